"""A tiny GPT-2, a tokenizer, rows of tokens, and two SAEs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from unweave.activations import TokenBatch
from unweave.models import LoadedModel
from unweave.sae import SAE, ReLU, TopK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, PAD = 0, 1
VOCAB, D, CONTEXT = 64, 16, 16
HOOK = "transformer.h.0"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; `<s>` is 0 and `<pad>` 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", *(f"w{i}" for i in range(2, VOCAB))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def gpt2(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """Two layers with weights large enough that its predictions are far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        module = GPT2LMHeadModel(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return LoadedModel(module, tokenizer, "tiny")


@pytest.fixture
def token_batch() -> Callable[..., TokenBatch]:
    """Rows of ids as a batch, padding where an id is `PAD`."""

    def make(rows: list[list[int]] | Tensor) -> TokenBatch:
        ids = torch.as_tensor(rows)
        real = ids != PAD
        return TokenBatch(ids, real, torch.where(real, torch.arange(len(ids))[:, None], -1))

    return make


@pytest.fixture
def batches(token_batch: Callable[..., TokenBatch]) -> list[TokenBatch]:
    """64 rows of random words after a BOS, the second half of the last one padding."""
    ids = torch.randint(2, VOCAB, (64, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    ids[-1, CONTEXT // 2 :] = PAD
    return [token_batch(ids)]


@pytest.fixture
def identity() -> Callable[[int], SAE]:
    """An SAE that returns its input: `relu(x) - relu(-x)`."""

    def make(d: int) -> SAE:
        sae = SAE(d, 2 * d, ReLU(), metadata={"hf_hook_name": HOOK, "model_name": "tiny"})
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_dec.data, sae.W_enc.data = both.clone(), both.clone().T
        return sae.requires_grad_(False)

    return make


@pytest.fixture
def sae() -> SAE:
    """An SAE that is neither good nor useless."""
    made = SAE(D, 48, TopK(4), metadata={"hf_hook_name": HOOK, "model_name": "tiny"}, generator=torch.Generator())
    made.b_dec.data.normal_(generator=torch.Generator().manual_seed(2))
    return made.requires_grad_(False)
