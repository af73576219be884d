from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.live import ActivationStream
from unweave.activations.masks import MaskConfig
from unweave.activations.tokens import TokenRows
from unweave.models import Hook, LoadedModel

BOS, EOS, PAD = 256, 257, 258
TEXTS = [f"<{i}>" + "word " * (i % 7) for i in range(60)]
ALL = MaskConfig(special_tokens=False, norm_multiple=None)


def stream_of(
    model: LoadedModel,
    hooks: list[Hook],
    masks: MaskConfig | None = None,
    data: Any = TEXTS,
    *,
    n: int = 4,
    **config: Any,
) -> ActivationStream:
    settings = DataConfig(**{"context": 8, "held_out": 0.0, **config})
    return ActivationStream(model, hooks, TokenRows(data, model.tokenizer, settings, held_out=False), masks, n)


def everything(stream: ActivationStream) -> dict[str, Tensor]:
    passes = list(stream)
    return {name: torch.cat([p[name] for p in passes]) for name in passes[0]}


def test_pitfall_210_235_one_pass_gives_aligned_rows_under_their_own_names(
    model: LoadedModel, hooks: list[Hook], speller: Any
) -> None:
    stream = stream_of(model, hooks[::-1])
    got = everything(stream)
    assert list(got) == ["h.1", "h.0"]
    assert torch.equal(got["h.1"], got["h.0"] + 1)
    assert len(speller.attention_masks) == stream.passes


