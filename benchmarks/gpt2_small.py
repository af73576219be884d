"""What the live benchmarks run: random weights in GPT-2 small's shape, for both libraries, and random tokens."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch

CONTEXT, LAYER, VOCABULARY = 128, 6, 50_257
HOOK, SAE_LENS_HOOK = f"h.{LAYER}:in", f"blocks.{LAYER}.hook_resid_pre"
"""The residual stream in front of the seventh block, in both libraries: six blocks run."""


def tokens(rows: int = 4000, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of random token ids; the time of a forward pass does not depend on them."""
    return np.random.default_rng(seed).integers(0, VOCABULARY - 1, (rows, CONTEXT))


def tokenizer() -> Any:
    """One whose vocabulary has the size of GPT-2's."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    end = "<|endoftext|>"
    plain = Tokenizer(models.WordLevel(words, unk_token=end))
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    asked_for = {"name_or_path": "local", "add_bos_token": True}  # by TransformerLens
    return PreTrainedTokenizerFast(tokenizer_object=plain, **roles, **asked_for)


def ours() -> Any:
    """The model as transformers has it, loaded into unweave."""
    from transformers import GPT2Config, GPT2Model

    from unweave.models import LoadedModel

    torch.manual_seed(0)
    return LoadedModel(GPT2Model(GPT2Config()).eval().requires_grad_(False), tokenizer(), "gpt2-small-random")


def theirs() -> Any:
    """The model as TransformerLens has it."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=VOCABULARY,
        act_fn="gelu_new", normalization_type="LN", model_name="gpt2-small-random", device="cpu", seed=0,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        model = HookedTransformer(config)
        model.set_tokenizer(tokenizer())
    return model.eval()


def runner(training_tokens: int, d_sae: int, k: int, **settings: Any) -> Any:
    """SAELens' training runner at its defaults, but for the model, the hook, the SAE, and that nothing is logged.

    And for its buffer: with a context of 128 the default of 20 is refused, as smaller than a batch of 4096.
    """
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    logging.disable(logging.WARNING)
    data = Dataset.from_dict({"tokens": tokens().tolist()}).with_format("torch")
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=768, d_sae=d_sae, k=k),
        model_name="gpt2-small-random",
        hook_name=SAE_LENS_HOOK,
        training_tokens=training_tokens,
        n_batches_in_buffer=64,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        **settings,
    )
    return LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=theirs())
