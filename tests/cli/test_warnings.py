from __future__ import annotations

import warnings

import unweave
from unweave.cli import _plain_warnings


def test_the_librarys_own_warnings_are_a_sentence_and_others_stay() -> None:
    usual = warnings.formatwarning
    with _plain_warnings():
        own = warnings.formatwarning("line 3 was skipped.", UserWarning, unweave.__file__, 1)
        other = warnings.formatwarning("old.", DeprecationWarning, "/somewhere/else.py", 7)
    assert own == "unweave: line 3 was skipped.\n"
    assert "else.py:7: DeprecationWarning: old." in other
    assert warnings.formatwarning is usual
