"""The tokens that a latent promotes and suppresses: its decoder direction, read through the unembedding.

A latent adds `activation * W_dec[i]` to the residual stream. What reaches the logits directly is that direction after
the final norm and the unembedding, `(W_dec[i] * weight_of_norm) @ W_U`, with the norm's scale, which depends on the
token, left out. Values are centred over the vocabulary, since adding a constant to all logits changes nothing. It is
the direct path alone: later layers may do something else with the direction, and more so the earlier the hook is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

_FINAL_NORMS = ("ln_f", "final_layer_norm", "final_layernorm", "norm")
_TILE_ELEMENTS = 1 << 25


class LogitEffects(NamedTuple):
    """Direct effects on the logits of `n` directions."""

    promoted: Int64[Tensor, "n n_tokens"]
    """Token ids whose logits rise most, strongest first."""
    promoted_by: Float[Tensor, "n n_tokens"]
    """By how much, per unit of activation, relative to the mean token."""
    suppressed: Int64[Tensor, "n n_tokens"]
    """Token ids whose logits fall most, strongest first."""
    suppressed_by: Float[Tensor, "n n_tokens"]
    """By how much; negative."""


def logit_effects(
    module: nn.Module, directions: Float[Tensor, "n d_model"], *, n_tokens: int = 10, vocabulary: int | None = None
) -> LogitEffects | None:
    """What directions of the residual stream do to the logits, directly.

    Args:
        module: A language model with `get_output_embeddings()`.
        directions: Rows of `W_dec`.
        n_tokens: Tokens to name on each side.
        vocabulary: Consider token ids below this alone (some models pad their unembedding).

    Returns:
        The effects, or None if the model has no unembedding or the directions are not of its width.
    """
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is None or head.weight.shape[1] != directions.shape[1]:
        return None
    W_U = head.weight.detach()[:vocabulary].T
    scale, is_centred = _final_norm(module, directions.shape[1])
    directions = directions.detach().float()
    if is_centred:
        directions = directions - directions.mean(1, keepdim=True)
    directions = (directions.to(W_U.device) * scale.to(W_U.device)).to(W_U.dtype)

    n_tokens = min(n_tokens, W_U.shape[1])
    tiles = []
    for tile in directions.split(max(1, _TILE_ELEMENTS // W_U.shape[1])):
        effect = (tile @ W_U).float()
        effect -= effect.mean(1, keepdim=True)
        up, down = effect.topk(n_tokens, dim=1), effect.topk(n_tokens, dim=1, largest=False)
        tiles.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(parts).cpu() for parts in zip(*tiles, strict=True)))


def _final_norm(module: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """Weight of the norm before the unembedding and whether it subtracts the mean; ones if no such norm is found."""
    norm = None
    for name, part in module.named_modules():
        *parents, leaf = name.split(".")
        inside_a_block = any(parent.isdigit() for parent in parents)
        weight = getattr(part, "weight", None)
        if leaf in _FINAL_NORMS and not inside_a_block and weight is not None and weight.shape == (d_model,):
            norm = part
    if norm is None:
        return torch.ones(d_model), False
    # Some families store the weight minus 1, so the norm is asked rather than read: a vector of alternating signs is
    # its own normalised form, and the bias cancels between it and its negative.
    ones = torch.ones_like(norm.weight)
    alternating = ones.clone()
    alternating[1::2] = -1
    with torch.no_grad():
        weight = (norm(alternating) - norm(-alternating)) / 2 * alternating
        of_ones = (norm(ones) - norm(-ones)) / 2
    return weight.float(), bool(of_ones.abs().max() < 0.1 * weight.abs().max())
