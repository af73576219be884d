"""A tiny model, its tokenizer and some text: enough for a whole run in a second or two."""

import pytest
import torch

from unweave.models import LoadedModel


@pytest.fixture(scope="session")
def tiny_model():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<eos>", "[UNK]", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="[UNK]")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return LoadedModel(module, fast, "tiny")


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(60, (40,), generator=generator)) for _ in range(200)]
