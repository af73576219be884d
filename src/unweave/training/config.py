"""What to train, and on what. Two small frozen dataclasses that turn into JSON or TOML and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ImageConfig, MaskConfig
from unweave.objectives import (
    PENALTIES,
    AuxK,
    EndToEnd,
    GhostGradients,
    KSchedule,
    Matryoshka,
    MultiTopK,
    Penalty,
    PreActivation,
    RandomMatryoshka,
    Reanimation,
    Schedule,
)
from unweave.sae import Activation, TopK
from unweave.sae.archetypal import ArchetypalDictionary, TiedDictionary
from unweave.sae.temporal import Temporal
from unweave.training.combinations import check_objectives, check_run
from unweave.training.controller import L0Controller
from unweave.training.dictionary import check_dictionary, check_order, is_tied
from unweave.training.resampling import Resampling
from unweave.training.sites import PREDICTS, check_coder, check_sites
from unweave.training.values import from_dict, to_dict

__all__ = ["METHODS", "Method", "SAEConfig", "Start", "TrainConfig", "from_dict", "to_dict"]

Method = Literal["scale", "unrotated_decoder", "decoder"]
METHODS: tuple[Method, ...] = get_args(Method)
"""What of a finished SAE's decoder can be fine-tuned; see `unweave.training.finetune`."""


