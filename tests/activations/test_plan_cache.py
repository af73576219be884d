from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, DataConfig, MaskConfig, TokenRows
from unweave.activations.cache import cache
from unweave.activations.cache.plan import plan_cache
from unweave.activations.limits import free_disk
from unweave.cli import main
from unweave.models import Hook, LoadedModel

TEXTS = [f"<{i}>" + "word " * (i % 7) for i in range(4000)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_a_cache_is_as_large_as_its_plan_says(
    model: LoadedModel, hooks: list[Hook], tmp_path: Path, dtype: str
) -> None:
    config = DataConfig(context=32)
    rows = TokenRows(TEXTS, model.tokenizer, config, held_out=False)
    masks = MaskConfig(special_tokens=False, norm_multiple=None)
    plan = plan_cache(30_000, ActivationStream(model, hooks, rows, masks).measure(), 32, dtype=dtype)
    assert (plan.tokens, plan.held_out_tokens, plan.rows, plan.shards) == (30_000, 1500, 938 + 47, 2)
    cache(TEXTS, tmp_path / "c", hooks=[str(h) for h in hooks], tokens=30_000, model=model, dtype=dtype, config=config)
    real = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*.npy"))
    assert abs(plan.bytes / real - 1) < 0.06
    assert plan.seconds > 0
    with pytest.raises(UnweaveError, match="at least one token"):
        plan_cache(0, ActivationStream(model, hooks, rows, masks).measure(), 32)


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.1)


def test_the_command_plans_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    arguments = ["plan", "--cache-tokens", "1000000", "--seconds", "0", "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "plan: a cache of 1,000,000 tokens and 50,000 held-out ones" in shown
    assert "8,204 rows, 2 shards, 500 MB on disk in bfloat16" in shown
    assert not (tmp_path / "c").exists()
    arguments[2] = str(10**15)
    assert main(arguments) == 2
    assert "take fewer tokens or hooks" in capsys.readouterr().err
