"""Training against the model itself: a coder is spliced in, and what its output does to the predictions counts.

    clean pass -> activations -> coder -> a pass with its output in the activation's place -> loss

From scratch (Braun et al., arXiv 2405.12241), or, from an SAE that was trained as usual, on the last few million tokens
(arXiv 2503.17272; Gemma Scope 2). It is a run like any other, of a `TrainConfig` with `end_to_end`: penalties, dead
latents, schedules, the optimiser and checkpoints are those of any training. Gradients flow through the model's layers
above the hook.

As in evaluation, a coder reads the activations of the clean pass, a transcoder's output stands where it predicts, and
of a crosscoder or a cross-layer transcoder the output of one hook at a time: the losses are means over its hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.models import Hook, LoadedModel, resolve_hooks, splice
from unweave.objectives import balanced, ce_loss, downstream_error, kl_loss, squared_error
from unweave.sae import TemporalSAE
from unweave.sae.normalization import token_statistics
from unweave.training.config import TrainConfig
from unweave.training.sites import Site
from unweave.training.trainee import Trainee

if TYPE_CHECKING:
    from unweave.training.spliced_session import SplicedSession


def check_end_to_end(config: TrainConfig, model: LoadedModel, hooks: Sequence[str]) -> None:
    """Refuse a model that predicts no tokens, and later hooks that do not come after all of those spliced at.

    Raises:
        UnweaveError: With the reason.
    """
    assert config.end_to_end is not None
    if model.tokenizer is None:
        raise UnweaveError(f"the model {model.name!r} has no tokenizer, so it cannot read text.")
    if getattr(model.module, "get_output_embeddings", lambda: None)() is None:
        raise UnweaveError(f"an end-to-end loss takes a model that predicts tokens, and {model.name!r} does not.")
    for later in later_hooks(config, model):
        for hook in hooks:
            if list(map(str, resolve_hooks(model.module, [hook, str(later)])))[-1] == hook:
                raise UnweaveError(f"the downstream hook {str(later)!r} does not come after {hook!r}.")


def later_hooks(config: TrainConfig, model: LoadedModel) -> list[Hook]:
    """The hooks at which downstream errors are measured."""
    names = list(config.end_to_end.hooks) if config.end_to_end else []
    return resolve_hooks(model.module, names) if names else []


class CleanPass(NamedTuple):
    """A pass of the unchanged model over some rows of text."""

    ids: Int64[Tensor, "prompts context"]
    mask: Bool[Tensor, "prompts context"]
    inputs: dict[str, Any]
    logits: Float[Tensor, "prompts context vocab"] | None
    """None where no loss is of them."""
    activations: dict[str, Float[Tensor, "prompts context d"]]
    """By hook."""
    later: list[Float[Tensor, "prompts context d"]]

    def rows(self) -> dict[str, Float[Tensor, "n d"]]:
        """The activations of the unmasked tokens."""
        return {name: activation[self.mask] for name, activation in self.activations.items()}

    def first(self, n: int) -> Bool[Tensor, "prompts context"]:
        """The first so many unmasked tokens: the last step of a run is cut."""
        return self.mask & (self.mask.flatten().cumsum(0) <= n).view_as(self.mask)


class SplicedTrainee(Trainee):
    """A trainee whose output stands in the model while its loss is computed."""

    def attach(self, session: SplicedSession, site: Site) -> None:
        """Say which passes it is trained on, and where it stands."""
        self.session, self.site = session, site
        hooks = {str(hook): hook for hook in session.stream.hooks}
        self.writes = [hooks[name] for name in site.targets or site.inputs]
        """Where its output belongs."""

    def loss(
        self, x: Float[Tensor, "n d_in"], sparsity_scale: float, target: Float[Tensor, "n d_out"] | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """That of the first unmasked tokens of the current pass, which `x` are the activations of."""
        usual, y_hat, codes = super().loss(x, sparsity_scale, target)
        settings, clean = self.session.config.end_to_end, self.session.current
        assert settings is not None
        assert clean is not None
        error = squared_error(y_hat, x if target is None else target)
        mask = clean.first(len(x))
        made = self._raw(y_hat, clean, len(x)).split([clean.activations[str(hook)].shape[2] for hook in self.writes], 1)
        effects = [self._effect(hook, part, clean, mask) for hook, part in zip(self.writes, made, strict=True)]
        kl, rest = (torch.stack(terms).mean() for terms in zip(*effects, strict=True))
        d = y_hat.shape[1]
        divergence = d * settings.kl * kl if settings.beta is None else balanced(error, kl, settings.beta)
        # What is not the squared error (penalties, dead latents) stays.
        return usual - error + settings.error * error + divergence + d * rest, y_hat, codes

    def split_input(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """Of a temporal SAE, which reads the whole rows of the pass."""
        sae, clean = self.sae, self.session.current
        assert isinstance(sae, TemporalSAE)
        assert clean is not None
        (hook,) = self.site.inputs
        rest, constant = sae.split_sequences(clean.activations[hook].to(x) * self.scale)
        kept = clean.first(len(x)).flatten()
        return rest[kept], constant[kept]

    def _raw(self, y_hat: Float[Tensor, "n d_out"], clean: CleanPass, n: int) -> Float[Tensor, "n d_out"]:
        """Outputs in the units of the model."""
        if self.target_scale is not None:
            return y_hat / self.target_scale
        if self.normalization is None:
            return y_hat / self.scale
        if self.normalization.per_token is None:
            return self.normalization.reversed()(y_hat)
        x = self.site.rows(clean.rows()).x[:n].to(y_hat.dtype)
        return token_statistics(x, self.normalization.per_token).undo(y_hat)

    def _effect(
        self, hook: Hook, output: Float[Tensor, "n d"], clean: CleanPass, mask: Bool[Tensor, "prompts context"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The divergence of a pass with some output at a hook, and the other terms with their coefficients."""
        settings, module = self.session.config.end_to_end, self.session.model.module
        assert settings is not None
        leaf, later = output.detach().requires_grad_(), list[Tensor]()

        def put(activation: Tensor) -> Tensor:
            new = activation.clone()
            new[mask] = leaf.to(new.dtype)
            return new

        def keep(activation: Tensor) -> Tensor:
            later.append(activation)
            return activation

        with splice(module, {hook: put} | dict.fromkeys(self.session.later, keep)):
            logits = module(clean.ids, **clean.inputs).logits
        if not logits.requires_grad:
            raise UnweaveError(f"no prediction depends on what passes at {str(hook)!r}: train it on its squared error.")
        kl, rest = logits.new_zeros(()), logits.new_zeros(())
        if settings.beta is not None or settings.kl:
            assert clean.logits is not None
            kl = kl_loss(clean.logits, logits, mask)
        if settings.ce:
            rest = rest + settings.ce * ce_loss(logits, clean.ids, mask)
        if settings.downstream:
            rest = rest + settings.downstream * downstream_error(clean.later, later, mask)
        return _handed_over(kl, leaf, output, last=not rest.requires_grad), _handed_over(rest, leaf, output, last=True)


def _handed_over(value: Float[Tensor, ""], leaf: Tensor, output: Tensor, *, last: bool) -> Float[Tensor, ""]:
    """A value of a pass, whose gradient is now that for `output`: the pass itself is needed no more if it is the last.

    So the graph of one pass is alive at a time, however many hooks a coder writes to.
    """
    if not value.requires_grad:
        return value
    (grad,) = torch.autograd.grad(value, leaf, retain_graph=not last)
    return value.detach() + ((output - output.detach()) * grad).sum()
