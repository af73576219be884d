"""Opening token folders, and serving their rows in a seeded order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, TokenRows, open_documents
from unweave.activations.tokenized import TokenWriter, open_token_folder
from unweave.activations.tokenized import reader as reader_module
from unweave.activations.tokenized.vocabulary import describe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

N = 300
CONTEXT = 8


def make(path: Path, about: dict[str, Any] | None = None, n: int = N) -> Path:
    """Row `i` holds the tokens `i`, of the document `10 * i`; five held-out rows hold 250."""
    with TokenWriter(path, context=CONTEXT, vocab_size=1000, about=about, shard_rows=70) as writer:
        rows = np.repeat(np.arange(n)[:, None], CONTEXT, axis=1)
        writer.append("train", rows, rows * 10)
        writer.append("held_out", np.full((5, CONTEXT), 250), np.full((5, CONTEXT), -1))
        writer.finish()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tokens") / "t")


def served(data: Any, *, n: int = 7, held_out: bool = False, **config: Any) -> torch.Tensor:
    rows = TokenRows(data, None, DataConfig(**{"context": CONTEXT} | config), held_out=held_out)
    return torch.cat([batch.ids for batch in rows.batches(n)])


def test_rows_come_once_with_their_true_documents(folder: Path) -> None:
    rows = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=False)
    batches = list(rows.batches(7))
    ids, documents = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "documents"))
    assert sorted(ids[:, 0].tolist()) == list(range(N))
    assert torch.equal(documents, ids * 10)
    assert ids[:, 0].tolist() != list(range(N))


def test_sides_are_those_of_the_folder(folder: Path) -> None:
    rows = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=True)
    batch = rows.next_rows(99)
    assert batch.ids[:, 0].tolist() == [250] * 5
    assert not batch.real.any()


def test_another_share_of_held_out_documents_is_refused(tmp_path: Path) -> None:
    """An SAE that was trained on text with 5 % held out has seen documents that a folder with 20 % holds out."""
    made = make(tmp_path / "t", {"config": {"held_out": 0.2}})
    for share in (0.0, 0.05, 0.5):
        with pytest.raises(UnweaveError, match=f"made with held_out=0.2, and held_out={share} was asked for"):
            TokenRows(made, None, DataConfig(context=CONTEXT, held_out=share), held_out=False)
    assert len(TokenRows(made, None, DataConfig(context=CONTEXT, held_out=0.2), held_out=True).next_rows(99)) == 5
    with TokenWriter(tmp_path / "none", context=CONTEXT, about={"config": {"held_out": 0.2}}) as writer:
        writer.append("train", np.zeros((3, CONTEXT), dtype=int), np.zeros((3, CONTEXT), dtype=int))
        writer.finish()
    none_held_out = DataConfig(context=CONTEXT, held_out=0)
    assert len(TokenRows(tmp_path / "none", None, none_held_out, held_out=False).next_rows(9)) == 3


def test_pitfall_201_220_the_order_follows_from_seed_and_epoch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "BLOCK_ROWS", 8)
    monkeypatch.setattr(reader_module, "WINDOW_BLOCKS", 6)
    first = served(folder)
    assert torch.equal(first, served(folder, n=64))
    assert not torch.equal(first, served(folder, seed=1))
    assert sorted(first[:, 0].tolist()) == list(range(N))
    assert (first[:, 0] - torch.arange(N)).abs().double().mean() > 60  # 100 for a uniform permutation
    rows = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=False, repeat=True)
    epochs = rows.next_rows(2 * N).ids[:, 0].view(2, N)
    assert sorted(epochs[1].tolist()) == list(range(N))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], first[:, 0])


@pytest.mark.parametrize("taken", [0, 1, 47, 48, 299, 300, 431])
def test_resuming_serves_the_same_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(reader_module, "BLOCK_ROWS", 8)
    monkeypatch.setattr(reader_module, "WINDOW_BLOCKS", 6)
    rows = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=False, repeat=True)
    rows.next_rows(taken)
    resumed = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=False, repeat=True)
    resumed.load_state_dict(rows.state_dict())
    assert torch.equal(rows.next_rows(500).ids, resumed.next_rows(500).ids)


def test_a_position_in_other_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = TokenRows(folder, None, DataConfig(context=CONTEXT), held_out=False)
    other = TokenRows(make(tmp_path / "o", n=N - 1), None, DataConfig(context=CONTEXT), held_out=False)
    with pytest.raises(UnweaveError, match="is of other data: fingerprint"):
        other.load_state_dict(rows.state_dict())


def test_rows_are_cut_to_a_shorter_context_and_longer_ones_refused(folder: Path) -> None:
    ids = served(folder, context=3)
    assert ids.shape == (2 * N, 3)
    assert sorted(ids[:, 0].tolist()) == sorted([*range(N), *range(N)])
    with pytest.raises(UnweaveError, match=r"has rows of 8 tokens, shorter than context=9"):
        served(folder, context=9)


def test_pitfall_207_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_tokenizer: MakeTokenizer
) -> None:
    make(tmp_path / "t", {"tokenizer": describe_tokenizer(tokenizer, "bytes"), "begin": 256})
    config = DataConfig(context=CONTEXT)
    assert TokenRows(tmp_path / "t", tokenizer, config, held_out=False).begin == 256
    other = make_tokenizer(bos_token="<s>")
    other.add_tokens(["more"])
    with pytest.raises(UnweaveError, match=r"made by the tokenizer 'bytes'.*another vocabulary"):
        TokenRows(tmp_path / "t", other, config, held_out=False)


def test_a_cache_gives_its_tokens(tmp_path: Path) -> None:
    make(tmp_path / "cache" / "tokens")
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps({"format": "unweave-cache"}))
    found = open_documents(tmp_path / "cache", DataConfig(context=CONTEXT)).folder
    assert found is not None
    assert found.path == tmp_path / "cache" / "tokens"


def break_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    return change


def damage(folder: Path) -> None:
    """pitfall_213: every file is named that is missing, short or of another kind."""
    (folder / "train_00000.npy").unlink()
    os.truncate(folder / "train_00001.npy", 200)
    np.save(folder / "train_00002.npy", np.zeros((3, 3)))
    (folder / "train_00003.documents.npy").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, r"train_00000.npy is missing; train_00001.npy has 200 bytes, not 1,248; train_00002.npy holds float64 "
                 r"\(3, 3\), not uint16 \(70, 8\); train_00003.documents.npy cannot be read"),
        (break_manifest(version=2), "has version 2; this unweave reads 1"),
        (break_manifest(dtype="int8"), r"train_00000.npy holds uint16 \(70, 8\), not int8"),
        (break_manifest(context=9), r"holds uint16 \(70, 8\), not uint16 \(70, 9\)"),
        (break_manifest(sides={}), "is no manifest of a token folder: KeyError"),
        (break_manifest(complete=False), "it is not complete"),
        (lambda f: (f / "manifest.json").unlink(), "is no token folder"),
    ],
)  # fmt: skip
def test_damaged_folders(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    change(make(tmp_path / "t"))
    with pytest.raises(UnweaveError, match=message):
        open_token_folder(tmp_path / "t")


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "t") / "train_00002.npy"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    folder = open_token_folder(tmp_path / "t")
    with pytest.raises(UnweaveError, match=r"train_00002.npy changed after being written"):
        folder.verify()


def test_data_that_do_not_go_together(tmp_path: Path) -> None:
    make(tmp_path / "t")
    np.save(tmp_path / "a.npy", np.ones((3, CONTEXT), dtype=int))
    (tmp_path / "a.txt").write_text("text")
    for names, message in (
        (("t", "a.npy"), "a token folder or cache cannot be read together with other data"),
        (("a.txt", "a.npy"), r"mix .npy rows of tokens with text"),
        (("a.txt", "b.txt"), r"there is no file or folder .*b.txt; did you mean '.*a.txt'"),
    ):
        with pytest.raises(UnweaveError, match=message):
            open_documents([tmp_path / name for name in names], DataConfig(context=CONTEXT))
