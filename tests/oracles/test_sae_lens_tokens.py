"""SAELens serves the pretokenised text that we write, packs as we do at the same settings, and we read its."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import unweave as uw
from unweave import DataConfig
from unweave.activations import TokenRows, standard_library_text
from unweave.activations.tokenized.saelens import save_saelens
from unweave.models import DEMO
from unweave.models.load import load_tokenizer

# sae-lens and datasets warn while they are imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

CONTEXT = 32
CONFIG = DataConfig(context=CONTEXT, held_out=0)


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    import sae_lens

    return sae_lens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    texts = [text[:3000] for text, _ in zip(standard_library_text(), range(60), strict=False)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(sae_lens: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that sae-lens tokenised at our settings: a begin token for each document, and all of it in one chunk."""
    path = tmp_path_factory.mktemp("theirs") / "s"
    config = sae_lens.PretokenizeRunnerConfig(
        tokenizer_name=str(DEMO), dataset_path="json", data_files=[str(data)], num_proc=1, context_size=CONTEXT,
        shuffle=False, pretokenize_batch_size=None, begin_batch_token=None, begin_sequence_token="bos",
        sequence_separator_token=None, save_path=str(path),
    )  # fmt: skip
    sae_lens.PretokenizeRunner(config).run()
    return path


def test_packing_is_the_same_token_for_token(data: Path, theirs: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    ours = uw.tokenize(data, tmp_path / "t", config=CONFIG)
    rows = load_from_disk(str(theirs))["input_ids"][:]
    assert len(rows) > 500
    assert torch.tensor(ours.rows("train", 0, len(rows) + 1)[0]).tolist() == [list(map(int, row)) for row in rows]


def test_we_read_theirs(theirs: Path) -> None:
    """And refuse it for another vocabulary, by the name that it gives."""
    from datasets import load_from_disk

    tokenizer = load_tokenizer("demo")
    rows = TokenRows(theirs, tokenizer, CONFIG, held_out=False).next_rows(99999).ids
    assert sorted(rows.tolist()) == sorted([list(map(int, row)) for row in load_from_disk(str(theirs))["input_ids"][:]])
    tokenizer.add_tokens(["another_token"])
    tokenizer.name_or_path = "another"
    with pytest.raises(uw.UnweaveError, match="another vocabulary"):
        TokenRows(theirs, tokenizer, CONFIG, held_out=False)


def test_sae_lens_takes_ours_in_training(sae_lens: ModuleType, data: Path, tmp_path: Path) -> None:
    """Its `ActivationsStore` serves our rows unchanged."""
    from sae_lens.training.activations_store import ActivationsStore

    ours = uw.tokenize(data, tmp_path / "t", config=CONFIG)
    path = save_saelens(ours, tmp_path / "s")
    dataset: Any = __import__("datasets").load_from_disk(str(path))
    model = uw.load_model("demo")

    class Stub(torch.nn.Module):
        tokenizer = model.tokenizer
        cfg = type("Config", (), {"device": "cpu", "n_ctx": 128})()
        W_E = torch.zeros(1, 1)

    store = ActivationsStore(
        model=Stub(), dataset=dataset, streaming=False, hook_name="h", hook_head_index=None, context_size=CONTEXT,
        d_in=4, n_batches_in_buffer=2, total_training_tokens=100, store_batch_size_prompts=4,
        train_batch_size_tokens=64, prepend_bos=True, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32",
    )  # fmt: skip
    assert store.is_dataset_tokenized
    assert store.get_batch_tokens(8).tolist() == ours.rows("train", 0, 8)[0].tolist()
