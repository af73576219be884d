from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations.masks import MaskConfig, Masks, kept_positions
from unweave.activations.tokens import TokenBatch

BOS, EOS, PAD = 256, 257, 258


def batch_of(ids: list[list[int]]) -> TokenBatch:
    tensor = torch.tensor(ids)
    return TokenBatch(tensor, tensor != PAD, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("1:", [1, 2, 3, 4, 5]),
        (":-1", [0, 1, 2, 3, 4]),
        ("1:5:2", [1, 3]),
        ("::1", [0, 1, 2, 3, 4, 5]),
        ("::-2", [1, 3, 5]),
        (" 2 : 4 ", [2, 3]),
        ((0, 3), [0, 3]),
        ((-1,), [5]),
    ],
)
def test_pitfall_236_positions(positions: Any, kept: list[int]) -> None:
    assert kept_positions(positions, 6).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("positions", ["6:", (), (6,), (-7,)])
def test_positions_outside_of_the_row(positions: Any) -> None:
    with pytest.raises(UnweaveError, match="keeps nothing, or lies outside a row of context=6"):
        kept_positions(positions, 6)


@pytest.mark.parametrize("positions", ["1", "a:", "1:2:3:4", "::0", ""])
def test_positions_that_are_no_slice(positions: str) -> None:
    with pytest.raises(UnweaveError, match="is no slice"):
        MaskConfig(positions=positions)


def test_lists_become_tuples() -> None:
    config = MaskConfig(token_ids=[1, 2], positions=[3, 4])  # type: ignore[arg-type]
    assert config == MaskConfig(token_ids=(1, 2), positions=(3, 4))


def test_a_norm_multiple_is_positive() -> None:
    with pytest.raises(UnweaveError, match="norm_multiple=0"):
        MaskConfig(norm_multiple=0)


def test_pitfall_233_tokens_are_left_out_by_id_and_by_position(tokenizer: Any) -> None:
    masks = Masks(MaskConfig(token_ids=(7,), positions="1:"), tokenizer, 4)
    keep = masks.by_token(batch_of([[BOS, 7, 8, 9], [10, 11, EOS, PAD]]))
    assert keep.tolist() == [[False, False, True, True], [False, True, False, False]]
    report = masks.report
    assert (report.seen, report.kept, report.by_id, report.by_position) == (7, 3, 3, 1)


def test_which_ids_are_left_out_is_said(tokenizer: Any) -> None:
    assert Masks(MaskConfig(), tokenizer, 4).excluded_ids == {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
    assert Masks(MaskConfig(special_tokens=False), tokenizer, 4).excluded_ids == {}
    assert Masks(MaskConfig(token_ids=(7,)), None, 4).excluded_ids == {7: "7"}


def test_pitfall_234_sinks_are_left_out_by_norm(tokenizer: Any) -> None:
    masks = Masks(MaskConfig(), tokenizer, 4)
    norms = torch.tensor([1.0, 2.0, 3.0, 20.0, 20.1])
    assert masks.by_norm({"a": norms[:3], "b": torch.ones(3)}).all()
    assert masks.report.median_norm == {"a": 2.0, "b": 1.0}
    keep = masks.by_norm({"a": norms[2:], "b": torch.tensor([11.0, 1.0, 1.0])})
    assert keep.tolist() == [False, True, False]
    assert masks.report.by_norm == 2


def test_the_norm_mask_can_be_off_and_ignores_a_silent_hook(tokenizer: Any) -> None:
    norms = {"a": torch.tensor([0.0, 0.0, 1000.0])}
    assert Masks(MaskConfig(), tokenizer, 4).by_norm(norms).all()
    norms = {"a": torch.tensor([1.0, 1.0, 1000.0])}
    assert Masks(MaskConfig(norm_multiple=None), tokenizer, 4).by_norm(norms).all()


def test_the_median_is_part_of_the_state(tokenizer: Any) -> None:
    masks, resumed = (Masks(MaskConfig(), tokenizer, 4) for _ in range(2))
    masks.by_token(batch_of([[1, 2, 3, 4]]))
    masks.by_norm({"a": torch.ones(4)})
    resumed.load_state_dict(masks.state_dict())
    assert asdict(resumed.report) == asdict(masks.report)
    assert not resumed.by_norm({"a": torch.full((4,), 11.0)}).any()
    assert masks.report.by_norm == 0
