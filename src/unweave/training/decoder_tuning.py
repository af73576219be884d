"""The trainee of a run that fine-tunes a decoder: codes stay exactly what they are, the output gets better.

    scale              a factor for each latent, as an L1 penalty shrinks codes
    unrotated_decoder  the factors and the decoder's bias: rows keep their directions
    decoder            everything behind the codes: decoder rows, bias and, where there is one, the skip

Everything can be folded into the decoder, so what comes out is a coder like any other. A crosscoder has one factor for
each latent, the same at all its hooks, because its code is one; so has a cross-layer transcoder for all that a latent
writes to. An SAE whose decoder encodes, too, comes out untied: its encoder is what its decoder was. What is special of
temporal SAEs is in `unweave.training.temporal_tuning`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.objectives import squared_error
from unweave.sae import SAE, TemporalSAE, ops
from unweave.sae.clt import CrossLayerPart
from unweave.sae.codes import SparseCodes
from unweave.sae.folds import fold_output_scale
from unweave.sae.normalization import token_statistics
from unweave.training.config import Method, SAEConfig
from unweave.training.fresh import Scale, scale_of
from unweave.training.optimizer import Adam, squares_of
from unweave.training.schedules import learning_rate_factor
from unweave.training.sites import Site
from unweave.training.sparsity import Sparsity
from unweave.training.trainee import MAX_DEAD_AFTER, StepSums, Trainee


class DecoderTuning(Trainee):
    """A finished coder of which only (parts of) the decoder are trained, step by step, by Adam on the squared error.

    Not made by `Trainee.__init__`: nothing is fresh, and nothing of the encoder or of its penalties is trained. Codes
    are those of raw inputs. The decoder's rows begin at norm 1, beside their `norms`, and are free, and outputs are
    compared at a mean squared norm of their width, so that a learning rate means the same for every coder.

    Args:
        start: The coder; it is not changed.
        method: What is trained.
        config: Learning rate and schedules.
        sample: Raw inputs `(n, d_in)`, which give the scale of training.
        target: What a transcoder is to predict from them, `(n, d_out)`; None: the inputs.
        steps: Steps of the whole run.
        tokens: Tokens of the whole run.
        widths: Widths of the hooks that lie side by side in the sample, by name; None: there is one hook.
        target_widths: The same of the target.

    Raises:
        UnweaveError: If no part of the decoder can change while codes stay, or all of the sample is 0.
    """

    def __init__(
        self,
        start: SAE,
        method: Method,
        config: SAEConfig,
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"] | None = None,
        *,
        steps: int,
        tokens: int,
        widths: Mapping[str, int] | None = None,
        target_widths: Mapping[str, int] | None = None,
    ) -> None:
        check_tunable(start)
        self.config, self.steps, self.step_count, self.method = config, steps, 0, method
        # In bfloat16, most steps would be lost in rounding.
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.start = start
        sae = self.sae = untied(start).to(sample.device, dtype).requires_grad_(False)
        self.normalization, self.atoms, self.fused = None, None, None
        self.scale, self.target_scale = self._to_training(sample, target, widths, target_widths)
        self.factor = nn.Parameter(torch.ones_like(sae.b_enc))
        norms = torch.cat([block.norm(dim=1) for block in sae.decoders])
        self.norms = torch.where(norms > 0, norms, 1.0)
        for block, own in sae.with_decoders(self.norms):
            block.div_(own[:, None])
        behind = {n: p for n, p in sae.named_parameters() if n.partition(".")[0] in ("W_dec", "b_dec", "W_skip")}
        trained = behind if method == "decoder" else {"factor": self.factor}
        if method == "unrotated_decoder":
            trained["b_dec"] = sae.b_dec
        for parameter in trained.values():
            parameter.requires_grad_()
        self.optimizer = Adam(trained, config.betas, dtype)
        self.widths: tuple[int, ...] = ()
        self.k_aux = 0  # nothing revives latents
        self.dead_after = config.dead_after or min(MAX_DEAD_AFTER, max(tokens // 10, 1))
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sample.device)
        self.lr = config.learning_rate
        self.sparsity = Sparsity(config, sae.d_out, steps)

    @torch.no_grad()
    def _to_training(
        self,
        sample: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"] | None,
        widths: Mapping[str, int] | None,
        target_widths: Mapping[str, int] | None,
    ) -> tuple[Scale, Scale | None]:
        """Bring what is behind the codes to the scale of training, and return that of inputs and of targets."""
        sae = self.sae
        move_bias(sae, subtracted=False)
        scale = 1.0 if sae.per_token else scale_of(sample, widths)
        target_scale = None if target is None else scale_of(target, target_widths)
        fold_output_scale(sae, 1 / scale, None if target_scale is None else 1 / target_scale)
        return scale, target_scale

    def _to_raw(self, sae: SAE) -> None:
        """Bring a coder back to the scale of raw activations."""
        fold_output_scale(sae, self.scale, self.target_scale)

    @property
    def row_norms(self) -> Float[Tensor, " d_sae"]:
        """What the decoder's rows are multiplied by."""
        return self.norms if self.method == "decoder" else self.norms * self.factor

    def outputs(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None
    ) -> tuple[SparseCodes, Float[Tensor, "n d_out"], Float[Tensor, "n d_out"]]:
        """Codes, outputs and what these should be, at the scale of training, of raw activations."""
        sae = self.sae
        with torch.no_grad():
            codes = sae.encode_sparse(x)
        x = x * self.scale if sae.per_token is None else token_statistics(x, sae.per_token).apply(x)
        y = x
        if target is not None:
            assert self.target_scale is not None
            y = target.detach().to(x) * self.target_scale
        scaled = codes.with_values(codes.values * codes.at(self.row_norms))
        return codes, ops.decode(scaled, sae.decoders) + sae.constant(x), y

    def step(self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None = None) -> StepSums:
        """Take one optimiser step on raw activations and, for a transcoder, what it is to predict from them."""
        config = self.config
        codes, y_hat, y = self.outputs(x.detach().to(self.sae.device, self.sae.dtype), target)
        loss = squared_error(y_hat, y)
        loss.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.optimizer.parameters.items()}
        for parameter in self.optimizer.parameters.values():
            parameter.grad = None
        grad_norm = squares_of(grads).sqrt().to(torch.float32)
        if not grad_norm.isfinite():
            raise UnweaveError(f"the gradient of step {self.step_count} is NaN or infinite: try a lower learning rate.")
        at = min(self.step_count, self.steps - 1)  # batches may get shorter than the first one
        self.lr = config.learning_rate * learning_rate_factor(at, self.steps, config.warmup, config.decay)
        self.optimizer.step(grads, dict.fromkeys(grads, self.lr))
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[codes.firing_counts() > 0] = 0
        self.step_count += 1
        n = torch.tensor(float(len(x)), device=y.device)
        error, variance = kernels.squared_norm(y_hat.detach() - y), kernels.spread(y)
        return StepSums(n, error, variance, codes.l0().sum(), loss.detach() * n, grad_norm * n)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "sae": dict(self.sae.state_dict()),
            "norms": self.norms,
            "factor": self.factor,
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "target_scale": self.target_scale,
            "step_count": self.step_count,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sae.load_state_dict(state["sae"])
        for name in ("norms", "factor", "tokens_since_fired"):
            getattr(self, name).copy_(state[name])
        self.scale, self.target_scale = (
            value.to(self.sae.device) if isinstance(value, Tensor) else value
            for value in (state["scale"], state["target_scale"])
        )
        self.step_count = state["step_count"]
        self.optimizer.load_state_dict(state["optimizer"], self.step_count)

    @torch.no_grad()
    def finished(self, metadata: dict[str, Any]) -> SAE:
        """A copy of the coder for raw activations, norms and factors folded into its decoder."""
        start, factor = self.sae, self.norms * self.factor
        if self.method == "scale":  # all the rest stays as it is, bit by bit
            start, factor = self.start, self.factor.detach()
        sae = untied(start).to(self.sae.device, self.sae.dtype).requires_grad_(False)
        for block, own in sae.with_decoders(factor):
            block.mul_(own[:, None])
        if self.method != "scale":
            self._to_raw(sae)
        sae.metadata = dict(metadata)
        return sae


