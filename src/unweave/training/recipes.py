"""Published recipes by name, converted to unweave's convention.

    uw.train_on(batches, [uw.recipes.april_2024()])
    unweave train --recipe april_2024 ...

Each function gives an `SAEConfig` with the hyperparameters of a publication; arguments change the sizes. Coefficients
are converted to inputs of mean squared norm d_in and errors summed over d_in. A recipe stated at a mean squared norm of
1 has thresholds and coefficients that depend on the width, so it takes `d_in` (the command line fills in the hook's).
Warm-ups stated in steps become shares of the published run. The rest is unweave's own: batch size and tokens belong to
`TrainConfig`, gradients are clipped in units that do not depend on the width, biases have the weights' learning rate,
and warm-ups are linear.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from unweave._errors import UnweaveError, nearest
from unweave.objectives import L0, L1, AuxK, Frequency, Matryoshka, PAnneal, PreActivation, QuadraticL0, Tanh
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training.config import SAEConfig

RECIPES: dict[str, Callable[..., SAEConfig]] = {}
"""Every recipe, by the name that `--recipe` takes."""

# SAEBench's suite (github.com/saprmarks/dictionary_learning): 500M tokens in batches of 2048.
_SUITE_STEPS = 244_140
_SUITE_WARMUP, _SUITE_SPARSITY_WARMUP = 1000 / _SUITE_STEPS, 5000 / _SUITE_STEPS
_NO_AUXK = AuxK(coefficient=0)


def register_recipe(function: Callable[..., SAEConfig]) -> Callable[..., SAEConfig]:
    """Make a recipe known by the function's name, as a decorator; every argument needs a default."""
    RECIPES[function.__name__] = function
    return function


def needs_width(name: str) -> bool:
    """Whether a recipe depends on the width of the activations.

    Raises:
        UnweaveError: If there is no such recipe; the message names the nearest.
    """
    if name not in RECIPES:
        raise UnweaveError(
            f"there is no recipe {name!r}{nearest(name, RECIPES) or '; there are ' + ', '.join(RECIPES)}"
        )
    return "d_in" in inspect.signature(RECIPES[name]).parameters


