"""The libraries themselves save what we read, and read what we write: sparsify, dictionary_learning, saev, overcomplete
and, for files of its versions 3 to 5, sae-lens. Codes and outputs agree in both directions.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub import read_sae, write_sae
from unweave.sae import SAE, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK, Transcoder

# Some of them warn while they are imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which sparsify otherwise decodes with wherever it is installed

D, M, K = 16, 64, 5


def bare(module: str) -> Any:
    """A module of a package whose `__init__` asks for more than is installed, without running that."""
    package = module.split(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(module)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(50, D) + torch.randn(D)


@torch.no_grad()
def randomise(module: Any) -> Any:
    """Weights, biases and gains that matter, and thresholds that some pre-activations pass."""
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) / (D**0.5 if parameter.ndim == 2 else 2))
        if name == "threshold":
            parameter.copy_(torch.rand(parameter.shape))
    if "threshold" in dict(module.named_buffers()) and module.threshold is not None:
        module.threshold.fill_(0.6)
    return module


def assert_equal(ours: SAE, codes: Tensor, output: Tensor, x: Tensor) -> None:
    assert 0 < (codes != 0).float().mean() < 1
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), output, atol=1e-5, rtol=1e-5)


# --- sparsify ---

SPARSIFY = [
    {"activation": "topk"},
    {"activation": "groupmax", "k": 4},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"skip_connection": True},
]


def sparsify_codes(coder: Any, x: Tensor) -> Tensor:
    found = coder.encode(x)
    return torch.zeros(len(x), M).scatter(1, found.top_indices, found.top_acts)


@pytest.mark.parametrize("keys", SPARSIFY, ids=str)
def test_sparsify_saves_and_we_read(keys: dict[str, Any], tmp_path: Path, x: Tensor) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    theirs = randomise(SparseCoder(D, SparseCoderConfig(**({"num_latents": M, "k": K} | keys))))
    theirs.save_to_disk(tmp_path / "layers.3")
    with torch.no_grad():
        assert_equal(read_sae(tmp_path / "layers.3"), sparsify_codes(theirs, x), theirs(x).sae_out, x)


@pytest.mark.parametrize(
    "ours",
    [
        SAE(D, M, TopK(K)),
        SAE(D, M, GroupMax(4)),
        SAE(D, M, TopK(K), apply_b_dec_to_input=False),
        Transcoder(D, D, M, TopK(K), skip=True),
    ],
    ids=str,
)
def test_we_write_and_sparsify_reads(ours: SAE, tmp_path: Path, x: Tensor) -> None:
    from sparsify import SparseCoder

    theirs = SparseCoder.load_from_disk(write_sae(randomise(ours), tmp_path, "sparsify"))
    with torch.no_grad():
        assert_equal(ours, sparsify_codes(theirs, x), theirs(x).sae_out, x)


# --- dictionary_learning ---

DICTIONARIES = {
    "AutoEncoder": ("dictionary_learning.dictionary", (D, M)),
    "AutoEncoderNew": ("dictionary_learning.dictionary", (D, M)),
    "GatedAutoEncoder": ("dictionary_learning.dictionary", (D, M)),
    "JumpReluAutoEncoder": ("dictionary_learning.dictionary", (D, M)),
    "AutoEncoderTopK": ("dictionary_learning.trainers.top_k", (D, M, K)),
    "BatchTopKSAE": ("dictionary_learning.trainers.batch_top_k", (D, M, K)),
    "MatryoshkaBatchTopKSAE": ("dictionary_learning.trainers.matryoshka_batch_top_k", (D, M, K, [16, M - 16])),
}


def save_dictionary(theirs: Any, folder: Path) -> Path:
    config = {"dict_class": type(theirs).__name__, "activation_dim": D, "dict_size": M, "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": config}))
    torch.save(theirs.state_dict(), folder / "ae.pt")
    return folder


@pytest.mark.parametrize("name", DICTIONARIES)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_dictionary_learning_saves_and_we_read(name: str, scale: float | None, tmp_path: Path, x: Tensor) -> None:
    """Of a finished run; and of an interrupted one, whose biases its own method then scales."""
    module, arguments = DICTIONARIES[name]
    theirs = randomise(getattr(bare(module), name)(*arguments))
    folder = save_dictionary(theirs, tmp_path)
    if scale is not None:
        if name == "AutoEncoderNew":
            pytest.skip("it has no method that scales its biases")
        torch.save({"step": 3, "ae": theirs.state_dict(), "norm_factor": scale}, folder / "ae.pt")
        theirs.scale_biases(scale)
        x = x * scale
    with torch.no_grad():
        assert_equal(read_sae(folder), theirs.encode(x), theirs(x), x)


@pytest.mark.parametrize(
    "ours",
    [
        SAE(D, M, ReLU()),
        SAE(D, M, ReLU(), apply_b_dec_to_input=False),
        SAE(D, M, Gated()),
        SAE(D, M, JumpReLU()),
        SAE(D, M, TopK(K)),
        SAE(D, M, BatchTopK(K)),
        SAE(D, M, BatchTopK(K), metadata={"matryoshka_widths": [16, M]}),
    ],
    ids=str,
)
def test_we_write_and_dictionary_learning_reads(ours: SAE, tmp_path: Path, x: Tensor) -> None:
    write_sae(randomise(ours), tmp_path, "dictionary_learning")
    name = json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"]
    module, arguments = DICTIONARIES[name]
    theirs = getattr(bare(module), name)(*arguments)
    theirs.load_state_dict(torch.load(tmp_path / "ae.pt", weights_only=True))
    with torch.no_grad():
        assert_equal(ours, theirs.encode(x), theirs(x), x)


# --- saev ---


def test_saev_saves_and_we_read(tmp_path: Path, x: Tensor) -> None:
    """A release of before schemas, which subtracted the decoder's bias."""
    config, nn = bare("saev.config"), bare("saev.nn")
    theirs = randomise(nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=M // D)))
    nn.dump(str(tmp_path / "sae.pt"), theirs)
    ours = read_sae(tmp_path / "sae.pt", normalized=True)
    with torch.no_grad():
        output, codes = theirs(x)[:2]
        assert_equal(ours, codes, output, x)


# --- overcomplete ---


def test_overcomplete_saves_and_we_read(tmp_path: Path, x: Tensor) -> None:
    """Its thresholds are logarithms, its JumpReLU keeps what lies on them, its rows are normalised in every forward."""
    jump = bare("overcomplete.sae.jump_sae")
    theirs = jump.JumpSAE(D, M, encoder_module="linear", dictionary_params={"use_multiplier": True})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
        torch.save(theirs.state_dict(), tmp_path / "sae.pt")
        _, codes, output = theirs(x)
        assert_equal(read_sae(tmp_path / "sae.pt", normalization="l2"), codes, output, x)


def test_overcomplete_topk_as_it_is_saved(tmp_path: Path, x: Tensor) -> None:
    theirs = bare("overcomplete.sae.topk_sae").TopKSAE(D, M, top_k=K)
    with torch.no_grad():
        theirs(x)
        torch.save(theirs.eval().state_dict(), tmp_path / "sae.pt")
        _, codes, output = theirs(x)
        assert_equal(read_sae(tmp_path / "sae.pt", activation=TopK(K)), codes, output, x)


def test_overcomplete_with_a_batch_norm_is_refused(tmp_path: Path) -> None:
    topk = bare("overcomplete.sae.topk_sae")
    torch.save(topk.TopKSAE(D, M, top_k=K, encoder_module="mlp_bn_1").state_dict(), tmp_path / "sae.pt")
    with pytest.raises(UnweaveError, match="more than one linear layer"):
        read_sae(tmp_path / "sae.pt", activation=TopK(K))


# --- SAELens 3 to 5, as version 6 reads them ---


@pytest.mark.parametrize(
    "keys",
    [
        {"architecture": "standard"},
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
        {"architecture": "standard", "hook_point": "blocks.3.hook_resid_pre", "apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_old_sae_lens_files_are_read_as_sae_lens_reads_them(keys: dict[str, Any], tmp_path: Path, x: Tensor) -> None:
    import sae_lens

    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_dec": (D,)}
    if keys["architecture"] == "gated":
        shapes |= {"b_gate": (M,), "r_mag": (M,), "b_mag": (M,)}
    else:
        shapes |= {"b_enc": (M,)} | ({"threshold": (M,)} if keys["architecture"] == "jumprelu" else {})
    tensors = {name: torch.randn(shape) / (D**0.5 if len(shape) == 2 else 2) for name, shape in shapes.items()}
    if "threshold" in tensors:
        tensors["threshold"].abs_()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {
        "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small", "hook_name": "h.3",
        "hook_layer": 3, "hook_head_index": None, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "prepend_bos": True, "context_size": 128,
        "dataset_path": "x", "dataset_trust_remote_code": True, "normalize_activations": "none",
        "sae_lens_training_version": "3.0.0",
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(config | keys))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    ours = read_sae(tmp_path)
    assert ours.metadata["source_format"] == "saelens_legacy"
    with torch.no_grad():
        assert_equal(ours, theirs.encode(x), theirs(x), x)
