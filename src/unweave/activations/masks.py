"""Which tokens an SAE does not see: special tokens, kinds of image tokens, chosen positions, and attention sinks.

Tokens are left out by id or kind, by position, and by norm: in many models a few tokens (the first one, some
delimiters, patches of plain background) carry activations tens of times longer than all others, and an SAE that sees
them spends its capacity on them. A token that is too long at one hook is left out at all hooks, so that rows stay
aligned. The median that "too long" refers to is that of the first pass, fixed from then on: nothing depends on how the
stream is cut into passes later, and a resumed run masks alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.rows import Batch
from unweave.models import TOKEN_KINDS, TokenKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens to leave out.

    Raises:
        UnweaveError: A norm multiple that is not positive, positions that are no slice, or unknown kinds of tokens.
    """

    special_tokens: bool = True
    """Leave out the tokenizer's special tokens: BOS, EOS, padding and all others in its `all_special_ids`."""
    token_ids: tuple[int, ...] = ()
    """Further token ids to leave out."""
    token_kinds: tuple[TokenKind, ...] = ("patch",)
    """Of images: the kinds of tokens to keep, out of "patch", "cls" and "register"."""
    positions: str | tuple[int, ...] | None = None
    """Positions in the row to keep, as a slice ("1:", "1:128:2") or one by one. None: all."""
    norm_multiple: float | None = 10.0
    """Leave out tokens whose activation is longer than this many times the median. None: off."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        kinds: Any = self.token_kinds
        object.__setattr__(self, "token_kinds", (kinds,) if isinstance(kinds, str) else tuple(kinds))
        if not self.token_kinds or not set(self.token_kinds) <= set(TOKEN_KINDS):
            raise UnweaveError(f"token_kinds={self.token_kinds} must be one or more of {', '.join(TOKEN_KINDS)}.")
        if not isinstance(self.positions, str | None):
            object.__setattr__(self, "positions", tuple(self.positions))
        if self.norm_multiple is not None and not self.norm_multiple > 0:
            raise UnweaveError(f"norm_multiple={self.norm_multiple} is not positive; None switches it off.")
        if isinstance(self.positions, str):
            _parse_slice(self.positions)


@dataclass
class MaskReport:
    """What the masks did so far. A token is counted once: by id or kind, else by position, else by norm."""

    seen: int = 0
    """Real tokens that went through the model: `kept + by_id + by_kind + by_position + by_norm`."""
    kept: int = 0
    by_id: int = 0
    by_kind: int = 0
    by_position: int = 0
    by_norm: int = 0
    median_norm: dict[str, float] = field(default_factory=dict)
    """Median activation norm of the first pass at each hook, over the tokens kept by id and position."""

    def why_nothing(self, config: MaskConfig) -> str:
        """What left nothing of the tokens seen, as a part of a sentence, with the settings to change."""
        if not self.seen:
            return "there was no token"
        steps = [
            (self.by_id, "are special tokens or in token_ids"),
            (self.by_kind, f"are of other kinds than token_kinds={config.token_kinds}"),
            (self.by_position, f"lie outside positions={config.positions!r}"),
            (self.by_norm, f"are longer than norm_multiple={config.norm_multiple} allows"),
        ]
        left_out = [f"{n:,} {why}" for n, why in steps if n]
        short = ""
        if self.by_position:
            short = " (unpacked documents that end before them have none there: pack them, or keep earlier positions)"
        return f"of {self.seen:,} tokens, {' and '.join(left_out)}{short}"


class Masks:
    """Applies a `MaskConfig` to rows of `context` tokens, and counts.

    Attributes:
        excluded_ids: The token ids that are left out, and the tokens they stand for.
        report: What was left out so far.

    Raises:
        UnweaveError: The positions lie outside the row.
    """

    def __init__(self, config: MaskConfig, tokenizer: PreTrainedTokenizerBase | None, context: int) -> None:
        self.config = config
        self.excluded_ids = _excluded_ids(config, tokenizer)
        self.report = MaskReport()
        self._positions = kept_positions(config.positions, context)
        self._excluded = torch.tensor(list(self.excluded_ids), dtype=torch.int64)
        self._kinds = torch.tensor([TOKEN_KINDS.index(kind) for kind in config.token_kinds], dtype=torch.uint8)

    def by_token(self, batch: Batch) -> Bool[Tensor, "n context"]:
        """True on the real tokens that neither their id or kind nor their position leaves out."""
        chosen, records = batch.real, batch.records()
        seen = int(chosen.sum())
        if "token_ids" in records:
            chosen = chosen & ~torch.isin(records["token_ids"], self._excluded)
        after_id = int(chosen.sum())
        if "kinds" in records:
            chosen = chosen & torch.isin(records["kinds"], self._kinds)
        # Images that keep their aspect ratio may have fewer positions than the longest row.
        keep = chosen & self._positions[: chosen.shape[1]]
        after_kind, kept = int(chosen.sum()), int(keep.sum())
        self.report.seen += seen
        self.report.by_id += seen - after_id
        self.report.by_kind += after_id - after_kind
        self.report.by_position += after_kind - kept
        self.report.kept += kept
        return keep

    def by_norm(self, norms: Mapping[str, Float[Tensor, " n"]]) -> Bool[Tensor, " n"]:
        """True on the tokens, out of those that `by_token` kept, that are not too long at any hook.

        Args:
            norms: Length of the activation of each token, by hook.
        """
        if not self.report.median_norm:
            self.report.median_norm = {name: float(norm.median()) for name, norm in norms.items()}
        keep = torch.ones_like(next(iter(norms.values())), dtype=torch.bool)
        if self.config.norm_multiple is not None:
            for name, norm in norms.items():
                # A median of 0 (a hook that is mostly silent) says nothing about which tokens are too long.
                limit = self.report.median_norm[name] * self.config.norm_multiple or math.inf
                keep &= norm <= limit
        left_out = len(keep) - int(keep.sum())
        self.report.by_norm += left_out
        self.report.kept -= left_out
        return keep

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.report)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report = MaskReport(**state | {"median_norm": dict(state["median_norm"])})


def lengths_of(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Length of each activation, in float32 or, of wider activations, in their own type."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def kept_positions(positions: str | Sequence[int] | None, context: int) -> Bool[Tensor, " context"]:
    """True where a position of the row is kept.

    Raises:
        UnweaveError: A position lies outside the row, or none is kept.
    """
    kept = torch.zeros(context, dtype=torch.bool)
    chosen: Sequence[int] = range(context)
    if isinstance(positions, str):
        chosen = chosen[_parse_slice(positions)]
    elif positions is not None:
        chosen = positions
    if not chosen or min(chosen) < -context or max(chosen) >= context:
        raise UnweaveError(f"positions={positions!r} keeps nothing, or lies outside a row of context={context}.")
    kept[list(chosen)] = True
    return kept


def _parse_slice(text: str) -> slice:
    try:
        parts = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        parts = []
    if not 2 <= len(parts) <= 3 or parts[2:] == [0]:
        raise UnweaveError(f'positions={text!r} is no slice like "1:" or "1:128:2".')
    return slice(*parts)


def _excluded_ids(config: MaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, str]:
    ids = list(config.token_ids)
    if tokenizer is None:
        return {i: str(i) for i in sorted(ids)}
    if config.special_tokens:
        ids += tokenizer.all_special_ids
    return {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(set(ids))}
