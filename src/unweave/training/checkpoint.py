"""Checkpoints: a nested state of tensors and JSON values, written whole and read back bit-equal.

A checkpoint is a folder `step-000001234` with `state.safetensors` and `state.json`. It appears by one rename, so there
is either the whole of it or nothing; older ones are deleted only after the newer one is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_folder, remove_folder, write_tensors

_TENSOR = "$tensor"


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {k: _flatten(v, f"{name}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[_TENSOR]] if _TENSOR in value else {k: _restore(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` under `folder`, then delete the older ones.

    A checkpoint of this step that is there already is left as it is: replacing it would take it away for a moment.
    """
    path = folder / f"step-{step:09d}"
    if path.is_dir():
        return path
    tensors: dict[str, Tensor] = {}
    document = _flatten(state, "", tensors)
    with atomic_folder(path) as temporary:
        write_tensors(temporary / "state.safetensors", tensors)
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
    for old in checkpoints(folder):
        if old != path:
            remove_folder(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UnweaveError: If a file is missing or damaged.
    """
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors", device=str(device))
        state = _restore(document, tensors)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError) as error:
        raise UnweaveError(f"the checkpoint {str(path)!r} is damaged and cannot be resumed from: {error}.") from error
    assert isinstance(state, dict)
    return state
