"""Every format: a file as its library writes it, and the forward pass that its authors documented, written down again.

Codes and outputs of what we read are compared with that forward pass, once more after our own save and load, and then
as every format that we write and that can express them. Each case has biases, thresholds and norms that matter; PyTorch
files also have tensors that are not contiguous.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub import convert, describe_sae, formats, read_sae
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    Crosscoder,
    CrossLayerTranscoder,
    Gated,
    GroupMax,
    JumpReLU,
    RawTopK,
    ReLU,
    TemporalSAE,
    TopK,
    Transcoder,
)
from unweave.sae.files import save_training_form

D, M, N = 12, 40, 60
WRITERS = [name for name, made in formats().items() if made.write is not None]


class Published(NamedTuple):
    """A file, and what its SAE gives."""

    path: Path
    x: Tensor
    codes: Tensor
    output: Tensor
    hints: dict[str, Any] = {}  # noqa: RUF012
    kind: type[SAE] = SAE


CASES: dict[str, tuple[str, Callable[[Path], Published]]] = {}


def case(format_name: str) -> Callable[[Callable[[Path], Published]], Callable[[Path], Published]]:
    def register(write: Callable[[Path], Published]) -> Callable[[Path], Published]:
        CASES[write.__name__] = (format_name, write)
        return write

    return register


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape)


def strided(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same values, matrices with the strides of their transposes."""
    return {n: t.T.contiguous().T if isinstance(t, Tensor) and t.ndim == 2 else t for n, t in tensors.items()}


def inputs(d: int = D) -> Tensor:
    return normal(N, d) + 0.5 * normal(d)


def topk(h: Tensor, k: int) -> Tensor:
    """The k largest of each row, and 0."""
    return torch.zeros_like(h).scatter(1, h.topk(k, dim=1).indices, 1.0) * h


def parts(d_out: int = D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc (d, M), b_enc, W_dec (M, d_out) whose rows have different norms, b_dec."""
    W_dec = normal(M, d_out, scale=d_out**-0.5) * torch.linspace(0.5, 2, M)[:, None]
    return normal(D, M, scale=D**-0.5), normal(M, scale=0.2), W_dec, normal(d_out, scale=0.5)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_yaml(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value))


def safe(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def pt(path: Path, value: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(strided(value), path)
    return path


# --- SAELens 3 to 5 ---


def legacy(folder: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    config = {
        "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "torch.float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None,
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "prepend_bos": True, "context_size": 128, "normalize_activations": "none",
        "sae_lens_training_version": "3.1.0",
    } | keys  # fmt: skip
    write_json(folder / "cfg.json", {k: v for k, v in config.items() if v != "absent"})
    safe(folder / "sae_weights.safetensors", tensors)
    return folder


def named(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


@case("saelens_legacy")
def saelens_legacy_standard_with_a_factor(folder: Path) -> Published:
    """pitfall_193: the factor goes into the rows of W_dec."""
    (W_enc, b_enc, W_dec, b_dec), x, factor = parts(), inputs(), torch.linspace(0.5, 2, M)
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    legacy(folder, named(W_enc, b_enc, W_dec, b_dec) | {"scaling_factor": factor})
    return Published(folder, x, codes, (codes * factor) @ W_dec + b_dec)


@case("saelens_legacy")
def saelens_legacy_oldest_keys(folder: Path) -> Published:
    """pitfall_141, pitfall_193: no architecture, old names, no `apply_b_dec_to_input`, a scaling factor of ones."""
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    absent = dict.fromkeys(("architecture", "hook_name", "activation_fn_str", "apply_b_dec_to_input"), "absent")
    keys = absent | {"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "normalize_activations": False}
    legacy(folder, named(W_enc, b_enc, W_dec, b_dec) | {"scaling_factor": torch.ones(M)}, **keys)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("saelens_legacy")
def saelens_legacy_topk(folder: Path) -> Published:
    """Whatever `architecture` says; ranked without decoder norms."""
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = topk((x - b_dec) @ W_enc + b_enc, 4).relu()
    legacy(folder, named(W_enc, b_enc, W_dec, b_dec), activation_fn_str="topk", activation_fn_kwargs={"k": 4})
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("saelens_legacy")
def saelens_legacy_tanh(folder: Path) -> Published:
    """A training checkpoint, which says `activation_fn`, with the whole runner's config."""
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu().tanh()
    keys = {"activation_fn_str": "absent", "activation_fn": "tanh-relu", "apply_b_dec_to_input": False}
    legacy(folder, named(W_enc, b_enc, W_dec, b_dec), **keys, l1_coefficient=5, train_batch_size_tokens=4096)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("saelens_legacy")
def saelens_legacy_gated(folder: Path) -> Published:
    (W_enc, b_gate, W_dec, b_dec), x, r_mag, b_mag = parts(), inputs(), normal(M, scale=0.3), normal(M, scale=0.3)
    u = (x - b_dec) @ W_enc
    codes = (u + b_gate > 0) * (u * r_mag.exp() + b_mag).relu()
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, "b_gate": b_gate, "r_mag": r_mag, "b_mag": b_mag}
    legacy(folder, tensors, architecture="gated")
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("saelens_legacy")
def saelens_legacy_scaled_inputs(folder: Path) -> Published:
    """The factor is in the state of the store: it is not in the weights."""
    (W_enc, b_enc, W_dec, b_dec), x, s = parts(), 3 * inputs(), 0.4
    theta = torch.linspace(0, 0.5, M)
    h = (s * x - b_dec) @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    tensors = named(W_enc, b_enc, W_dec, b_dec) | {"threshold": theta}
    legacy(folder / "final_100", tensors, architecture="jumprelu", normalize_activations="expected_average_only_in")
    state = {"n_dataset_processed": torch.tensor(7), "estimated_norm_scaling_factor": torch.tensor(s)}
    safe(folder / "final_100" / "activations_store_state.safetensors", state)
    return Published(folder / "final_100", x, codes, (codes @ W_dec + b_dec) / s)


# --- SAELens 6: checkpoints before the end of a run ---


def modern(folder: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    config = {
        "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.8.hook_resid_pre"},
    }  # fmt: skip
    write_json(folder / "cfg.json", config | keys)
    safe(folder / "sae_weights.safetensors", tensors)
    return folder


