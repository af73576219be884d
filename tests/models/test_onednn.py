from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unweave import kernels
from unweave.models import Hook, LoadedModel, Meter, capture, copied_bytes, copy_in, lean, onednn

IDS = torch.randint(2, 40, (3, 21), generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(21) < torch.tensor([[21], [9], [1]])).long()
HOOKS = {
    "gpt2": ["h.2:in", "h.1.attn.c_proj:in", "h.1.mlp.act", "h.0.mlp.c_fc", "h.0.mlp", "h.1.ln_2"],
    "llama": ["layers.1", "layers.1.self_attn.o_proj:in", "layers.0.mlp.act_fn", "layers.0.mlp"],
    "gpt_neox": ["layers.1", "layers.1.attention.dense:in", "layers.0.mlp.dense_h_to_4h", "layers.0.mlp"],
}  # fmt: skip
FORMS = {
    "rows": (IDS, {}),
    "padding": (IDS, {"attention_mask": MASK}),
    "one row": (IDS[:1], {}),
    "one position": (IDS[:, :1], {}),
    "one token": (IDS[:1, :1], {}),
}  # fmt: skip


def built(family: str) -> LoadedModel:
    """Heads of 16, so that our attention takes them; of Llama, two query heads share one of keys and values."""
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 32}  # fmt: skip
    kind: Any = {
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=40, n_embd=64, n_layer=3, n_head=4, n_positions=32)
        ),
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gpt_neox": lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**sizes)),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return LoadedModel(module.eval().requires_grad_(False), None, family)


def hooks_of(family: str) -> list[Hook]:
    return [Hook(n.removesuffix(":in"), "in" if n.endswith(":in") else "out") for n in HOOKS[family]]


def plain(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, hooks: list[Hook]) -> nn.Module:
    """The copy as it is without any of this."""
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "usable", lambda dtype: False)
        patch.setattr("unweave.models.attention.use", lambda module: False)
        return copy_in(model, dtype, hooks, IDS).module


def packed_paths(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.is_mkldnn}


needs_bf16 = pytest.mark.skipif(not onednn.usable(torch.bfloat16), reason="oneDNN has no products in bf16 here")