def tuned_trainee(
    start: SAE,
    method: Method,
    config: SAEConfig,
    site: Site,
    sample: Mapping[str, Float[Tensor, "n d"]],
    *,
    steps: int,
    tokens: int,
    seed: int,
) -> Trainee:
    """A `DecoderTuning` at a site, as `MakeTrainee` wants it; nothing of it is random."""
    return DecoderTuning(start, method, config, **site.sample(sample), steps=steps, tokens=tokens)


def check_tunable(sae: SAE) -> None:
    """Refuse coders whose codes would change with any part of their decoder.

    Raises:
        UnweaveError: With the reason.
    """
    if sae.activation.tied:
        raise UnweaveError(
            f"a {sae.activation.name} SAE chooses each atom by what the atoms before it leave of the input, so no part "
            "of its decoder can change while its codes stay: it can be trained end to end."
        )
    if isinstance(sae, CrossLayerPart):
        raise UnweaveError("a part of a cross-layer transcoder shares its weights with others: fine-tune the whole.")


def untied(sae: SAE) -> SAE:
    """A copy with an encoder of its own, whose codes are the same."""
    if not sae.tied:
        return copy.deepcopy(sae)
    with torch.device("meta"):  # nothing is drawn or allocated: all weights are taken over
        made = SAE(sae.d_in, sae.d_sae, sae.activation)
        if isinstance(sae, TemporalSAE):
            made = TemporalSAE(sae.d_in, sae.d_sae, sae.activation, replace(sae.settings, tied=False))
            made.scale = sae.scale
            made.register_buffer("b_enc", sae.b_enc.clone(), persistent=False)
    made.requires_grad_(False)
    made.apply_b_dec_to_input, made.per_token, made.metadata = sae.apply_b_dec_to_input, sae.per_token, sae.metadata
    # Each in the type that it has: a threshold is in float32 beside weights of any other.
    weights = sae.state_dict() | {"W_enc": sae.W_enc.detach()}
    made.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return made


@torch.no_grad()
def move_bias(sae: SAE, *, subtracted: bool) -> None:
    """Whether the decoder's bias is subtracted from the input, in place; the encoder's makes up for it, codes stay."""
    if sae.apply_b_dec_to_input == subtracted:
        return
    shifts = [sae.b_dec @ W * (-1 if subtracted else 1) for W, _ in sae.encoders]
    sae.activation.shift_parameters(sae, shifts[0])
    for (_, b), shift in zip(sae.encoders, shifts, strict=True):
        b.sub_(shift)
    sae.apply_b_dec_to_input = subtracted
