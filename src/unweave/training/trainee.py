"""One SAE under training: its optimiser, its schedules, its dead latents, and one step.

A step reads: encode, decode, loss, backward, one optimiser update. The learning rate's and the penalty's schedules are
arguments of the step they act on, and everything that a later step depends on is in `state_dict`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives import L1, TargetL0, auxk_loss, l1_penalty, squared_error, target_l0_penalty
from unweave.objectives.penalties import decoder_norms
from unweave.sae import SAE, BatchTopK, ops
from unweave.training.config import SAEConfig
from unweave.training.schedules import learning_rate_factor, warmup_factor

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
    """

    def __init__(
        self, config: SAEConfig, sample: Float[Tensor, "n d_in"], *, steps: int, tokens: int, seed: int
    ) -> None:
        self.config, self.steps, self.step_count = config, steps, 0
        d_in = sample.shape[1]
        mean_square = sample.double().square().sum(1).mean().item()  # the square may leave float32's range
        if mean_square == 0:
            raise UnweaveError("all activations of the first batch are 0, so there is nothing to train on.")
        self.scale = (d_in / mean_square) ** 0.5
        sae = SAE(d_in, config.d_sae, config.activation, generator=torch.Generator().manual_seed(seed))
        if not config.decoder_is_unit:
            # A small start lets an L1 penalty's norms grow where they are needed (Anthropic, April 2024).
            sae.W_dec.data.mul_(0.1)
            sae.W_enc.data.mul_(0.1)
        if config.b_dec_init == "mean":
            sae.b_dec.data.copy_(sample.float().mean(0).cpu() * self.scale)
        self.sae = sae.to(sample.device)
        self.dead_after = config.dead_after or min(MAX_DEAD_AFTER, max(tokens // 10, 1))
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=sample.device)
        self.k_aux = config.auxk.k_for(d_in) if config.auxk.coefficient > 0 else 0

        weights = [p for n, p in self.sae.named_parameters() if n != "threshold"]
        groups: list[dict[str, Any]] = [{"params": weights, "base_lr": config.learning_rate}]
        if "threshold" in dict(self.sae.named_parameters()):
            groups.append({"params": [self.sae.threshold], "base_lr": config.threshold_lr})
        self.optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.dead_after

    def loss(self, x: Float[Tensor, "n d_in"], sparsity_scale: float) -> tuple[Tensor, Tensor, Any]:
        """Loss, reconstruction and codes of a batch at the scale of training."""
        config, sae = self.config, self.sae
        dead = self.dead
        n_dead = int(dead.sum()) if self.k_aux else 0
        pre, codes, aux = sae.training_codes(x, dead if n_dead else None, self.k_aux)
        x_hat = ops.decode(codes, sae.W_dec) + sae.b_dec
        loss = squared_error(x_hat, x)
        match config.sparsity_term:
            case L1() as l1:
                coefficient = sparsity_scale * l1.coefficient_for(sae.d_in)
                loss = loss + coefficient * l1_penalty(codes, decoder_norms(sae.W_dec))
            case TargetL0(l0, coefficient):
                penalty = target_l0_penalty(pre, sae.threshold, sae.activation, l0)  # type: ignore[arg-type]
                loss = loss + sparsity_scale * coefficient * sae.d_in * penalty
        if aux is not None:
            loss = loss + config.auxk.coefficient * auxk_loss(aux, sae.W_dec, x - x_hat, n_dead, self.k_aux)
        return loss, x_hat, codes

    def step(self, x: Float[Tensor, "n d_in"]) -> StepSums:
        """Take one optimiser step on raw activations."""
        config, sae = self.config, self.sae
        x = x.detach().to(sae.dtype) * self.scale
        loss, x_hat, codes = self.loss(x, warmup_factor(self.step_count, self.steps, config.sparsity_warmup))
        loss.backward()
        if config.decoder_is_unit:
            _remove_parallel_part(sae.W_dec)
        max_norm = config.grad_clip * sae.d_in if config.grad_clip else float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm)
        factor = learning_rate_factor(self.step_count, self.steps, config.warmup, config.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if config.decoder_is_unit:
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
            if isinstance(sae.threshold, torch.nn.Parameter):
                sae.threshold.clamp_(min=0)
            self._track(codes, len(x))
        self.step_count += 1
        n = torch.tensor(float(len(x)), device=x.device)
        error, variance = (x_hat.detach() - x).square().sum(), (x - x.mean(0)).square().sum()
        return StepSums(n, error, variance, codes.l0().sum(), loss.detach() * n, grad_norm.detach() * n)

    def _track(self, codes: Any, n: int) -> None:
        """Count the tokens since each latent fired; estimate BatchTopK's inference threshold (bias-corrected mean)."""
        self.tokens_since_fired += n
        self.tokens_since_fired[codes.firing_counts() > 0] = 0
        if isinstance(self.config.activation, BatchTopK):
            positive = codes.values[codes.values > 0]
            if len(positive):
                threshold, t = self.sae.threshold, self.step_count
                assert threshold is not None
                before = torch.where(threshold.isnan(), 0.0, threshold) * (1 - _EMA**t)
                threshold.copy_((_EMA * before + (1 - _EMA) * positive.amin()) / (1 - _EMA ** (t + 1)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, by parameter name."""
        names: dict[Tensor, str] = {p: n for n, p in self.sae.named_parameters()}
        return {
            "sae": dict(self.sae.state_dict()),
            "optimizer": {names[p]: dict(s) for p, s in self.optimizer.state.items()},
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "step_count": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sae.load_state_dict(state["sae"])
        for name, parameter in self.sae.named_parameters():
            if name in state["optimizer"]:
                # Moments take their parameter's memory layout, which the fused update walks linearly.
                self.optimizer.state[parameter] = {
                    k: torch.empty_like(parameter).copy_(v)
                    if v.shape == parameter.shape
                    else v.to(parameter.device, copy=True)
                    for k, v in state["optimizer"][name].items()
                }
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.scale, self.step_count = state["scale"], state["step_count"]


@torch.no_grad()
def _remove_parallel_part(W_dec: Tensor) -> None:
    """Take out of each row's gradient what would only change the row's norm; rows have unit norm."""
    assert W_dec.grad is not None
    along = torch.linalg.vecdot(W_dec.grad, W_dec)
    W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