def test_all_tokens_come_in_order(model: LoadedModel, hooks: list[Hook]) -> None:
    rows = stream_of(model, hooks).rows
    ids = torch.cat([batch.ids for batch in rows.batches(5)]).flatten()
    got = everything(stream_of(model, hooks, ALL))["h.0"]
    assert torch.equal(got[:, 0].long(), ids)
    assert torch.equal(got[:, 1].long(), torch.arange(8).repeat(len(ids) // 8))


def test_masked_tokens_are_left_out_and_counted(model: LoadedModel, hooks: list[Hook]) -> None:
    stream = stream_of(model, hooks, MaskConfig(positions="2:"))
    got = everything(stream)["h.0"]
    assert got[:, 1].min() == 2
    assert not torch.isin(got[:, 0].long(), torch.tensor([BOS, EOS, PAD])).any()
    report = stream.report
    assert report.seen == sum(len(t) + 1 for t in TEXTS) // 8 * 8
    assert len(got) == report.kept == report.seen - report.by_id - report.by_position
    assert stream.excluded_ids == {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}


def test_pitfall_234_235_a_sink_at_one_hook_is_left_out_at_all(
    model: LoadedModel, hooks: list[Hook], speller: Any
) -> None:
    token = model.tokenizer("w")["input_ids"][0]  # type: ignore[misc]
    speller.special = {token: 5000.0}
    stream = stream_of(model, hooks)
    got = everything(stream)
    assert not (got["h.0"][:, 0] == token).any()
    assert torch.equal(got["h.1"], got["h.0"] + 1)
    assert stream.report.by_norm > 0
    assert stream.report.kept == len(got["h.0"])


def test_padding_is_masked_in_attention_and_left_out(model: LoadedModel, hooks: list[Hook], speller: Any) -> None:
    got = everything(stream_of(model, hooks, ALL, pack=False))["h.0"]
    assert len(got) == sum(min(len(t) + 1, 8) for t in TEXTS)
    assert any(mask is not None and mask.eq(0).any() for mask in speller.attention_masks)


def test_without_padding_there_is_no_attention_mask(model: LoadedModel, hooks: list[Hook], speller: Any) -> None:
    everything(stream_of(model, hooks))
    assert set(speller.attention_masks) == {None}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite(model: LoadedModel, hooks: list[Hook], speller: Any, value: float) -> None:
    stream = stream_of(model, hooks)
    next(stream)
    speller.special = dict.fromkeys(range(256), value)
    where = r"\(document 1, position 0\)\."
    with pytest.raises(UnweaveError, match=r"activations at hook h\.1 are NaN or infinite in pass 2 " + where):
        next(stream)


def test_a_token_that_is_masked_may_be_infinite(model: LoadedModel, hooks: list[Hook], speller: Any) -> None:
    speller.special = {BOS: math.inf}
    assert everything(stream_of(model, hooks))["h.1"].isfinite().all()


def test_tokens_of_another_tokenizer(model: LoadedModel, hooks: list[Hook]) -> None:
    for bad in (300, -1):
        ids = np.full((4, 8), 5)
        ids[2, 3] = bad
        with pytest.raises(UnweaveError, match=f"token id {bad}, but speller knows the ids from 0 to 299"):
            next(stream_of(model, hooks, data=ids))


def test_a_context_longer_than_the_model(model: LoadedModel, hooks: list[Hook], speller: Any) -> None:
    speller.config = type("Config", (), {"max_position_embeddings": 7})
    with pytest.raises(UnweaveError, match="context=8 is longer than the 7 positions of speller"):
        stream_of(model, hooks)


def test_hooks_and_passes_are_checked(model: LoadedModel, hooks: list[Hook]) -> None:
    with pytest.raises(UnweaveError, match="one or more different hooks"):
        stream_of(model, [])
    with pytest.raises(UnweaveError, match="one or more different hooks"):
        stream_of(model, [*hooks, hooks[0]])
    with pytest.raises(UnweaveError, match="prompts_per_pass=0"):
        stream_of(model, hooks, n=0)


def test_masks_that_leave_nothing(model: LoadedModel, hooks: list[Hook]) -> None:
    rows = TokenRows(TEXTS, model.tokenizer, DataConfig(context=8, held_out=0), held_out=False, repeat=True)
    with pytest.raises(UnweaveError, match=r"in 64 passes: of [\d,]+ tokens, [\d,]+ are special tokens or in"):
        next(stream := ActivationStream(model, hooks, rows, MaskConfig(token_ids=tuple(range(256)))))
    with pytest.raises(UnweaveError, match="the masks left no token of a pass: of 4,096 tokens, 4,096 are special"):
        stream.measure()
    config = DataConfig(context=8, held_out=0, pack=False)
    short = TokenRows(["ab", "cde", "fg"], model.tokenizer, config, held_out=False, repeat=True)
    late = ActivationStream(model, hooks, short, MaskConfig(positions="7:", special_tokens=False))
    with pytest.raises(UnweaveError, match=r"lie outside positions='7:' \(unpacked documents that end before them"):
        late.measure()


class Heads(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.out, self.shape = nn.Identity(), shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.ones(self.shape))


def test_heads_are_laid_side_by_side_and_tokens_may_be_flat(tokenizer: Any) -> None:
    for shape, width in (((4, 8, 3, 5), 15), ((32, 7), 7)):
        model = LoadedModel(Heads(*shape), tokenizer, "heads")
        stream = stream_of(model, [Hook("out")], ALL, np.ones((4, 8), dtype=int))
        assert next(stream)["out"].shape == (32, width)


def test_a_hook_that_is_not_per_token(tokenizer: Any) -> None:
    model = LoadedModel(Heads(4, 3), tokenizer, "heads")
    with pytest.raises(UnweaveError, match=r"hook out gives shape \(4, 3\) for \(4, 8\) tokens: not one per token"):
        next(stream_of(model, [Hook("out")], data=np.ones((4, 8), dtype=int)))


def test_pitfall_230_the_type_is_the_models(tokenizer: Any) -> None:
    class Half(Heads):
        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.ones(self.shape, dtype=torch.bfloat16))

    stream = stream_of(LoadedModel(Half(4, 8, 3), tokenizer, "half"), [Hook("out")], ALL, np.ones((4, 8), dtype=int))
    assert stream.measure(1).bytes_per_token == {"out": 6}
    assert next(stream)["out"].dtype == torch.bfloat16


def test_pitfall_137_measuring_consumes_nothing(model: LoadedModel, hooks: list[Hook]) -> None:
    plain, measured = stream_of(model, hooks), stream_of(model, hooks)
    cost = measured.measure()
    assert measured.widths() == {"h.0": 6, "h.1": 6}
    assert cost.tokens_per_second > 0
    assert 0.7 < cost.kept < 1
    assert cost.bytes_per_token == {"h.0": 24, "h.1": 24}
    first, second = everything(plain), everything(measured)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain.report == measured.report
    with pytest.raises(UnweaveError, match="nothing to measure"):
        measured.measure()


def test_a_resumed_stream_goes_on_alike(model: LoadedModel, hooks: list[Hook], speller: Any) -> None:
    speller.special = {model.tokenizer("w")["input_ids"][0]: 900.0}  # type: ignore[misc]
    stream = stream_of(model, hooks)
    for _ in range(3):
        next(stream)
    state = stream.state_dict()
    assert json.dumps(state["masks"])
    resumed = stream_of(model, hooks)
    resumed.load_state_dict(state)
    first, second = everything(stream), everything(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.report == stream.report
    assert resumed.passes == stream.passes


@pytest.mark.parametrize(("limit", "expected"), [(10**9, 4096 // 8), (8 * 6 * 4 * 10, 10), (1, 1)])
def test_the_rows_of_a_pass_are_chosen_by_the_widest_tensor(
    model: LoadedModel, hooks: list[Hook], monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr("unweave.activations.live._CPU_BYTES", limit)
    rows = TokenRows(TEXTS, model.tokenizer, DataConfig(context=8), held_out=False, repeat=True)
    stream = ActivationStream(model, hooks, rows)
    assert stream.prompts_per_pass is None
    next(stream)
    assert stream.prompts_per_pass == expected
    assert stream.report.seen == 8 * expected


def test_a_saved_state_keeps_the_choice_and_the_type(
    model: LoadedModel, hooks: list[Hook], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> ActivationStream:
        rows = TokenRows(TEXTS, model.tokenizer, DataConfig(context=8), held_out=False, repeat=True)
        return ActivationStream(model, hooks, rows, dtype=torch.bfloat16 if first is None else None)

    first: ActivationStream | None = None
    first = make()
    next(first)
    assert first.model is not first.given
    state = first.state_dict()
    expected = next(first)
    monkeypatch.setattr("unweave.activations.live._CPU_TOKENS", 16)
    resumed = make()
    resumed.load_state_dict(state)
    got = next(resumed)
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    assert resumed.model.module.embedding.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert model.module.embedding.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert resumed.prompts_per_pass == first.prompts_per_pass
