"""Checkpoints: plain tensors and plain JSON, whatever state goes in."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open

from unweave.training.checkpoint import load_checkpoint, save_checkpoint

STATE = {
    "run": {"weights": {"W": torch.randn(3, 4).T, "k": torch.tensor(7)}, "step": 3, "lr": 0.1, "moments": []},
    "stream": {"position": [1, 2], "ids": torch.arange(5), "name": "text", "none": None},
}


def test_there_is_no_pickle_in_a_checkpoint(tmp_path, monkeypatch):
    """pitfall_185: safetensors and JSON, and nothing else is opened to read them."""
    path = save_checkpoint(tmp_path, 3, STATE)
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((path / "state.json").read_text())
    with safe_open(path / "state.safetensors", "pt") as file:
        assert len(list(file.keys())) == 3
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, None)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["run"]["weights"].pop("W"), STATE["run"]["weights"]["W"])
    assert loaded["run"]["weights"]["k"] == 7
    assert torch.equal(loaded["stream"].pop("ids"), torch.arange(5))
    assert loaded["stream"] == {"position": [1, 2], "name": "text", "none": None}
    assert (loaded["run"]["step"], loaded["run"]["lr"], loaded["run"]["moments"]) == (3, 0.1, [])


@pytest.mark.parametrize("value", [{1, 2}, print, object(), b"bytes"], ids=["set", "function", "object", "bytes"])
def test_what_is_neither_a_tensor_nor_json_is_not_saved(value, tmp_path):
    """pitfall_185: and what was there before stays."""
    save_checkpoint(tmp_path, 1, STATE)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, {"run": {"state": value}})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
