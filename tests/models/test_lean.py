from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2Model

from unweave.models import Hook, LoadedModel, capture, lean

IDS = torch.arange(24).view(2, 12)
HOOKS = [Hook("h.1"), Hook("h.1.mlp.act"), Hook("h.1.mlp.c_fc")]


def gpt2() -> LoadedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_head=2, vocab_size=50, n_positions=16, n_layer=3, n_embd=32)
    return LoadedModel(GPT2Model(config).eval().requires_grad_(False), None, "tiny")


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(model: LoadedModel) -> list[str]:
    with Operations() as seen:
        capture(model.module, HOOKS, IDS)
    return seen.names


def test_a_lean_twin_computes_the_same_with_the_same_weights_and_fewer_operations() -> None:
    model = gpt2()
    twin = lean(model)
    expected, got = capture(model.module, HOOKS, IDS), capture(twin.module, HOOKS, IDS)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)
    for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]:
        assert {**dict(twin.module.named_parameters()), **dict(twin.module.named_buffers())}[name] is tensor
    before, after = operations(model), operations(twin)
    assert {"tanh", "pow"} <= set(before)
    assert not {"tanh", "pow"} & set(after)
    assert after.count("cat") < before.count("cat")  # of keys and values


def test_the_model_itself_stays_as_it_is() -> None:
    model = gpt2()
    before = operations(model)
    lean(model)
    assert operations(model) == before
    assert model.module.config.use_cache is True  # type: ignore[union-attr]


def test_weights_that_change_later_change_in_the_twin() -> None:
    model = gpt2()
    twin = lean(model)
    with torch.no_grad():
        model.module.get_parameter("h.0.mlp.c_fc.weight").mul_(2)
    torch.testing.assert_close(
        capture(twin.module, HOOKS, IDS)["h.1"], capture(model.module, HOOKS, IDS)["h.1"], rtol=1e-5, atol=1e-6
    )


def test_a_model_that_somebody_has_changed_is_run_as_it_is() -> None:
    hooked, patched, other = gpt2(), gpt2(), LoadedModel(nn.Linear(2, 2), None, "linear")
    hooked.module.get_submodule("h.0.mlp").register_forward_hook(lambda m, args, out: out * 0)
    block = patched.module.get_submodule("h.0.mlp")
    block.forward = lambda x: x * 0  # type: ignore[method-assign]
    for model in (hooked, patched, other):
        assert lean(model) is model


def test_a_model_that_cannot_be_copied_is_run_as_it_is() -> None:
    model = gpt2()
    model.module.hold = (i for i in range(3))  # type: ignore[assignment]
    assert lean(model) is model