@dataclass(frozen=True)
class SAEConfig:
    """One SAE and how it is trained.

    Shares (`warmup`, `decay`, ...) are fractions of the run. Coefficients and thresholds are for inputs scaled to a
    mean squared norm of d_in, which training does by itself and folds into the weights at its end.

    Attributes:
        d_sae: Number of latents.
        activation: `TopK(k)`, `ReLU()` or another of `unweave.sae.ACTIVATIONS`.
        sparsity: One of `unweave.objectives.PENALTIES`, or several, which add up. None: L1 for ReLU and for Gated,
            whose gate it acts on; TargetL0 for JumpReLU, or L0 under a controller; nothing for the TopK family.
        l0_controller: Moves the coefficients of `sparsity` until a requested L0 is reached.
        error: What the main loss is: the "squared" error, or relative to the "variance" of the batch or to the squared
            norm of each "token"; see `unweave.objectives.error_weights`.
        auxk: The loss that revives dead latents; `AuxK(coefficient=0)` turns it off.
        ghost: Ghost gradients for dead latents. They take the place of AuxK at its default.
        pre_act: Pulls dead latents up to their thresholds (JumpReLU, ReLU, Gated).
        reanimation: Pushes up latents that did not fire in the batch.
        resampling: Replaces dead latents by badly reconstructed tokens at some points of the run.
        matryoshka: Prefixes of the dictionary that reconstruct by themselves, fixed or drawn at every step.
        multi_topk: A second reconstruction with a larger k (TopK, BatchTopK).
        k_schedule: Anneals k from a larger one down to the activation function's.
        lr: Learning rate of Adam. None: `2e-4 / sqrt(d_sae / 2**14)` (the width rule of Gao et al.).
        threshold_lr: Learning rate of JumpReLU thresholds, which move by about this much a step. None: `lr *
            sqrt(d_in)`, which is `lr` at a mean squared norm of 1 as in Gemma Scope, but at most a tenth of the
            bandwidth, so that a step does not jump over what it sees.
        threshold_schedule: Multiplies the learning rate of thresholds, beside the schedule of all learning rates.
        betas: Adam's decay rates.
        warmup: Share of the run over which the learning rate rises linearly.
        decay: Share of the run, at its end, over which the learning rate falls linearly to 0.
        sparsity_warmup: Share of the run over which coefficients of sparsity terms without a schedule rise linearly.
        grad_clip: Largest gradient norm, in units in which predicting the mean costs 1; None for no clipping.
        unit_norm: Whether decoder rows are kept at norm 1. None: yes, except for ReLU, whose L1 penalty weighs norms.
            "keep": rows start with the norms that they have in the SAE to start from, and are free.
        normalize: What is done to the inputs: "scalar" (one factor), "center" (their mean is subtracted, too) or
            "whiten" (unit variance in every direction), which are folded into the finished weights; or "layer_norm" or
            "constant_norm_rescale" of each token, which the finished SAE goes on doing.
        b_dec_init: "mean" of the first activations (fewer dead latents), "zeros", or their "geometric_median", which
            outliers move less.
        W_dec_init: "random" directions, or "data": mostly directions of the first activations (fewer dead latents).
        dead_after: Tokens without firing after which a latent is dead. None: a tenth of the run, at most 10 million.
        precision: Of the dense products: "bf16", "fp32", or "auto" for bf16 where the hardware is faster at it. With
            sparse execution the codes and gradients are fp32's either way; see the page on speed.
        moments: dtype of Adam's moments of the weights. "bf16" (rounded stochastically) halves their memory.
        coder: "sae", or one that reads or predicts something else: "transcoder" (from each hook to its target),
            "crosscoder" (one code for all hooks), or "clt" (a code for each hook, which predicts its target and all
            later ones; `d_sae` and the activation function's k are a layer's).
        glu: Whether the pre-activations of an SAE or a transcoder have a second, learnt factor; see `SAE`.
        skip: Whether a transcoder (of a clt, each layer) also has a linear map from its input to its target.
        temporal: Attention that predicts a part of each token from those before it; the rest is encoded. Batches are
            then whole sequences in order (see `train_on`).
        dictionary: `TiedDictionary()` (one matrix for both ways) or `ArchetypalDictionary()` (atoms near data points).
    """

    d_sae: int = 16_384
    activation: Activation = TopK()
    sparsity: Penalty | tuple[Penalty, ...] | None = None
    l0_controller: L0Controller | None = None
    error: Literal["squared", "variance", "token"] = "squared"
    auxk: AuxK = AuxK()
    ghost: GhostGradients | None = None
    pre_act: PreActivation | None = None
    reanimation: Reanimation | None = None
    resampling: Resampling | None = None
    matryoshka: Matryoshka | RandomMatryoshka | None = None
    multi_topk: MultiTopK | None = None
    k_schedule: KSchedule | None = None
    lr: float | None = None
    threshold_lr: float | None = None
    threshold_schedule: Schedule | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    decay: float = 0.2
    sparsity_warmup: float = 0.1
    grad_clip: float | None = 1.0
    unit_norm: Literal[True, False, "keep"] | None = None
    normalize: Literal["scalar", "center", "whiten", "layer_norm", "constant_norm_rescale"] = "scalar"
    b_dec_init: Literal["mean", "zeros", "geometric_median"] = "mean"
    W_dec_init: Literal["random", "data"] = "random"
    dead_after: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    moments: Literal["fp32", "bf16"] = "fp32"
    coder: Literal["sae", "transcoder", "crosscoder", "clt"] = "sae"
    glu: bool = False
    skip: bool = False
    dictionary: ArchetypalDictionary | TiedDictionary | None = None
    temporal: Temporal | None = None

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise UnweaveError(f"d_sae must be at least 1, got {self.d_sae}.")
        self.activation.check(self.d_sae)
        check_coder(self)
        check_dictionary(self)
        if isinstance(self.sparsity, list | tuple):
            object.__setattr__(self, "sparsity", tuple(self.sparsity))
        check_objectives(self)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UnweaveError(f"betas are two numbers from 0 to below 1, got {self.betas}.")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UnweaveError(f"{name} is a share of the run between 0 and 1, got {getattr(self, name)}.")
        for name in ("lr", "threshold_lr", "grad_clip", "dead_after"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UnweaveError(f"{name} must be above 0, got {value}.")

    @property
    def sparsity_terms(self) -> tuple[Penalty, ...]:
        """The sparsity terms, with the activation function's default filled in."""
        if isinstance(self.sparsity, tuple):
            return self.sparsity
        if self.sparsity is not None:
            return (self.sparsity,)
        default = self.activation.default_sparsity
        if default == "target_l0" and self.l0_controller is not None:
            default = "l0"
        return () if default is None else (PENALTIES[default](),)

    @property
    def sparsity_term(self) -> Penalty | None:
        """The first sparsity term, which mostly is the only one."""
        return next(iter(self.sparsity_terms), None)

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else 2e-4 / (self.d_sae / 2**14) ** 0.5

    def threshold_rate(self, d_in: int, bandwidth: float | None = None) -> float:
        """Learning rate of thresholds at a width, and at a bandwidth other than the activation function's."""
        if self.threshold_lr is not None:
            return self.threshold_lr
        window = getattr(self.activation, "bandwidth", float("inf")) if bandwidth is None else bandwidth
        return min(self.learning_rate * d_in**0.5, 0.1 * window)

    @property
    def decoder_is_unit(self) -> bool:
        if self.unit_norm is not None:
            return self.unit_norm is True
        if self.coder in PREDICTS or self.temporal or isinstance(self.dictionary, ArchetypalDictionary):
            return False
        return is_tied(self) or not self.activation.free_norms

    def __str__(self) -> str:
        optional = (
            *(() if self.sparsity is None else self.sparsity_terms), self.l0_controller, self.matryoshka,
            self.multi_topk, self.k_schedule, self.ghost, self.pre_act, self.reanimation, self.resampling,
        )  # fmt: skip
        extras = [o for o in optional if o is not None]
        kind = [] if self.coder == "sae" else ["skip " * self.skip + self.coder]
        return ", ".join([*kind, str(self.activation), f"d_sae {self.d_sae:,}", *map(str, extras)])


@dataclass(frozen=True)
class Start:
    """An SAE that a run trains further, in place of a fresh one.

    Attributes:
        sae: A path, the name of a release, or a repository on the Hub; None: it is passed to `train`.
        id: The SAE in it, where there are several.
        method: What is fine-tuned: "decoder", "unrotated_decoder" or "scale", with codes that stay what they are; see
            `unweave.training.finetune`. None: all weights, by `TrainConfig.end_to_end`.
        lr: Learning rate. None: 3e-3 for a decoder, a quarter of `SAEConfig.lr` for all weights.
    """

    sae: str | None = None
    id: str | None = None
    method: Method | None = None
    lr: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A training run on the activations of a model.

    Attributes:
        model: "demo" or "demo-vit" (the models that ship with unweave), a Hugging Face name, or a local folder.
        data: "stdlib" (text that every Python carries), a file or folder of text, or a Hugging Face dataset; for a
            vision model "digits" (scikit-learn's), a folder of images, or a Hugging Face dataset of them. Or a folder
            of tokens or a cache of activations: then no pass of the model is made for training.
        hooks: Where the activations are taken, by module path, glob or alias. Every SAE is trained at each of them.
        targets: What transcoders and cross-layer transcoders predict, named alike: the first target belongs to the
            first hook, in the order of the model's modules.
        saes: The SAEs to train; all see the same batches. With `start`, leave them out: its settings follow from it.
        start: An SAE to train further.
        end_to_end: A loss of the model that the SAEs are spliced into, in place of the squared error; see
            `unweave.training.end_to_end`. Each step then takes whole rows, as many as `batch_size` tokens are.
        tokens: Tokens to train on, after masking.
        batch_size: Tokens in an optimiser step.
        out: Folder for the SAEs, `metrics.jsonl`, `config.json` and checkpoints; None writes nothing.
        buffer: Tokens in the shuffling ring; None: 32 batches, from a cache 128; a shorter run has no more
            than its tokens, so that it need not wait for more.
        prompts_per_pass: Rows of tokens in one forward pass of the model. None: as many as are fast and fit; see
            `unweave.activations.ActivationStream`.
        model_precision: What the model runs in: "fp32", "bf16", or "auto" for bf16 where the hardware is faster at it
            and a model in fp32 is large enough to gain (its matrices have 256 rows and columns or more), else the
            type that its weights have. The model itself stays as it is; what runs is a copy.
        background: Whether the model runs ahead in a thread of its own, with the same results. "auto": where it runs
            on a GPU; on a CPU it would only compete with the training step for the cores.
        checkpoint_every: Tokens between checkpoints, besides the one at an interruption; None: none.
        text: How text becomes rows of tokens, and which share of the documents is held out.
        images: How images become rows of tokens, and which share of them is held out.
        masks: Which tokens are left out.
        seed: Every random choice follows from it.
        device: Where to run; None: a GPU if there is one.
        model_device: Where to run the model, if that is another device.
    """

    model: str = "demo"
    data: str = "stdlib"
    hooks: tuple[str, ...] = ("resid_post.1",)
    targets: tuple[str, ...] = ()
    start: Start | None = None
    end_to_end: EndToEnd | None = None
    saes: tuple[SAEConfig, ...] = (SAEConfig(),)
    tokens: int = 2_000_000
    batch_size: int = 4096
    out: str | None = None
    buffer: int | None = None
    prompts_per_pass: int | None = None
    model_precision: Literal["auto", "fp32", "bf16"] = "auto"
    background: Literal["auto", True, False] = "auto"
    checkpoint_every: int | None = None
    text: DataConfig = field(default_factory=DataConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    seed: int = 0
    device: str | None = None
    model_device: str | None = None

    def __post_init__(self) -> None:
        # Lists are what JSON, TOML and most callers bring.
        hooks: Any = self.hooks
        object.__setattr__(self, "hooks", (hooks,) if isinstance(hooks, str) else tuple(hooks))
        targets: Any = self.targets
        object.__setattr__(self, "targets", (targets,) if isinstance(targets, str) else tuple(targets))
        object.__setattr__(self, "saes", tuple(self.saes))
        if not isinstance(self.data, str):
            raise UnweaveError("TrainConfig.data is a name or a path; pass other data as train(config, data=...).")
        for name in ("tokens", "batch_size", "prompts_per_pass", "buffer", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnweaveError(f"{name} must be at least 1, got {value}.")
        for name, allowed in (("model_precision", ("auto", "fp32", "bf16")), ("background", (True, False, "auto"))):
            if getattr(self, name) not in allowed:
                raise UnweaveError(f"{name} is one of {allowed}, not {getattr(self, name)!r}.")
        if not self.hooks or not self.saes:
            raise UnweaveError("a training run needs at least one hook and one SAE.")
        further = self.start is not None or self.end_to_end is not None
        if not further or self.saes != (SAEConfig(),):  # else what is trained may follow from an SAE that is read later
            check_sites(self.saes, self.targets)
        check_order(self)
        check_run(self)

    @property
    def ring_size(self) -> int:
        """Tokens in the shuffling ring: never fewer than a batch."""
        return max(self.buffer or min(32 * self.batch_size, self.tokens), self.batch_size)
