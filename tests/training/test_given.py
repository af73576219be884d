"""What is asked for by name is what the data were made with, even where it is the default; else it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import unweave as uw
from unweave import DataConfig, UnweaveError
from unweave.cli.train import TrainArgs
from unweave.training.given import check_given

CONFIG = DataConfig(context=16, held_out=0.2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, texts: Any) -> Path:
    path = tmp_path_factory.mktemp("stored") / "cache"
    uw.cache(texts, path, model=tiny_model, hooks="resid_post.0", tokens=500, config=CONFIG, model_precision="fp32")
    return path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 128}, r"context=128 was asked for, and the cache .*cache was made with 16"),
        ({"held_out": 0.05}, r"held_out=0\.05 was asked for, and the cache .* was made with 0\.2"),
        ({"model_precision": "bf16"}, "model_precision='bf16' was asked for, and the cache .* was made with 'fp32'"),
        ({"model": "demo"}, "activations of the model 'tiny', and 'demo' has other parameters"),
    ],
)
def test_a_default_that_is_given_is_not_one_that_was_left_out(
    stored: Path, options: dict[str, Any], sentence: str
) -> None:
    """pitfall_355"""
    with pytest.raises(UnweaveError, match=sentence):
        TrainArgs(data=str(stored), **options).prepared()


def test_what_the_cache_was_made_with_may_be_given(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TrainArgs(data=str(stored)).prepared()
    TrainArgs(data=str(stored), context=16, held_out=0.2, model_precision="fp32").prepared()
    assert capsys.readouterr().err == ""
    TrainArgs(data=str(stored), prompts_per_pass=8, max_bad=3).prepared()
    assert "max_bad and prompts_per_pass have no effect" in capsys.readouterr().err


def test_a_file_gives_settings_too(stored: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"data = '{stored}'\ntext = {{ bos = true }}\n")
    TrainArgs(config=file).prepared()
    file.write_text(f"data = '{stored}'\ntext = {{ pack = true, separator = 'eos' }}\n")
    with pytest.raises(UnweaveError, match=r"separator='eos' was asked for, and .* was made with None"):
        TrainArgs(config=file).prepared()


def test_tokens_decide_as_well(stored: Path) -> None:
    tokens = str(stored / "tokens")
    check_given({"data": tokens, "text": {"context": 8, "held_out": 0.2}})  # rows can be cut
    for text, sentence in (
        ({"context": 128}, "has rows of 16 tokens, shorter than context=128"),
        ({"held_out": 0.05}, r"made with held_out=0\.2, and held_out=0\.05"),
        ({"bos": False}, "bos=False was asked for, and .* was made with True"),
    ):
        with pytest.raises(UnweaveError, match=sentence):
            check_given({"data": tokens, "text": text})


def test_of_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = uw.ImageConfig(held_out=0.1)
    uw.cache("digits", tmp_path / "c", hooks="resid_post.1", tokens=340, model="demo-vit", config=config)
    data = str(tmp_path / "c")
    check_given({"data": data, "images": {"held_out": 0.1, "max_bad": 3, "seed": 5}})
    for given, sentence in (
        ({"images": {"held_out": 0.05}}, r"held_out=0\.05 was asked for, and .* was made with 0\.1"),
        ({"images": {"size": [16, 16]}}, r"size=\[16, 16\] was asked for, and .* was made with None"),
        ({"text": {"context": 128}}, "holds images, whose rows are as long as the images make them"),
    ):
        with pytest.raises(UnweaveError, match=sentence):
            check_given({"data": data} | given)
    other = uw.TrainConfig(data=data, images=uw.ImageConfig(size=16))
    with pytest.raises(UnweaveError, match="size=16 was asked for"):
        uw.train(other, progress=False)


def test_a_run_that_was_not_begun_needs_to_be_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with pytest.raises(UnweaveError, match=r"there is no run to resume in '.*frist'; did you mean 'first'"):
        TrainArgs(resume=True, out=str(tmp_path / "frist")).prepared()
    config, _ = TrainArgs(resume=True, out=str(tmp_path / "new"), tokens=500).prepared()
    assert config.tokens == 500
