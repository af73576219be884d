"""Transformers, kept quiet by several threads at once."""

from __future__ import annotations

import logging
import threading
import warnings

from unweave.models.checkpoints import transformers_quiet


def test_settings_are_put_back_by_the_last_of_several_threads() -> None:
    """Each of which would otherwise put back what the one before it had set."""
    from transformers.utils import logging as transformers_logging

    before, filters = transformers_logging.get_verbosity(), warnings.filters[:]
    inside, left = threading.Event(), threading.Event()

    def second() -> None:
        with transformers_quiet("."):
            inside.set()
            assert left.wait(60)

    thread = threading.Thread(target=second)
    with transformers_quiet("."):
        thread.start()
        assert inside.wait(60)
    try:
        assert transformers_logging.get_verbosity() == logging.CRITICAL  # the other one is not done
    finally:
        left.set()
        thread.join()
    assert (transformers_logging.get_verbosity(), warnings.filters) == (before, filters)
    assert transformers_logging.set_tqdm_hook(None) is None
