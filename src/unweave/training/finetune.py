"""Fine-tuning of a finished SAE's decoder: its codes stay exactly what they are, the reconstruction gets better.

    scale              a factor for each latent, as an L1 penalty shrinks codes
    unrotated_decoder  the factors and the decoder's bias: rows keep their directions
    decoder            decoder rows and bias

Everything can be folded into the decoder, so what comes out is an SAE like any other. `finetune` takes batches of
activations; whole runs, with checkpoints, are those of `train` with a `Start`. Training against the model that the SAE
belongs to is in `unweave.training.end_to_end`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.objectives import squared_error
from unweave.sae import SAE, fold_input_scale, ops
from unweave.sae.normalization import token_statistics
from unweave.training.config import METHODS, Method, SAEConfig
from unweave.training.fresh import scale_of
from unweave.training.optimizer import Adam, squares_of
from unweave.training.schedules import learning_rate_factor
from unweave.training.sites import Site
from unweave.training.sparsity import Sparsity
from unweave.training.trainee import MAX_DEAD_AFTER, StepSums, Trainee


class DecoderTuning(Trainee):
    """A finished SAE of which only (parts of) the decoder are trained, step by step, by Adam on the squared error.

    Not made by `Trainee.__init__`: nothing is fresh, and nothing of the encoder or of its penalties is trained.

    Args:
        start: The SAE; it is not changed.
        method: What is trained.
        config: Learning rate and schedules.
        sample: Raw activations `(n, d_in)`, which give the scale of training.
        steps: Steps of the whole run.
        tokens: Tokens of the whole run.

    Raises:
        UnweaveError: If the SAE has no decoder of its own, or all of the sample is 0.
    """

    def __init__(
        self, start: SAE, method: Method, config: SAEConfig, sample: Float[Tensor, "n d_in"], *, steps: int, tokens: int
    ) -> None:
        check_tunable(start)
        self.config, self.steps, self.step_count, self.method = config, steps, 0, method
        # In bfloat16, most steps would be lost in rounding.
        self.sae = copy.deepcopy(start).to(sample.device, torch.float32).requires_grad_(False)
        self.sae.per_token = None
        self.per_token = start.per_token
        """What is done to each token beforehand, and undone by the finished SAE."""
        move_bias(self.sae, subtracted=False)
        self.scale = 1.0 if self.per_token else scale_of(sample)
        self.target_scale, self.normalization, self.atoms = None, None, None
        fold_input_scale(self.sae, 1 / self.scale)
        self.factor = nn.Parameter(torch.ones_like(self.sae.b_enc))
        sae = self.sae
        trained: Mapping[Method, dict[str, nn.Parameter]] = {
            "scale": {"factor": self.factor},
            "unrotated_decoder": {"factor": self.factor, "b_dec": sae.b_dec},
            "decoder": {"W_dec": sae.W_dec, "b_dec": sae.b_dec},
        }
        for parameter in trained[method].values():
            parameter.requires_grad_()
        self.optimizer = Adam(trained[method], config.betas)
        self.widths: tuple[int, ...] = ()
        self.dead_after = config.dead_after or min(MAX_DEAD_AFTER, max(tokens // 10, 1))
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sample.device)
        self.lr = config.learning_rate
        self.sparsity = Sparsity(config, sae.d_out, steps)

    def step(self, x: Float[Tensor, "n d_in"], target: Tensor | None = None) -> StepSums:
        """Take one optimiser step on raw activations."""
        sae, config = self.sae, self.config
        x = x.detach().to(sae.device, sae.dtype)
        if self.per_token is not None:
            x = token_statistics(x, self.per_token).apply(x)
        x = x * self.scale
        with torch.no_grad():
            codes = sae.encode_sparse(x)
        scaled = codes if self.method == "decoder" else codes.with_values(codes.values * codes.at(self.factor))
        x_hat = ops.decode(scaled, sae.W_dec) + sae.b_dec
        loss = squared_error(x_hat, x)
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
        n = torch.tensor(float(len(x)), device=x.device)
        error, variance = kernels.squared_norm(x_hat.detach() - x), kernels.squared_norm(x - x.mean(0))
        return StepSums(n, error, variance, codes.l0().sum(), loss.detach() * n, grad_norm * n)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "sae": dict(self.sae.state_dict()),
            "factor": self.factor,
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "step_count": self.step_count,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.sae.load_state_dict(state["sae"])
        self.factor.copy_(state["factor"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.scale, self.step_count = state["scale"], state["step_count"]
        self.optimizer.load_state_dict(state["optimizer"], self.step_count)

    @torch.no_grad()
    def finished(self, metadata: dict[str, Any]) -> SAE:
        """A copy of the SAE for raw activations, the factors folded into its decoder."""
        sae = copy.deepcopy(self.sae).requires_grad_(False)
        sae.W_dec.mul_(self.factor[:, None])
        assert isinstance(self.scale, float)
        fold_input_scale(sae, self.scale)
        sae.per_token = self.per_token
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
    return DecoderTuning(start, method, config, site.rows(sample).x, steps=steps, tokens=tokens)


def finetune(
    sae: SAE,
    batches: Iterable[Float[Tensor, "n d_in"]],
    *,
    method: Method = "decoder",
    tokens: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.05,
    decay: float = 0.5,
) -> SAE:
    """Train a copy of an SAE's decoder on the squared error, with the encoder frozen.

    Args:
        sae: Any autoencoder that takes raw activations; it is not changed.
        batches: Raw activations.
        method: What is trained; see above.
        tokens: Activations to train on; the last batch is cut. None: all that there are, which must be a sequence.
        lr: Learning rate of Adam, for inputs scaled to a mean squared norm of d_in.
        warmup: Share of the run over which it rises.
        decay: Share of the run, at its end, over which it falls to 0.

    Returns:
        An SAE whose codes are those of `sae`. Its decoder's bias is not subtracted from the input any more (that of
        `sae` moved into the encoder), so that the two biases are free of each other.

    Raises:
        UnweaveError: If there is no such method, encoder and decoder are one, there are too few activations, or they
            are not finite or of another width.
    """
    if method not in METHODS:
        raise UnweaveError(f"SAEs are fine-tuned by {', '.join(METHODS)}, not by {method!r}.")
    check_tunable(sae)
    if tokens is None:
        batches = list(batches)
        tokens = sum(len(b) for b in batches)
    stream = iter(batches)
    first = next(stream, None)
    if first is None or tokens < 1 or len(first) == 0:
        raise UnweaveError("there are no activations to fine-tune on.")
    config = SAEConfig(
        d_sae=sae.d_sae, activation=sae.activation, sparsity=(), lr=lr, warmup=warmup, decay=decay, grad_clip=None
    )
    trainee, seen = DecoderTuning(sae, method, config, first, steps=-(-tokens // len(first)), tokens=tokens), 0
    for batch in chain([first], stream):
        x, step = batch[: tokens - seen], trainee.step_count
        if x.ndim != 2 or x.shape[1] != sae.d_in or not x.isfinite().all():
            raise UnweaveError(f"batch {step} must be finite and have the shape (n, {sae.d_in}), got {tuple(x.shape)}.")
        trainee.step(x)
        seen += len(x)
        if seen >= tokens:
            break
    if seen < tokens:
        raise UnweaveError(f"the activations ran out after {seen:,} of {tokens:,} tokens.")
    return trainee.finished(sae.metadata | {"finetuning": {"method": method, "tokens": tokens, "lr": lr}})


def check_tunable(sae: SAE) -> None:
    """Refuse what has no decoder to itself.

    Raises:
        UnweaveError: It is no autoencoder, or encoder and decoder are one.
    """
    if type(sae) is not SAE or sae.tied:
        raise UnweaveError("fine-tuning a decoder takes an autoencoder with an encoder of its own.")


@torch.no_grad()
def move_bias(sae: SAE, *, subtracted: bool) -> None:
    """Whether the decoder's bias is subtracted from the input, in place; the encoder's makes up for it, codes stay."""
    if sae.apply_b_dec_to_input == subtracted:
        return
    shift = sae.b_dec @ sae.W_enc * (-1 if subtracted else 1)
    sae.activation.shift_parameters(sae, shift)
    sae.b_enc.sub_(shift)
    sae.apply_b_dec_to_input = subtracted
