"""What `torch.save` wrote is mapped wherever it begins, and comes out as it went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unweave._mapped import is_own
from unweave.hub.torch_files import read_torch


@pytest.mark.parametrize("start", [0, 1, 13])
@pytest.mark.parametrize("is_zip", [True, False])
def test_it_comes_out_as_it_went_in(is_zip: bool, start: int, tmp_path: Path) -> None:
    weight = torch.randn(5, 7)
    tensors = {
        "whole": weight, "turned": weight.T, "part": weight[1:3, 2:], "none": torch.empty(0, 3),
        "k": torch.tensor(3), "half": torch.randn(3).bfloat16(),
    }  # fmt: skip
    with (path := tmp_path / "x.pt").open("wb") as file:
        file.write(b"z" * start)
        torch.save(tensors | {"more": [1, "x", {"q": weight}]}, file, _use_new_zipfile_serialization=is_zip)
    read = read_torch(path, start)
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
    assert read["more"][:2] == [1, "x"]
    assert torch.equal(read["more"][2]["q"], weight)
    assert read["whole"].data_ptr() == read["turned"].data_ptr()
    assert is_own(read["whole"]) is not is_zip  # what is mapped is a file's memory
