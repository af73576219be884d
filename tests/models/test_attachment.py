"""What does not match where an SAE is attached is said, by one function, wherever somebody attaches it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from unweave._errors import UnweaveError
from unweave.models import DEMO, Hook, LoadedModel, differences, load_model, splice, trained_at
from unweave.models.load import name_of
from unweave.sae import SAE, ReLU


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.b(self.a(x))
        return made


def notes(metadata: dict[str, Any], model: Any, *reads: str) -> list[str]:
    """The notes, which are warnings as well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = differences(metadata, model, [Hook(name) for name in reads])
    assert [str(w.message) for w in caught] == [f"{note}." for note in found]
    return found


def named(name: str) -> LoadedModel:
    return LoadedModel(Net(), None, name)


@pytest.mark.parametrize(
    ("trained_on", "used_on", "same"),
    [
        ("gpt2-small", "openai-community/gpt2", True), ("EleutherAI/pythia-70m", "/models/pythia-70m/", True),
        ("gpt2", "gpt2-medium", False), ("gpt2", "Net", True),  # a class is no name
    ],
)  # fmt: skip
def test_models_by_their_names(trained_on: str, used_on: str, same: bool) -> None:
    found = notes({"model_name": trained_on}, named(used_on), "a")
    assert found == ([] if same else [f"the SAE was trained on the model {trained_on!r} and is used on {used_on!r}"])


def test_cached_activations_are_compared_by_their_metadata() -> None:
    cached = {"model_name": "tiny", "tokenizer_fingerprint": "one"}
    known = {"model_name": "tiny", "tokenizer_fingerprint": "one", "hf_hook_name": "a"}
    assert notes(known, cached, "a") == []
    assert notes(known | {"model_name": "gpt2"}, cached, "a") == [
        "the SAE was trained on the model 'gpt2' and is used on 'tiny'"
    ]
    assert notes(known, cached, "b") == ["the SAE was trained on activations at 'a' and reads those at 'b'"]
    assert notes({"hook_name": "blocks.0.hook_resid_pre"}, cached, "b") == []  # whose path nobody knows here
    with pytest.raises(UnweaveError, match="the tokenizer of 'tiny' has another vocabulary"):
        notes(known | {"tokenizer_fingerprint": "two"}, cached, "a")


def test_a_hook_that_the_model_has_not() -> None:
    """A module path is exact; a name of another library may just be unknown for this model."""
    assert notes({"hf_hook_name": "h.3"}, named("tiny"), "a") == [
        "the SAE was trained on activations at 'h.3' and reads those at 'a'"
    ]
    assert notes({"hook_name": "blocks.3.hook_resid_pre"}, named("tiny"), "a") == []
    assert notes({"hf_hook_names": ["a", "b"]}, named("tiny"), "a", "b") == []
    assert len(notes({"hf_hook_names": ["a", "b"]}, named("tiny"), "b")) == 1


def test_the_place_in_the_metadata() -> None:
    assert trained_at({}) is None
    assert trained_at({"hook_name": "z", "hook_head_index": 2}) == "z#2"
    assert trained_at({"hook_name": "z", "hf_hook_name": "h.0:in#4:8", "hook_head_index": 2}) == "h.0:in#4:8"


def test_what_transformers_did_not_process_others_may_have() -> None:
    """pitfall_258: processing that the SAE was trained with is recorded, and missed where it was not done."""
    processed = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert notes(processed, named("tiny"), "a") == []
    assert len(notes(processed, load_model("demo"), "a")) == 1


def test_the_shipped_model_has_its_short_name_as_a_module_too() -> None:
    module = load_model("demo").module
    assert module.config._name_or_path == str(DEMO)
    assert name_of(module) == "demo"
    assert notes({"model_name": "demo"}, module, "a") == []


def test_a_path_is_not_told(tmp_path: Any) -> None:
    (tmp_path / "mine").mkdir()
    (note,) = notes({"model_name": "gpt2"}, named(str(tmp_path / "mine")), "a")
    assert note.endswith("used on 'mine'")


@pytest.mark.parametrize("method", [False, True])
def test_an_sae_that_is_spliced_in_elsewhere_says_so(method: bool) -> None:
    module, sae = Net(), SAE(4, 8, ReLU(), metadata={"hf_hook_name": "a"}).requires_grad_(False)
    x = torch.randn(3, 4)
    edit = sae.forward if method else sae
    with splice(module, {Hook("a"): edit}):  # where it belongs: no warning, which would be an error
        same = module(x)
    torch.testing.assert_close(same, module.b(sae(module.a(x))))
    with (
        pytest.warns(UserWarning, match="trained on activations at 'a' and reads those at 'b'") as caught,
        splice(module, {Hook("b"): edit}),
    ):
        module(x)
    assert {w.filename for w in caught} == {__file__}


def test_an_sae_of_another_model_that_is_spliced_in_says_so() -> None:
    loaded = load_model("demo")
    sae = SAE(64, 8, ReLU(), metadata={"model_name": "gpt2", "hook_name": "blocks.0.hook_resid_post"})
    hook = Hook("transformer.h.0")
    with (
        pytest.warns(UserWarning, match="trained on the model 'gpt2' and is used on 'demo'"),
        splice(loaded.module, {hook: sae}),
    ):
        pass
    sae.metadata["model_name"] = "demo"
    with splice(loaded.module, {hook: sae}):
        pass
