"""Writing rows of tokens as SAELens' pretokenised text: a `datasets` folder with a `sae_lens.json` in it.

Such folders are read like any other `datasets` folder (see `open_documents`); what their `sae_lens.json` says of the
tokenizer is compared with the model's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from unweave._errors import UnweaveError
from unweave._files import atomic_folder, write_json
from unweave.activations.tokenized.folder import TokenFolder
from unweave.activations.tokenized.format import Side
from unweave.activations.tokenized.vocabulary import FINGERPRINT_KEY, SAELENS_FILE

COLUMN = "input_ids"
FILE_TOKENS = 1 << 26
_BATCH_ROWS = 1024
_FEATURES = {COLUMN: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}}
"""Newer `datasets` call it a List, and read this as one."""


def save_saelens(tokens: TokenFolder, folder: str | Path, *, side: Side = "train") -> Path:
    """Write one side of a token folder so that SAELens reads it as `dataset_path`, and `datasets.load_from_disk` too.

    Args:
        tokens: What to write.
        folder: A folder that is not there yet.
        side: "train" or "held_out".

    Returns:
        The folder.

    Raises:
        UnweaveError: The folder exists, pyarrow is missing, or the rows are padded, which SAELens does not know.
    """
    folder = Path(folder)
    if folder.exists():
        raise UnweaveError(f"{folder} exists already: choose another folder.")
    if not tokens.n_rows(side):
        raise UnweaveError(f"{tokens.path} has no {side} rows.")
    config = tokens.manifest.get("config") or {}
    if not config.get("pack", True):
        raise UnweaveError(f"{tokens.path} has one document a row, with padding, which SAELens would take for text.")
    n, file_rows = tokens.n_rows(side), max(1, FILE_TOKENS // tokens.context)
    starts = range(0, n, file_rows)
    with atomic_folder(folder) as temporary:
        names = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
        for name, start in zip(names, starts, strict=True):
            _write_arrow(temporary / name, tokens, side, start, min(start + file_rows, n))
        write_json(temporary / "dataset_info.json", {"citation": "", "description": "", "features": _FEATURES,
                                                     "homepage": "", "license": ""})  # fmt: skip
        write_json(temporary / "state.json", {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": hashlib.blake2b((tokens.fingerprint + side).encode(), digest_size=8).hexdigest(),
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
            "_split": None,
        })  # fmt: skip
        write_json(temporary / SAELENS_FILE, _metadata(tokens, config))
    return folder


def _metadata(tokens: TokenFolder, config: dict[str, Any]) -> dict[str, Any]:
    """What SAELens writes beside its own. It puts its begin-of-sequence token in front of each document, as we do."""
    tokenizer = tokens.manifest.get("tokenizer") or {}
    return {
        "sae_lens_version": None,
        "tokenizer_name": tokenizer.get("name"),
        "original_dataset": tokens.manifest.get("source"),
        "original_dataset_name": config.get("subset"),
        "original_split": config.get("split"),
        "original_data_files": None,
        "original_column_name": config.get("column"),
        "context_size": tokens.context,
        "shuffled": False,
        "seed": None,
        "begin_batch_token": None,
        "begin_sequence_token": tokens.begin,
        "sequence_separator_token": tokens.separator,
        "disable_concat_sequences": False,
        "use_chat_formatting": config.get("chat", False),
        FINGERPRINT_KEY: tokenizer.get("fingerprint"),
    }


def _write_arrow(path: Path, tokens: TokenFolder, side: Side, start: int, stop: int) -> None:
    try:
        import pyarrow as pa
    except ImportError:
        raise UnweaveError("writing a SAELens dataset needs pyarrow: pip install 'unweave[data]'.") from None
    schema = pa.schema(
        [pa.field(COLUMN, pa.list_(pa.int32()))],
        metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for at in range(start, stop, _BATCH_ROWS):
            ids, _ = tokens.rows(side, at, min(at + _BATCH_ROWS, stop))
            ends = np.arange(len(ids) + 1, dtype=np.int32) * tokens.context
            column = pa.ListArray.from_arrays(pa.array(ends), pa.array(ids.ravel().astype(np.int32)))
            stream.write_batch(pa.record_batch([column], schema=schema))
