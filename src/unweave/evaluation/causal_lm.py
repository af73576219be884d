"""A causal language model that can be run again with one activation changed, without computing everything again.

A model is seen as a body, which ends in hidden states, and a head, which makes logits of them. The layers before the
hook are replayed from the clean run, and the head is applied where logits are wanted. Since both rest on how Hugging
Face models are built, `reproduces` compares with the model as it is before any number is taken from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from unweave.evaluation.replay import Recording, layers_before, replay
from unweave.models import Edit, Hook, splice


def log_probabilities(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-softmax in float32; an impossible token gets the least finite number, so that 0·log 0 is 0 in a KL."""
    return log_softmax(logits, -1, dtype=torch.float32).clamp_(min=torch.finfo(torch.float32).min)


def kl_divergence(log_p: Float[Tensor, "n vocab"], log_q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """`Σ p (log p - log q)` of each position, in nats."""
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


class Run(NamedTuple):
    """A clean run of a batch."""

    activation: Float[Tensor, "..."]
    """What passed the hook; all that follows the tokens' dimensions is one activation."""
    hidden: Float[Tensor, "prompts context d_model"]
    """What the unembedding reads."""
    before: dict[nn.Module, Any]
    """Outputs of the layers that a changed run needs not compute again."""
    output_type: type
    """What the body returns its hidden states in."""
    read: list[Float[Tensor, "..."]]
    """What passed the hooks that are only looked at, in their order."""


class CausalLM:
    """A Hugging Face causal language model, seen as a body that ends in hidden states and a head that reads them.

    Args:
        module: The model; `obstacle(module, hook)` must be None.
        hook: Where its activation is looked at and replaced, inside the body.
        reads: Where else it is looked at in a clean run; by default only there.
    """

    def __init__(self, module: nn.Module, hook: Hook, reads: Sequence[Hook] = ()) -> None:
        self.module, self.hook, self.reads = module, hook, list(reads)
        self.body: nn.Module = _base_model(module)
        self._before = layers_before(module, hook)

    @staticmethod
    def obstacle(module: nn.Module, hook: Hook) -> str | None:
        """Why predictions of the next token can't be measured here, in words, or None if they can."""
        can_generate, config = getattr(module, "can_generate", lambda: False), getattr(module, "config", None)
        if not can_generate() or getattr(config, "is_encoder_decoder", False):
            return f"{type(module).__name__} is no causal language model with a head"
        body = _base_model(module)
        if body is module or module.get_submodule(hook.path) not in set(body.modules()):
            return f"{hook} is not inside the body of {type(module).__name__}"
        return None

    def run(self, ids: Int64[Tensor, "prompts context"], real: Bool[Tensor, "prompts context"]) -> Run:
        """Run a batch unchanged."""
        seen: dict[Hook, Tensor] = {}
        recording = Recording(self._before)

        def looking_at(hook: Hook) -> Edit:
            def look(activation: Tensor) -> Tensor:
                seen.setdefault(hook, activation.clone())
                if hook == self.hook:
                    recording.stop()
                return activation

            return look

        looks = {hook: looking_at(hook) for hook in (*self.reads, self.hook)}
        with recording, splice(self.module, looks):
            output = self._body_output(ids, real)
        read = [seen[hook] for hook in self.reads]
        return Run(seen[self.hook], output.last_hidden_state, recording.outputs, type(output), read)

    def rerun(
        self,
        run: Run,
        ids: Int64[Tensor, "prompts context"],
        real: Bool[Tensor, "prompts context"],
        activation: Float[Tensor, "..."],
    ) -> Float[Tensor, "prompts context d_model"]:
        """Run the batch again with another activation at the hook; returns what the unembedding reads then."""
        with replay(run.before), splice(self.module, {self.hook: lambda _: activation}):
            return self._body_output(ids, real).last_hidden_state

    def _body_output(self, ids: Tensor, real: Tensor) -> Any:
        mask = None if bool(real.all()) else real.long()
        return self.body(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)

    def logits(self, run: Run, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """What the model's own head, with any soft cap or scale of its logits, makes of some hidden states."""
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with replay({self.body: run.output_type(last_hidden_state=hidden[None])}):
            return self.module(input_ids=ids, use_cache=False, return_dict=True).logits[0]

    def reproduces(self, ids: Int64[Tensor, "1 context"]) -> bool:
        """Whether this view of the model gives the model's own predictions, and they depend on earlier tokens alone.

        The first half of one prompt is run through the model as it is, the whole prompt by replaying its layers.
        """
        half, real = ids.shape[1] // 2, torch.ones_like(ids, dtype=torch.bool)
        run = self.run(ids, real)
        again = self.logits(run, self.rerun(run, ids, real, run.activation)[0, :half])
        plain = self.module(input_ids=ids[:, :half], use_cache=False, return_dict=True).logits[0]
        kl = kl_divergence(log_probabilities(plain), log_probabilities(again)).mean()
        return float(kl.abs()) < 10 * torch.finfo(plain.dtype).eps


def _base_model(module: Any) -> nn.Module:
    """Hugging Face's name for a model without its head; a model that has none is its own."""
    return getattr(module, "base_model", module)