@case("saelens")
def saelens_checkpoint_scaled(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, s = parts(), 3 * inputs(), 0.4
    codes = ((s * x - b_dec) @ W_enc + b_enc).relu()
    modern(folder, named(W_enc, b_enc, W_dec, b_dec), normalize_activations="expected_average_only_in")
    write_json(folder / "activation_scaler.json", {"scaling_factor": s, "has_whitening": False})
    return Published(folder, x, codes, (codes @ W_dec + b_dec) / s)


@case("saelens")
def saelens_checkpoint_whitened(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, s, mean = parts(), 3 * inputs(), 0.4, normal(D)
    matrix = (torch.eye(D) + normal(D, D, scale=0.1)).double()
    white = (s * x - mean) @ matrix.float()
    codes = (white @ W_enc + b_enc).relu()
    output = ((codes @ W_dec + b_dec) @ matrix.inverse().float() + mean) / s
    modern(
        folder, named(W_enc, b_enc, W_dec, b_dec), normalize_activations="covariance_whitening",
        apply_b_dec_to_input=False,
    )  # fmt: skip
    write_json(folder / "activation_scaler.json", {"scaling_factor": s, "has_whitening": True})
    whitening = {"mean": mean.double(), "matrix": matrix, "inverse_matrix": matrix.inverse()}
    safe(folder / "activation_whitening.safetensors", whitening)
    return Published(folder, x, codes, output)


# --- Gemma Scope ---


def npz(path: Path, tensors: dict[str, Tensor], *, compressed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **{n: t.numpy() for n, t in tensors.items()})


@case("gemma_scope")
def gemma_scope_residual(folder: Path) -> Published:
    """pitfall_267: a threshold in the units of the weights."""
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), inputs(), torch.linspace(-0.2, 0.6, M)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    folder = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    npz(folder / "params.npz", named(W_enc, b_enc, W_dec, b_dec) | {"threshold": theta})
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("gemma_scope")
def gemma_scope_older_names_compressed_and_in_fortran_order(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), inputs(), torch.linspace(0, 0.6, M)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    tensors = strided({"w_enc": W_enc, "b_enc": b_enc, "w_dec": W_dec, "b_dec": b_dec, "threshold": theta})
    npz(folder / "params.npz", tensors, compressed=True)
    return Published(folder / "params.npz", x, codes, codes @ W_dec + b_dec)


@case("gemma_scope")
def gemma_scope_embedding(folder: Path) -> Published:
    """pitfall_147: trained on embeddings before Gemma's factor, used after it."""
    (W_enc, b_enc, W_dec, b_dec), embedding, theta = parts(), inputs(), torch.linspace(0, 0.6, M)
    h = embedding @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    folder = folder / "google--gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    npz(folder / "params.npz", strided(named(W_enc, b_enc, W_dec, b_dec) | {"threshold": theta}))
    return Published(folder, embedding * D**0.5, codes, (codes @ W_dec + b_dec) * D**0.5)


@case("gemma_scope")
def gemma_scope_transcoder(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(9), inputs(), torch.linspace(0, 0.6, M)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    folder = folder / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_71"
    npz(folder / "params.npz", named(W_enc, b_enc, W_dec, b_dec) | {"threshold": theta})
    return Published(folder, x, codes, codes @ W_dec + b_dec, kind=Transcoder)


def gemma_2(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, theta: Tensor) -> dict[str, Tensor]:
    return {"w_enc": W_enc, "b_enc": b_enc, "w_dec": W_dec, "b_dec": b_dec, "threshold": theta}


@case("gemma_scope_2")
def gemma_scope_2_residual_without_config(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), inputs(), torch.linspace(0, 0.6, M)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    folder = folder / "gemma-scope-2-1b-pt" / "resid_post" / "layer_13_width_16k_l0_small"
    safe(folder / "params.safetensors", gemma_2(W_enc, b_enc, W_dec, b_dec, theta))
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("gemma_scope_2")
def gemma_scope_2_affine_transcoder(folder: Path) -> Published:
    """pitfall_264: the skip is used as stored, (d_in, d_out), and is not symmetric."""
    (W_enc, b_enc, W_dec, b_dec), x, theta, skip = parts(), inputs(), torch.linspace(0, 0.6, M), normal(D, D)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    folder = folder / "transcoder_all" / "layer_3_width_16k_l0_small_affine"
    safe(folder / "params.safetensors", gemma_2(W_enc, b_enc, W_dec, b_dec, theta) | {"affine_skip_connection": skip})
    write_json(folder / "config.json", {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"})
    return Published(folder, x, codes, codes @ W_dec + b_dec + x @ skip, kind=Transcoder)


LAYERS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*31 July 2025")  # of saev's schema 2


def clt(targets: Callable[[int], int], *, skip: bool = False) -> tuple[list[dict[str, Tensor]], Tensor, Tensor, Tensor]:
    """pitfall_265, 266: layers as Gemma Scope 2 has them, and what they give; decoders to earlier ones mean nothing."""
    x, layers, codes = normal(N, LAYERS * D), [], []
    for i in range(LAYERS):
        W_enc, b_enc, _, b_dec = parts()
        decoders, theta = normal(M, targets(i), D, scale=D**-0.5), torch.linspace(0, 0.6, M)
        h = x[:, i * D : (i + 1) * D] @ W_enc + b_enc
        codes.append(h.relu() * (h > theta))
        layers.append(gemma_2(W_enc, b_enc, decoders, b_dec, theta))
        if skip:
            layers[-1]["affine_skip_connection"] = normal(D, D)
    outputs = [
        sum((codes[i] @ layers[i]["w_dec"][:, j - LAYERS] for i in range(j + 1)), layers[j]["b_dec"])
        for j in range(LAYERS)
    ]
    if skip:
        mapped = [x[:, i * D : (i + 1) * D] @ layers[i]["affine_skip_connection"] for i in range(LAYERS)]
        outputs = [output + more for output, more in zip(outputs, mapped, strict=True)]
    return layers, x, torch.cat(codes, 1), torch.cat(outputs, 1)


@case("gemma_scope_2")
def gemma_scope_2_clt_with_all_targets(folder: Path) -> Published:
    layers, x, codes, output = clt(lambda i: LAYERS)
    for i, tensors in enumerate(layers):
        safe(folder / "clt" / "width_262k_l0_medium" / f"params_layer_{i}.safetensors", tensors)
    return Published(folder / "clt" / "width_262k_l0_medium", x, codes, output, kind=CrossLayerTranscoder)


@case("gemma_scope_2")
def gemma_scope_2_clt_with_later_targets(folder: Path) -> Published:
    layers, x, codes, output = clt(lambda i: LAYERS - i)
    for i, tensors in enumerate(layers):
        safe(folder / f"params_layer_{i}.safetensors", tensors)
    return Published(folder, x, codes, output, kind=CrossLayerTranscoder)


@case("gemma_scope_2")
def gemma_scope_2_affine_clt(folder: Path) -> Published:
    layers, x, codes, output = clt(lambda i: LAYERS, skip=True)
    for i, tensors in enumerate(layers):
        safe(folder / f"params_layer_{i}.safetensors", tensors)
    return Published(folder, x, codes, output, kind=CrossLayerTranscoder)


# --- dictionary_learning ---


def dictionary(folder: Path, dict_class: str, tensors: dict[str, Tensor], **keys: Any) -> Path:
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": M, "lm_name": "EleutherAI/pythia-70m"}
    write_json(folder / "config.json", {"trainer": trainer | keys, "buffer": {"ctx_len": 128}})
    pt(folder / "ae.pt", tensors)
    return folder


def linear(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
    return {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T}


@case("dictionary_learning")
def dictionary_learning_autoencoder(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    dictionary(folder, "AutoEncoder", linear(W_enc, b_enc, W_dec) | {"bias": b_dec})
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_new(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu()
    dictionary(folder, "AutoEncoderNew", linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec})
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_gated(folder: Path) -> Published:
    (W_enc, b_gate, W_dec, b_dec), x, r_mag, b_mag = parts(), inputs(), normal(M, scale=0.3), normal(M, scale=0.3)
    z = (x - b_dec) @ W_enc
    codes = (z + b_gate > 0) * (r_mag.exp() * z + b_mag).relu()
    tensors = {
        "decoder_bias": b_dec, "r_mag": r_mag, "gate_bias": b_gate, "mag_bias": b_mag, "encoder.weight": W_enc.T,
        "decoder.weight": W_dec.T,
    }  # fmt: skip
    dictionary(folder, "GatedAutoEncoder", tensors)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


def counted(k: int, threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(threshold)}


@case("dictionary_learning")
def dictionary_learning_topk(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = topk(((x - b_dec) @ W_enc + b_enc).relu(), 5)
    dictionary(folder, "AutoEncoderTopK", linear(W_enc, b_enc, W_dec) | {"b_dec": b_dec} | counted(5, 0.9), k=5)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_batchtopk(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    h = ((x - b_dec) @ W_enc + b_enc).relu()
    codes = h * (h > 0.7)
    dictionary(folder, "BatchTopKSAE", linear(W_enc, b_enc, W_dec) | {"b_dec": b_dec} | counted(5, 0.7), k=5)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_batchtopk_without_a_threshold(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    dictionary(folder, "BatchTopKSAE", linear(W_enc, b_enc, W_dec) | {"b_dec": b_dec} | counted(5, -1.0), k=5)
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_matryoshka_without_config(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    h = ((x - b_dec) @ W_enc + b_enc).relu()
    codes = h * (h > 0.7)
    pt(
        folder / "ae.pt",
        named(W_enc, b_enc, W_dec, b_dec) | counted(5, 0.7) | {"group_sizes": torch.tensor([10, M - 10])},
    )
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_jumprelu(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), inputs(), torch.linspace(-0.2, 0.6, M)
    h = x @ W_enc + b_enc
    codes = (h * (h > theta)).relu()
    dictionary(folder, "JumpReluAutoEncoder", named(W_enc, b_enc, W_dec, b_dec) | {"threshold": theta})
    return Published(folder / "ae.pt", x, codes, codes @ W_dec + b_dec)


@case("dictionary_learning")
def dictionary_learning_interrupted(folder: Path) -> Published:
    """Trained on x / norm_factor; biases and threshold are still in those units, so codes are too."""
    (W_enc, b_enc, W_dec, b_dec), x, norm = parts(), 3 * inputs(), 3.0
    h = ((x - norm * b_dec) @ W_enc + norm * b_enc).relu()
    codes = h * (h > norm * 0.7)
    tensors = strided(linear(W_enc, b_enc, W_dec) | {"b_dec": b_dec} | counted(5, 0.7))
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": M, "k": 5}
    write_json(folder / "config.json", {"trainer": trainer})
    optimizer = {"state": {0: {"exp_avg": normal(3)}}, "param_groups": [{"lr": 1e-3}]}
    value = {"step": 100, "ae": tensors, "optimizer": optimizer, "config": trainer, "norm_factor": norm}
    pt(folder / "checkpoints" / "ae_100.pt", value)
    return Published(folder / "checkpoints" / "ae_100.pt", x, codes, codes @ W_dec + norm * b_dec)


# --- sparsify ---


def sparsify(folder: Path, tensors: tuple[Tensor, ...], skip: Tensor | None = None, **keys: Any) -> Path:
    W_enc, b_enc, W_dec, b_dec = tensors
    stored = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    safe(folder / "sae.safetensors", stored | ({} if skip is None else {"W_skip": skip}))
    config = {
        "activation": "topk", "d_in": D, "expansion_factor": 32, "k": 4, "multi_topk": False, "normalize_decoder": True,
        "num_latents": M, "skip_connection": skip is not None, "transcode": False,
    }  # fmt: skip
    write_json(folder / "cfg.json", config | keys)
    return folder


@case("sparsify")
def sparsify_sae(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = tensors, _ = parts(), inputs()
    codes = topk(((x - b_dec) @ W_enc + b_enc).relu(), 4)
    return Published(sparsify(folder / "layers.10", tensors), x, codes, codes @ W_dec + b_dec)


@case("sparsify")
def sparsify_transcoder_with_skip(folder: Path) -> Published:
    """pitfall_264"""
    (W_enc, b_enc, W_dec, b_dec), x, skip = parts(), inputs(), normal(D, D)
    codes = topk((x @ W_enc + b_enc).relu(), 4)
    path = sparsify(folder, (W_enc, b_enc, W_dec, b_dec), skip, transcode=True)
    return Published(path, x, codes, codes @ W_dec + b_dec + x @ skip.T, kind=Transcoder)


@case("sparsify")
def sparsify_sae_with_skip(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, skip = parts(), inputs(), normal(D, D)
    codes = topk(((x - b_dec) @ W_enc + b_enc).relu(), 4)
    path = sparsify(folder, (W_enc, b_enc, W_dec, b_dec), skip)
    return Published(path, x, codes, codes @ W_dec + b_dec + x @ skip.T, kind=Transcoder)


@case("sparsify")
def sparsify_groupmax(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    groups = ((x - b_dec) @ W_enc + b_enc).relu().unflatten(1, (4, M // 4))
    codes = (groups * (groups == groups.amax(2, keepdim=True))).flatten(1)
    path = sparsify(folder, (W_enc, b_enc, W_dec, b_dec), activation="groupmax", num_latents=0, expansion_factor=0)
    write_json(folder / "cfg.json", json.loads((folder / "cfg.json").read_text()) | {"num_latents": M})
    return Published(path, x, codes, codes @ W_dec + b_dec)


@case("sparsify")
def sparsify_signed(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    h = (x - b_dec) @ W_enc + b_enc
    codes = torch.zeros_like(h).scatter(1, h.abs().topk(4, dim=1).indices, 1.0) * h
    return Published(sparsify(folder, (W_enc, b_enc, W_dec, b_dec), signed=True), x, codes, codes @ W_dec + b_dec)


# --- OpenAI ---


def openai(path: Path, tensors: tuple[Tensor, ...], *, tied: bool = False, **settings: Any) -> Path:
    W_enc, b_enc, W_dec, b_dec = tensors
    value = {"pre_bias": b_dec, "latent_bias": b_enc, "encoder.weight": W_enc.T, "stats_last_nonzero": torch.zeros(M)}
    return pt(path, value | ({} if tied else {"decoder.weight": W_dec.T}) | settings)


@case("openai")
def openai_topk_layer_norm(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = tensors, _ = parts(), 3 * inputs() + 2
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    codes = topk(((x - mean) / (std + 1e-5) - b_dec) @ W_enc + b_enc, 5).relu()
    state = {"k": 5, "postact_fn": "ReLU"}
    path = openai(folder / "5.pt", tensors, activation="TopK", activation_state_dict=state)
    return Published(path, x, codes, (codes @ W_dec + b_dec) * std + mean)


@case("openai")
def openai_relu_tied(folder: Path) -> Published:
    (W_enc, b_enc, _, b_dec), x = tensors, _ = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    path = openai(folder / "5.pt", tensors, tied=True, activation="ReLU", activation_state_dict={})
    return Published(path, x, codes, codes @ W_enc.T + b_dec)


# --- saev ---


def saev(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(strided(tensors), file)
    return path


@case("saev")
def saev_without_schema(folder: Path) -> Published:
    """pitfall_141, pitfall_188, pitfall_189: trained on (x - mean) / scale, minus the decoder's bias."""
    (W_enc, b_enc, W_dec, b_dec), x, mean, scale = parts(), 3 * inputs(), normal(D), 3.0
    codes = ((((x - mean) / scale) - b_dec) @ W_enc + b_enc).relu()
    header = {"d_vit": D, "exp_factor": M / D, "n_reinit_samples": 0, "normalize_w_dec": True, "seed": 1}
    path = saev(folder / "sae.pt", header, named(W_enc, b_enc, W_dec, b_dec))
    hints = {"mean": mean, "scale": scale}
    return Published(path, x, codes, (codes @ W_dec + b_dec) * scale + mean, hints)


@case("saev")
def saev_schema_1(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    header = {"schema": 1, "cfg": {"d_vit": D}, "cls": "Relu", "commit": "abc", "lib": "0.1.0"}
    path = saev(folder / "sae.pt", header, named(W_enc, b_enc, W_dec, b_dec))
    return Published(path, x, codes, codes @ W_dec + b_dec, {"normalized": True})


@case("saev")
def saev_schema_2_topk_keeps_negatives(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    b_enc = b_enc - 1
    codes = topk(x @ W_enc + b_enc, 9)
    assert (codes < 0).any()
    activation = {"cls": "TopK", "params": {"top_k": 9}}
    header = {"schema": 2, "cfg": {"d_vit": D, "activation": activation}, "cls": "SparseAutoencoderConfig"}
    path = saev(folder / "sae.pt", header, named(W_enc, b_enc, W_dec, b_dec))
    return Published(path, x, codes, codes @ W_dec + b_dec)


@case("saev")
def saev_schema_5_batchtopk(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    h = x @ W_enc + b_enc
    codes = h * (h > 0.6)
    sparsity = {"cls": "NoSparsity", "params": {}}
    activation = {"cls": "BatchTopK", "params": {"top_k": 5, "momentum": 0.9, "sparsity": sparsity}}
    header = {"schema": 5, "cfg": {"d_model": D, "d_sae": M, "activation": activation}, "cls": "x"}
    tensors = named(W_enc, b_enc, W_dec, b_dec) | {"activation.threshold": torch.tensor(0.6)}
    return Published(saev(folder / "sae.pt", header, tensors), x, codes, codes @ W_dec + b_dec)


# --- OpenMOSS ---


@case("llama_scope")
def llama_scope(folder: Path) -> Published:
    """pitfall_267: as trained: scaled inputs, codes compared with the one threshold after all folds."""
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), 5 * inputs(), 0.8
    averages = {"in": 20.0, "out": 20.0}
    s = D**0.5 / averages["in"]
    norms = W_dec.norm(dim=1)
    h = (x @ W_enc + b_enc / s) * norms
    codes = h * (h > theta)
    output = (s * codes / norms @ W_dec + b_dec) / s
    config = {
        "d_model": D, "d_sae": M, "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post", "act_fn": "jumprelu",
        "jump_relu_threshold": theta, "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True, "norm_activation": "dataset-wise", "dataset_average_activation_norm": averages,
        "sparsity_include_decoder_norm": True, "top_k": 50,
    }  # fmt: skip
    write_json(folder / "hyperparams.json", config)
    tensors = linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec}
    safe(folder / "checkpoints" / "final.safetensors", tensors)
    # `norms` were taken of the decoder before the fold of scales, and both are the same here: s_in / s_out is 1.
    return Published(folder, x, codes, output)


@case("llama_scope")
def llama_scope_transcoder(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta = parts(), 5 * inputs(), 0.8
    averages = {"in": 20.0, "out": 2.0}
    s_in, s_out = D**0.5 / averages["in"], D**0.5 / averages["out"]
    folded = W_dec * s_in / s_out
    norms = folded.norm(dim=1)
    h = (x @ W_enc + b_enc / s_in) * norms
    codes = h * (h > theta)
    # As trained: the code of s_in * x, decoded, is s_out * y.
    trained = (s_in * x @ W_enc + b_enc) * (h > theta)
    torch.testing.assert_close(trained @ W_dec / s_out, codes @ (folded / norms[:, None]))
    config = {
        "d_model": D, "d_sae": M, "hook_point_in": "blocks.3.ln2.hook_normalized",
        "hook_point_out": "blocks.3.hook_mlp_out", "act_fn": "jumprelu",
        "jump_relu_threshold": theta, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": averages, "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
    }  # fmt: skip
    write_json(folder / "hyperparams.json", config)
    safe(folder / "checkpoints" / "final.safetensors", linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec})
    return Published(folder, x, codes, (trained @ W_dec + b_dec) / s_out, kind=Transcoder)


@case("llama_scope_r1_distill")
def llama_scope_r1(folder: Path) -> Published:
    """pitfall_267: logarithms of thresholds, of scaled inputs."""
    (W_enc, b_enc, W_dec, b_dec), x, s, log_theta = parts(), 5 * inputs(), 0.3, torch.linspace(-3, -0.5, M)
    h = s * x @ W_enc + b_enc
    codes = h * (h > log_theta.exp())
    write_json(folder / "L15R" / "config.json", {"d_model": D, "expansion_factor": M / D})
    tensors = linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec, "log_jumprelu_threshold": log_theta}
    safe(folder / "L15R" / "sae_weights.safetensors", tensors)
    return Published(folder / "L15R", x, codes, (codes @ W_dec + b_dec) / s, {"norm_scaling_factor": s})


@case("llama_scope_r1_distill")
def llama_scope_r1_by_norms(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, log_theta = parts(), 5 * inputs(), torch.linspace(-3, -0.5, M)
    h = x @ W_enc + b_enc
    codes = h * (h * W_dec.norm(dim=1) > log_theta.exp())
    keys = {"d_model": D, "expansion_factor": M / D, "sparsity_include_decoder_norm": True}
    write_json(folder / "L15R" / "config.json", keys)
    tensors = linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec, "log_jumprelu_threshold": log_theta}
    safe(folder / "L15R" / "sae_weights.safetensors", tensors)
    return Published(folder / "L15R", x, codes, codes @ W_dec + b_dec, {"norm_scaling_factor": 1.0})


def moss(folder: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    config = {
        "sae_type": "sae", "d_model": D, "expansion_factor": M / D, "hook_point_in": "a", "hook_point_out": "a",
        "act_fn": "jumprelu", "use_decoder_bias": True, "norm_activation": "inference",
        "sparsity_include_decoder_norm": True, "dtype": "torch.float32",
    }  # fmt: skip
    write_json(folder / "config.json", config | keys)
    safe(folder / "sae_weights.safetensors", tensors)
    return folder


def moss_names(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    return {"W_E": W_enc, "b_E": b_enc, "W_D": W_dec, "b_D": b_dec}


THETA = "activation_function.log_jumprelu_threshold"


@case("llamascopium")
def llamascopium_jumprelu_scaled(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, log_theta, average = parts(), 5 * inputs(), torch.linspace(-3, 0, M), 20.0
    f = D**0.5 / average
    h = f * x @ W_enc + b_enc
    trained = h * (h * W_dec.norm(dim=1) > log_theta.exp())
    tensors = moss_names(W_enc, b_enc, W_dec, b_dec) | {THETA: log_theta}
    tensors |= {"dataset_average_activation_norm.a": torch.tensor(average)}
    moss(folder, tensors, norm_activation="dataset-wise")
    return Published(folder, x, trained / f, (trained @ W_dec + b_dec) / f)


@case("llamascopium")
def llamascopium_topk_by_norms(folder: Path) -> Published:
    """Codes are read in units of unit decoder rows, in which they were ranked."""
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    norms = W_dec.norm(dim=1)
    ranked = topk(((x @ W_enc + b_enc) * norms).relu(), 5)
    average = {"dataset_average_activation_norm.a": torch.tensor(float("nan"))}  # uninitialised where it is not used
    tensors = moss_names(W_enc, b_enc, W_dec, b_dec) | average
    moss(folder, tensors, act_fn="topk", top_k=5)
    return Published(folder, x, ranked, ranked / norms @ W_dec + b_dec)


@case("llamascopium")
def llamascopium_normalised_tokens_and_no_bias(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), 5 * inputs()
    norm = x.norm(dim=1, keepdim=True) / D**0.5
    codes = (x / norm @ W_enc + b_enc).relu()
    moss(
        folder, moss_names(W_enc, b_enc, W_dec, b_dec), act_fn="relu", norm_activation="token-wise",
        use_decoder_bias=False,
    )  # fmt: skip
    return Published(folder, x, codes, codes @ W_dec * norm)


def gate(f: float = 1.0) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A gated linear unit: its tensors, and what it multiplies the pre-activations of an input by."""
    W, b = normal(D, M) / 2, normal(M)
    return {"W_E_glu": W, "b_E_glu": b}, lambda x: 1 / (1 + (-(f * x @ W + b)).exp())


@case("llamascopium")
def llamascopium_glu_jumprelu_scaled(folder: Path) -> Published:
    """Decoder norms weigh pre-activations behind the gate, and the scale of inputs goes into both factors."""
    (W_enc, b_enc, W_dec, b_dec), x, log_theta, average = parts(), 5 * inputs(), torch.linspace(-3, -1, M), 20.0
    f = D**0.5 / average
    glu, opened = gate(f)
    h = (f * x @ W_enc + b_enc) * opened(x)
    trained = h * (h * W_dec.norm(dim=1) > log_theta.exp())
    tensors = moss_names(W_enc, b_enc, W_dec, b_dec) | glu | {THETA: log_theta}
    tensors |= {"dataset_average_activation_norm.a": torch.tensor(average)}
    moss(folder, tensors, norm_activation="dataset-wise", use_glu_encoder=True)
    return Published(folder, x, trained / f, (trained @ W_dec + b_dec) / f)


@case("llamascopium")
def llamascopium_glu_topk_by_norms(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, (glu, opened) = parts(), inputs(), gate()
    norms = W_dec.norm(dim=1)
    ranked = topk(((x @ W_enc + b_enc) * opened(x) * norms).relu(), 5)
    moss(folder, moss_names(W_enc, b_enc, W_dec, b_dec) | glu, act_fn="topk", top_k=5, use_glu_encoder=True)
    return Published(folder, x, ranked, ranked / norms @ W_dec + b_dec)


@case("llamascopium")
def llamascopium_glu_transcoder(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, (glu, opened) = parts(), inputs(), gate()
    codes = ((x @ W_enc + b_enc) * opened(x)).relu()
    tensors = moss_names(W_enc, b_enc, W_dec, b_dec) | glu
    moss(folder, tensors, act_fn="relu", hook_point_out="b", use_glu_encoder=True)
    return Published(folder, x, codes, codes @ W_dec + b_dec, kind=Transcoder)


@case("llamascopium")
def llamascopium_crosscoder(folder: Path) -> Published:
    return moss_crosscoder(folder, biased=True)


@case("llamascopium")
def llamascopium_crosscoder_without_bias(folder: Path) -> Published:
    return moss_crosscoder(folder, biased=False)


def moss_crosscoder(folder: Path, *, biased: bool) -> Published:
    heads = [parts() for _ in range(2)]
    x, averages, log_theta = 5 * normal(N, 2 * D), (20.0, 5.0), torch.linspace(-3, 0, M)
    f = [D**0.5 / average for average in averages]
    xs = x.split(D, 1)
    h = sum(f[i] * xs[i] @ W_enc + b_enc for i, (W_enc, b_enc, _, _) in enumerate(heads))
    assert isinstance(h, Tensor)
    codes = h * (h > log_theta.exp())
    output = torch.cat([(codes @ W_dec + b_dec * biased) / f[i] for i, (_, _, W_dec, b_dec) in enumerate(heads)], 1)
    tensors = {
        name: torch.stack(list(column))
        for name, column in zip(("W_E", "b_E", "W_D", "b_D"), zip(*heads, strict=True), strict=True)
    }
    tensors |= {f"dataset_average_activation_norm.{n}": torch.tensor(a) for n, a in zip("ab", averages, strict=True)}
    moss(
        folder, tensors | {THETA: log_theta}, sae_type="crosscoder", norm_activation="dataset-wise",
        sparsity_include_decoder_norm=False, hook_points=["a", "b"], use_decoder_bias=biased,
    )  # fmt: skip
    return Published(folder, x, codes, output, kind=Crosscoder)


@case("llamascopium")
def llamascopium_clt(folder: Path) -> Published:
    """pitfall_265: decoders are grouped by the output that they write to."""
    return moss_clt(folder, biased=True)


@case("llamascopium")
def llamascopium_clt_without_bias(folder: Path) -> Published:
    return moss_clt(folder, biased=False)


def moss_clt(folder: Path, *, biased: bool) -> Published:
    x, f = 5 * normal(N, LAYERS * D), [D**0.5 / average for average in (20.0, 5.0, 10.0)]
    xs, encoders = x.split(D, 1), [parts() for _ in range(LAYERS)]
    log_theta = normal(LAYERS, M, scale=0.3) - 1
    into = [normal(j + 1, M, D, scale=D**-0.5) for j in range(LAYERS)]
    h = [f[i] * xs[i] @ encoders[i][0] + encoders[i][1] for i in range(LAYERS)]
    trained = [h[i] * (h[i] > log_theta[i].exp()) for i in range(LAYERS)]
    codes = torch.cat([trained[i] / f[i] for i in range(LAYERS)], 1)
    biases = [encoder[3] * biased for encoder in encoders]
    output = [(sum((trained[i] @ into[j][i] for i in range(j + 1)), biases[j])) / f[j] for j in range(LAYERS)]
    tensors = {"W_E": torch.stack([e[0] for e in encoders]), "b_E": torch.stack([e[1] for e in encoders])}
    tensors |= {f"W_D.{j}": into[j] for j in range(LAYERS)}
    tensors |= {f"b_D.{j}": biases[j] for j in range(LAYERS) if biased}
    reads, writes = [f"in.{i}" for i in range(LAYERS)], [f"out.{i}" for i in range(LAYERS)]
    averages = dict(zip([*reads, *writes], 2 * [20.0, 5.0, 10.0], strict=True))
    tensors |= {f"dataset_average_activation_norm.{n}": torch.tensor(a) for n, a in averages.items()}
    moss(
        folder, tensors | {THETA: log_theta}, sae_type="clt", norm_activation="dataset-wise", hook_points_in=reads,
        hook_points_out=writes, sparsity_include_decoder_norm=False, use_decoder_bias=biased,
    )  # fmt: skip
    return Published(folder, x, codes, torch.cat(output, 1), kind=CrossLayerTranscoder)


# --- single files ---


@case("goodfire")
def goodfire(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu()
    tensors = {
        "encoder_linear.weight": W_enc.T, "encoder_linear.bias": b_enc, "decoder_linear.weight": W_dec.T,
        "decoder_linear.bias": b_dec,
    }  # fmt: skip
    return Published(pt(folder / "Llama-3.1-8B-Instruct-SAE-l19.pth", tensors), x, codes, codes @ W_dec + b_dec)


@case("deepseek_r1")
def deepseek_r1(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu()
    tensors = linear(W_enc, b_enc, W_dec) | {"decoder.bias": b_dec}
    return Published(pt(folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", tensors), x, codes, codes @ W_dec + b_dec)


@case("qwen_scope")
def qwen_scope(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = topk(x @ W_enc + b_enc, 6).relu()
    folder = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_6"
    path = pt(folder / "layer7.sae.pt", {"W_enc": W_enc.T, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec})
    return Published(path, x, codes, codes @ W_dec + b_dec)


@case("hook_z")
def hook_z(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    config = {"act_size": D, "dict_size": M, "act_name": "blocks.5.attn.hook_z", "layer": 5}
    write_json(folder / "gpt2-small_L5.pt".replace(".pt", "_cfg.json"), config)
    pt(folder / "gpt2-small_L5.pt", named(W_enc, b_enc, W_dec, b_dec))
    return Published(folder, x, codes, codes @ W_dec + b_dec)


@case("e2e_sae")
def e2e_sae(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu()
    tensors = {
        f"blocks-{i}-hook_resid_pre.{name}": tensor * (1 if i == 6 else 2)
        for i in (2, 6)
        for name, tensor in {
            "encoder.0.weight": W_enc.T, "encoder.0.bias": b_enc, "decoder.weight": W_dec.T, "decoder.bias": b_dec,
        }.items()
    }  # fmt: skip
    write_yaml(folder / "final_config.yaml", {"tlens_model_name": "gpt2-small"})
    pt(folder / "samples_400000.pt", tensors)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    return Published(folder, x, codes, codes @ unit + b_dec, {"position": "blocks.6.hook_resid_pre"})


@case("overcomplete")
def overcomplete_jumprelu(folder: Path) -> Published:
    """`h >= threshold` keeps what lies on it: the first input does, at every latent."""
    (W_enc, b_enc, W_dec, _), x, log_theta = parts(), inputs(), torch.linspace(-3, 0, M)
    x[0] = 0
    b_enc = torch.where(torch.arange(M) % 2 == 0, log_theta.exp(), b_enc)
    h = x @ W_enc + b_enc
    codes = h * (h >= log_theta.exp())
    assert (codes[0, ::2] > 0).all()
    rows = W_dec / (W_dec.norm(dim=1, keepdim=True) + 1e-8) * torch.tensor(0.4).exp()
    tensors = {
        "encoder.final_block.0.weight": W_enc.T, "encoder.final_block.0.bias": b_enc, "dictionary._weights": W_dec,
        "dictionary.multiplier": torch.tensor(0.4), "thresholds": log_theta,
    }  # fmt: skip
    return Published(pt(folder / "sae.pt", tensors), x, codes, codes @ rows, {"normalization": "l2"})


@case("temporal")
def temporal(folder: Path) -> Published:
    """Sequences of tokens; attention over earlier codes predicts a part of each."""
    heads, bottleneck, k, scale = 2, 4, 3, 0.3
    W_dec, b, x = normal(M, D), normal(D), normal(3, 10, D)
    E = normal(D, M)
    shapes = {"k_ctx": M // bottleneck, "q_target": M // bottleneck, "v_ctx": M, "c_proj": M}
    layers = [
        {f"{name}.{kind}": normal(*((n, M) if kind == "weight" else (n,)), scale=0.3)
         for name, n in shapes.items() for kind in ("weight", "bias")} for _ in range(2)
    ]  # fmt: skip

    def attend(z: Tensor, layer: dict[str, Tensor]) -> Tensor:
        before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)

        def projected(name: str, of: Tensor) -> Tensor:
            made = of @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]
            return made.unflatten(2, (heads, -1)).transpose(1, 2)

        q, key, v = projected("q_target", z), projected("k_ctx", before), projected("v_ctx", before)
        scores = q @ key.transpose(2, 3) / key.shape[-1] ** 0.5
        later = torch.ones(10, 10, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(3) @ v
        return (mixed.transpose(1, 2).flatten(2) @ layer["c_proj.weight"].T + layer["c_proj.bias"]).relu()

    r, predicted = scale * x - b, torch.zeros(3, 10, M)
    for layer in layers:
        p = attend((r @ E / (4 * D)).relu(), layer)
        q = p @ W_dec
        alpha = (q * r).sum(2, keepdim=True) / (q.norm(dim=2, keepdim=True) + 1e-6) ** 2
        predicted, r = predicted + alpha * p, r - alpha * q
    novel = topk((r @ E / (4 * D)).relu().flatten(0, 1), k).view(3, 10, M)
    own = {
        "exp_factor": M / D, "n_heads": heads, "n_attn_layers": 2, "bottleneck_factor": bottleneck,
        "sae_diff_type": "topk", "kval_topk": k, "tied_weights": False, "scaling_factor": scale,
    }  # fmt: skip
    write_yaml(folder / "conf.yaml", {"llm": {"dimin": D}, "sae": own, "data": {"dtype": "float32"}})
    tensors = {f"attn_layers.{i}.{name}": t for i, layer in enumerate(layers) for name, t in layer.items()}
    safe(folder / "latest_ckpt.safetensors", tensors | {"D": W_dec, "b": b, "E": E})
    return Published(folder, x, novel, ((novel + predicted) @ W_dec + b) / scale, kind=TemporalSAE)


# --- circuit-tracer ---


@case("circuit_tracer")
def mwhanna_transcoder(folder: Path) -> Published:
    """pitfall_273: with the side file that is misspelt in the wild."""
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = (x @ W_enc + b_enc).relu()
    path = safe(folder / "layer_5.safetensors", named(W_enc.T, b_enc, W_dec, b_dec))
    write_yaml(folder / "wanb-config.yaml", {"d_model": {"value": D}, "d_feature": {"value": M}, "wandb_version": 1})
    return Published(path, x, codes, codes @ W_dec + b_dec, kind=Transcoder)


@case("circuit_tracer")
def circuit_tracer_jumprelu_with_skip(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x, theta, skip = parts(), inputs(), torch.linspace(0, 0.6, M), normal(D, D)
    h = x @ W_enc + b_enc
    codes = h.relu() * (h > theta)
    tensors = named(W_enc.T, b_enc, W_dec, b_dec) | {"activation_function.threshold": theta, "W_skip": skip}
    safe(folder / "layer_4.safetensors", named(W_enc.T, b_enc, W_dec, b_dec))
    safe(folder / "layer_5.safetensors", tensors)
    files = [{"id": f"l{i}", "layer": i, "filepath": f"layer_{i}.safetensors"} for i in (4, 5)]
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    write_yaml(folder / "config.yaml", {"model_name": "google/gemma-2-2b", "transcoders": files} | hooks)
    return Published(folder, x, codes, codes @ W_dec + b_dec + x @ skip.T, {"layer": 5}, Transcoder)


@case("circuit_tracer")
def circuit_tracer_topk_with_the_older_decoder(folder: Path) -> Published:
    (W_enc, b_enc, W_dec, b_dec), x = parts(), inputs()
    codes = topk((x @ W_enc + b_enc).relu(), 5)
    tensors = named(W_enc.T, b_enc, W_dec.T, b_dec) | {"k": torch.tensor(5)}
    return Published(
        safe(folder / "layer_0.safetensors", tensors), x, codes, codes @ W_dec + b_dec, kind=Transcoder
    )  # fmt: skip


@case("circuit_tracer")
def circuit_tracer_clt(folder: Path) -> Published:
    layers, x, codes, output = clt(lambda i: LAYERS - i)
    return Published(circuit_tracer_layers(folder, layers), x, codes, output, kind=CrossLayerTranscoder)


@case("circuit_tracer")
def circuit_tracer_clt_with_skip(folder: Path) -> Published:
    layers, x, codes, output = clt(lambda i: LAYERS - i, skip=True)
    return Published(circuit_tracer_layers(folder, layers), x, codes, output, kind=CrossLayerTranscoder)


def circuit_tracer_layers(folder: Path, layers: list[dict[str, Tensor]]) -> Path:
    for i, layer in enumerate(layers):
        encoder = {
            "W_enc": layer["w_enc"].T,
            "b_enc": layer["b_enc"],
            "b_dec": layer["b_dec"],
            "threshold": layer["threshold"],
        }
        if "affine_skip_connection" in layer:
            encoder["W_skip"] = layer["affine_skip_connection"]
        safe(folder / f"W_enc_{i}.safetensors", {f"{name}_{i}": tensor for name, tensor in encoder.items()})
        safe(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": layer["w_dec"]})
    return folder


# --- what holds for all of them ---


@pytest.fixture(params=CASES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Published]:
    torch.manual_seed(7)
    format_name, write = CASES[request.param]
    folder = tmp_path / "files"
    folder.mkdir()
    return format_name, write(folder)


def assert_same(sae: SAE, expected: Published) -> None:
    shape = (*expected.x.shape[:-1], sae.d_sae)
    codes = sae.encode(expected.x).reshape(shape)
    assert 0 < (expected.codes != 0).float().mean() < 1
    torch.testing.assert_close(codes, expected.codes.reshape(shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(expected.x), expected.output, atol=1e-5, rtol=1e-5)


def test_codes_and_outputs_are_the_authors(published: tuple[str, Published], tmp_path: Path) -> None:
    """pitfall_198, pitfall_275: each file comes with the numbers that its authors' code gives."""
    format_name, expected = published
    sae = SAE.from_pretrained(expected.path, **expected.hints)
    assert type(sae) is expected.kind
    assert sae.metadata.get("source_format", "saelens") == format_name
    assert_same(sae, expected)
    assert_same(SAE.load(sae.save(tmp_path / "ours")), expected)


def refusal(sae: SAE, to: str) -> str | None:
    """What a format has to say to an SAE that it cannot express; written down from what the libraries have."""
    kind, name = type(sae), type(sae.activation).__name__
    if to == "saelens":  # our own layout, too
        return None
    if sae.glu:
        return "has no form for pre-activations that a gated linear unit multiplies"
    layered = to == "circuit_tracer" and kind is CrossLayerTranscoder
    predicts = to in ("sparsify", "circuit_tracer")
    if kind is not SAE and not layered and not (kind is Transcoder and predicts):
        return f"has no form for a {kind.__name__}"
    if sae.per_token is not None:
        return rf"normalises every token \({sae.per_token}\)"
    known = {
        "sparsify": {TopK, GroupMax},
        "dictionary_learning": {ReLU, TopK, BatchTopK, JumpReLU, Gated},
        "circuit_tracer": {ReLU, BatchTopK, JumpReLU} | (set() if layered else {TopK}),  # one threshold is a JumpReLU's
        "saev": {ReLU, RawTopK, BatchTopK},
    }
    return None if type(sae.activation) in known[to] else rf"(not|no class for) {name}\.$"


def assert_same_as(to: str, source: Path, expected: Published, folder: Path) -> bool:
    """Convert, and compare with the authors' numbers; or see that the format says what it cannot express."""
    if message := refusal(SAE.load(source), to):
        with pytest.raises(UnweaveError, match=message):
            convert(source, folder, to=to)
        assert not folder.exists()
        return False
    convert(source, folder, to=to)
    assert_same(read_sae(folder, format=to), expected)
    return True


def test_they_survive_every_format_that_can_express_them(published: tuple[str, Published], tmp_path: Path) -> None:
    """pitfall_192: read, save, load, convert, load: and still the authors' codes and outputs."""
    format_name, expected = published
    ours = read_sae(expected.path, **expected.hints).save(tmp_path / "ours")
    survived = {to for to in WRITERS if assert_same_as(to, ours, expected, tmp_path / to)}
    assert "saelens" in survived
    assert format_name not in WRITERS or format_name in survived or type(SAE.load(ours).activation) in (
        AbsTopK,  # of sparsify's older versions
        JumpReLU,  # of saev's BatchTopK, whose k an inference form does not have
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if "batchtopk" in name or "matryoshka" in name])
def test_batchtopk_survives_from_its_training_form(name: str, tmp_path: Path) -> None:
    """Which says the k that its libraries want, and the one threshold."""
    torch.manual_seed(7)
    (tmp_path / "files").mkdir()
    expected = CASES[name][1](tmp_path / "files")
    ours = save_training_form(read_sae(expected.path), tmp_path / "ours", {})
    assert type(SAE.load(ours).activation) is BatchTopK
    assert {to for to in WRITERS if assert_same_as(to, ours, expected, tmp_path / to)} == {*WRITERS} - {"sparsify"}


def test_the_config_alone_says_the_same(published: tuple[str, Published], monkeypatch: pytest.MonkeyPatch) -> None:
    """pitfall_268: widths come from the tensors; no weight is read for them."""
    format_name, expected = published
    sae = read_sae(expected.path, **expected.hints)
    monkeypatch.setattr("unweave.sae.draft.Draft.build", None)
    described = describe_sae(expected.path, **expected.hints)
    assert described["format"] == format_name
    assert described["kind"] == ("SAE" if type(sae) is TemporalSAE else type(sae).__name__)
    assert (described["d_in"], described["d_out"], described["d_sae"]) == (sae.d_in, sae.d_out, sae.d_sae)
    assert described["dtype"] == "float32"
    assert described["activation"]["type"] == sae.activation.name
    assert described["metadata"] == sae.metadata


def test_half_precision_stays(tmp_path: Path) -> None:
    """pitfall_270: the dtype is the file's, and thresholds are float32 whatever it is."""
    torch.manual_seed(7)
    expected = gemma_scope_2_affine_transcoder(tmp_path)
    half = {name: tensor.bfloat16() for name, tensor in load_file(expected.path / "params.safetensors").items()}
    safe(expected.path / "params.safetensors", half)
    sae = read_sae(expected.path)
    assert sae.dtype == torch.bfloat16
    assert sae.threshold is not None
    assert sae.threshold.dtype == torch.float32
    assert read_sae(expected.path, dtype=torch.float32).dtype == torch.float32


def test_files_and_saes_are_independent(published: tuple[str, Published]) -> None:
    """Folds never change a file that is mapped, and who writes the file anew does not change the SAE."""
    _, expected = published
    folder = expected.path if expected.path.is_dir() else expected.path.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sae = read_sae(expected.path, **expected.hints)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for path, content in before.items():
        with path.open("r+b") as file:  # in place: the same file, not another of its name
            file.write(bytes(len(content)))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sae.state_dict().items())
    starts = [tensor.untyped_storage().data_ptr() for tensor in sae.state_dict().values()]
    assert len(set(starts)) == len(starts)  # no two share memory, not even where the file says that they are tied


def weights_of(path: Path) -> Path:
    """The largest file with tensors."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix in (".safetensors", ".npz", ".pt")]
    return max(files, key=lambda file: file.stat().st_size)


def test_cut_off_files_are_refused_in_one_sentence(published: tuple[str, Published]) -> None:
    """Whichever format, wherever the file ends: never another error, never an SAE of half of the bytes."""
    _, expected = published
    path = weights_of(expected.path)
    whole = path.read_bytes()
    for end in (0, 7, len(whole) // 3, len(whole) - 9):
        path.write_bytes(whole[:end])
        with pytest.raises(UnweaveError, match=r"damaged|is known|code in it|no line of JSON|does not begin") as error:
            read_sae(expected.path, **expected.hints)
        assert str(error.value).count("\n") == 0
    garbled = bytearray(whole)
    garbled[8:40] = b"\xff" * 32
    path.write_bytes(garbled)
    with pytest.raises(UnweaveError):
        read_sae(expected.path, **expected.hints)


def cut(value: Any) -> tuple[Any, bool]:
    """The same tensors, of which one decoder (else another matrix) lacks the end of its last axis; whether one does."""
    if isinstance(value, Tensor) and value.ndim > 1:
        return value[..., :-1].clone(), True
    if not isinstance(value, dict):
        return value, False
    made, done = dict(value), False
    for name in sorted(made, key=lambda name: ("dec" in str(name).lower(), str(name)), reverse=True):
        if not done:
            made[name], done = cut(made[name])
    return made, done


def test_a_tensor_of_another_shape_is_named(published: tuple[str, Published]) -> None:
    _, expected = published
    path = weights_of(expected.path)
    if path.suffix == ".safetensors":
        tensors, done = cut(load_file(path))
        safe(path, tensors)
    elif path.suffix == ".npz":
        tensors, done = cut({name: torch.from_numpy(array) for name, array in np.load(path).items()})
        npz(path, tensors)
    else:
        head, _, _ = path.read_bytes().partition(b"\n") if path.read_bytes()[:1] == b"{" else (b"", b"", b"")
        with path.open("rb") as file:
            file.seek(len(head) + 1 if head else 0)
            tensors, done = cut(torch.load(io.BytesIO(file.read()), weights_only=True))
        torch.save(tensors, path)
        path.write_bytes((head + b"\n" if head else b"") + path.read_bytes())
    assert done
    with pytest.raises(UnweaveError, match=r"shape|width|go with|square"):
        read_sae(expected.path, **expected.hints)
