"""Capture and splice: what they return and change, and that nothing of them stays behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.models import Hook, capture, resolve_hooks, splice


class Several(NamedTuple):
    extra: str
    activation: Tensor


class Returning(nn.Module):
    """Returns its doubled input in a container of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        y = 2 * x
        return {
            "tensor": y, "tuple": (y, None), "late": (None, y), "list": [y, y + 1], "dict": {"a": 1, "b": y},
            "named": Several("text", y), "output": BaseModelOutput(last_hidden_state=y), "nothing": "text",
        }[self.kind]  # fmt: skip


class Parent(nn.Module):
    """`child`, called positionally or by keyword, then `after`."""

    def __init__(self, child: nn.Module, keyword: str | None = None) -> None:
        super().__init__()
        self.child, self.keyword, self.after = child, keyword, nn.Identity()

    def forward(self, x: Tensor) -> Any:
        result = self.child(x) if self.keyword is None else self.child(**{self.keyword: x})
        self.after(x)
        return result


class Keyword(nn.Module):
    def forward(self, hidden_states: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        given = hidden_states if hidden_states is not None else other
        assert given is not None
        return 3 * given


def unpack(result: Any) -> Tensor:
    """The activation in any of Returning's containers."""
    values = [result] if isinstance(result, Tensor) else result.values() if isinstance(result, dict) else result
    return next(value for value in values if isinstance(value, Tensor))


def state(module: nn.Module) -> list[Any]:
    """What attaching could change: hooks, modes, gradients, attributes."""
    return [
        (name, child.training, list(child._forward_hooks), list(child._forward_pre_hooks), sorted(vars(child)))
        for name, child in module.named_modules()
    ] + [(name, parameter.requires_grad, parameter._version) for name, parameter in module.named_parameters()]


@contextmanager
def counted(module: nn.Module) -> Iterator[Counter[str]]:
    """Count how often each submodule begins to run its forward."""
    runs: Counter[str] = Counter()

    def count(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs[name] += 1
            return forward(*args, **kwargs)

        return run

    for name, child in module.named_modules():
        child.forward = count(name, child.forward)
    yield runs
    for child in module.modules():
        del child.forward


KINDS = ["tensor", "tuple", "late", "list", "dict", "named", "output"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_tensor_of_any_container(kind: str) -> None:
    x = torch.randn(2, 3)
    model = Parent(Returning(kind))
    assert torch.equal(capture(model, [Hook("child")], x)["child"], 2 * x)
    plain = model(x)
    with splice(model, {Hook("child"): lambda y: y - 7}):
        edited = model(x)
    assert type(edited) is type(plain)
    assert torch.equal(unpack(edited), 2 * x - 7)
    assert len(edited) == len(plain)
    if kind == "output":
        assert torch.equal(edited.last_hidden_state, 2 * x - 7)
        assert torch.equal(edited[0], 2 * x - 7)


@pytest.mark.parametrize("kept", [[torch.ones(2)], {"a": torch.ones(2)}])
def test_a_container_that_the_module_keeps_is_not_written_to(kept: Any) -> None:
    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kept

    model = Parent(Keeping())
    with splice(model, {Hook("child"): torch.zeros_like}):
        assert not unpack(model(torch.ones(1))).any()
    assert unpack(model(torch.ones(1))).all()


@pytest.mark.parametrize("keyword", [None, "hidden_states"])
def test_the_input_by_position_or_keyword(keyword: str | None) -> None:
    x = torch.randn(2, 3)
    model = Parent(Keyword(), keyword)
    hook = Hook("child", "in")
    assert str(hook) == "child:in"
    assert torch.equal(capture(model, [hook], x)["child:in"], x)
    with splice(model, {hook: lambda y: y + 1}):
        assert torch.equal(model(x), 3 * (x + 1))


def test_where_no_tensor_passes_is_an_error() -> None:
    with pytest.raises(UnweaveError, match="'child' returns no tensor but str"):
        capture(Parent(Returning("nothing")), [Hook("child")], torch.ones(1))
    with pytest.raises(UnweaveError, match="'child' is given neither a positional tensor nor hidden_states"):
        capture(Parent(Keyword(), "other"), [Hook("child", "in")], torch.ones(1))


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_only_when_asked_for(gpt2: nn.Module, ids: Tensor, grad: bool) -> None:
    [hook] = resolve_hooks(gpt2, ["resid_post.1"])
    activation = capture(gpt2, [hook], input_ids=ids, grad=grad)[str(hook)]
    assert activation.requires_grad == grad
    assert not activation.is_inference()
    if grad:
        activation.sum().backward()
        assert gpt2.transformer.wte.weight.grad is not None
    assert torch.is_grad_enabled()


def test_results_have_the_order_of_the_hooks_and_the_dtype_of_the_model(gpt2: nn.Module, ids: Tensor) -> None:
    hooks = resolve_hooks(gpt2, ["resid_post.*", "h.1.ln_1:in"])[::-1]
    seen = capture(gpt2.bfloat16(), [*hooks, hooks[0]], input_ids=ids, attention_mask=torch.ones_like(ids))
    assert list(seen) == [str(hook) for hook in hooks]
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}


def test_pitfall_231_the_forward_pass_ends_at_the_last_hook(gpt2: nn.Module, ids: Tensor) -> None:
    with counted(gpt2) as runs:
        capture(gpt2, resolve_hooks(gpt2, ["resid_pre.0", "resid_pre.1"]), input_ids=ids)
    assert runs["transformer.h.0"] == 1
    assert runs["transformer.h.1"] == runs["transformer.h.2"] == runs["lm_head"] == 0
    with counted(gpt2) as runs:
        capture(gpt2, 2 * resolve_hooks(gpt2, ["resid_post.1"]), input_ids=ids)
    assert runs["transformer.h.1.mlp"] == 1
    assert runs["transformer.h.2"] == runs["transformer.ln_f"] == runs["lm_head"] == 0


def test_the_order_of_execution_decides_when_all_is_seen() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model = Backwards()
    with counted(model) as runs:
        capture(model, resolve_hooks(model, ["first"]), torch.ones(2))
    assert runs == {"": 1, "first": 1}
    assert list(capture(model, resolve_hooks(model, ["first", "last"]), torch.ones(2))) == ["last", "first"]


def test_a_model_that_catches_exceptions_does_not_hold_up_the_end() -> None:
    class Careful(Parent):
        def forward(self, x: Tensor) -> Any:
            try:
                return super().forward(x)
            except Exception:
                return self.after(x)

    model = Careful(nn.Identity())
    with counted(model) as runs:
        capture(model, [Hook("child")], torch.ones(2))
    assert runs["after"] == 0


def test_of_several_runs_the_first_counts() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.end = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.step(x) + 1
            return self.end(x)

    seen = capture(Loop(), [Hook("step"), Hook("end")], torch.zeros(1))
    assert (seen["step"].item(), seen["end"].item()) == (0, 3)
    with splice(loop := Loop(), {Hook("step"): lambda x: 10 * x}):
        assert loop(torch.zeros(1)).item() == 111


def test_a_hook_that_is_never_passed_is_an_error() -> None:
    class Skipping(Parent):
        def forward(self, x: Tensor) -> Any:
            return self.after(x)

    model = Skipping(nn.Identity())
    with pytest.raises(UnweaveError, match="'child', 'child:in' did not run in the forward pass of Skipping"):
        capture(model, [Hook("child"), Hook("after"), Hook("child", "in")], torch.ones(1))


def test_a_hook_of_another_model_is_an_error() -> None:
    model = Parent(nn.Identity())
    for use in (lambda h: capture(model, [h], torch.ones(1)), lambda h: splice(model, {h: torch.sin}).__enter__()):
        with pytest.raises(UnweaveError, match="Parent has no module 'chidl'; did you mean 'child'"):
            use(Hook("chidl"))


def test_pitfall_211_later_writes_do_not_reach_what_was_captured() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()
            self.register_buffer("scratch", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.scratch.copy_(x)
            y = self.first(self.scratch)
            y += 1
            return self.second(y)

    model = InPlace()
    hooks = [Hook("first", "in"), Hook("first"), Hook("second")]
    early = capture(model, hooks, torch.zeros(3))
    late = capture(model, hooks, torch.full((3,), 5.0))
    assert [tensor[0].item() for tensor in early.values()] == [0, 0, 1]
    assert [tensor[0].item() for tensor in late.values()] == [5, 5, 6]


def test_pitfall_146_nothing_is_cached_across_a_change_of_the_weights(gpt2: nn.Module, ids: Tensor) -> None:
    [hook] = resolve_hooks(gpt2, ["resid_post.0"])
    before = capture(gpt2, [hook], input_ids=ids)[str(hook)]
    gpt2.load_state_dict({name: 1.5 * tensor for name, tensor in gpt2.state_dict().items()})
    after = capture(gpt2, [hook], input_ids=ids)[str(hook)]
    assert not torch.allclose(before, after)
    assert torch.equal(after, gpt2(input_ids=ids, output_hidden_states=True).hidden_states[1])


def test_the_early_end_keeps_no_activation_alive() -> None:
    """pitfall_308"""

    class Watched(Parent):
        def forward(self, x: Tensor) -> Any:
            inner = x + 1
            self.watch = weakref.ref(inner)
            return super().forward(inner)

    model = Watched(nn.Identity())
    gc.disable()
    try:
        capture(model, [Hook("child")], torch.ones(1))
        assert model.watch() is None
    finally:
        gc.enable()


def test_pitfall_249_and_250_nothing_stays_behind_and_nobody_elses_hooks_go(gpt2: nn.Module, ids: Tensor) -> None:
    calls: list[str] = []
    gpt2.transformer.h[0].register_forward_hook(lambda *_: calls.append("theirs"))
    hooks = resolve_hooks(gpt2, ["resid_pre.0", "resid_post.0", "mlp_out.2"])
    weights = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    before = state(gpt2)

    capture(gpt2, hooks, input_ids=ids)
    assert state(gpt2) == before
    with splice(gpt2, dict.fromkeys(hooks, torch.zeros_like)):
        assert state(gpt2) != before
        gpt2(input_ids=ids)
    assert state(gpt2) == before
    with pytest.raises(UnweaveError, match="no module"), splice(gpt2, dict.fromkeys([*hooks, Hook("no")], torch.sin)):
        pass
    assert state(gpt2) == before
    with pytest.raises(ZeroDivisionError), splice(gpt2, {hooks[0]: lambda x: x / (1 // 0)}):
        gpt2(input_ids=ids)
    assert state(gpt2) == before
    with pytest.raises(IndexError):
        capture(gpt2, hooks, input_ids=ids + 1000)
    assert state(gpt2) == before

    assert all(torch.equal(tensor, weights[name]) for name, tensor in gpt2.state_dict().items())
    assert len(calls) == 2


def test_pitfall_249_two_edits_at_one_hook_go_one_by_one() -> None:
    model = Parent(nn.Identity())
    hook = Hook("child")
    x = torch.tensor([1.0])
    outer, inner = splice(model, {hook: lambda y: y + 1}), splice(model, {hook: lambda y: 10 * y})
    outer.__enter__()
    inner.__enter__()
    assert model(x).item() == 20  # the outer one first
    assert capture(model, [hook], x)["child"].item() == 20
    outer.__exit__(None, None, None)  # in any order
    assert model(x).item() == 10
    inner.__exit__(None, None, None)
    assert model(x).item() == 1


def test_captures_may_be_nested() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    with splice(model, {Hook("1"): lambda x: capture(model, [Hook("0")], x + 100)["0"]}):
        assert capture(model, [Hook("2")], torch.zeros(1))["2"].item() == 100


@pytest.mark.parametrize("grad", [False, True])
def test_splice_several_hooks_with_and_without_gradients(gpt2: nn.Module, ids: Tensor, grad: bool) -> None:
    shift = torch.zeros(16, requires_grad=True)
    hooks = resolve_hooks(gpt2, ["resid_pre.1", "mlp_out.2"])
    plain = gpt2(input_ids=ids).logits
    with torch.set_grad_enabled(grad):
        with splice(gpt2, dict.fromkeys(hooks, lambda x: x + shift)):
            unchanged = gpt2(input_ids=ids).logits
        with splice(gpt2, {hooks[0]: lambda x: x + 1, hooks[1]: torch.zeros_like}):
            changed = gpt2(input_ids=ids).logits
            assert not capture(gpt2, hooks, input_ids=ids)["transformer.h.2.mlp"].any()
    assert torch.equal(unchanged, plain)  # pitfall 253: adding nothing leaves the logits bit for bit
    assert not torch.allclose(changed, plain)
    if grad:
        unchanged[:, :, 3].sum().backward()
        assert shift.grad is not None
        assert shift.grad.any()
    else:
        assert not unchanged.requires_grad


def test_an_ablated_model_is_the_model_of_what_is_left(gpt2: nn.Module, ids: Tensor) -> None:
    with splice(gpt2, dict.fromkeys(resolve_hooks(gpt2, ["attn_out.*", "mlp_out.*"]), torch.zeros_like)):
        ablated = gpt2(input_ids=ids).logits
    body = gpt2.transformer
    embedded = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    assert torch.allclose(ablated, gpt2.lm_head(body.ln_f(embedded)), atol=1e-6)


def test_the_replacement_has_the_shape_and_gets_the_dtype() -> None:
    model = Parent(nn.Identity())
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    with splice(model, {Hook("child"): lambda y: y.float() / 3}):
        assert torch.equal(model(x), (x.float() / 3).bfloat16())
    with (
        splice(model, {Hook("child"): lambda y: y[0]}),
        pytest.raises(UnweaveError, match=r"'child' has shape \(3,\), not \(2, 3\)"),
    ):
        model(x)


def test_pitfall_260_generation_is_edited_the_same_with_and_without_a_cache(gpt2: nn.Module, ids: Tensor) -> None:
    hooks = resolve_hooks(gpt2, ["resid_post.0", "resid_pre.2", "attn_out.1"])
    seen: Counter[int] = Counter()

    def edit(x: Tensor) -> Tensor:
        seen[x.shape[1]] += 1
        return x + 2 * torch.tanh(x.flip(-1))

    def generate(cached: bool) -> Tensor:
        return gpt2.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None)

    plain = generate(True)
    with splice(gpt2, dict.fromkeys(hooks, edit)):
        cached = generate(True)
        assert seen == {7: 3, 1: 7 * 3}  # the prompt once, then each new token once
        uncached = generate(False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(generate(True), plain)


class Heads(nn.Module):
    """Something with two heads of three columns, in an axis of their own or side by side."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.z, self.shape = nn.Identity(), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.z(x.reshape(*x.shape[:2], *self.shape)).flatten(2)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["side by side", "apart"])
def test_columns_are_read_and_replaced_alone(shape: tuple[int, ...]) -> None:
    module, x = Heads(shape), torch.randn(4, 5, 6)
    second, first = Hook("z", columns=(3, 6)), Hook("z", "in", (0, 2))
    captured = capture(module, [first, second], x)
    assert list(captured) == ["z:in#0:2", "z#3:6"]
    assert torch.equal(captured["z#3:6"], x[..., 3:])
    assert torch.equal(captured["z:in#0:2"], x[..., :2])
    with splice(module, {second: lambda part: part + 10, first: lambda part: 0 * part}):
        assert torch.equal(module(x), torch.cat([0 * x[..., :2], x[..., 2:3], x[..., 3:] + 10], -1))
    with pytest.raises(UnweaveError, match="beyond the 6 columns"):
        capture(module, [Hook("z", columns=(3, 7))], x)
    with splice(module, {second: lambda part: part[..., :2]}), pytest.raises(UnweaveError, match=r"not \(4, 5, 3\)"):
        module(x)
