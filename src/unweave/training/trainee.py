"""One SAE under training: its optimiser, its schedules, its dead latents, and one step.

A step reads: encode, decode, loss, backward, one optimiser update. The learning rate's and the penalty's schedules are
arguments of the step they act on, and everything that a later step depends on is in `state_dict`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.objectives import (
    L1,
    TargetL0,
    auxk_loss,
    dead_latents_loss,
    gate_error,
    l1_penalty,
    matryoshka_error,
    multi_topk_error,
    open_gate,
    squared_error,
    target_l0_penalty,
)
from unweave.objectives.penalties import decoder_norms
from unweave.sae import SAE, BatchTopK, Gated, TopK, fold_decoder_norms, fold_input_scale, ops
from unweave.training.config import SAEConfig
from unweave.training.fused import Fused, supports
from unweave.training.optimizer import Adam, squares_of
from unweave.training.schedules import learning_rate_factor, warmup_factor
from unweave.training.step import Step

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
        steps: Steps of the whole run, for the schedules.
        tokens: Tokens of the whole run.
        seed: Gives the initial decoder.
        start: An SAE that takes raw activations, to train a copy of; None: a fresh one.

    Raises:
        UnweaveError: If all of the sample is 0, or `start` is not an SAE of this config.
    """

    def __init__(
        self,
        config: SAEConfig,
        sample: Float[Tensor, "n d_in"],
        *,
        steps: int,
        tokens: int,
        seed: int,
        start: SAE | None = None,
    ) -> None:
        self.config, self.steps, self.step_count = config, steps, 0
        d_in = sample.shape[1]
        mean_square = sample.double().square().sum(1).mean().item()  # the square may leave float32's range
        if mean_square == 0:
            raise UnweaveError("all activations of the first batch are 0, so there is nothing to train on.")
        self.scale = (d_in / mean_square) ** 0.5
        sae = SAE(d_in, config.d_sae, config.activation, generator=torch.Generator().manual_seed(seed))
        if start is not None:
            _check_start(start, config, d_in)
            sae.load_state_dict(start.state_dict())
            fold_input_scale(sae, 1 / self.scale)
            fold_decoder_norms(sae)
        elif not config.decoder_is_unit:
            # A small start lets an L1 penalty's norms grow where they are needed (Anthropic, April 2024).
            sae.W_dec.data.mul_(0.1)
            sae.W_enc.data.mul_(0.1)
        if start is None and config.b_dec_init == "mean":
            sae.b_dec.data.copy_(sample.float().mean(0).cpu() * self.scale)
        self.sae = sae.to(sample.device)
        self.dead_after = config.dead_after or min(MAX_DEAD_AFTER, max(tokens // 10, 1))
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=sample.device)
        self.k_aux = config.auxk.k_for(d_in) if config.auxk.coefficient > 0 else 0
        self.widths = config.matryoshka.widths_for(config.d_sae) if config.matryoshka else ()
        self.k_multi = 0
        if config.multi_topk and isinstance(config.activation, TopK | BatchTopK):
            self.k_multi = config.multi_topk.k_for(config.activation.k, config.d_sae)

        parameters = dict(self.sae.named_parameters())
        self.rates = {n: config.threshold_lr if n == "threshold" else config.learning_rate for n in parameters}
        moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.optimizer = Adam(parameters, config.betas, moments)
        # A subclass with a loss of its own goes through autograd.
        fuses = type(self).loss is Trainee.loss and supports(config, self.sae)
        self.fused = Fused(self.sae, config, self.widths, self.k_aux) if fuses else None
        self._screen: kernels.Screen | None = None
        self._screen_of = (0, 0)
        self.lr = config.learning_rate
        """Learning rate of the last step."""
        match config.sparsity_term:
            case L1() as l1:
                self.penalty = l1.coefficient_for(d_in)
            case TargetL0(_, coefficient):
                self.penalty = coefficient * d_in
            case None:
                self.penalty = 0.0

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.dead_after

    def loss(self, x: Float[Tensor, "n d_in"], sparsity_scale: float) -> tuple[Tensor, Tensor, Any]:
        """Loss, reconstruction and codes of a batch at the scale of training."""
        config, sae = self.config, self.sae
        dead = self.dead
        n_dead = int(dead.sum()) if self.k_aux or config.ghost or config.pre_act else 0
        pre, codes, aux, extra = sae.training_codes(x, dead if n_dead else None, self.k_aux, self.k_multi)
        if self.widths:
            loss, x_hat = matryoshka_error(codes, sae.W_dec, sae.b_dec, x, self.widths)
        else:
            x_hat = ops.decode(codes, sae.W_dec) + sae.b_dec
            loss = squared_error(x_hat, x)
        penalised = codes
        if isinstance(config.activation, Gated):
            penalised = open_gate(pre)
            loss = loss + gate_error(penalised, sae.W_dec, sae.b_dec, x)
        if config.multi_topk and extra is not None:
            loss = loss + config.multi_topk.coefficient * multi_topk_error(extra, sae.W_dec, x_hat, x)
        match config.sparsity_term:
            case L1():
                loss = loss + sparsity_scale * self.penalty * l1_penalty(penalised, decoder_norms(sae.W_dec))
            case TargetL0(l0):
                penalty = target_l0_penalty(pre, sae.threshold, sae.activation, l0)  # type: ignore[arg-type]
                loss = loss + sparsity_scale * self.penalty * penalty
        if aux is not None:
            loss = loss + config.auxk.coefficient * auxk_loss(aux, sae.W_dec, x - x_hat, n_dead, self.k_aux)
        if n_dead and (config.ghost or config.pre_act):
            latents = dead.nonzero().flatten()
            loss = loss + dead_latents_loss(sae, latents, x, x - x_hat, config.pre_act, config.ghost)
        return loss, x_hat, codes

    def _autograd(self, x: Float[Tensor, "n d_in"], sparsity_scale: float) -> Step:
        """Loss and gradients of any objective."""
        sae, parameters = self.sae, self.optimizer.parameters
        loss, x_hat, codes = self.loss(x, sparsity_scale)
        loss.backward()
        with torch.no_grad():
            if self.config.decoder_is_unit:
                _remove_parallel_part(sae.W_dec)
            # A parameter that this batch does not reach (a penalty warming up from 0) has none.
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
            for parameter in parameters.values():
                parameter.grad = None
            squares = squares_of(grads)
            smallest = None
            if isinstance(self.config.activation, BatchTopK):
                positive = codes.values[codes.values > 0]
                smallest = positive.min() if len(positive) else None
            error = kernels.squared_norm(x_hat.detach() - x)
            return Step(
                loss.detach(), error, codes.l0().sum(), codes.firing_counts() > 0, smallest, dict(grads), squares
            )

    def step(self, x: Float[Tensor, "n d_in"]) -> StepSums:
        """Take one optimiser step on raw activations."""
        config, sae = self.config, self.sae
        if len(x) == 0:
            raise UnweaveError("a training step needs at least one token, and the batch is empty.")
        x = x.detach().to(sae.dtype) * self.scale
        sparsity_scale = warmup_factor(self.step_count, self.steps, config.sparsity_warmup)
        made = None
        if self.fused is not None:
            with suppress(kernels.TooDense):
                made = self.fused(x, self.dead, sparsity_scale * self.penalty, self._current_screen())
        if made is None:
            made = self._autograd(x, sparsity_scale)
        grad_norm = made.squares.sqrt().to(torch.float32)
        if not grad_norm.isfinite():
            raise UnweaveError(f"the gradient of step {self.step_count} is NaN or infinite: try a lower learning rate.")
        clip = 1.0
        if config.grad_clip:
            clip = min(1.0, config.grad_clip * sae.d_in / (float(grad_norm) + 1e-6))
        factor = learning_rate_factor(self.step_count, self.steps, config.warmup, config.decay)
        self.lr = config.learning_rate * factor
        self._screen = self.optimizer.step(
            made.grads,
            {name: rate * factor for name, rate in self.rates.items()},
            grad_scale=clip,
            unit="W_dec" if config.decoder_is_unit else None,
            screen=None if self.fused is None else ("W_enc", config.precision),
            instead_of=self._screen,
        )
        self._screen_of = self._state_of_encoder()
        with torch.no_grad():
            if isinstance(sae.threshold, torch.nn.Parameter):
                sae.threshold.clamp_(min=0)
            self._track(made, len(x))
        self.step_count += 1
        n = torch.tensor(float(len(x)), device=x.device)
        variance = kernels.squared_norm(torch.sub(x, x.mean(0), out=x))  # x is not used again
        return StepSums(n, made.squared_error, variance, made.l0, made.loss * n, grad_norm * n)

    def _state_of_encoder(self) -> tuple[int, int]:
        return self.sae.W_enc._version, self.sae.W_enc.data_ptr()

    def _current_screen(self) -> kernels.Screen | None:
        """What the last update made for this step, unless the encoder was changed in between."""
        return self._screen if self._screen_of == self._state_of_encoder() else None

    def _track(self, made: Step, n: int) -> None:
        """Count the tokens since each latent fired; estimate BatchTopK's inference threshold (bias-corrected mean)."""
        self.tokens_since_fired += n
        self.tokens_since_fired[made.fired] = 0
        if isinstance(self.config.activation, BatchTopK) and made.smallest is not None:
            threshold, t = self.sae.threshold, self.step_count
            assert threshold is not None
            before = torch.where(threshold.isnan(), 0.0, threshold) * (1 - _EMA**t)
            threshold.copy_((_EMA * before + (1 - _EMA) * made.smallest) / (1 - _EMA ** (t + 1)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name."""
        return {
            "sae": dict(self.sae.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "step_count": self.step_count,
            "dense": self.fused is not None and self.fused.dense,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sae.load_state_dict(state["sae"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.scale, self.step_count = state["scale"], state["step_count"]
        self.optimizer.load_state_dict(state["optimizer"], self.step_count)
        self._screen = None  # of the weights before
        if self.fused is not None:
            self.fused.dense = bool(state.get("dense"))


def _check_start(start: SAE, config: SAEConfig, d_in: int) -> None:
    found, wanted = (start.d_in, start.d_sae, start.activation), (d_in, config.d_sae, config.activation)
    for name, value, expected in zip(("d_in", "d_sae", "activation"), found, wanted, strict=True):
        if value != expected:
            raise UnweaveError(f"the SAE to start from has {name}={value}, and {name}={expected} is to be trained.")
    if not start.apply_b_dec_to_input:
        raise UnweaveError("an SAE that does not subtract its decoder bias from its input cannot be trained further.")


@torch.no_grad()
def _remove_parallel_part(W_dec: Tensor) -> None:
    """Take out of each row's gradient what would only change the row's norm; rows have unit norm."""
    assert W_dec.grad is not None
    along = torch.linalg.vecdot(W_dec.grad, W_dec)
    W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
