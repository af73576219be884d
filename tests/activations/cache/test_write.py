"""Writing caches: exactly what was asked for, the same bytes however it was interrupted or shared out.

pitfall_202, pitfall_204, pitfall_207, pitfall_208, pitfall_210, pitfall_212, pitfall_214, pitfall_216.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from unweave import DataConfig, UnweaveError, open_cache
from unweave.activations import TokenRows
from unweave.activations.cache import shards
from unweave.activations.cache.shards import ShardWriter
from unweave.activations.cache.write import cache
from unweave.activations.tokenized.folder import open_token_folder
from unweave.models import LoadedModel

Make = Callable[..., Any]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spell(rows: dict[str, torch.Tensor], records: Any) -> None:
    """The activations are those of the tokens and positions that the records say."""
    ids, positions = (torch.from_numpy(np.asarray(records[name][:])).float() for name in ("token_ids", "positions"))
    assert torch.equal(rows["h.0"][:, 0], ids)
    assert torch.equal(rows["h.0"][:, 1], positions)
    assert torch.equal(rows["h.1"], rows["h.0"] + 1)


@pytest.mark.parametrize("tokens", [1, 7, 8, 24, 100, 301])
def test_so_many_tokens_as_asked_for_and_none_twice(make_cache: Make, tokens: int, tmp_path: Path) -> None:
    made = make_cache(tokens=tokens, held_out_tokens=5)
    assert (made.train.n_rows, made.held_out.n_rows) == (tokens, 5)
    for side in (made.train, made.held_out):
        spell(side.read(0, side.n_rows), side.records)
    folder = open_token_folder(tmp_path / "cache")
    for side, name in ((made.train, "train"), (made.held_out, "held_out")):
        ids, documents = folder.rows(name, 0, folder.n_rows(name))
        assert np.array_equal(ids.ravel()[: side.n_rows], side.records["token_ids"][:])
        assert np.array_equal(documents.ravel()[: side.n_rows], side.records["documents"][:])
        assert 0 <= ids.size - side.n_rows < 8  # no row that was not needed


def test_the_rows_are_those_that_text_gives(letters: list[str], make_cache: Make, model: LoadedModel) -> None:
    made = make_cache(tokens=80)
    rows = TokenRows(letters, model.tokenizer, DataConfig(context=8), held_out=False).next_rows(10)
    assert np.array_equal(made.train.records["token_ids"][:], rows.ids.flatten().numpy())
    assert np.array_equal(made.train.records["documents"][:], rows.documents.flatten().numpy())


def test_several_shards_and_every_type_hold_the_same(make_cache: Make) -> None:
    exact = make_cache("float32", tokens=500)
    assert len(exact.manifest["sides"]["train"]["shards"]) > 3
    x = exact.train.read(0, 500)["h.0"]
    for dtype, wanted in (("bf16", x.bfloat16()), (torch.float16, x.half())):
        assert torch.equal(make_cache(str(dtype), tokens=500, dtype=dtype).train.read(0, 500)["h.0"], wanted)
    found = make_cache("int8", tokens=500, dtype="int8").train.read(0, 500)["h.0"]
    assert ((found - x).abs() <= x.abs().amax(1, keepdim=True) / 254 + 1e-4).all()
    assert torch.equal(found.abs().amax(1), x.abs().amax(1))
    norms = torch.from_numpy(np.asarray(exact.train.norms["h.0"][:]))
    torch.testing.assert_close(norms, x.norm(dim=1))


def test_more_than_ten_shards_are_read_in_their_order(make_cache: Make) -> None:
    """pitfall_335: the eleventh does not come after the first, as it would among names."""
    many, one = make_cache("many", tokens=300, shard_bytes=600), make_cache("one", tokens=300, shard_bytes=10**6)
    assert len(many.manifest["sides"]["train"]["shards"]) > 11
    assert torch.equal(many.train.read(0, 300)["h.0"], one.train.read(0, 300)["h.0"])
    assert np.array_equal(many.train.records["documents"][:], one.train.records["documents"][:])


def test_positions_with_a_step_are_stored_alone(make_cache: Make) -> None:
    made = make_cache(tokens=40, positions="1:7:3")
    assert set(made.train.records["positions"][:].tolist()) == {1, 4}
    spell(made.train.read(0, 40), made.train.records)
    with pytest.raises(UnweaveError, match="keeps nothing"):
        make_cache("none", positions="8:")


def test_padding_is_not_stored(make_cache: Make) -> None:
    made = make_cache(tokens=50, config=DataConfig(context=12, pack=False))
    assert 258 not in made.train.records["token_ids"][:]
    assert made.train.records["documents"][:].min() >= 0
    assert (np.diff(np.flatnonzero(made.train.records["positions"][:] == 0)) < 12).all()


class _Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_resuming_gives_the_bytes_of_an_uninterrupted_cache(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    make_cache("whole")
    calls, append = [0], ShardWriter.append

    def killed(self: ShardWriter, *arguments: Any) -> None:
        if calls[0] == after:
            raise _Killed
        calls[0] += 1
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", killed)
        with pytest.raises(_Killed):
            make_cache("killed")
    with pytest.raises(UnweaveError, match="unfinished"):
        open_cache(tmp_path / "killed")
    with pytest.raises(UnweaveError, match="unfinished: pass --resume"):
        make_cache("killed")
    made = make_cache("killed", resume=True)
    assert made.train.n_rows == 300
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_what_a_killed_process_left_is_removed_and_a_broken_shard_written_anew(
    make_cache: Make, tmp_path: Path
) -> None:
    make_cache("whole")
    make_cache("broken")
    folder = tmp_path / "broken"
    manifest = json.loads((folder / "manifest.json").read_text())
    begun = {key: manifest[key] for key in ("format", "version", "hash", "made_from")} | {"complete": False}
    (folder / "manifest.json").write_text(json.dumps(begun))
    gone = 2**22 + 17  # the number of no process
    (folder / f".train_00001.{gone}.tmp").mkdir()
    (folder / f".train_00001.{gone}.tmp" / "h.0.npy").write_bytes(b"half")
    (folder / f".manifest.json.{gone}.tmp").write_bytes(b"{")
    shutil.rmtree(folder / "train_00001")
    (folder / "train_00002" / "h.0.npy").write_bytes(b"short")
    make_cache("broken", resume=True)
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_ranks_share_the_work_and_the_last_one_completes_it(
    make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_cache("whole")
    n = len(whole.manifest["sides"]["train"]["shards"])
    assert n > 3
    for rank in (2, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert make_cache("shared") is None
        there = {int(path.name[-5:]) for path in (tmp_path / "shared").glob("train_*")}
        assert {i for i in range(n) if i % 3 == rank} <= there
        assert not {i for i in range(n) if i % 3 == 1} & there
    last = make_cache("shared", rank=1, world=3)
    assert last.train.n_rows == 300
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")
    with pytest.raises(UnweaveError, match="rank=3 is not one of world=3"):
        make_cache("shared", rank=3, world=3)


def test_one_process_can_finish_what_many_began(make_cache: Make, tmp_path: Path) -> None:
    make_cache("whole")
    make_cache("begun", rank=1, world=4)
    make_cache("begun", resume=True)
    assert files_of(tmp_path / "begun") == files_of(tmp_path / "whole")


def test_the_hash_is_of_content_and_not_of_places(letters: list[str], make_cache: Make, tmp_path: Path) -> None:
    text = "\n\n".join(letters)
    hashes = []
    for place in ("one", "an other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text(text, encoding="utf-8")
        made = make_cache(f"{place}/cache", data=tmp_path / place / "text.txt", tokens=50, held_out_tokens=0)
        hashes.append(made.hash)
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 32
    assert str(tmp_path) not in (tmp_path / "one" / "cache" / "manifest.json").read_text()
    assert make_cache("other", data=tmp_path / "one" / "text.txt", tokens=51, held_out_tokens=0).hash != hashes[0]


def test_a_cache_goes_on_with_nothing_else(
    letters: list[str], make_cache: Make, model: LoadedModel, make_tokenizer: Any
) -> None:
    """pitfall_035: a change of any setting is noticed, and said."""
    make_cache("begun", rank=0, world=2)
    other = torch.nn.Module()
    other.embedding, other.h = torch.nn.Embedding(300, 6), model.module.h
    other.forward = model.module.forward
    foreign = make_tokenizer(bos_token="<s>")
    foreign.add_tokens(["new"])
    for settings, message in (
        ({"model": LoadedModel(other, model.tokenizer, "speller")}, "with another model of the name 'speller': "),
        ({"model": LoadedModel(model.module, foreign, "speller")}, "another tokenizer: choose another folder"),
        ({"dtype": "bfloat16"}, "other settings: dtype was 'float32' and is now 'bfloat16'"),
        ({"hooks": ["h.0"]}, "other settings: hooks was"),
        ({"tokens": 400}, "train was 300 and is now 400"),
        ({"positions": "1:"}, "positions was None and is now '1:'"),
        ({"config": DataConfig(context=16)}, "context was 8 and is now 16"),
        ({"data": letters[1:]}, "was made with another data"),
        ({"prompts_per_pass": 4}, "prompts_per_pass was 3 and is now 4"),
    ):
        with pytest.raises(UnweaveError, match=message):
            make_cache("begun", resume=True, **settings)


def test_a_finished_cache_and_other_folders_are_left_alone(make_cache: Make, tmp_path: Path) -> None:
    make_cache("done")
    before = files_of(tmp_path / "done")
    with pytest.raises(UnweaveError, match="holds this cache already, finished"):
        make_cache("done")
    assert make_cache("done", resume=True).train.n_rows == 300
    assert files_of(tmp_path / "done") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UnweaveError, match="not empty and holds no cache"):
        make_cache("full")
    (tmp_path / "file").touch()
    with pytest.raises(UnweaveError, match="is a file"):
        make_cache("file")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite")])
def test_what_is_not_finite_is_refused_with_its_place(
    make_cache: Make, model: LoadedModel, tmp_path: Path, value: float, word: str
) -> None:
    model.module.special[256] = value
    with pytest.raises(UnweaveError, match=f"at hook h.1 are {word}.*document \\d+, position \\d+"):
        make_cache()
    assert not list((tmp_path / "cache").glob("train_*"))
    assert not list((tmp_path / "cache").glob(".*"))


def test_numbers_beyond_float16_are_refused_and_fit_bfloat16(make_cache: Make, model: LoadedModel) -> None:
    model.module.special[256] = 1e6
    with pytest.raises(UnweaveError, match=r"at hook h\.1 .* float16.*document \d+, position \d+"):
        make_cache("half", dtype="float16")
    assert make_cache("wide", dtype="bfloat16").train.read(0, 300)["h.1"].isfinite().all()


def test_data_that_end_early(letters: list[str], make_cache: Make, tmp_path: Path) -> None:
    few = letters[:20]
    with pytest.raises(UnweaveError, match=r"training documents .* end after \d+ of 5,000 tokens"):
        make_cache(data=few, tokens=5000)
    assert not (tmp_path / "cache").exists()  # before the model was run, and the folder can be used for fewer
    made = make_cache("fewer", data=few, tokens=5000, allow_fewer=True, held_out_tokens=0)
    assert made.train.n_rows % 8 == 0
    assert 40 < made.train.n_rows < 160
    with pytest.raises(UnweaveError, match="held-out documents"):
        make_cache("held", tokens=100, held_out_tokens=90_000)
    assert 0 < make_cache("default", tokens=2000).held_out.n_rows <= 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens, .* must be at least 1"),
        ({"dtype": "float8"}, "cannot hold 'float8'; did you mean"),
        ({"hooks": ["h.2"]}, "h.2"),
        ({"held_out_tokens": 5, "config": DataConfig(context=8, held_out=0)}, "no data are held out"),
        ({"shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    make_cache: Make, tmp_path: Path, settings: Any, message: str
) -> None:
    with pytest.raises(UnweaveError, match=message):
        make_cache(**settings)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_ends_in_a_sentence_and_nothing_is_lost(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_cache("whole")
    writes, write = [0], ShardWriter._write

    def full(self: ShardWriter, *arguments: Any) -> None:
        writes[0] += 1
        if writes[0] > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(UnweaveError, match=r"disk of .* is full; its finished shards are not lost"):
            make_cache("full")
    assert list((tmp_path / "full").glob("train_*"))
    assert not list((tmp_path / "full").glob(".*"))
    make_cache("full", resume=True)
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


def test_what_cannot_fit_is_refused_before_it_is_begun(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Little:
        free: ClassVar = 1000

    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: Little)
    with pytest.raises(UnweaveError, match=r"needs .* GB more, and the disk"):
        make_cache()
    assert not list((tmp_path / "cache").glob("train_*"))


def test_hooks_whose_names_would_share_a_file_do_not(tmp_path: Path) -> None:
    from unweave.activations.cache.format import slugs

    names = ["a:b", "a_b", "A_b", "positions", "labels", "x" * 300, "x" * 299 + "y", "a.norms", "a", "é", "..", "h.0#3"]
    files = slugs(names)
    assert len({file.lower() for file in files.values()}) == len(names)
    assert not {"positions", "labels", "a.norms", "..", ""} & set(files.values())
    assert all(len(file) < 200 for file in files.values())


def test_a_cache_of_a_token_folder_keeps_its_documents(make_cache: Make, tmp_path: Path) -> None:
    first = make_cache("first", tokens=400)
    again = make_cache("again", data=tmp_path / "first" / "tokens", tokens=200, config=None)
    assert again.config == first.config
    pairs = {(d, t) for d, t in zip(first.train.records["documents"][:].tolist(),
                                    first.train.records["token_ids"][:].tolist(), strict=True)}  # fmt: skip
    found = zip(again.train.records["documents"][:].tolist(), again.train.records["token_ids"][:].tolist(), strict=True)
    assert set(found) <= pairs


def test_progress_ends_at_everything(make_cache: Make) -> None:
    seen: list[tuple[int, int]] = []
    made = make_cache(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300 + made.held_out.n_rows,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_that_are_laid_out_already_need_no_tokens(letters: list[str], tmp_path: Path, model: LoadedModel) -> None:
    config = DataConfig(context=8)
    opened = [TokenRows(letters, model.tokenizer, config, held_out=side) for side in (False, True)]
    made = cache(opened[0], tmp_path / "c", hooks="h.0", tokens=90, model=model, held_out_data=opened[1],
                 dtype="float32", prompts_per_pass=3, shard_bytes=3000)  # fmt: skip
    assert made is not None
    assert made.tokens is None
    assert made.train.n_rows == 90
    assert made.held_out is not None
    assert made.held_out.n_rows == 4
    assert np.array_equal(made.train.read(0, 90)["h.0"][:, 0].numpy(), made.train.records["token_ids"][:])


def test_nothing_is_run_twice(make_cache: Make, model: LoadedModel) -> None:
    make_cache("begun", rank=0, world=2)
    before = len(model.module.attention_masks)
    make_cache("begun", resume=True)
    whole = len(model.module.attention_masks)
    make_cache("fresh")
    assert whole - before < len(model.module.attention_masks) - whole


def test_the_model_runs_in_the_precision_asked_for_in_one_copy(
    make_cache: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2Model

    from unweave.activations import live

    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    network = GPT2Model(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).eval()
    settings = {"model": LoadedModel(network, tokenizer, "small"), "hooks": ["h.0"]}
    plain = make_cache("plain", model_precision="fp32", **settings)
    copies: list[Any] = []
    monkeypatch.setattr(live, "copy_in", lambda *a, copy_in=live.copy_in, **k: copies.append(a) or copy_in(*a, **k))
    low = make_cache("low", model_precision="bf16", **settings)
    assert len(low.manifest["sides"]["train"]["shards"]) > 3
    assert len(copies) == 1
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    x, y = (side.train.read(0, 300)["h.0"] for side in (plain, low))
    assert torch.equal(y, y.bfloat16().float())
    assert not torch.equal(x, y)
    torch.testing.assert_close(x, y, atol=0.05, rtol=0.05)
    assert low.manifest["made_from"]["model_precision"] == "bfloat16"
    with pytest.raises(UnweaveError, match="model_precision was 'bfloat16' and is now 'float32'"):
        make_cache("low", model_precision="fp32", resume=True, **settings)
    with pytest.raises(UnweaveError, match="model_precision 'bf61'; did you mean 'bf16'"):
        make_cache("other", model_precision="bf61", **settings)
