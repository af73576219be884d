"""From images to trained, evaluated, shown SAEs, by the library and by the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unweave as uw
from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, ImageRows, MaskConfig
from unweave.cli import main
from unweave.dashboard import image_dashboard
from unweave.models import LoadedModel, load_model
from unweave.training import TrainConfig, trainer
from unweave.training.train import TrainResult

SMALL = uw.SAEConfig(d_sae=128, activation=uw.TopK(8), lr=3e-3)


@pytest.fixture(scope="module")
def vit() -> LoadedModel:
    return load_model("demo-vit")


def config(out: Path | None = None, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": "demo-vit", "data": "digits", "hooks": ("resid_post.1",), "saes": (SMALL,), "tokens": 40_000,
        "batch_size": 1024, "buffer": 4096, "out": None if out is None else str(out),
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, vit: LoadedModel) -> TrainResult:
    return uw.train(config(tmp_path_factory.mktemp("vision") / "run"), model=vit, progress=False)


def test_an_sae_of_patches_is_trained_and_says_where_it_is_from(trained: TrainResult) -> None:
    [sae] = trained.saes
    assert sae.d_in == 96
    assert sae.metadata["hf_hook_name"] == "vit.layers.1"
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert sae.metadata["model_name"] == "demo-vit"
    assert sae.metadata["dataset_path"] == "digits"
    assert sae.metadata["context_size"] == 17
    assert sae.metadata["masks"]["token_kinds"] == ["patch"]
    assert sae.metadata["images"]["held_out"] == 0.05
    assert sae.metadata["training_epochs"] == 2  # 1704 images of 16 patches


def test_it_is_evaluated_on_the_images_that_were_held_out(trained: TrainResult) -> None:
    report = uw.evaluate(trained.saes[0], model="demo-vit", data="digits")
    assert report.provenance["data"]["split"] == "held-out"
    tokens = report.provenance["tokens"]
    assert (tokens["seen"], tokens["by_kind"]) == (93 * 17, 93)
    assert report["explained_variance"] is not None
    assert report["explained_variance"] > 0.6
    assert report["l0"] == pytest.approx(8, abs=0.5)
    behaviour = [value for name, value in report.metrics.items() if "ce_loss" in name or "kl" in name]
    assert behaviour
    assert set(behaviour) == {None}
    assert "no metrics of behaviour: images have no next token to predict" in report.notes


def test_the_numbers_are_those_of_arithmetic_by_hand(trained: TrainResult, vit: LoadedModel) -> None:
    [sae] = trained.saes
    masks = MaskConfig(norm_multiple=None)
    rows = ImageRows("digits", vit, ImageConfig(), held_out=True)
    pixels = rows.peek(100).pixels["pixel_values"]
    with torch.no_grad():
        x = vit.module(pixels, output_hidden_states=True).hidden_states[2][:, 1:].flatten(0, 1)
        explained = 1 - (sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        l0 = (sae.encode(x) > 0).sum(1).double().mean()
    report = uw.evaluate(sae, model=vit, data=rows, masks=masks, batch_prompts=10)
    assert report["explained_variance"] == pytest.approx(explained.item(), abs=1e-4)
    assert report["l0"] == pytest.approx(l0.item(), abs=1e-3)
    assert len(rows.next_rows(100)) == 93  # they are where they were


def test_kinds_of_tokens_can_be_trained_on(vit: LoadedModel) -> None:
    masks = MaskConfig(token_kinds=("cls",))
    result = uw.train(config(masks=masks, tokens=2048, buffer=1024), model=vit, progress=False)
    assert result.saes[0].metadata["masks"]["token_kinds"] == ["cls"]
    report = uw.evaluate(result.saes[0], model=vit, data="digits")
    assert report.provenance["tokens"]["kept"] == 93


def test_a_killed_run_goes_on_from_its_checkpoint(
    vit: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uw.train(config(tokens=12_000), model=vit, progress=False)
    cut = config(tmp_path / "run", tokens=12_000, checkpoint_every=4096)

    def die(*args: Any, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(1)
        if len(calls) == 10:
            raise MemoryError

    monkeypatch.setattr(trainer, "_check_batch", die)
    with pytest.raises(MemoryError):
        uw.train(cut, model=vit, progress=False)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    resumed = uw.train(cut, model=vit, resume=True, progress=False)
    assert torch.equal(whole.saes[0].W_dec, resumed.saes[0].W_dec)


def test_text_is_no_data_for_a_vision_model(vit: LoadedModel) -> None:
    with pytest.raises(UnweaveError, match='is a vision model: give it images, such as data="digits" or a folder'):
        uw.train(config(data="stdlib"), model=vit, progress=False)


def test_the_page_shows_what_fires(trained: TrainResult, vit: LoadedModel, tmp_path: Path) -> None:
    page = image_dashboard(
        trained.saes[0], model=vit, data="digits", path=tmp_path / "p.html", n_features=12, n_top=5, tokens=170 * 17
    )
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    found = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert found["classes"] == list("0123456789")
    assert len(found["latents"]) == 12
    latent = found["latents"][-1]
    best = latent["top"][0]
    assert [top["value"] for top in latent["top"]] == sorted((t["value"] for t in latent["top"]), reverse=True)
    assert max(best["heat"]) == 255
    # The best image of a latent, and the heat on it, again by hand.
    rows = ImageRows("digits", vit, ImageConfig(), held_out=False)
    assert rows.source.entry is not None
    assert vit.processor is not None
    picture: Any = rows.source.entry(best["image"]).open()
    inputs = vit.processor(images=[picture.convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        x = vit.module(**inputs, output_hidden_states=True).hidden_states[2][0, 1:]
        codes = trained.saes[0].encode(x)[:, latent["index"]]
    assert codes.max().item() == pytest.approx(best["value"], abs=2e-3)
    assert (codes * 255 / codes.max()).round().int().tolist() == pytest.approx(best["heat"], abs=1)
    image = found["images"][str(best["image"])]
    assert rows.source.labels is not None
    assert (image["rows"], image["columns"], image["label"]) == (4, 4, rows.source.labels[best["image"]])


def test_the_command_line_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--vision", "--tokens", "20000", "--out", str(out)]) == 0
    assert json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval_type_id"] == "core"
    assert (out / "features.html").stat().st_size > 50_000
    assert main(["eval", str(out / "sae"), "--tokens", "500", "--out", str(tmp_path / "again.json")]) == 0
    assert main(["dashboard", str(out / "sae"), "--features", "4", "--tokens", "2000"]) == 0
    assert "handwritten digits" in capsys.readouterr().out
    assert main(["eval", str(out / "sae"), "--context", "3"]) == 2
    assert "leave out --context" in capsys.readouterr().err


def test_the_command_line_trains_on_a_folder(tmp_path: Path, vit: LoadedModel) -> None:
    images = ImageRows("digits", vit, ImageConfig(), held_out=False).source
    assert images.entry is not None
    for i in range(60):
        place = tmp_path / "digits" / str(images.labels[i])  # type: ignore[index]
        place.mkdir(parents=True, exist_ok=True)
        picture: Any = images.entry(i).open()
        picture.save(place / f"{i}.png")
    line = [
        "train", "--model", "demo-vit", "--data", str(tmp_path / "digits"), "--hooks", "resid_post.0",
        "--tokens", "2000", "--d-sae", "64", "--k", "4", "--batch-size", "512", "--buffer", "1024", "--held-out", "0.2",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(line) == 0
    sae = uw.SAE.load(tmp_path / "run" / "sae")
    assert sae.metadata["images"]["held_out"] == 0.2
    assert math.isfinite(float(sae.W_dec.sum()))


def test_images_of_many_shapes_are_trained_on_and_evaluated() -> None:
    """Kept aspect ratios, and SigLIP 2's padded lists, all the way: what is evaluated is every patch, once."""
    import transformers

    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    shapes = [(20, 44), (44, 20), (30, 30)]
    pictures = [generator.integers(0, 256, (*shapes[i % 3], 3), dtype=np.uint8) for i in range(30)]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    dino = load_model(
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=16)),
        processor=transformers.BitImageProcessorPil(),
    )
    siglip2 = load_model(
        transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**sizes, num_patches=16, intermediate_size=16)
        ),
        processor=transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16),
    )
    sae = uw.SAEConfig(d_sae=24, activation=uw.TopK(4))
    for model, images in ((dino, ImageConfig(aspect="keep", max_patches=16)), (siglip2, ImageConfig())):
        run = TrainConfig(
            hooks=("resid_post.0",), saes=(sae,), tokens=900, batch_size=128, buffer=256, images=images,
            masks=MaskConfig(norm_multiple=None),
        )  # fmt: skip
        [trained] = uw.train(run, model=model, data=pictures, progress=False).saes
        everything = replace(images, held_out=0.0)
        report = uw.evaluate(trained, model=model, data=pictures, data_config=everything, batch_prompts=4)
        rows = ImageRows(pictures, model, everything, held_out=False)
        patches = sum(int((batch.real & (batch.kinds == 0)).sum()) for batch in rows.batches(4))
        assert report.provenance["tokens"]["kept"] == patches
        assert report.provenance["data"]["context"] == rows.context
        assert report["l0"] == pytest.approx(4, abs=0.1)
