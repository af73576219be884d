"""One SAE under training: its optimiser, its schedules, its dead latents, and one step.

A step reads: encode, decode, loss, backward, one optimiser update. The learning rate's and the penalty's schedules are
arguments of the step they act on, and everything that a later step depends on is in `state_dict`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels.scratch import scratch
from unweave.objectives import Matryoshka
from unweave.sae import SAE, ArchetypalDictionary, Normalization, TemporalSAE
from unweave.training.clip import check_pending, clip_factor
from unweave.training.config import SAEConfig
from unweave.training.dead import known_count, revived, state_of
from unweave.training.dictionary import archetypal_atoms, hand_over, renew
from unweave.training.fresh import fresh_coder, scale_of, take_over
from unweave.training.fused import Fused, supports
from unweave.training.log_threshold import as_logarithm, step_in_log
from unweave.training.loss import training_loss
from unweave.training.optimizer import Adam, remove_parallel_part, squares_of
from unweave.training.readback import Readback, runs_behind
from unweave.training.resampling import resample
from unweave.training.schedules import learning_rate_factor, warmup_factor
from unweave.training.sparsity import Sparsity
from unweave.training.step import Step
from unweave.training.window import follow_spread, set_window

MAX_DEAD_AFTER = 10_000_000
_EMA = 0.99


class StepSums(NamedTuple):
    """Sums over the tokens of a step, at the scale of training, on the device; ratios are formed for the log."""

    tokens: Tensor
    squared_error: Tensor
    variance: Tensor
    """Squared distance of the inputs from their batch mean."""
    l0: Tensor
    loss: Tensor
    """Loss times tokens."""
    grad_norm: Tensor
    """Gradient norm before clipping, times tokens."""


class Trainee:
    """An SAE, trained step by step at the scale `E||x||^2 = d_in`.

    Args:
        config: What to train.
        sample: Activations `(n, d_in)` that give the input scale and the initial decoder bias.
        target: What a transcoder is to predict from the sample, `(n, d_out)`; None: the sample itself.
        widths: Widths of the hooks that lie side by side in the sample, by name; None: there is one hook.
        target_widths: The same of the target.
        steps: Steps of the whole run, for the schedules.
        tokens: Tokens of the whole run.
        seed: Gives the initial decoder.
        start: An SAE that takes raw activations, to train a copy of; None: a fresh one.

    Raises:
        UnweaveError: If all of the sample is 0, or `start` is not an SAE of this config.
    """

    readback: Readback | None = None
    """What a GPU has yet to say of the last fused steps; None where the host knows at once."""

    def __init__(
        self,
        config: SAEConfig,
        sample: Float[Tensor, "n d_in"],
        *,
        steps: int,
        tokens: int,
        seed: int,
        start: SAE | None = None,
        target: Float[Tensor, "n d_out"] | None = None,
        widths: Mapping[str, int] | None = None,
        target_widths: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.steps, self.step_count, self.seed = config, steps, 0, seed
        self.threshold_batches = 0
        self.scale = scale_of(sample, widths)
        """What inputs are multiplied by; 1 where every token has its own factor."""
        self.normalization = None if config.normalize == "scalar" else Normalization.fit(config.normalize, sample)
        if self.normalization is not None:
            self.scale = self.normalization.scale
        self.target_scale = None if target is None else scale_of(target, target_widths)
        """What targets are multiplied by; None: they are the inputs."""
        # Not the seed itself: from it a synthetic world draws its features, and the SAE would start with them.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} weights".encode()))
        shown, scale = (sample, self.scale) if self.normalization is None else (self.normalization(sample), 1.0)
        sae = fresh_coder(config, shown, target, widths, scale, self.target_scale, generator, target_widths)
        self.atoms = None
        if isinstance(config.dictionary, ArchetypalDictionary):
            self.atoms = archetypal_atoms(config.dictionary, sae, shown * scale, generator)
        if start is not None:
            self.scale = take_over(start, sae, config, self.scale, self.target_scale, self.normalization)
        self.sae = sae.to(sample.device)
        self.dead_after = config.dead_after or min(MAX_DEAD_AFTER, max(tokens // 10, 1))
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sample.device)
        self.k_aux = config.auxk.k_for(sae.d_out) if config.auxk.coefficient > 0 else 0
        fixed = config.matryoshka if isinstance(config.matryoshka, Matryoshka) else None
        self.widths = () if fixed is None else fixed.widths_for(config.d_sae)
        self.k_multi = 0
        if config.multi_topk:
            self.k_multi = config.multi_topk.k_for(config.activation.k, config.d_sae)  # type: ignore[attr-defined]

        parameters = dict(self.sae.named_parameters())
        if self.atoms is not None:
            del parameters["W_dec"]
            parameters |= {f"atoms.{name}": p for name, p in self.atoms.named_parameters()}
        of_thresholds = config.threshold_rate(self.sae.d_in)
        self.rates = {n: of_thresholds if n == "threshold" else config.learning_rate for n in parameters}
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.optimizer = Adam(parameters, config.betas, moments)
        # A subclass with a loss of its own goes through autograd.
        fuses = type(self).loss is Trainee.loss and supports(config, self.sae)
        self.fused = Fused(self.sae, config, self.widths, self.k_aux) if fuses else None
        if self.fused is not None and runs_behind(self.sae.W_dec):
            self.readback = Readback()
        self._screen: kernels.Screen | None = None
        self._screen_of = (0, 0)
        self.dead_counted: tuple[int, int, int] | None = None
        """How many latents are dead, and the state of `tokens_since_fired` that this holds for."""
        self.lr = config.learning_rate
        """Learning rate of the last step."""
        self.sparsity = Sparsity(config, sae.d_out, steps)

    @property
    def penalty(self) -> float:
        """Coefficient of the first sparsity term as it is now, apart from its warm-up; 0 without one."""
        return self.sparsity.coefficient()

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.dead_after

    def loss(
        self, x: Float[Tensor, "n d_in"], sparsity_scale: float, target: Float[Tensor, "n d_out"] | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Loss, reconstruction and codes of a batch at the scale of training."""
        return training_loss(self, x, sparsity_scale, target)

    def split_input(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """Of a temporal SAE, what is left of its inputs to encode, and what the output is without novel codes."""
        assert isinstance(self.sae, TemporalSAE)
        return self.sae.split_input(x)

    def _autograd(self, x: Float[Tensor, "n d_in"], sparsity_scale: float, target: Tensor | None = None) -> Step:
        """Loss and gradients of any objective."""
        sae, parameters = self.sae, self.optimizer.parameters
        loss, x_hat, codes = self.loss(x, sparsity_scale) if target is None else self.loss(x, sparsity_scale, target)
        loss.backward()
        with torch.no_grad():
            if self.config.decoder_is_unit:
                for block in sae.decoders:
                    remove_parallel_part(block)
            if self.atoms is not None:
                hand_over(self.atoms, sae)
            # A parameter that this batch does not reach (a penalty warming up from 0) has none.
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
            for parameter in parameters.values():
                parameter.grad = None
            squares = squares_of(grads)
            smallest = None
            if self.config.activation.calibrated:
                positive = codes.values[codes.values > 0]
                smallest = positive.min() if len(positive) else None
            error = kernels.squared_norm(x_hat.detach() - (x if target is None else target))
            return Step(
                loss.detach(), error, codes.l0().sum(), codes.firing_counts() > 0, smallest, dict(grads), squares
            )

    def step(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None = None) -> StepSums:
        """Take one optimiser step on raw activations and, for a transcoder, what it is to predict from them."""
        config, sae = self.config, self.sae
        if len(x) == 0:
            raise UnweaveError("a training step needs at least one token, and the batch is empty.")
        raw, x = x, self._scaled(x)
        if self.target_scale is not None and target is not None:
            target = target.detach().to(sae.dtype) * self.target_scale
        sparsity_scale = warmup_factor(self.step_count, self.steps, config.sparsity_warmup)
        follow_spread(self, x)
        made = None
        if self.fused is not None:
            penalty = self.sparsity.scaled(self.step_count, sparsity_scale)
            try:
                made = self.fused(x, revived(self), penalty, self._current_screen())  # x is centred there
            except kernels.TooDense:
                x = self._scaled(raw)
        if made is None:
            made = self._autograd(x, sparsity_scale, target)
        log_threshold = getattr(config.activation, "log_threshold", False)
        if log_threshold:
            made = step_in_log(made, sae.threshold)  # type: ignore[arg-type]
        grad_norm = made.squares.sqrt().to(torch.float32)
        clip, n_dead = clip_factor(self, made, grad_norm, len(x))
        factor = learning_rate_factor(self.step_count, self.steps, config.warmup, config.decay)
        self.lr = config.learning_rate * factor
        rates = {name: rate * factor for name, rate in self.rates.items()}
        if config.threshold_schedule is not None:
            rates["threshold"] *= config.threshold_schedule(self.step_count, self.steps)
        with as_logarithm(sae.threshold) if log_threshold else nullcontext():  # type: ignore[arg-type]
            self._screen = self.optimizer.step(
                made.grads,
                rates,
                grad_scale=clip,
                unit="W_dec" if config.decoder_is_unit else None,
                screen=None if self.fused is None or self.fused.dense else ("W_enc", config.precision),
                # A GPU may leave out the step, and what it leaves as it is has to be right.
                instead_of=self._screen if self.readback is None else self._current_screen(),
            )
        self._screen_of = state_of(sae.W_enc)
        if self.atoms is not None:
            renew(self.atoms, sae)
        with torch.no_grad():
            if isinstance(sae.threshold, torch.nn.Parameter):
                sae.threshold.clamp_(min=0)
            self._track(made, len(x) if made.fits is None else len(x) * made.fits)
            self.dead_counted = None if n_dead is None else (n_dead, *state_of(self.tokens_since_fired))
        self.sparsity.observe(made.l0 / len(x), self.step_count)
        if config.resampling is not None and config.resampling.due(self.step_count, self.steps):
            replaced = resample(sae, self.optimizer, self.dead, self._scaled(raw), config.resampling, self.draws())
            self.tokens_since_fired[replaced] = 0
        self.step_count += 1
        n = torch.full((), float(len(x)), device=x.device)
        variance = kernels.spread(x if target is None else target)  # centred or not, inputs vary as much
        return StepSums(n, made.squared_error, variance, made.l0, made.loss * n, grad_norm * n)

    def _scaled(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Activations at the scale of training, not in the memory of `x`; valid until the next step of any SAE."""
        x = x.detach().to(self.sae.dtype)
        if self.normalization is not None:
            return self.normalization(x)
        if x.device.type != "cpu":
            return x * self.scale
        return torch.mul(x, self.scale, out=scratch("scaled inputs", tuple(x.shape), x.dtype))

    def draws(self) -> torch.Generator:
        """The random numbers of a step: a function of seed and step alone, so that a resumed run draws alike."""
        # Of a seed, torch's CPU generator takes 32 bits.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.step_count}".encode()))

    def _current_screen(self) -> kernels.Screen | None:
        """What the last update made for this step, unless the encoder was changed in between."""
        return self._screen if self._screen_of == state_of(self.sae.W_enc) else None

    def _track(self, made: Step, n: int | Tensor) -> None:
        """Count the tokens since each latent fired; estimate BatchTopK's inference threshold (bias-corrected mean)."""
        self.tokens_since_fired += n
        self.tokens_since_fired.masked_fill_(made.fired if made.fits is None else made.fired & made.fits, 0)
        if made.smallest is not None and (threshold := self.sae.threshold) is not None:
            self.threshold_batches += 1  # those in which nothing fires say nothing, and do not count
            share = (1 - _EMA) / (1 - _EMA**self.threshold_batches)
            threshold.copy_(torch.where(threshold.isnan(), made.smallest, threshold.lerp(made.smallest, share)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name.

        Raises:
            UnweaveError: If a gradient was NaN or infinite, of which a GPU has not spoken yet.
        """
        check_pending(self)
        return {
            "sae": dict(self.sae.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "normalization": None if self.normalization is None else vars(self.normalization),
            "target_scale": self.target_scale,
            "step_count": self.step_count,
            "threshold_batches": self.threshold_batches,
            "atoms": None if self.atoms is None else dict(self.atoms.state_dict()),
            "dense": self.fused is not None and self.fused.dense,
            "sparsity": self.sparsity.state_dict(),
            "bandwidth": getattr(self.sae.activation, "bandwidth", None),
            "pending": [] if self.readback is None else self.readback.state(),
            "dead_counted": None if self.readback is None else known_count(self),
            "density": None if self.fused is None else self.fused.density,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sae.load_state_dict(state["sae"])
        if self.atoms is not None:
            self.atoms.load_state_dict(state["atoms"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.scale, self.target_scale = state["scale"], state["target_scale"]
        if isinstance(self.scale, Tensor):
            self.scale = self.scale.to(self.sae.device)
        if isinstance(self.target_scale, Tensor):
            self.target_scale = self.target_scale.to(self.sae.device)
        if self.normalization is not None:
            self.normalization = Normalization(**state["normalization"]).to(self.sae.device)
        self.step_count, self.threshold_batches = state["step_count"], state["threshold_batches"]
        self.optimizer.load_state_dict(state["optimizer"], self.step_count)
        self.sparsity.load_state_dict(state["sparsity"], self.step_count)
        set_window(self, state["bandwidth"])
        self._screen = self.dead_counted = None  # of the weights before
        if self.fused is not None:
            self.fused.dense, self.fused.begun = bool(state.get("dense")), self.step_count > 0
            self.fused.density = state["density"]
        if self.readback is not None:
            self.readback.restore(state["pending"])
            if (n_dead := state["dead_counted"]) is not None:
                self.dead_counted = (n_dead, *state_of(self.tokens_since_fired))
