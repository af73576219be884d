"""Which latents to show first: those that a reader can make sense of, and not fifty times the same one.

A latent's score is a product of factors, each of which answers a question that a reader would ask:

- consistent: do its random firings look like its strongest ones? The cosine between the mean token embeddings of the
  two, before the firing, at it or after it, whichever agrees best; less what chance gives, and its square root, because
  tokens of one meaning are a good deal less alike than copies of one token.
- strong: are its peaks high, compared with those of other latents?
- specific: how rarely does it fire? 1 below a density of 0.1 %, falling with the logarithm to 0 at 5 %.
- in words: does it fire on whole words, rather than on brackets, digits and pieces of words? (At least 0.2.)
- more than one token: what fires on a single token, wherever that stands, repeats the embedding. (At least 0.25.)
- not boilerplate: where the tokens around agree as well, it may be one memorised phrase. (At least 0.5.)

Latents that fire too rarely, or in too few documents, to be judged come after all others. The choice is greedy: a
latent loses value with each one chosen before it that fires mostly on the same token, and the more the closer its
decoder direction is to one that is on the page already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.dashboard.collect import Collected
from unweave.dashboard.windows import Contexts

SPECIFIC_BELOW, DENSE_ABOVE = 1e-3, 0.05
MIN_FIRINGS = 10
MIN_DOCUMENTS = 5
_BY_CHANCE = 0.1
_HARD_TO_JUDGE = 1e-3
_SAME_TOKEN = 0.5
_CANDIDATES_PER_PLACE = 20
_TILE_ELEMENTS = 1 << 24


class Interest(NamedTuple):
    """The latents to show, the most interesting first."""

    latents: Int64[Tensor, " n"]
    scores: Float[Tensor, " n"]
    """Score of each by itself, in [0, 1]; likeness to others affects the order only."""


def most_interesting(
    collected: Collected,
    W_dec: Float[Tensor, "d_sae d_in"],
    *,
    n: int,
    embedding: Float[Tensor, "vocabulary d_model"],
    strings: Sequence[str],
) -> Interest:
    """Choose up to `n` latents, none of them dead.

    Args:
        collected: Statistics of all latents.
        W_dec: Decoder, by which latents are told to be alike.
        n: Latents wanted.
        embedding: A vector for each token id, in which tokens of similar use are close.
        strings: The text of each token id that occurs.
    """
    score = interest_scores(collected, embedding=embedding, strings=strings)
    candidates = score.argsort(descending=True, stable=True)[: n * _CANDIDATES_PER_PLACE]
    candidates = candidates[score[candidates] > 0]
    value, usual = score[candidates], _usual_token(collected.sample)[0][candidates]
    directions = torch.nn.functional.normalize(W_dec.detach()[candidates.to(W_dec.device)].float().cpu(), dim=1)
    likeness = torch.zeros_like(value)
    chosen: list[int] = []
    for _ in range(min(n, len(candidates))):
        remaining = value * (1 - likeness)
        remaining[chosen] = -1
        best = int(remaining.argmax())
        chosen.append(best)
        value[usual == usual[best]] *= _SAME_TOKEN
        likeness = likeness.maximum(directions @ directions[best]).clamp(max=1)
    latents = candidates[chosen]
    return Interest(latents, score[latents])


def interest_scores(
    collected: Collected, *, embedding: Float[Tensor, "vocabulary d_model"], strings: Sequence[str]
) -> Float[Tensor, " d_sae"]:
    """The score of every latent; 0 for dead ones, and for them alone."""
    alive, n_documents = collected.counts > 0, (collected.top.positions >= 0).sum(1)
    agreement = _agreement(collected, embedding).sort(dim=1, descending=True).values
    consistent, boilerplate = (agreement[:, 0] - _BY_CHANCE).clamp(min=0).sqrt(), agreement[:, 1]

    peak = collected.top.peak_values.abs().sum(1) / n_documents.clamp(min=1)
    strong = peak / (peak + (peak[alive].median() if alive.any() else 1))

    octaves = torch.log(DENSE_ABOVE / collected.density.float().clamp(min=SPECIFIC_BELOW))
    specific = (octaves / math.log(DENSE_ABOVE / SPECIFIC_BELOW)).clamp(min=0)

    usual, share = _usual_token(collected.sample)
    recall = (collected.counts * share / collected.token_counts[usual.clamp(min=0)].clamp(min=1)).clamp(max=1)
    one_token = share * (1 + recall) / 2

    in_words = _whole_words(collected.top, strings).sum(1) / n_documents.clamp(min=1)
    score = (
        consistent * strong * specific
        * (0.2 + 0.8 * in_words) * (1 - 0.75 * one_token) * (1 - 0.5 * boilerplate)
    )  # fmt: skip
    can_judge = (collected.counts >= MIN_FIRINGS) & (n_documents >= MIN_DOCUMENTS)
    return score.where(can_judge, score * _HARD_TO_JUDGE).clamp(min=torch.finfo(torch.float32).tiny) * alive


def _agreement(collected: Collected, embedding: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "d_sae 3"]:
    """Cosine between random and strongest firings, at the tokens before, at and after the peak."""
    top, sample = _around_peak(collected.top), _around_peak(collected.sample)
    present = torch.cat([top.flatten(), sample.flatten()]).unique()
    present = present[present >= 0]
    if not len(present):
        return torch.zeros(len(top), 3)
    vectors = embedding.detach()[present.to(embedding.device)].float().cpu()
    # Centred at the mean over running text, two unrelated tokens have a cosine of about 0.
    counts = torch.nn.functional.pad(collected.token_counts, (0, len(embedding) - len(collected.token_counts)))
    frequency = counts[present].float()
    vectors = torch.nn.functional.normalize(vectors - frequency @ vectors / frequency.sum().clamp(min=1), dim=1)

    tile = max(1, _TILE_ELEMENTS // (3 * max(top.shape[1], sample.shape[1]) * vectors.shape[1]))
    tiles = [
        (_mean_vector(a, present, vectors) * _mean_vector(b, present, vectors)).sum(2)
        for a, b in zip(top.split(tile), sample.split(tile), strict=True)
    ]
    return torch.cat(tiles).clamp(0, 1)


def _around_peak(contexts: Contexts) -> Int64[Tensor, "d_sae n 3"]:
    """Ids of the tokens before, at and after each peak; -1 where there is none."""
    middle = contexts.ids.shape[2] // 2
    return contexts.ids[:, :, middle - 1 : middle + 2].long()


def _mean_vector(ids: Tensor, present: Tensor, vectors: Tensor) -> Float[Tensor, "n 3 d"]:
    """Mean over the slots that hold a token."""
    used = (ids >= 0)[..., None]
    found = torch.searchsorted(present, ids.clamp(min=int(present[0])))
    return (vectors[found] * used).sum(1) / used.sum(1).clamp(min=1)


def _usual_token(sample: Contexts) -> tuple[Int64[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """The token that each latent fires on most often, and on what fraction of its firings."""
    ids, used = sample.peak_ids, sample.positions >= 0
    alike = ((ids[:, :, None] == ids[:, None, :]) & used[:, :, None]).sum(1)
    usual = alike.max(1)
    share = usual.values / used.sum(1).clamp(min=1)
    return ids.gather(1, usual.indices[:, None]).squeeze(1), share


def _whole_words(contexts: Contexts, strings: Sequence[str]) -> Tensor:
    """Where the peak is a word of three letters or more, with no letter of another token joined to it."""
    # One more entry, for id -1: what lies beyond the row joins nothing.
    begins = torch.tensor([*(text[:1].isalpha() for text in strings), False])
    ends = torch.tensor([*(text[-1:].isalpha() for text in strings), False])
    is_long = torch.tensor([*(sum(map(str.isalpha, text)) >= 3 for text in strings), False])
    before, peak, after = _around_peak(contexts).unbind(2)
    return is_long[peak] & ~(ends[before] & begins[peak]) & ~(ends[peak] & begins[after])