@needs_bf16
@pytest.mark.parametrize("family", HOOKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_in_bf16_is_packed_and_computes_the_same(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hooks = built(family), hooks_of(family)
    ids, named = FORMS[form]
    exact = capture(model.module.double(), hooks, ids, **named)
    model.module.float()
    before = capture(plain(model, monkeypatch, torch.bfloat16, hooks), hooks, ids, **named)
    low = copy_in(model, torch.bfloat16, hooks, IDS)
    assert any("mlp" in path for path in packed_paths(low.module))
    for chosen in (hooks, hooks[:1]):  # the second leaves the inside of the blocks unwatched, where steps may be joined
        for name, x in capture(low.module, chosen, ids, **named).items():
            real = named.get("attention_mask", torch.ones_like(ids)).bool()
            a, b, c = (y.double().reshape(*ids.shape, -1)[real] for y in (x, before[name], exact[name]))
            assert x.dtype == torch.bfloat16
            assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-3 * c.norm()


@needs_bf16
def test_all_families_compute_the_same_in_a_packed_copy(
    family: str, fresh_model: nn.Module, ids: torch.Tensor
) -> None:
    body = getattr(fresh_model, fresh_model.base_model_prefix)
    paths = [name for name, _ in body.named_modules() if name.endswith(("h.1", "layers.1", "layer.1"))]
    hooks = [Hook(paths[0])]
    loaded = LoadedModel(body.requires_grad_(False), None, family)
    low = copy_in(loaded, torch.bfloat16, hooks, ids).module
    assert packed_paths(low)
    got = capture(low, hooks, ids)[paths[0]].float()
    expected = capture(body, hooks, ids)[paths[0]]
    assert (got - expected).norm() <= 0.03 * expected.norm()


@needs_bf16
def test_our_attention_is_called_where_there_is_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hooks = built("llama"), hooks_of("llama")[:1]
    low, calls = copy_in(model, torch.bfloat16, hooks, IDS).module, []
    ours = kernels.attention

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(q.shape)
        return ours(q, *args, **kwargs)

    monkeypatch.setattr(kernels, "attention", counted)
    capture(low, hooks, IDS)
    assert calls == [(3, 4, 21, 16)] * 2
    capture(low, hooks, IDS, attention_mask=MASK)
    assert len(calls) == 2
    assert model.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


@needs_bf16
def test_packed_weights_take_the_place_of_the_copy_and_are_counted() -> None:
    model, hooks = built("gpt2"), [Hook("h.1")]
    low = copy_in(model, torch.bfloat16, hooks, IDS).module
    own = [name for name, p in low.named_parameters() if p is not model.module.get_parameter(name)]
    assert copied_bytes(model.module, low) == 2 * sum(model.module.get_parameter(name).numel() for name in own)
    paths = packed_paths(low)
    assert "h.1.mlp.c_fc.weight" in paths
    assert not any(path.startswith("h.2") for path in paths)  # behind the hook, and the model's own
    assert not any(parameter.is_mkldnn for parameter in model.module.parameters())


@needs_bf16
def test_the_meter_sees_what_a_packed_copy_makes() -> None:
    low = copy_in(built("gpt2"), torch.bfloat16, [Hook("h.1")], IDS).module
    with Meter() as meter:
        capture(low, [Hook("h.1")], IDS)
    assert meter.largest == IDS.numel() * 4 * 64 * 2  # of the MLP; the weights were there before


@needs_bf16
@pytest.mark.parametrize("how", ["raises", "differs"])
def test_a_copy_that_packing_would_break_is_not_packed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hooks = built("gpt2"), [Hook("h.1")]
    expected = capture(plain(model, monkeypatch, torch.bfloat16, hooks), hooks, IDS)["h.1"]

    def broken(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if how == "raises":
            raise RuntimeError("could not create a primitive")
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    assert onednn.usable(torch.bfloat16)
    monkeypatch.setattr(onednn, "linear", broken)
    low = copy_in(model, torch.bfloat16, hooks, IDS).module
    assert not packed_paths(low)
    assert torch.equal(capture(low, hooks, IDS)["h.1"], expected)


@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_operations_that_are_missing_or_wrong_are_not_used(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if how == "missing":
            raise AttributeError("no such operation")
        return x.new_ones(*x.shape[:-1], weight.shape[0])

    monkeypatch.setattr(onednn, "linear", changed)
    assert not onednn.usable.__wrapped__(torch.float32)
    assert not onednn.usable.__wrapped__(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", HOOKS)
def test_a_lean_twin_computes_the_same_in_every_type(family: str, dtype: torch.dtype) -> None:
    model, hooks = built(family), hooks_of(family)
    model.module.to(dtype)
    twin = lean(model).module
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for ids, named in FORMS.values():
        expected = capture(model.module, hooks, ids, **named)
        for chosen in (hooks, hooks[:1]):
            for name, x in capture(twin, chosen, ids, **named).items():
                assert (x - expected[name]).norm() <= tolerance * expected[name].norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", HOOKS)
def test_a_lean_twin_follows_what_becomes_of_the_weights(family: str, dtype: torch.dtype) -> None:
    """They are the model's: set to other values, under autocast, and in another type."""
    model, hooks = built(family), hooks_of(family)[:1]
    twin = lean(model).module
    name = next(iter(capture(twin, hooks, IDS)))
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(capture(twin, hooks, IDS)[name], capture(model.module, hooks, IDS)[name])
    with torch.autocast("cpu", torch.bfloat16):
        expected = capture(model.module, hooks, IDS)[name]
        assert (capture(twin, hooks, IDS)[name] - expected).norm() <= 0.02 * expected.norm()
    model.module.to(dtype)
    expected = capture(model.module, hooks, IDS)[name]
    assert (capture(twin, hooks, IDS)[name] - expected).norm() <= 0.02 * expected.norm()


def test_a_bias_that_does_not_lie_in_order_is_left_to_pytorch() -> None:
    model = built("llama")
    first: Any = model.module.get_submodule("layers.0.mlp.gate_proj")
    first.bias = nn.Parameter(torch.randn(1).expand(first.out_features), requires_grad=False)
    twin, hooks = lean(model).module, hooks_of("llama")[:1]
    expected = capture(model.module, hooks, IDS)["layers.1"]
    torch.testing.assert_close(capture(twin, hooks, IDS)["layers.1"], expected, rtol=1e-4, atol=1e-4)


def test_gradients_go_through_a_lean_twin() -> None:
    model = built("gpt2")
    model.module.requires_grad_(True)
    twin = lean(model).module
    capture(twin, [Hook("h.1")], IDS, grad=True)["h.1"].square().sum().backward()
    got = model.module.get_parameter("h.0.mlp.c_fc.weight").grad
    assert got is not None
    model.module.zero_grad()
    capture(model.module, [Hook("h.1")], IDS, grad=True)["h.1"].square().sum().backward()
    expected = model.module.get_parameter("h.0.mlp.c_fc.weight").grad
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
