"""A tiny GPT-2 with a byte-level tokenizer, text for it, and an SAE."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from unweave.models import LoadedModel
from unweave.sae import SAE, TopK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

D, D_SAE, HOOK = 16, 48, "transformer.h.0"
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u2028x\u2029", "<!--", "\u202eflip"]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000",
)  # fmt: skip


@pytest.fixture
def browse(chromium: Path, tmp_path: Path) -> Callable[..., str]:
    """Open an address and return the DOM; what the page complains about on the console fails the test."""

    def browse(url: str, *flags: str, size: str = "1280,900") -> str:
        own = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}")
        command = [str(chromium), *FLAGS, *own, *flags, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, encoding="utf-8")
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout

    return browse


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few words, among them some that would do harm if a page took them for markup."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, "Ġt", "Ġth", "Ġthe"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=D, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        module = GPT2LMHeadModel(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return LoadedModel(module, tokenizer, "tiny")


@pytest.fixture
def sae() -> SAE:
    metadata = {"hf_hook_name": HOOK, "context_size": 32}
    return SAE(D, D_SAE, TopK(4), metadata=metadata, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty documents, the hostile tokens among them."""
    words = ["the cat", "sat on", "é", "→", "the mat", "\n\n", "    ", "1234", *HOSTILE]
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(words), (40, 60), generator=generator).tolist()
    return [" ".join(words[i] for i in document) for document in picks]
