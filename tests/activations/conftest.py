"""A tokenizer whose tokens are bytes, and a model whose activations tell which token they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from unweave.models import Hook, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

D = 6


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Every token is a byte, except `<s>` = 256, `</s>` = 257 and `<pad>` = 258, in whatever roles are asked for."""

    def make(**roles: str) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens(["<s>", "</s>", "<pad>"])
        return PreTrainedTokenizerFast(tokenizer_object=model, **roles)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class Layer(nn.Module):
    """Adds its own number, so that activations tell which hook they come from."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


class Speller(nn.Module):
    """The activation of token `t` at position `p` is `(t, p, 100, 100, 100, 100)`, and 1 more at `h.1`.

    Attributes:
        special: What to write into the activations of a token id, in place of 100, at `h.1` alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, D)
        self.h = nn.ModuleList([Layer(0.0), Layer(1.0)])
        self.special: dict[int, float] = {}
        self.attention_masks: list[Tensor | None] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.attention_masks.append(attention_mask)
        x = torch.full((*ids.shape, D), 100.0)
        x[..., 0], x[..., 1] = ids.float(), torch.arange(ids.shape[1]).float()
        x = self.h[0](x)
        for token, value in self.special.items():
            x[..., 2:][ids == token] = value
        return self.h[1](x)


@pytest.fixture
def speller() -> Speller:
    return Speller()


@pytest.fixture
def model(speller: Speller, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(speller, tokenizer, "speller")


@pytest.fixture
def hooks() -> list[Hook]:
    return [Hook("h.0"), Hook("h.1")]
