"""An SAE that is trained further on another model, tokenizer or hook than its own says so, from text or a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unweave import SAE, DataConfig, Start, TrainConfig, UnweaveError, cache
from unweave.models import LoadedModel
from unweave.models.load import fingerprint
from unweave.sae import TopK
from unweave.training.train import prepare, train

HOOK = "transformer.h.0"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_model: LoadedModel, texts: list[str]) -> Any:
    return cache(
        texts, tmp_path_factory.mktemp("stored") / "cache", model=tiny_model, hooks=[HOOK, "transformer.h.1"],
        tokens=600, held_out_tokens=100, config=DataConfig(context=16), dtype="float32",
    )  # fmt: skip


@pytest.fixture
def sae(tiny_model: LoadedModel) -> SAE:
    width = tiny_model.module.config.n_embd
    known = {"hf_hook_name": HOOK, "model_name": tiny_model.name}
    return SAE(width, 24, TopK(3), metadata=known | {"tokenizer_fingerprint": fingerprint(tiny_model.tokenizer)})


def begun(hook: str = HOOK, **more: Any) -> TrainConfig:
    text = DataConfig(context=16)
    start = Start(method="scale")
    return TrainConfig(hooks=(hook,), tokens=200, batch_size=64, buffer=128, text=text, start=start, **more)


@pytest.mark.parametrize("cached", [False, True])
def test_where_it_belongs_nothing_is_said(
    cached: bool, sae: SAE, tiny_model: LoadedModel, texts: list[str], stored: Any
) -> None:
    """A warning would be an error."""
    prepare(begun(), tiny_model, stored if cached else texts, sae)


@pytest.mark.parametrize("cached", [False, True])
def test_another_model(cached: bool, sae: SAE, tiny_model: LoadedModel, texts: list[str], stored: Any) -> None:
    del sae.metadata["tokenizer_fingerprint"]
    sae.metadata["model_name"] = "gpt2-xl"
    with pytest.warns(
        UserWarning, match=f"trained on the model 'gpt2-xl' and is used on '{tiny_model.name}'"
    ) as caught:
        made = train(begun(), model=tiny_model, data=stored if cached else texts, start=sae, progress=False)
    assert {w.filename for w in caught} == {__file__}
    assert torch.equal(made.saes[0].W_dec.norm(dim=1) > 0, torch.ones(24, dtype=torch.bool))


@pytest.mark.parametrize("cached", [False, True])
def test_another_tokenizer_of_the_same_model(
    cached: bool, sae: SAE, tiny_model: LoadedModel, texts: list[str], stored: Any
) -> None:
    sae.metadata["tokenizer_fingerprint"] = "another"
    with pytest.raises(UnweaveError, match="has another vocabulary than the one that the SAE was trained with"):
        prepare(begun(), tiny_model, stored if cached else texts, sae)


def test_another_hook(sae: SAE, tiny_model: LoadedModel, texts: list[str], stored: Any) -> None:
    """Of a model that is here its modules tell; of a cache, the names."""
    with pytest.raises(UnweaveError, match=r"of the hook 'transformer\.h\.0', and 'transformer\.h\.1' is named"):
        prepare(begun("transformer.h.1"), tiny_model, texts, sae)
    with pytest.warns(UserWarning, match=r"at 'transformer\.h\.0' and reads those at 'transformer\.h\.1'"):
        prepare(begun("transformer.h.1"), None, stored, sae)
