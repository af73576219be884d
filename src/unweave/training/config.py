"""What to train, and on what. Two small frozen dataclasses that turn into JSON or TOML and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from unweave._errors import UnweaveError, nearest
from unweave.activations import DataConfig, MaskConfig
from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, TargetL0
from unweave.sae import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK


@dataclass(frozen=True)
class SAEConfig:
    """One SAE and how it is trained.

    Shares (`warmup`, `decay`, ...) are fractions of the run. Coefficients and thresholds are for inputs scaled to a
    mean squared norm of d_in, which training does by itself and folds into the weights at its end.

    Attributes:
        d_sae: Number of latents.
        activation: `TopK(k)`, `BatchTopK(k)`, `ReLU()`, `JumpReLU()` or `Gated()`.
        sparsity: `L1(...)` or `TargetL0(...)`. None: L1 for ReLU and for Gated, whose gate it acts on; TargetL0 for
            JumpReLU; nothing for the TopK family.
        auxk: The loss that revives dead latents; `AuxK(coefficient=0)` turns it off.
        ghost: Ghost gradients for dead latents. They take the place of AuxK at its default.
        pre_act: Pulls dead latents up to their thresholds (JumpReLU, ReLU, Gated).
        matryoshka: Prefixes of the dictionary that reconstruct by themselves.
        multi_topk: A second reconstruction with a larger k (TopK, BatchTopK).
        lr: Learning rate of Adam. None: `2e-4 / sqrt(d_sae / 2**14)` (the width rule of Gao et al.).
        threshold_lr: Learning rate of JumpReLU thresholds, which move by about this much a step.
        betas: Adam's decay rates.
        warmup: Share of the run over which the learning rate rises linearly.
        decay: Share of the run, at its end, over which the learning rate falls linearly to 0.
        sparsity_warmup: Share of the run over which the sparsity coefficient rises linearly.
        grad_clip: Largest gradient norm, in units in which predicting the mean costs 1; None for no clipping.
        unit_norm: Whether decoder rows are kept at norm 1. None: yes, except for ReLU, whose L1 penalty weighs norms.
        b_dec_init: "mean" of the first activations (fewer dead latents) or "zeros".
        dead_after: Tokens without firing after which a latent is dead. None: a tenth of the run, at most 10 million.
        precision: Of the dense products: "bf16", "fp32", or "auto" for bf16 where the hardware is faster at it. With
            sparse execution the codes and gradients are fp32's either way; see the page on speed.
        moments: dtype of Adam's moments of the weights. "bf16" (rounded stochastically) halves their memory.
    """

    d_sae: int = 16_384
    activation: Activation = TopK()
    sparsity: L1 | TargetL0 | None = None
    auxk: AuxK = AuxK()
    ghost: GhostGradients | None = None
    pre_act: PreActivation | None = None
    matryoshka: Matryoshka | None = None
    multi_topk: MultiTopK | None = None
    lr: float | None = None
    threshold_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    decay: float = 0.2
    sparsity_warmup: float = 0.1
    grad_clip: float | None = 1.0
    unit_norm: bool | None = None
    b_dec_init: Literal["mean", "zeros"] = "mean"
    dead_after: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    moments: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise UnweaveError(f"d_sae must be at least 1, got {self.d_sae}.")
        if getattr(self.activation, "k", 1) > self.d_sae:
            raise UnweaveError(f"k={self.activation.k} is larger than d_sae={self.d_sae}.")  # type: ignore[union-attr]
        if isinstance(self.sparsity, TargetL0) and not isinstance(self.activation, JumpReLU):
            raise UnweaveError(
                f"TargetL0 acts through JumpReLU's thresholds, and a {type(self.activation).__name__} SAE has none."
            )
        if isinstance(self.sparsity, TargetL0) and self.sparsity.l0 > self.d_sae:
            raise UnweaveError(f"a target L0 of {self.sparsity.l0} is larger than d_sae={self.d_sae}.")
        if self.unit_norm is False and isinstance(self.activation, TopK | BatchTopK):
            raise UnweaveError("TopK and BatchTopK rank latents against each other, so their decoders need unit_norm.")
        self._check_objectives()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UnweaveError(f"betas are two numbers from 0 to below 1, got {self.betas}.")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UnweaveError(f"{name} is a share of the run between 0 and 1, got {getattr(self, name)}.")
        for name in ("lr", "threshold_lr", "grad_clip", "dead_after"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UnweaveError(f"{name} must be above 0, got {value}.")

    def _check_objectives(self) -> None:
        name, ranked = type(self.activation).__name__, isinstance(self.activation, TopK | BatchTopK)
        if self.matryoshka is not None:
            self.matryoshka.widths_for(self.d_sae)
        if self.multi_topk is not None:
            if not isinstance(self.activation, TopK | BatchTopK):
                raise UnweaveError(f"Multi-TopK is a second, larger k beside the first, and {name} has none.")
            self.multi_topk.k_for(self.activation.k, self.d_sae)
        if self.pre_act is not None and ranked:
            raise UnweaveError(
                f"the pre-activation loss compares a latent with a bound of its own, and {name} ranks latents against "
                "each other: AuxK is what revives them."
            )
        if self.ghost is not None:
            if self.auxk == AuxK():
                object.__setattr__(self, "auxk", AuxK(coefficient=0))
            if self.auxk.coefficient > 0:
                raise UnweaveError(
                    "ghost gradients and AuxK both reconstruct the residual with dead latents: give one of them."
                )

    @property
    def sparsity_term(self) -> L1 | TargetL0 | None:
        """The sparsity term with the activation function's default filled in."""
        if self.sparsity is None and isinstance(self.activation, ReLU | Gated):
            return L1()
        if self.sparsity is None and isinstance(self.activation, JumpReLU):
            return TargetL0()
        return self.sparsity

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else 2e-4 / (self.d_sae / 2**14) ** 0.5

    @property
    def decoder_is_unit(self) -> bool:
        return self.unit_norm if self.unit_norm is not None else not isinstance(self.activation, ReLU)

    def __str__(self) -> str:
        extras = [o for o in (self.matryoshka, self.multi_topk, self.ghost, self.pre_act) if o is not None]
        return ", ".join([str(self.activation), f"d_sae {self.d_sae:,}", *map(str, extras)])


