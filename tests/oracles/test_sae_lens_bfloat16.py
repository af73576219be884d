"""What sae-lens saves in bfloat16 loads here, and gives what sae-lens gives, and the other way around.

Sums are rounded elsewhere in the two libraries, so codes are compared within bfloat16's rounding; and exactly where
both compute in float32 with the weights of the file.

For ours in sae-lens the bound is derived. A bfloat16 has 8 significant bits, so each rounding is wrong by at most
u = 2^-8 of its result. A pre-activation `(x - b_dec) @ W + b` is rounded three times, after each operation (sums of
products are kept in float32), hence by at most 3 u S in all, where S is the sum of the absolute values of all that is
added up, and two libraries are at most 6 u S apart. A gated SAE's magnitudes have three more roundings, those of the
gain, of its product and of the gained weight. An output of given codes is rounded twice, with a skip four times. What a
latent is compared with (a threshold, the k-th strongest) is rounded as well, so a latent may be active in one library
only if it is nearer to it than that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.sae import (
    SAE,
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    Temporal,
    TemporalSAE,
    TopK,
    Transcoder,
)

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

D_IN, D_SAE, WIDTHS = 24, 96, [8, 32, 96]
RANKED: dict[str, Any] = {"k": 5, "rescale_acts_by_decoder_norm": True}
SAES: dict[str, dict[str, Any]] = {
    "StandardSAE": {}, "GatedSAE": {}, "TopKSAE": RANKED, "AbsTopKSAE": {"k": 5}, "JumpReLUSAE": {},
    "BatchTopKTrainingSAE": RANKED, "MatryoshkaBatchTopKTrainingSAE": RANKED | {"matryoshka_widths": WIDTHS},
    "MatchingPursuitSAE": {"max_iterations": 5, "residual_threshold": 0.0},
    "TemporalSAE": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 5, "sae_diff_type": "topk"},
    "Transcoder": {}, "SkipTranscoder": {}, "JumpReLUTranscoder": {}, "JumpReLUSkipTranscoder": {},
}  # fmt: skip


@torch.no_grad()
def their_sae(kind: str) -> Any:
    import sae_lens

    config: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "bfloat16", **SAES[kind]}
    if "Transcoder" in kind:
        config |= {"d_out": 12, "apply_b_dec_to_input": False}
    sae = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**config))
    for name, parameter in sae.named_parameters():
        if not name.startswith("attn_layers"):
            parameter.copy_(torch.randn(parameter.shape) / D_IN**0.5)
        if name.endswith("threshold"):
            parameter.copy_(0.1 + torch.rand(parameter.shape))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.4)
    return sae


@pytest.mark.parametrize("kind", SAES)
def test_we_load_theirs(kind: str, tmp_path: Path) -> None:
    import sae_lens

    theirs, x = their_sae(kind), torch.randn(2, 40, D_IN)
    theirs.save_model(tmp_path / "sae")
    forms = ["sae"]
    if hasattr(theirs, "save_inference_model"):  # sae-lens loads no training form as an SAE
        theirs.save_inference_model(tmp_path / "inference")
        forms.append("inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / forms[-1])
    codes, outputs = theirs.encode(x.bfloat16()).float(), theirs(x.bfloat16()).float()
    assert 0 < (codes != 0).float().mean() < 1
    for form in forms:
        ours = SAE.load(tmp_path / form)
        assert ours.dtype == torch.bfloat16
        own = ours.encode(x.bfloat16()).float()
        both = (own != 0) & (codes != 0)
        assert both.sum() >= 0.95 * torch.maximum((own != 0).sum(), (codes != 0).sum())
        assert (own - codes)[both].norm() < 0.05 * codes.norm()
        assert (ours(x.bfloat16()).float() - outputs).norm() < 0.1 * outputs.norm()

    config = tmp_path / forms[-1] / "cfg.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    theirs, ours = sae_lens.SAE.load_from_disk(config.parent), SAE.load(config.parent, dtype=torch.float32)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


U = 2.0**-8
ROOM = 1.05
"""For products of roundings, which the bounds leave out."""
OURS: dict[str, tuple[type[SAE], Activation, dict[str, Any]]] = {
    "standard": (SAE, ReLU(), {}), "gated": (SAE, Gated(), {}), "topk": (SAE, TopK(5), {}),
    "abstopk": (SAE, AbsTopK(5), {}), "jumprelu": (SAE, JumpReLU(), {}), "batchtopk": (SAE, BatchTopK(5), {}),
    "matryoshka": (SAE, BatchTopK(5), {"metadata": {"matryoshka_widths": WIDTHS}}),
    "no pre-bias": (SAE, TopK(5), {"apply_b_dec_to_input": False}),
    "matching_pursuit": (SAE, MatchingPursuit(k=5, residual_threshold=0.0), {}),
    "temporal": (TemporalSAE, TopK(5), {"settings": Temporal(n_heads=2, bottleneck=4)}),
    "transcoder": (Transcoder, ReLU(), {}), "skip_transcoder": (Transcoder, ReLU(), {"skip": True}),
    "jumprelu_transcoder": (Transcoder, JumpReLU(), {}),
    "jumprelu_skip_transcoder": (Transcoder, JumpReLU(), {"skip": True}),
}  # fmt: skip
UNBOUNDED = {"matching_pursuit", "temporal"}
"""What is rounded at every step of a loop, or in every layer: compared by its norm, as above."""


@torch.no_grad()
def our_sae(kind: str) -> SAE:
    make, activation, options = OURS[kind]
    widths = (D_IN, 12, D_SAE) if make is Transcoder else (D_IN, D_SAE)
    sae = make(*widths, activation, **options)  # type: ignore[arg-type]
    for name, parameter in sae.named_parameters():
        if not name.startswith("attn_layers") and kind != "matching_pursuit":
            parameter.copy_(torch.randn(parameter.shape) / D_IN**0.5)
        if name == "threshold":
            parameter.copy_(0.1 + torch.rand(parameter.shape))
    if isinstance(activation, BatchTopK):
        sae.threshold = torch.tensor(0.4)
    return sae.requires_grad_(False)


def bound_of_latents(sae: SAE, x: Any) -> tuple[Any, Any]:
    """In float64: how far apart codes may be, and whether a latent is so near to its cut that only one may have it."""
    W, b = sae.W_enc.double(), sae.b_enc.double()
    centred = x.double() - (sae.b_dec.double() if sae.apply_b_dec_to_input else 0)
    h, off = centred @ W + b, 6 * U * ROOM * (centred.abs() @ W.abs() + b.abs())
    if isinstance(sae.activation, Gated):
        gain, b_mag = sae.r_mag.double().exp(), sae.b_mag.double()
        magnitude, codes_off = (
            centred @ W * gain + b_mag,
            12 * U * ROOM * (centred.abs() @ W.abs() * gain + b_mag.abs()),
        )
        return codes_off, (h.abs() <= off) | (magnitude.abs() <= codes_off)
    if sae.threshold is not None:
        threshold = sae.threshold.double()
        return off, (h - threshold).abs() <= off + U * threshold
    if isinstance(sae.activation, TopK | AbsTopK):
        ranked = h.abs() if isinstance(sae.activation, AbsTopK) else h
        top = ranked.topk(sae.activation.k + 1, 1).values
        to_the_other_side = torch.maximum(ranked - top[:, -1:], top[:, -2:-1] - ranked)
        return off, to_the_other_side <= off + off.amax(1, keepdim=True)  # what it is ranked against is off, too
    return off, h.abs() <= off


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_they_load_ours(kind: str, tmp_path: Path) -> None:
    import sae_lens

    ours = SAE.load(our_sae(kind).save(tmp_path / "float32"), dtype=torch.bfloat16)
    theirs = sae_lens.SAE.load_from_disk(ours.save(tmp_path / "sae"))
    assert theirs.dtype == ours.dtype == torch.bfloat16
    x = torch.randn(2, 40, D_IN).bfloat16()
    codes, own = theirs.encode(x).float(), ours.encode(x).float()
    assert 0 < (codes != 0).float().mean() < 1
    both, either = (codes != 0) & (own != 0), (codes != 0) | (own != 0)
    assert both.sum() >= 0.95 * either.sum()
    if kind in UNBOUNDED:
        assert (own - codes)[both].norm() < 0.05 * codes.norm()
        assert (ours(x).float() - theirs(x).float()).norm() < 0.1 * theirs(x).float().norm()
    else:
        within_bounds(ours, theirs, x.flatten(0, 1))

    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype="float32")
    ours = SAE.load(tmp_path / "sae", dtype=torch.float32)
    x = x.float()
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def within_bounds(ours: SAE, theirs: Any, x: Any) -> None:
    """Codes, where latents are active, and outputs; see above."""
    codes, own = theirs.encode(x).double(), ours.encode(x).double()
    flipped = (codes != 0) != (own != 0)
    codes_off, near = bound_of_latents(ours, x)
    assert not (flipped & ~near).any()
    assert near.float().mean() < 0.5
    assert ((codes - own).abs() <= codes_off)[~flipped].all()

    W_dec, b_dec = ours.W_dec.double().abs(), ours.b_dec.double().abs()
    skip = ours.W_skip.double().abs() if isinstance(ours, Transcoder) and ours.W_skip is not None else None
    mapped = 0 if skip is None else x.double().abs() @ skip.T
    size, roundings = codes.abs() @ W_dec + b_dec + mapped, 2 if skip is None else 4
    if skip is None:
        of_equal_codes = (ours.decode(codes.bfloat16()).double() - theirs.decode(codes.bfloat16()).double()).abs()
        assert (of_equal_codes <= 2 * roundings * U * size * ROOM).all()
    apart = (ours(x).double() - theirs(x).double()).abs()
    calm = ~flipped.any(1)
    assert calm.float().mean() > 0.5
    assert (apart <= (codes_off @ W_dec + 2 * roundings * U * size) * ROOM)[calm].all()
