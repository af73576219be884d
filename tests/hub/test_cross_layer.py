"""What loading a cross-layer transcoder takes in memory, whatever its files are grouped by."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave.sae import SAE, CrossLayerTranscoder, ReLU

LAYERS, D, M = 5, 128, 20_480


def some(*shape: int) -> Tensor:
    """Values that cost nothing and differ in every row of a matrix."""
    size = torch.Size(shape).numel()
    return torch.linspace(-1, 1, 99_991).repeat(-(-size // 99_991))[:size].view(shape)


def circuit_tracer(folder: Path) -> None:
    for i in range(LAYERS):
        encoder = {f"W_enc_{i}": some(M, D), f"b_enc_{i}": some(M), f"b_dec_{i}": some(D)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": some(M, LAYERS - i, D)}, folder / f"W_dec_{i}.safetensors")


def gemma_scope_2(folder: Path) -> None:
    for i in range(LAYERS):
        layer = {"w_enc": some(D, M), "w_dec": some(M, LAYERS - i, D), "b_enc": some(M), "b_dec": some(D)}
        save_file(layer | {"threshold": torch.ones(M)}, folder / f"params_layer_{i}.safetensors")


def llamascopium(folder: Path) -> None:
    config = {"sae_type": "clt", "act_fn": "relu", "d_model": D, "expansion_factor": M // D}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"W_E": some(LAYERS, D, M), "b_E": some(LAYERS, M)}
    for j in range(LAYERS):
        tensors |= {f"W_D.{j}": some(j + 1, M, D), f"b_D.{j}": some(D)}
    save_file(tensors, folder / "sae_weights.safetensors")


def own(folder: Path) -> None:
    config = {
        "architecture": "clt", "d_in": LAYERS * D, "d_sae": LAYERS * M, "apply_b_dec_to_input": False,
        "reads": {f"a{i}": D for i in range(LAYERS)}, "writes": {f"b{i}": D for i in range(LAYERS)},
        "metadata": {"sae_lens_version": "6.54.12"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {"W_enc": some(D, LAYERS * M), "b_enc": some(LAYERS * M), "b_dec": some(LAYERS * D)}
    tensors |= {f"W_dec.{i}": some(M, (LAYERS - i) * D) for i in range(LAYERS)}
    save_file(tensors, folder / "sae_weights.safetensors")


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is what Linux says")
@pytest.mark.parametrize("write", [circuit_tracer, gemma_scope_2, llamascopium, own], ids=lambda f: f.__name__)
def test_loading_takes_what_its_files_take(write: Callable[[Path], None], tmp_path: Path) -> None:
    """At most 1.1 times that. A decoder of all layers times all outputs would take 1.5 times, a second copy 2."""
    small = CrossLayerTranscoder({"a": 1, "b": 1}, {"c": 1, "d": 1}, 1, ReLU())
    SAE.load(small.save(tmp_path / "small"))  # imports what reads files
    shutil.rmtree(tmp_path / "small")
    write(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 200e6
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    coder = SAE.load(tmp_path)
    peak = resident("VmHWM") - before
    assert isinstance(coder, CrossLayerTranscoder)
    held = sum(tensor.nbytes for tensor in coder.state_dict().values())
    assert 0.99 * size < held < 1.01 * size
    assert 0.99 * size < peak < 1.1 * size
    blocks = coder.decoder(1, list(coder.writes)[3])
    expected = some(M, LAYERS - 1, D)[:, 2] if write is not llamascopium else some(4, M, D)[1]
    assert torch.equal(blocks, expected)
