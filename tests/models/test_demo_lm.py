"""The model that ships: it loads like any other, it has learnt its language, and its layers matter."""

import math
from pathlib import Path

import pytest
import torch

from unweave.activations import DataConfig, TokenRows
from unweave.models import DEMO, load_model, resolve_hooks, splice


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


@pytest.fixture(scope="module")
def held_out(demo):
    return TokenRows("stdlib", demo.tokenizer, DataConfig(), held_out=True).next_rows(32).ids


def loss(demo, ids):
    with torch.no_grad():
        logits = demo.module(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_it_is_a_folder_like_any_other(demo):
    """The name is a short form of the folder."""
    same = load_model(Path(DEMO))
    assert all(torch.equal(a, b) for a, b in zip(demo.module.parameters(), same.module.parameters(), strict=True))
    assert type(demo.module).__name__ == "GPT2LMHeadModel"
    assert sum(p.stat().st_size for p in DEMO.iterdir()) < 8_000_000


@pytest.fixture(scope="module")
def clean(demo, held_out):
    return loss(demo, held_out)


def test_it_has_learnt_its_language(demo, held_out, clean):
    """At most 1.5 bits per character of text that it was not trained on."""
    characters = len(demo.tokenizer.decode(held_out[:, 1:].flatten()))
    assert clean * held_out[:, 1:].numel() / math.log(2) / characters < 1.5


@pytest.mark.parametrize("hook", ["resid_pre.0", "resid_post.0", "resid_post.1", "resid_post.2", "resid_post.3"])
def test_its_residual_stream_matters(demo, held_out, clean, hook):
    """Zero-ablation costs more than 2 nats everywhere, so that loss recovered means something."""
    with splice(demo.module, dict.fromkeys(resolve_hooks(demo.module, [hook]), torch.zeros_like)):
        assert loss(demo, held_out) - clean > 2


def test_text_survives_its_tokenizer(demo):
    text = "def f(x):\n    return {'ключ': x}  # 🦊\n"
    assert demo.tokenizer.decode(demo.tokenizer(text).input_ids) == text
