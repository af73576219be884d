"""SAELens' pretokenised text: written so that `datasets` reads it, and read with its tokenizer compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, TokenRows
from unweave.activations.tokenized import saelens
from unweave.activations.tokenized.folder import TokenFolder
from unweave.activations.tokenized.saelens import save_saelens
from unweave.activations.tokenized.tokenize import tokenize
from unweave.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [f"document {i} " + "says so much " * (i % 9) for i in range(90)]
CONFIG = DataConfig(context=16)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TokenFolder:
    return tokenize(TEXTS, tmp_path / "t", tokenizer=tokenizer, config=CONFIG)


def metadata(folder: Path, **changes: object) -> None:
    """Change what `sae_lens.json` says."""
    path = folder / "sae_lens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_datasets_reads_the_rows(tmp_path: Path, folder: TokenFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files, in batches that do not divide them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(saelens, "FILE_TOKENS", 16 * 33)
    monkeypatch.setattr(saelens, "_BATCH_ROWS", 10)
    save_saelens(folder, tmp_path / "s")
    dataset = datasets.load_from_disk(str(tmp_path / "s"))
    assert dataset.column_names == ["input_ids"]
    assert dataset["input_ids"][:] == folder.rows("train", 0, 9999)[0].tolist()
    assert len(list((tmp_path / "s").glob("*.arrow"))) == -(-folder.n_rows() // 33)
    save_saelens(folder, tmp_path / "h", side="held_out")
    assert len(datasets.load_from_disk(str(tmp_path / "h"))) == folder.n_rows("held_out")


def test_metadata_has_saelens_keys(tmp_path: Path, folder: TokenFolder) -> None:
    written = json.loads((save_saelens(folder, tmp_path / "s") / "sae_lens.json").read_text())
    keys = (
        "sae_lens_version, tokenizer_name, original_dataset, original_dataset_name, original_split, "
        "original_data_files, original_column_name, context_size, shuffled, seed, begin_batch_token, "
        "begin_sequence_token, sequence_separator_token, disable_concat_sequences, use_chat_formatting"
    )
    assert set(keys.split(", ")) == written.keys() - {"unweave_tokenizer_fingerprint"}
    assert (written["context_size"], written["begin_sequence_token"]) == (16, 256)


def test_rows_come_back_and_are_cut(tmp_path: Path, folder: TokenFolder, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("datasets")
    save_saelens(folder, tmp_path / "s")
    config = DataConfig(context=5, held_out=0)
    rows = TokenRows(tmp_path / "s", tokenizer, config, held_out=False).next_rows(99999).ids
    expected = folder.rows("train", 0, 9999)[0][:, :15].reshape(-1, 5)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_pitfall_207_another_vocabulary_is_refused(
    tmp_path: Path, folder: TokenFolder, tokenizer: PreTrainedTokenizerFast,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:  # fmt: skip
    """By our fingerprint where it is there, else by loading the tokenizer that is named."""
    pytest.importorskip("datasets")
    save_saelens(folder, tmp_path / "s")
    other = make_tokenizer(bos_token="<s>")
    other.add_tokens(["more"])
    with pytest.raises(UnweaveError, match="another vocabulary"):
        TokenRows(tmp_path / "s", other, CONFIG, held_out=False)
    metadata(tmp_path / "s", unweave_tokenizer_fingerprint=None, tokenizer_name="demo")
    with pytest.raises(UnweaveError, match=r"tokenizer 'demo'.*another vocabulary"):
        TokenRows(tmp_path / "s", tokenizer, CONFIG, held_out=False)
    TokenRows(tmp_path / "s", load_model("demo").tokenizer, CONFIG, held_out=False)
    metadata(tmp_path / "s", tokenizer_name="nobody/nothing")
    with pytest.warns(UserWarning, match="'nobody/nothing', which is not there to be compared"):
        TokenRows(tmp_path / "s", tokenizer, CONFIG, held_out=False)
    (tmp_path / "s" / "sae_lens.json").write_text("{")
    with pytest.raises(UnweaveError, match=r"sae_lens.json is damaged"):
        TokenRows(tmp_path / "s", tokenizer, CONFIG, held_out=False)


def test_a_downloaded_hub_repository_is_checked_too(
    tmp_path: Path, folder: TokenFolder, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Parquet files with a `sae_lens.json` beside them."""
    datasets = pytest.importorskip("datasets")
    save_saelens(folder, tmp_path / "s")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.load_from_disk(str(tmp_path / "s")).to_parquet(str(tmp_path / "hub" / "data" / "train.parquet"))
    (tmp_path / "s" / "sae_lens.json").rename(tmp_path / "hub" / "sae_lens.json")
    assert len(TokenRows(tmp_path / "hub", None, CONFIG, held_out=False).next_rows(5)) == 5
    other = make_tokenizer(bos_token="<s>")
    other.add_tokens(["more"])
    with pytest.raises(UnweaveError, match="another vocabulary"):
        TokenRows(tmp_path / "hub", other, CONFIG, held_out=False)


def test_refusals(tmp_path: Path, folder: TokenFolder, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnweaveError, match="exists already"):
        save_saelens(folder, tmp_path)
    padded = tokenize(TEXTS, tmp_path / "p", tokenizer=tokenizer, config=DataConfig(context=16, pack=False, held_out=0))
    with pytest.raises(UnweaveError, match="with padding"):
        save_saelens(padded, tmp_path / "s")
    with pytest.raises(UnweaveError, match="has no held_out rows"):
        save_saelens(padded, tmp_path / "s", side="held_out")
    assert not (tmp_path / "s").exists()
