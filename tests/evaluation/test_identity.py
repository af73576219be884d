"""An SAE that is given another model, tokenizer or hook than it was trained on says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unweave._errors import UnweaveError
from unweave.activations import TokenBatch
from unweave.evaluation import evaluate
from unweave.models import LoadedModel
from unweave.models.load import fingerprint
from unweave.sae import SAE


@pytest.fixture
def measure(gpt2: LoadedModel, sae: SAE, batches: list[TokenBatch]) -> Callable[..., list[str]]:
    """The notes of an evaluation, with these metadata on top of the SAE's."""

    def run(model: LoadedModel = gpt2, hook: str | None = None, **metadata: Any) -> list[str]:
        sae.metadata |= metadata
        notes: list[str] = evaluate(sae, model=model, data=batches, tokens=64, hook=hook).notes
        return notes

    return run


@pytest.fixture
def other_tokenizer(gpt2: LoadedModel) -> LoadedModel:
    """The same model by its name, with a tokenizer in which two words have changed places."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = gpt2.tokenizer.get_vocab()
    vocabulary["w2"], vocabulary["w3"] = vocabulary["w3"], vocabulary["w2"]
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<pad>")
    return LoadedModel(gpt2.module, tokenizer, gpt2.name)


def test_all_as_in_training(measure: Callable[..., list[str]], gpt2: LoadedModel) -> None:
    known = fingerprint(gpt2.tokenizer)
    assert measure(tokenizer_fingerprint=known, model_from_pretrained_kwargs={"fold_ln": False}) == []


def test_another_tokenizer_of_the_model_is_refused_pitfall_207(
    measure: Callable[..., list[str]], gpt2: LoadedModel, other_tokenizer: LoadedModel
) -> None:
    with pytest.raises(UnweaveError, match="the tokenizer of 'tiny' has another vocabulary than the one that"):
        measure(other_tokenizer, tokenizer_fingerprint=fingerprint(gpt2.tokenizer))


def test_another_model_is_said_with_its_tokenizer_pitfall_208(
    measure: Callable[..., list[str]], gpt2: LoadedModel, other_tokenizer: LoadedModel
) -> None:
    with pytest.warns(UserWarning, match="trained on the model 'small' and is used on 'tiny'|another vocabulary"):
        notes = measure(other_tokenizer, model_name="small", tokenizer_fingerprint=fingerprint(gpt2.tokenizer))
    assert [note.partition(" 'tiny'")[0] for note in notes] == [
        "the SAE was trained on the model 'small' and is used on", "the tokenizer of",
    ]  # fmt: skip


def test_another_hook_of_the_same_width(measure: Callable[..., list[str]]) -> None:
    assert measure(hook="transformer.h.0") == []
    assert measure(hook="resid_post.0") == []  # another name of the same
    (note,) = measure(hook="transformer.h.1")
    assert note == "the SAE was trained on activations at 'transformer.h.0' and reads those at 'transformer.h.1'"


def test_a_model_whose_weights_were_processed(measure: Callable[..., list[str]]) -> None:
    with pytest.warns(UserWarning, match=r"weights were processed \(center_writing_weights\)"):
        (note,) = measure(model_from_pretrained_kwargs={"center_writing_weights": True})
    assert note.endswith("and this one's were not")