@register_recipe
def april_2024(d_sae: int = 16_384, *, l1: float = 5.0) -> SAEConfig:
    """ReLU with an L1 penalty weighed by decoder norms.

    Anthropic, Circuits Updates, April 2024: coefficient 5 for inputs of mean norm sqrt(d_in), rising over the first 5 %
    of the run; learning rate 5e-5, falling to 0 over the last 20 %; decoder rows of free norm that start at 0.1; no
    bias at the start and nothing against dead latents. Batches of 2048 to 4096, about 200k steps.
    """
    return SAEConfig(
        d_sae=d_sae, activation=ReLU(), sparsity=L1(l1), auxk=_NO_AUXK, lr=5e-5, warmup=0.0, decay=0.2,
        sparsity_warmup=0.05, unit_norm=False, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def topk(d_sae: int = 32_768, *, k: int = 32) -> SAEConfig:
    """TopK with AuxK.

    Gao et al., arXiv 2406.04093, and the script for GPT-2 small in their code: k 32, 32,768 latents, learning rate
    1e-4 without a schedule, AuxK at 1/32 on latents dead for 10M tokens, decoder bias at the geometric median. Batches
    of 131,072.
    """
    return SAEConfig(
        d_sae=d_sae, activation=TopK(k), lr=1e-4, warmup=0.0, decay=0.0, dead_after=10_000_000,
        b_dec_init="geometric_median",
    )  # fmt: skip


@register_recipe
def batch_topk(d_sae: int = 12_288, *, k: float = 32) -> SAEConfig:
    """BatchTopK with AuxK.

    Bussmann et al., arXiv 2412.06410, and their code: learning rate 3e-4 without a schedule, betas (0.9, 0.99), AuxK at
    1/32 with 512 latents, dead after 20 batches of 4096 tokens. 10^9 tokens at layer 8 of GPT-2 small.
    """
    return SAEConfig(
        d_sae=d_sae, activation=BatchTopK(k), auxk=AuxK(k=512), lr=3e-4, betas=(0.9, 0.99), warmup=0.0, decay=0.0,
        dead_after=20 * 4096,
    )  # fmt: skip


@register_recipe
def matryoshka(d_sae: int = 65_536, *, k: float = 40) -> SAEConfig:
    """Matryoshka BatchTopK.

    Bussmann et al., arXiv 2503.17547, in dictionary_learning's form: groups of 1/32, 1/16, 1/8, 1/4 and 17/32 of the
    latents, the mean of their errors, learning rate 3e-4 with 1000 steps of warm-up and a fall to 0 over the last 20 %.
    500M tokens in batches of 2048 at layer 12 of Gemma-2-2B.
    """
    return SAEConfig(
        d_sae=d_sae, activation=BatchTopK(k), matryoshka=Matryoshka(), lr=3e-4, warmup=_SUITE_WARMUP, decay=0.2,
        dead_after=10_000_000, b_dec_init="geometric_median",
    )  # fmt: skip


def _gemma_jump(d_in: int) -> JumpReLU:
    """Thresholds of 0.001 and a window as wide, at a mean squared norm of 1."""
    return JumpReLU(init_threshold=0.001 * d_in**0.5, bandwidth=0.001 * d_in**0.5)


@register_recipe
def gemma_scope(d_sae: int = 16_384, *, d_in: int = 2304, l0_coefficient: float = 6e-4) -> SAEConfig:
    """JumpReLU with an L0 penalty.

    Lieberum et al., arXiv 2408.05147: inputs of mean squared norm 1, thresholds and bandwidth 0.001, learning rate 7e-5
    (of thresholds in those units), betas (0, 0.999), 1000 steps of warm-up and no decay, the penalty rising over 10,000
    steps, nothing against dead latents. 4B tokens in batches of 4096 (16k latents).

    Args:
        d_sae: Number of latents.
        d_in: Width of the activations.
        l0_coefficient: As published, at a mean squared norm of 1; it was swept.
    """
    steps = 4e9 / 4096
    return SAEConfig(
        d_sae=d_sae, activation=_gemma_jump(d_in), sparsity=L0(l0_coefficient * d_in), auxk=_NO_AUXK, lr=7e-5,
        threshold_lr=7e-5 * d_in**0.5, betas=(0.0, 0.999), warmup=1000 / steps, decay=0.0,
        sparsity_warmup=10_000 / steps, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def gemma_scope_2(d_sae: int = 16_384, *, d_in: int = 2304, l0: float = 60.0) -> SAEConfig:
    """Matryoshka JumpReLU with a quadratic L0 penalty and a frequency penalty.

    Gemma Scope 2 (2025): as Gemma Scope, with a penalty of each token's squared distance from a target L0 (10 to 20, 30
    to 60 or 90 to 150) that rises over 50,000 steps, one against latents that fire on more than a tenth of the tokens,
    and Matryoshka's loss. The two coefficients, the frequency penalty's formula and the widths are not published; they
    are unweave's defaults. 8B tokens in batches of 4096.
    """
    steps = 8e9 / 4096
    return SAEConfig(
        d_sae=d_sae, activation=_gemma_jump(d_in), sparsity=(QuadraticL0(l0), Frequency()), matryoshka=Matryoshka(),
        auxk=_NO_AUXK, lr=7e-5, threshold_lr=7e-5 * d_in**0.5, betas=(0.0, 0.999), warmup=1000 / steps, decay=0.0,
        sparsity_warmup=50_000 / steps, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def january_2025(d_sae: int = 16_384, *, coefficient: float = 10.0) -> SAEConfig:
    """JumpReLU with a tanh penalty and the pre-activation loss.

    Anthropic, Circuits Updates, January 2025: inputs of mean norm sqrt(d_in), log thresholds that start at 0.1,
    bandwidth 2, straight-through gradients to all parameters, tanh with c 4 at a coefficient of 10 to 20 that rises
    over the whole run, the pre-activation loss at 3e-6, learning rate 2e-4 falling to 0 over the last 20 %, free
    decoder norms. Batches of 32,768. The coefficient is for models of thousands of dimensions. A code saves about its
    square of the error and costs the coefficient, so 10 drops all codes below 3, which is little where features have
    norms of `sqrt(d_in / L0)` = 7, and nearly everything at a width of 128: `2e-3 * d_in` is Tanh's default there.
    Unlike there, the pre-activation loss acts on dead latents alone, encoder biases start at 0, and decoder rows at
    norm 0.1.
    """
    return SAEConfig(
        d_sae=d_sae,
        activation=JumpReLU(init_threshold=0.1, bandwidth=2.0, ste_to_input=True, log_threshold=True),
        sparsity=Tanh(coefficient), auxk=_NO_AUXK, pre_act=PreActivation(3e-6), lr=2e-4, threshold_lr=2e-4,
        warmup=0.0, decay=0.2, sparsity_warmup=1.0, unit_norm=False, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def gated(d_sae: int = 16_384, *, d_in: int = 2304, l1: float = 0.03) -> SAEConfig:
    """Gated with an L1 penalty on the gate.

    Rajamanoharan et al., arXiv 2404.16014, as in SAEBench's suite: inputs of mean squared norm 1, learning rate 3e-4,
    betas (0, 0.999), 1000 steps of warm-up, 5000 of the penalty's, a fall to 0 over the last 20 %, no clipping.

    Args:
        d_sae: Number of latents.
        d_in: Width of the activations.
        l1: Coefficient at a mean squared norm of 1, 0.012 to 0.08 in the suite.
    """
    return SAEConfig(
        d_sae=d_sae, activation=Gated(), sparsity=L1(l1 * d_in**0.5), auxk=_NO_AUXK, lr=3e-4, betas=(0.0, 0.999),
        warmup=_SUITE_WARMUP, decay=0.2, sparsity_warmup=_SUITE_SPARSITY_WARMUP, grad_clip=None, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def p_anneal(d_sae: int = 16_384, *, d_in: int = 2304, l1: float = 0.015) -> SAEConfig:
    """ReLU with an Lp penalty whose p goes from 1 to 0.2.

    Karvonen et al., arXiv 2408.00113, as in SAEBench's suite: unit decoder rows, inputs of mean squared norm 1,
    learning rate 3e-4, p changing ten times from step 10,000 on, the schedules of `gated`.

    Args:
        d_sae: Number of latents.
        d_in: Width of the activations.
        l1: Coefficient at the start, where p is 1, at a mean squared norm of 1; 0.006 to 0.025 in the suite.
    """
    return SAEConfig(
        d_sae=d_sae, activation=ReLU(), sparsity=PAnneal(l1 * d_in**0.5, begin=10_000 / _SUITE_STEPS), unit_norm=True,
        auxk=_NO_AUXK, lr=3e-4, warmup=_SUITE_WARMUP, decay=0.2, sparsity_warmup=_SUITE_SPARSITY_WARMUP,
        b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def transcoder(d_sae: int = 24_576, *, k: int = 32) -> SAEConfig:
    """TopK transcoder with a skip, from each hook to its target.

    Paulo et al., arXiv 2501.18823, as in the sparsify library: k 32, a decoder and a skip that start at 0, biases at
    the means of targets and (through the encoder) of inputs, decoder rows of free norm, no AuxK, learning rate
    `2e-4 / sqrt(d_sae / 2**14)`. Their error is divided by the targets' variance, which Adam does not notice.
    """
    return SAEConfig(d_sae=d_sae, activation=TopK(k), coder="transcoder", skip=True, auxk=_NO_AUXK)


@register_recipe
def crosscoder(d_sae: int = 16_384, *, l1: float = 2.0) -> SAEConfig:
    """ReLU crosscoder of all hooks, whose L1 penalty weighs a code by the sum of its decoder norms.

    Anthropic, Sparse Crosscoders, October 2024, as in the open replication: decoder norm 0.1 at each hook, the penalty
    rising over the first 5 % of the run, learning rate 5e-5 falling to 0 over the last 20 %, clipping, nothing against
    dead latents. Batches of 4096. The coefficient is unweave's start for a sweep, not a published one. For comparing
    two models BatchTopK avoids the artefacts of L1.
    """
    return SAEConfig(
        d_sae=d_sae, activation=ReLU(), coder="crosscoder", sparsity=L1(l1), auxk=_NO_AUXK, lr=5e-5, warmup=0.0,
        decay=0.2, sparsity_warmup=0.05, b_dec_init="zeros",
    )  # fmt: skip


@register_recipe
def clt(d_sae: int = 24_576, *, k: float = 200 / 12) -> SAEConfig:
    """BatchTopK cross-layer transcoder from all hooks to all targets.

    As in the crosslayer-coding library: 32 times as many latents for each layer as dimensions, learning rate 1e-4,
    beta2 0.98, a fall to 0 over the last 20 %, AuxK at 1/32. Its k of 200 is read as that of a token over the 12 layers
    of GPT-2 small; ours is a layer's, and BatchTopK shares it out among the layers. Their errors are divided by the
    targets' variances, which a factor of their own for each target comes to.

    Args:
        d_sae: Number of latents of each layer.
        k: Active latents of a token in each layer, on average.
    """
    return SAEConfig(
        d_sae=d_sae, activation=BatchTopK(k), coder="clt", lr=1e-4, betas=(0.9, 0.98), warmup=0.0, decay=0.2,
    )  # fmt: skip
