"""What people write, and the hooks it stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unweave._errors import UnweaveError
from unweave.models import Hook, resolve_hooks


def block() -> nn.Module:
    return nn.ModuleDict({"attn": nn.ModuleDict({"proj": nn.Linear(2, 2)}), "mlp": nn.Linear(2, 2)})


def toy() -> nn.Module:
    """`body.embed`, `body.h.0.attn.proj`, `body.h.0.mlp`, ..., `head`, with eleven blocks."""
    body = nn.ModuleDict({"embed": nn.Linear(2, 2), "h": nn.ModuleList([block() for _ in range(11)])})
    return nn.ModuleDict({"body": body, "head": nn.Linear(2, 2)})


TOY = toy()
PATHS = [path for path, _ in TOY.named_modules() if path]


def resolve(*names: str) -> list[str]:
    return [str(hook) for hook in resolve_hooks(TOY, names)]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("body.h.3.mlp", ["body.h.3.mlp"]),
        ("body.h.3.mlp:out", ["body.h.3.mlp"]),
        ("body.h.3.mlp:in", ["body.h.3.mlp:in"]),
        ("h.3", ["body.h.3"]),
        ("3.mlp:in", ["body.h.3.mlp:in"]),
        ("proj", None),
        ("h.*.mlp", [f"body.h.{n}.mlp" for n in range(11)]),
        ("body.h.?", [f"body.h.{n}" for n in range(10)]),
        ("h.[02]:in", ["body.h.0:in", "body.h.2:in"]),
        ("*", ["body", "head"]),
        ("body.*", ["body.embed", "body.h"]),
    ],
)
def test_one_name(name: str, found: list[str] | None) -> None:
    if found is None:
        with pytest.raises(UnweaveError, match=r"any of 11 modules, such as 'body\.h\.0\.attn\.proj' and"):
            resolve(name)
    else:
        assert resolve(name) == found


def test_a_star_stays_within_a_component() -> None:
    assert resolve("body.h.1.*") == ["body.h.1.attn", "body.h.1.mlp"]
    assert resolve("h.1.a*") == ["body.h.1.attn"]
    with pytest.raises(UnweaveError, match="matches nothing"):
        resolve("body.*.mlp")


def test_a_whole_path_wins_over_the_end_of_another() -> None:
    module = nn.ModuleDict({"mlp": nn.Linear(2, 2), "block": nn.ModuleDict({"mlp": nn.Linear(2, 2)})})
    assert resolve_hooks(module, ["mlp"]) == [Hook("mlp")]


def test_a_module_that_is_called_like_an_alias_wins(gpt2: nn.Module) -> None:
    gpt2.hook_embed = nn.Identity()
    assert resolve_hooks(gpt2, ["hook_embed"]) == [Hook("hook_embed")]


def test_order_is_the_models_and_each_hook_comes_once() -> None:
    names = ["head", "h.1", "h.1.mlp:in", "h.1.attn.proj", "h.1:in", "h.1.attn", "h.1.mlp:in", "body.h.1:out", "embed"]
    assert resolve(*names) == [
        "body.embed", "body.h.1:in", "body.h.1.attn.proj", "body.h.1.attn", "body.h.1.mlp:in", "body.h.1", "head",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(["", ":in", ":out"])), max_size=8), st.randoms())
def test_pitfall_210_the_order_of_the_names_plays_no_part(picked: list[tuple[str, str]], random: st.DataObject) -> None:
    names = ["".join(pick) for pick in picked]
    shuffled = names.copy()
    random.shuffle(shuffled)
    found = resolve(*names)
    assert resolve(*shuffled, *names) == found
    assert resolve(*found) == found
    assert set(found) == {name.removesuffix(":out") for name in names}


def test_a_module_with_two_paths_has_both() -> None:
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"first": shared, "second": shared})
    assert resolve_hooks(module, ["second", "first"]) == [Hook("first"), Hook("second")]


def test_aliases(gpt2: nn.Module) -> None:
    hooks = resolve_hooks(gpt2, ["blocks.1.hook_resid_pre", "resid_post.*", "mlp_out.2", "transformer.h.2"])
    assert [str(hook) for hook in hooks] == [
        "transformer.h.0", "transformer.h.1:in", "transformer.h.1", "transformer.h.2.mlp", "transformer.h.2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("body.h.11.mlp", r"there are 'body\.h\.0\.mlp' to 'body\.h\.10\.mlp'"),
        ("h.42", r"there are 'h\.0' to 'h\.10'"),
        ("h.1.mpl", r"did you mean 'h\.1\.mlp'"),
        ("bdoy.embed", r"did you mean 'body\.embed'"),
        ("h.*.mpl", r"did you mean 'h\.\d\.mlp'"),
        ("unrelated", r"its modules are 'body', 'head' and what is in them"),
        ("", r"its modules are 'body', 'head'"),
        ("h.1:inn", r"only ':in' and ':out' exist"),
        ("resid_post.0", r"aliases need one stack"),
    ],
)
def test_pitfall_248_what_matches_nothing_is_an_error_that_says_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(UnweaveError, match=hint) as error:
        resolve("head", name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resid_post.3", r"there are 'resid_post\.0' to 'resid_post\.2'"),
        ("blocks.9.hook_mlp_out", r"there are 'blocks\.0\.hook_mlp_out' to 'blocks\.2\.hook_mlp_out'"),
        ("blocks.1.hook_resd_pre", r"did you mean 'blocks\.1\.hook_resid_pre'"),
        ("resid_pre.1:in", r"the alias 'resid_pre\.1' stands for one side already"),
    ],
)
def test_pitfall_248_aliases_too(gpt2: nn.Module, name: str, hint: str) -> None:
    with pytest.raises(UnweaveError, match=hint):
        resolve_hooks(gpt2, [name])


def test_columns_of_any_hook() -> None:
    assert resolve_hooks(TOY, ["h.3.mlp:in#4:8", "h.3.mlp:in#0:4", "h.3.mlp:in"]) == [
        Hook("body.h.3.mlp", "in"), Hook("body.h.3.mlp", "in", (0, 4)), Hook("body.h.3.mlp", "in", (4, 8)),
    ]  # fmt: skip
    [hook] = resolve_hooks(TOY, ["h.3.mlp#4:8"])
    assert resolve_hooks(TOY, [str(hook)]) == [hook]


@pytest.mark.parametrize("part", ["#", "#x", "#8:4", "#4:4", "#1:2:3", "#-1"])
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(UnweaveError, match="neither a head"):
        resolve_hooks(TOY, [f"h.3.mlp{part}"])


def test_a_head_is_one_of_what_attention_mixes() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=10, n_positions=8))
    place = "transformer.h.1.attn.c_proj"
    assert resolve_hooks(module, ["blocks.1.attn.hook_z#2"]) == [Hook(place, "in", (8, 12))]
    assert resolve_hooks(module, ["blocks.*.attn.hook_z#0"])[1] == Hook(place, "in", (0, 4))
    with pytest.raises(UnweaveError, match="heads 0 to 2, and no head 3"):
        resolve_hooks(module, ["blocks.1.attn.hook_z#3"])
    with pytest.raises(UnweaveError, match="no heads that are known"):
        resolve_hooks(module, ["resid_post.1#0"])
