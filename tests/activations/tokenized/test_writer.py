"""What is written is what was appended, whatever the shards, the commits and the kills."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.activations.tokenized import TokenWriter, open_token_folder
from unweave.activations.tokenized import writer as writer_module
from unweave.activations.tokenized.format import checksum

ABOUT = {"config": {"bos": True}}


@pytest.fixture(autouse=True, scope="module")
def _fast_disk() -> Iterator[None]:
    """What is flushed to the disk makes no difference to a process that only pretends to be killed."""
    with patch.object(os, "fsync"):
        yield


def start(folder: Path, **options: Any) -> TokenWriter:
    return TokenWriter(folder, **{"context": 4, "vocab_size": 1000, "about": ABOUT, "shard_rows": 3} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, n: int = 50, **options: Any) -> TokenWriter:
    with start(folder, **options) as writer:
        writer.append("train", np.arange(n), np.arange(n) // 5)
        writer.append("held_out", np.arange(8).reshape(2, 4), np.full((2, 4), 7))
        writer.finish()
    return writer


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "t")
    folder = open_token_folder(tmp_path / "t", verify=True)
    ids, documents = folder.rows("train", 0, 99)
    assert ids.tolist() == np.arange(48).reshape(12, 4).tolist()
    assert documents.tolist() == (np.arange(48) // 5).reshape(12, 4).tolist()
    assert folder.rows("train", 5, 7)[0].tolist() == ids[5:7].tolist()
    assert folder.take("train", np.array([11, 0, 4, 4]))[0].tolist() == ids[[11, 0, 4, 4]].tolist()
    assert folder.rows("held_out", 0, 2)[1].tolist() == [[7] * 4] * 2
    assert (folder.n_rows("train"), folder.n_rows("held_out"), folder.context) == (12, 2, 4)


def test_pitfall_213_216_files_are_plain_arrays_of_their_true_size(tmp_path: Path) -> None:
    write(tmp_path / "t", n=4 * 7)
    shards = [np.load(tmp_path / "t" / f"train_0000{i}.npy") for i in range(3)]
    assert [(shard.shape, shard.dtype) for shard in shards] == [((n, 4), np.uint16) for n in (3, 3, 1)]
    assert not (tmp_path / "t" / "train_00003.npy").exists()
    sides = open_token_folder(tmp_path / "t").manifest["sides"]
    assert [shard["rows"] for shard in sides["train"]["shards"]] == [3, 3, 1]
    assert sides["train"]["shards"][2]["tokens"]["blake2b"] == checksum(tmp_path / "t" / "train_00002.npy")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["train", "held_out"]), st.integers(0, 40), st.booleans()), max_size=8))
def test_bytes_do_not_depend_on_cuts_commits_and_resumes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[Any, int, bool]]
) -> None:
    """Each piece may be followed by a commit, garbage behind it, and a new writer that resumes."""
    base = tmp_path_factory.mktemp("w")
    done = {"train": 0, "held_out": 0}
    writer = start(base / "cut")
    for side, n, kill in pieces:
        ids = np.arange(done[side], done[side] + n) % 1000
        writer.append(side, ids, ids * 3)
        done[side] += n
        if kill:
            writer.commit({"done": done})
            writer.append("train", np.full(17, 999), np.full(17, 5))
            writer.close()
            writer = start(base / "cut", resume=True)
            assert (writer.state, writer.tokens) == ({"done": done}, done)
    writer.finish({"n": 1})
    with start(base / "whole") as whole:
        for side, n in done.items():
            ids = np.arange(n) % 1000
            whole.append(side, ids, ids * 3)  # type: ignore[arg-type]
        whole.finish({"n": 1})
    assert contents(base / "cut") == contents(base / "whole")
    shutil.rmtree(base)


@pytest.mark.parametrize("left", [0, 1, 3, 7, 12])
def test_rewind_drops_rows_for_good(tmp_path: Path, left: int) -> None:
    with start(tmp_path / "t") as writer:
        writer.append("train", np.arange(50), np.arange(50))
        writer.commit({"a": 1})
        writer.rewind({"train": left})
        assert writer.rows["train"] == left
        writer.append("train", np.arange(500, 520), np.arange(20))
        writer.finish()
    ids = np.concatenate([np.arange(left * 4), np.arange(500, 520)])
    assert open_token_folder(tmp_path / "t", verify=True).rows("train", 0, 99)[0].ravel().tolist() == ids.tolist()
    with start(tmp_path / "u") as writer, pytest.raises(UnweaveError, match="cannot go back to 1 train rows: it has 0"):
        writer.rewind({"train": 1})


@pytest.mark.parametrize("at", ["manifest", "describe", "cut"])
def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    write(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    writer = start(tmp_path / "t")
    writer.append("train", np.arange(50), np.arange(50) // 5)
    writer.append("held_out", np.arange(8), np.full(8, 7))
    writer.commit({"end": True})
    write_json = writer_module.write_json

    def kill_at_manifest(path: Path, value: Any) -> None:
        return kill() if path.name == "manifest.json" else write_json(path, value)

    name, substitute = {
        "manifest": ("write_json", kill_at_manifest), "describe": ("checksum", kill), "cut": ("cut_file", kill),
    }[at]  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, name, substitute)
        with pytest.raises(Killed):
            writer.finish()
    with pytest.raises(UnweaveError, match="is unfinished: go on with `unweave tokenize"):
        open_token_folder(tmp_path / "t")
    with start(tmp_path / "t", resume=True) as resumed:
        assert resumed.state == {"end": True}
        resumed.finish()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_large_document_numbers_widen_their_shard(tmp_path: Path) -> None:
    numbers = np.array([5, 6, 7, 8, 1 << 40, 3, 2, 1])
    with start(tmp_path / "t", shard_rows=2) as writer:
        writer.append("train", np.arange(4), numbers[:4])
        writer.append("train", np.arange(4), numbers[4:])
        writer.append("train", np.arange(4), numbers[:4])
        writer.finish()
    assert open_token_folder(tmp_path / "t", verify=True).rows("train", 0, 2)[1].ravel().tolist() == numbers.tolist()
    kinds = [np.load(tmp_path / "t" / f"train_0000{i}.documents.npy").dtype for i in range(2)]
    assert kinds == [np.int64, np.int32]


def test_wide_vocabularies_are_uint32(tmp_path: Path) -> None:
    for size, dtype in ((1 << 16, np.uint16), (1 + (1 << 16), np.uint32), (None, np.uint32)):
        with start(tmp_path / f"{size}", vocab_size=size) as writer:
            writer.append("train", np.full(4, 65535), np.zeros(4, dtype=int))
            writer.finish()
        assert np.load(tmp_path / f"{size}" / "train_00000.npy").dtype == dtype


@pytest.mark.parametrize(
    ("ids", "documents", "side", "message"),
    [
        (np.array([1000]), np.array([0]), "train", "token id 1000 is not in the vocabulary of 1,000 tokens"),
        (np.array([-1]), np.array([0]), "train", "token id -1 is not"),
        (np.arange(4), np.arange(3), "train", r"shape \(4,\) with documents of shape \(3,\)"),
        (np.arange(4), np.arange(4), "heldout", "no side 'heldout'; did you mean 'held_out'"),
    ],
)
def test_refused_tokens(tmp_path: Path, ids: Any, documents: Any, side: Any, message: str) -> None:
    with start(tmp_path / "t") as writer, pytest.raises(UnweaveError, match=message):
        writer.append(side, ids, documents)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (write, {}, "holds finished tokens already"),
        (lambda f: start(f).close(), {}, "holds unfinished tokens: go on with --resume"),
        (lambda f: (f.mkdir(), (f / "notes.txt").write_text("")), {"resume": True}, "something else.*'notes.txt'"),
        (lambda f: f.write_text(""), {}, "t cannot be written"),
        (write, {"resume": True, "context": 5}, "other settings: context was 4 and is now 5"),
        (write, {"resume": True, "about": {"config": {"bos": False}}}, "bos was True and is now False"),
        (lambda f: start(f).close(), {"resume": True, "vocab_size": None}, "dtype was 'uint16' and is now 'uint32'"),
    ],
)
def test_refused_folders(
    tmp_path: Path, prepare: Callable[[Path], Any], options: dict[str, Any], message: str
) -> None:
    prepare(tmp_path / "t")
    before = contents(tmp_path / "t") if (tmp_path / "t").is_dir() else None
    with pytest.raises(UnweaveError, match=message):
        start(tmp_path / "t", **options)
    assert before is None or contents(tmp_path / "t") == before


def test_resuming_a_finished_folder_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "t")
    before = contents(tmp_path / "t")
    writer = start(tmp_path / "t", resume=True)
    assert writer.finished
    with pytest.raises(UnweaveError, match="is finished: nothing can be appended"):
        writer.append("train", np.arange(4), np.arange(4))
    writer.finish()
    assert contents(tmp_path / "t") == before


def test_lost_data_are_not_resumed(tmp_path: Path) -> None:
    with start(tmp_path / "t") as writer:
        writer.append("train", np.arange(50), np.arange(50))
        writer.commit()
    (tmp_path / "t" / "train_00000.npy").unlink()
    os.truncate(tmp_path / "t" / "train_00001.documents.npy", 140)
    with pytest.raises(UnweaveError, match=r"train_00000.npy, train_00001.documents.npy lost what had been written"):
        start(tmp_path / "t", resume=True)


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    writer = start(tmp_path / "t")
    writer.append("train", np.arange(20), np.arange(20) // 5)
    writer.commit({"n": 20})
    writer.append("train", np.full(9, 3), np.full(9, 3))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UnweaveError, match=r"disk of .* is full"):
            writer.commit({"n": 29})
    writer.close()
    with start(tmp_path / "t", resume=True) as resumed:
        assert resumed.state == {"n": 20}
        resumed.append("train", np.arange(20, 50), np.arange(20, 50) // 5)
        resumed.append("held_out", np.arange(8), np.full(8, 7))
        resumed.finish()
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