@dataclass(frozen=True)
class TrainConfig:
    """A training run on the activations of a model.

    Attributes:
        model: "demo" (the model that ships with unweave), a Hugging Face name, or a local folder.
        data: "stdlib" (text that every Python carries), a file or folder of text, or a Hugging Face dataset.
        hooks: Where the activations are taken, by module path, glob or alias. Every SAE is trained at each of them.
        saes: The SAEs to train; all see the same batches.
        tokens: Tokens to train on, after masking.
        batch_size: Tokens in an optimiser step.
        out: Folder for the SAEs, `metrics.jsonl`, `config.json` and checkpoints; None writes nothing.
        buffer: Tokens in the shuffling ring; None: 32 batches.
        prompts_per_pass: Rows of tokens in one forward pass of the model.
        checkpoint_every: Tokens between checkpoints, besides the one at an interruption; None: none.
        text: How text becomes rows of tokens, and which share of the documents is held out.
        masks: Which tokens are left out.
        seed: Every random choice follows from it.
        device: Where to run; None: a GPU if there is one.
    """

    model: str = "demo"
    data: str = "stdlib"
    hooks: tuple[str, ...] = ("resid_post.1",)
    saes: tuple[SAEConfig, ...] = (SAEConfig(),)
    tokens: int = 2_000_000
    batch_size: int = 4096
    out: str | None = None
    buffer: int | None = None
    prompts_per_pass: int = 32
    checkpoint_every: int | None = None
    text: DataConfig = field(default_factory=DataConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        # Lists are what JSON, TOML and most callers bring.
        hooks: Any = self.hooks
        object.__setattr__(self, "hooks", (hooks,) if isinstance(hooks, str) else tuple(hooks))
        object.__setattr__(self, "saes", tuple(self.saes))
        if not isinstance(self.data, str):
            raise UnweaveError("TrainConfig.data is a name or a path; pass other data as train(config, data=...).")
        for name in ("tokens", "batch_size", "prompts_per_pass", "buffer", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnweaveError(f"{name} must be at least 1, got {value}.")
        if not self.hooks or not self.saes:
            raise UnweaveError("a training run needs at least one hook and one SAE.")

    @property
    def ring_size(self) -> int:
        """Tokens in the shuffling ring: never fewer than a batch."""
        return max(self.buffer or 32 * self.batch_size, self.batch_size)


_TYPES: dict[str, type[Any]] = {
    "relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU, "gated": Gated, "l1": L1,
    "target_l0": TargetL0,
}  # fmt: skip
_NAMES = {cls: name for name, cls in _TYPES.items()}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; parts that come in several kinds carry their kind as `type`."""
    result: dict[str, Any] = {"type": _NAMES[type(config)]} if type(config) in _NAMES else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple | list):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        result[f.name] = value
    return result


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`; keys left out take their defaults.

    Raises:
        UnweaveError: If a key or a type does not exist (the message names the nearest that does), or a value does not
            fit.
    """
    hints = typing.get_type_hints(cls)
    keys = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in keys:
            raise UnweaveError(
                f"there is no setting {where + key!r}{nearest(key, keys) or '; there are ' + ', '.join(keys)}"
            )
        arguments[key] = _convert(hints[key], value, where + key)
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    classes: list[Any] = [o for o in options if dataclasses.is_dataclass(o)]
    if classes and isinstance(value, dict):
        if len(classes) == 1 and "type" not in value:
            return from_dict(classes[0], value, where + ".")
        kinds = {_NAMES[c]: c for c in classes if c in _NAMES}
        kind, rest = value.get("type"), {k: v for k, v in value.items() if k != "type"}
        if kind not in kinds:
            raise UnweaveError(f"{where} has no type {kind!r}; it is one of {', '.join(kinds)}.")
        return from_dict(kinds[kind], rest, where + ".")
    if classes and not any(value is None for o in options if o is type(None)):
        raise UnweaveError(f"{where} must be a table of settings, such as {{ type = ... }}, got {value!r}.")
    if typing.get_origin(hint) is tuple and not isinstance(value, list | tuple):
        raise UnweaveError(
            f"{where} must be a list (in TOML, tables in a list are written [[{where}]]), got {value!r}."
        )
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_convert(typing.get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, list) and any(typing.get_origin(o) is tuple for o in options):
        return tuple(value)
    literals = [v for o in options if typing.get_origin(o) is Literal for v in typing.get_args(o)]
    if literals and value not in literals:
        raise UnweaveError(f"{where} is one of {', '.join(map(repr, literals))}, got {value!r}.")
    plain = tuple(o for o in options if isinstance(o, type) and not dataclasses.is_dataclass(o))
    accepted = (*plain, int) if float in plain else plain
    if (
        accepted
        and not literals
        and (not isinstance(value, accepted) or (isinstance(value, bool) and bool not in plain))
    ):
        if isinstance(value, float) and value.is_integer() and int in plain:
            return int(value)
        raise UnweaveError(f"{where} must be {' or '.join(p.__name__ for p in plain)}, got {value!r}.")
    return value
