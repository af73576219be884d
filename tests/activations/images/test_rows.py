"""Rows of images: which, in which order, how often, and what happens to those that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, ImageConfig, ImageRows, MaskConfig, is_held_out
from unweave.models import TOKEN_KINDS, Hook, LoadedModel, load_model, resolve_hooks

Pictures = Callable[..., list[Image.Image]]
ALL = ImageConfig(held_out=0)


def numbers(rows: ImageRows, n: int = 7) -> list[int]:
    return [i for batch in rows.batches(n) for i in batch.documents[:, 0].tolist()]


def test_every_image_is_served_once_with_its_number(vit: LoadedModel, folder: Path) -> None:
    rows = ImageRows(folder, vit, ALL, held_out=False)
    batch = rows.next_rows(12)
    order = batch.documents[:, 0].tolist()
    assert sorted(order) == list(range(12))
    assert order != sorted(order)
    assert not len(rows.next_rows(1))
    for i, number in enumerate(order):
        image = Image.open(folder / rows.source.names[number]).convert("RGB")
        assert vit.processor is not None
        by_hand = vit.processor(images=[image], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch.pixels["pixel_values"][i], by_hand)


def test_records_say_what_each_token_is(vit: LoadedModel, folder: Path) -> None:
    rows = ImageRows(folder, vit, ALL, held_out=False)
    batch = rows.next_rows(2)
    records = batch.records()
    assert set(records) == {"positions", "documents", "kinds"}
    assert records["positions"].tolist() == [list(range(5))] * 2
    assert records["positions"].dtype == torch.int32
    assert records["documents"].dtype == torch.int64
    assert [TOKEN_KINDS[kind] for kind in records["kinds"][0].tolist()] == ["cls", *["patch"] * 4]
    assert rows.context == 5


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_threads_change_nothing(vit: LoadedModel, pictures: Pictures, workers: int) -> None:
    data = pictures(40)
    expected = ImageRows(data, vit, ImageConfig(workers=2), held_out=False)
    found = ImageRows(data, vit, ImageConfig(workers=workers), held_out=False)
    for ours, theirs in zip(found.batches(6), expected.batches(6), strict=True):
        assert torch.equal(ours.documents, theirs.documents)
        assert torch.equal(ours.pixels["pixel_values"], theirs.pixels["pixel_values"])


def test_epochs_and_seeds_have_orders_of_their_own(vit: LoadedModel, pictures: Pictures) -> None:
    rows = ImageRows(pictures(20), vit, ALL, held_out=False, repeat=True)
    epochs = [rows.next_rows(20).documents[:, 0].tolist() for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert rows.epoch == 2
    again = ImageRows(pictures(20), vit, ALL, held_out=False)
    assert numbers(again) == epochs[0]
    assert numbers(ImageRows(pictures(20), vit, ImageConfig(held_out=0, seed=1), held_out=False)) != epochs[0]


def test_the_split_goes_by_content_alone(vit: LoadedModel, pictures: Pictures) -> None:
    data = pictures(60)
    held_out = set(numbers(ImageRows(data, vit, ImageConfig(held_out=0.3, seed=5), held_out=True)))
    rest = set(numbers(ImageRows(data, vit, ImageConfig(held_out=0.3), held_out=False)))
    assert held_out | rest == set(range(60))
    assert not held_out & rest
    source = ImageRows(data, vit, ALL, held_out=False).source
    assert source.entry is not None
    assert held_out == {i for i in range(60) if is_held_out(source.entry(i).content, 0.3)}
    copies = [*data, *data]  # the same images a second time are on the same side
    both = set(numbers(ImageRows(copies, vit, ImageConfig(held_out=0.3), held_out=True)))
    assert both == held_out | {i + 60 for i in held_out}


def test_of_few_images_each_side_gets_some(vit: LoadedModel, pictures: Pictures) -> None:
    sides = [numbers(ImageRows(pictures(3), vit, ImageConfig(held_out=0.01), held_out=side)) for side in (False, True)]
    assert [len(side) for side in sides] == [2, 1]
    with pytest.raises(UnweaveError, match="the held-out part of 1 images in memory holds no images"):
        ImageRows(pictures(1), vit, ImageConfig(), held_out=True).peek(1)


@pytest.mark.parametrize("done", [0, 3, 10, 17, 25])
def test_a_resumed_run_sees_the_same_images(vit: LoadedModel, pictures: Pictures, done: int) -> None:
    data = pictures(12)
    rows = ImageRows(data, vit, ImageConfig(), held_out=False, repeat=True)
    for _ in range(done):
        rows.next_rows(1)
    rows.peek(4)  # what was looked at is not gone
    state = rows.state_dict()
    expected = [rows.next_rows(5) for _ in range(4)]
    resumed = ImageRows(data, vit, ImageConfig(workers=0), held_out=False, repeat=True)
    resumed.load_state_dict(state)
    for batch in expected:
        ours = resumed.next_rows(5)
        assert torch.equal(ours.documents, batch.documents)
        assert torch.equal(ours.pixels["pixel_values"], batch.pixels["pixel_values"])
    assert resumed.epoch == rows.epoch


def test_a_position_is_of_its_data_and_processor(vit: LoadedModel, folder: Path, make_vit: Callable[..., Any]) -> None:
    state = ImageRows(folder, vit, ALL, held_out=False).state_dict()
    other = make_vit(image_mean=[0.1, 0.1, 0.1])
    with pytest.raises(UnweaveError, match="processor was"):
        ImageRows(folder, other, ALL, held_out=False).load_state_dict(state)
    with pytest.raises(UnweaveError, match="seed was 0 and is now 1"):
        ImageRows(folder, vit, ImageConfig(held_out=0, seed=1), held_out=False).load_state_dict(state)
    Image.new("RGB", (4, 4)).save(folder / "cat" / "new.png")
    with pytest.raises(UnweaveError, match="fingerprint was"):
        ImageRows(folder, vit, ALL, held_out=False).load_state_dict(state)


# Unreadable images


def damage(folder: Path) -> list[str]:
    (folder / "cat" / "01.png").write_bytes(b"this is no image")
    whole = (folder / "cat" / "02.png").read_bytes()
    (folder / "cat" / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "04.png").write_bytes(b"")
    return ["cat/01.png", "cat/02.png", "cat/04.png"]


def test_unreadable_images_are_skipped_with_their_names(vit: LoadedModel, folder: Path) -> None:
    bad = damage(folder)
    rows = ImageRows(folder, vit, ImageConfig(held_out=0, max_bad=3), held_out=False, repeat=True)
    with pytest.warns(UserWarning, match="skipped the image cat/0") as warned:
        served = [rows.next_rows(1).documents[0, 0].item() for _ in range(10)][:9]
    assert sorted(rows.bad) == bad
    assert len(warned) == 3
    assert sorted(rows.source.names[i] for i in served) == sorted(set(rows.source.names) - set(bad))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows.next_rows(18)  # later epochs skip the same ones without a word, and count them once
    assert len(rows.bad) == 3


def test_one_more_than_the_limit_is_an_error_that_names_them(vit: LoadedModel, folder: Path) -> None:
    bad = damage(folder)
    rows = ImageRows(folder, vit, ImageConfig(held_out=0, max_bad=2), held_out=False)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(UnweaveError, match=r"3 images .* more than max_bad=2") as error,
    ):
        numbers(rows)
    assert all(name in str(error.value) for name in bad)


def test_the_damaged_are_remembered_when_resuming(vit: LoadedModel, folder: Path) -> None:
    damage(folder)
    rows = ImageRows(folder, vit, ImageConfig(held_out=0, max_bad=3), held_out=False, repeat=True)
    with pytest.warns(UserWarning, match="skipped"):
        rows.next_rows(10)
    resumed = ImageRows(folder, vit, ImageConfig(held_out=0, max_bad=3), held_out=False, repeat=True)
    resumed.load_state_dict(rows.state_dict())
    resumed.next_rows(20)
    assert resumed.bad == rows.bad


def test_an_image_in_memory_that_is_none_is_bad_too(vit: LoadedModel) -> None:
    data = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 7), np.uint8)]
    rows = ImageRows(data, vit, ALL, held_out=False)
    with pytest.warns(UserWarning, match="where pixels are bytes from 0 to 255"):
        assert numbers(rows) == [0]
    assert list(rows.bad) == ["image 1", "image 2"] or list(rows.bad) == ["image 2", "image 1"]


def test_a_mask_of_another_size_is_bad(vit: LoadedModel, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
        Image.new("L", (8, 8 if i else 9), i).save(tmp_path / "masks" / f"{i}.png")
    rows = ImageRows(tmp_path, vit, ALL, held_out=False)
    with pytest.warns(UserWarning, match=r"skipped the image 0.png, .* its mask is of size \(9, 8\)"):
        batch = rows.next_rows(3)
    labels = batch.records()["labels"]
    assert labels.dtype == torch.uint8
    assert labels.tolist() == [[0, i, i, i, i] for i in batch.documents[:, 0].tolist()]


# Streams and inputs that are ready


def test_any_iterable_of_inputs_and_metadata_will_do(vit: LoadedModel) -> None:
    inputs = [torch.full((3, 8, 8), float(i)) for i in range(6)]

    def pairs() -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        for i, pixels in enumerate(inputs):
            yield pixels, {"name": f"scan {i}", "label": i % 2, "labels": [i, i, i, 300]}

    for data in (list(pairs()), pairs()):
        rows = ImageRows(data, vit, ALL, held_out=False)
        batch = rows.next_rows(6)
        for i, number in enumerate(batch.documents[:, 0].tolist()):
            assert torch.equal(batch.pixels["pixel_values"][i], inputs[number])
            assert batch.labels is not None
            assert batch.labels[i].tolist() == [0, number, number, number, 300]
        assert rows.source.names == [f"scan {i}" for i in range(6)]
        assert rows.source.labels == [0, 1] * 3


def test_a_generator_cannot_be_read_twice(vit: LoadedModel, pictures: Pictures) -> None:
    rows = ImageRows(iter(pictures(3)), vit, ALL, held_out=False, repeat=True)
    assert rows.next_rows(3).documents[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(UnweaveError, match="in epoch 1: it cannot be read twice"):
        rows.next_rows(1)


def test_an_input_of_more_tokens_than_the_first_is_refused(vit: LoadedModel) -> None:
    pairs = [(torch.zeros(3, 8, 8), {}), (torch.zeros(3, 8, 12), {})]
    rows = ImageRows(iter(pairs), vit, ALL, held_out=False)
    rows.next_rows(1)
    with pytest.raises(UnweaveError, match="input 1 has 7 tokens, and the first one 5"):
        rows.next_rows(1)


# Through the model


def by_hand(model: LoadedModel, **inputs: Any) -> torch.Tensor:
    return model.module(**inputs, output_hidden_states=True).hidden_states[1]


def test_activations_are_those_of_the_model_run_by_hand(vit: LoadedModel, pictures: Pictures) -> None:
    data = pictures(6)
    rows = ImageRows(data, vit, ALL, held_out=False)
    stream = ActivationStream(vit, resolve_hooks(vit.module, ["resid_post.0"]), rows, prompts_per_pass=4)
    for done in iter(stream.next_pass, None):
        [found] = done.activations.values()
        for row in range(len(found)):
            assert vit.processor is not None
            inputs = vit.processor(images=[data[int(done.records["documents"][row])]], return_tensors="pt")
            expected = by_hand(vit, **inputs)[0, int(done.records["positions"][row])]
            assert torch.allclose(found[row], expected, atol=1e-5)
        assert set(done.records["kinds"].tolist()) == {0}
        if stream.passes == 2:
            break
    assert stream.report.kept == stream.report.seen * 4 // 5
    assert stream.report.by_kind == 6


@pytest.mark.parametrize(
    ("kinds", "kept"), [("cls", [0]), (("patch", "cls"), [0, 1, 2, 3, 4]), ("patch", [1, 2, 3, 4])]
)
def test_kinds_of_tokens_are_chosen(vit: LoadedModel, pictures: Pictures, kinds: Any, kept: list[int]) -> None:
    rows = ImageRows(pictures(1), vit, ALL, held_out=False)
    masks = MaskConfig(token_kinds=kinds, norm_multiple=None)
    done = ActivationStream(vit, [Hook("layers.0")], rows, masks).next_pass()
    assert done.records["positions"].tolist() == kept


def test_registers_are_a_kind(pictures: Pictures) -> None:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, num_register_tokens=3
    )
    processor = transformers.BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model = load_model(transformers.Dinov2WithRegistersModel(config), processor=processor)
    rows = ImageRows(pictures(1), model, ALL, held_out=False)
    assert rows.context == 1 + 3 + 4  # of the processor's 8 pixels, not of the 16 in the configuration
    masks = MaskConfig(token_kinds=("register",))
    done = ActivationStream(model, resolve_hooks(model.module, ["resid_post.0"]), rows, masks).next_pass()
    assert done.records["positions"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kinds", [(), ("patches",)])
def test_unknown_kinds_are_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(UnweaveError, match="must be one or more of patch, cls, register"):
        MaskConfig(token_kinds=kinds)  # type: ignore[arg-type]


def test_naflex_keeps_aspect_ratios_and_leaves_padding_out(siglip2: LoadedModel, pictures: Pictures) -> None:
    data = [*pictures(2, 8, 24), *pictures(2, 20, 9)]
    rows = ImageRows(data, siglip2, ALL, held_out=False)
    batch = rows.peek(4)
    assert batch.real.shape == (4, 12)
    assert not batch.real.all()
    assert (batch.documents[~batch.real] == -1).all()
    done = ActivationStream(siglip2, resolve_hooks(siglip2.module, ["resid_post.0"]), rows).next_pass()
    [found] = done.activations.values()
    assert len(found) == int(batch.real.sum())
    for row in range(len(found)):
        assert siglip2.processor is not None
        inputs = siglip2.processor(images=[data[int(done.records["documents"][row])]], return_tensors="pt")
        assert torch.allclose(found[row], by_hand(siglip2, **inputs)[0, int(done.records["positions"][row])], atol=1e-5)


def test_another_size_interpolates_the_positions(vit: LoadedModel, pictures: Pictures) -> None:
    data = pictures(2)
    rows = ImageRows(data, vit, ImageConfig(size=(8, 16), held_out=0), held_out=False)
    batch = rows.peek(2)
    assert rows.context == 1 + 2 * 4
    [found] = ActivationStream(vit, [Hook("layers.0")], rows).next_pass().activations.values()
    expected = by_hand(vit, pixel_values=batch.pixels["pixel_values"], interpolate_pos_encoding=True)
    assert torch.allclose(found, expected[:, 1:].flatten(0, 1), atol=1e-5)


def test_aspect_ratios_are_kept_batch_by_batch(vit: LoadedModel, pictures: Pictures) -> None:
    """Images of one grid run together, and each has the tokens of its own grid."""
    data = [image for i in range(10) for image in pictures(1, *((8, 32) if i % 2 else (30, 8)))]
    rows = ImageRows(data, vit, ImageConfig(aspect="keep", max_patches=4, held_out=0), held_out=False, repeat=True)
    stream = ActivationStream(vit, [Hook("layers.0")], rows, prompts_per_pass=32)
    passes = [stream.next_pass() for _ in range(2)]
    assert [len(next(iter(done.activations.values()))) for done in passes] == [20, 20]
    assert len({i % 2 for i in passes[0].records["documents"].tolist()}) == 1
    wide = rows.peek(1).pixels["pixel_values"].shape[2:]
    assert wide in {(4, 16), (16, 4)}
    assert rows.context == 5


def test_resuming_between_grids(vit: LoadedModel, pictures: Pictures) -> None:
    data = [image for i in range(9) for image in pictures(1, *((8, 32) if i % 2 else (30, 8)))]
    config = ImageConfig(aspect="keep", max_patches=4, held_out=0)
    rows = ImageRows(data, vit, config, held_out=False, repeat=True)
    rows.next_rows(3)
    state = rows.state_dict()
    expected = [rows.next_rows(3).documents[:, 0].tolist() for _ in range(5)]
    again = ImageRows(data, vit, config, held_out=False, repeat=True)
    again.load_state_dict(state)
    assert [again.next_rows(3).documents[:, 0].tolist() for _ in range(5)] == expected


def test_pitfall_246_numbers_are_int64(vit: LoadedModel, pictures: Pictures) -> None:
    assert ImageRows(pictures(1), vit, ALL, held_out=False).next_rows(1).records()["documents"].dtype == torch.int64
