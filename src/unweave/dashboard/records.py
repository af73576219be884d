"""The page's data: one plain record per latent, and the token strings that they share.

Everything here is JSON: numbers rounded to four digits, strings exactly as the tokenizer gives them. A context is a
list of indices into the page's table of strings, the place of the peak, and the activations that are not 0.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from unweave.dashboard.collect import BINS_PER_OCTAVE, Collected, bin_edge
from unweave.dashboard.interest import Interest
from unweave.dashboard.logits import LogitEffects
from unweave.dashboard.tokens import token_strings
from unweave.dashboard.windows import Contexts

QUANTILES = (0.9, 0.5)
"""Besides the strongest contexts, a page shows some from around these quantiles of a latent's firings."""
_CONTEXTS_PER_QUANTILE = 5
_MAX_BARS = 40
_USUAL_TOKENS = 6
_LEAST_POWER = 0.01


class StringTable:
    """Gives each token id that is asked for the index of its string in one list."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}

    def __getitem__(self, token: int) -> int:
        return self._index.setdefault(token, len(self._index))

    def strings(self, tokenizer: Any) -> list[str]:
        """The strings, in the order of their indices."""
        return token_strings(tokenizer, self._index)


def latent_records(
    collected: Collected, interest: Interest, effects: LogitEffects | None, tokenizer: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record for each of the latents to show, in their order, and the strings that the records point to.

    Args:
        collected: Statistics of all latents.
        interest: Which latents to show.
        effects: Tokens promoted and suppressed, a row for each latent to show, if the model has logits.
        tokenizer: Turns ids into strings; None where there is none.
    """
    table = StringTable()
    records = []
    for row, latent in enumerate(interest.latents.tolist()):
        groups = _groups(collected, latent, table)
        record = {
            "index": latent,
            "interest": _short(interest.scores[row]),
            "count": int(collected.counts[latent]),
            "density": _short(collected.density[latent]),
            "max": _short(collected.maximum[latent]),
            "peaks": _usual_peaks(groups),
            "histogram": _histogram(collected, latent),
            "groups": groups,
        }
        if effects is not None:
            record["promoted"] = _effects(effects.promoted[row], effects.promoted_by[row], table)
            record["suppressed"] = _effects(effects.suppressed[row], effects.suppressed_by[row], table)
        records.append(record)
    return records, table.strings(tokenizer)


def _groups(collected: Collected, latent: int, table: StringTable) -> list[dict[str, Any]]:
    used = int((collected.top.positions[latent] >= 0).sum())
    top = [_context(collected.top, latent, slot, table) for slot in range(used)]
    groups: list[dict[str, Any]] = [{"quantile": None, "value": _short(collected.maximum[latent]), "contexts": top}]
    for q in QUANTILES:
        slots = collected.near_quantile(latent, q)[:_CONTEXTS_PER_QUANTILE]
        slots.sort(key=lambda slot: -float(collected.sample.peak_values[latent, slot].abs()))
        contexts = [_context(collected.sample, latent, slot, table) for slot in slots]
        if contexts:
            groups.append({"quantile": q, "value": _short(collected.quantile(latent, q)), "contexts": contexts})
    return groups


def _usual_peaks(groups: list[dict[str, Any]]) -> list[int]:
    """The tokens with the largest sums of squared activations: weak firings hardly count."""
    power: Counter[int] = Counter()
    for context in (context for group in groups for context in group["contexts"]):
        active = dict(zip(context["active"][::2], context["active"][1::2], strict=True))
        power[context["tokens"][context["peak"]]] += active[context["peak"]] ** 2
    enough = _LEAST_POWER * power.total()
    return [token for token, amount in power.most_common(_USUAL_TOKENS) if amount >= enough]


def _context(contexts: Contexts, latent: int, slot: int, table: StringTable) -> dict[str, Any]:
    ids, values = contexts.ids[latent, slot].tolist(), contexts.values[latent, slot].tolist()
    inside = [place for place, token in enumerate(ids) if token >= 0]
    first = inside[0]
    active = [(place - first, _short(values[place])) for place in inside if values[place] != 0]
    return {
        "tokens": [table[ids[place]] for place in inside],
        "peak": len(ids) // 2 - first,
        "active": [number for pair in active for number in pair],
    }


def _histogram(collected: Collected, latent: int) -> dict[str, Any]:
    """Bars between the lowest and the highest magnitude: the first one's lower edge, the ratio of edges, and counts."""
    counts = collected.histogram[latent].tolist()
    filled = [i for i, count in enumerate(counts) if count]
    first, last = filled[0], filled[-1]
    per_bar = -(-(last + 1 - first) // _MAX_BARS)
    bars = [sum(counts[i : i + per_bar]) for i in range(first, last + 1, per_bar)]
    return {"low": _short(bin_edge(first)), "ratio": round(2 ** (per_bar / BINS_PER_OCTAVE), 6), "counts": bars}


def _effects(tokens: Any, values: Any, table: StringTable) -> list[list[float]]:
    return [[table[token], _short(value)] for token, value in zip(tokens.tolist(), values.tolist(), strict=True)]


def _short(value: Any) -> float:
    """Four significant digits, as an int where that is shorter."""
    rounded = float(f"{float(value):.4g}")
    return int(rounded) if rounded.is_integer() else rounded
