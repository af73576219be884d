"""Reading SAELens' cached activations: a `datasets` folder of Arrow files, whose buffers are mapped as they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.cache.foreign import Computed, MappedStore, as_tensor, read_json
from unweave.activations.cache.store import Column, Joined

if TYPE_CHECKING:
    import pyarrow as pa

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
UNFINISHED = ".tmp_shards"
RUNNER = "cache_activations_runner_cfg.json"
TOKEN_IDS = "token_ids"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""What a finished Arrow stream ends with. Cut off between two batches, a file reads like a whole one."""


def is_saelens(folder: Path) -> bool:
    """Whether a folder is a data set of activations, or was on its way to become SAELens' cache."""
    if (folder / UNFINISHED).is_dir():
        return True
    if not ((folder / STATE).is_file() and (folder / INFO).is_file()):
        return False
    try:
        features = read_json(folder / INFO)["features"].values()
    except (UnweaveError, KeyError, TypeError, AttributeError):
        return False
    return any(isinstance(feature, dict) and feature.get("_type") == "Array2D" for feature in features)


class SaelensCache(MappedStore):
    """SAELens' cached activations as a `Store`: a hook for each column of activations, a row for each of its tokens.

    Rows come in the order of the folder, sequence by sequence. Records: "documents" (number of the sequence, from 0:
    the format doesn't know which documents it was packed from), "positions" (place in the sequence; if positions were
    sliced and `cache_activations_runner_cfg.json` is there, that before slicing), and "token_ids" where they were
    stored. Needs pyarrow (`pip install 'unweave[data]'`).

    Args:
        folder: The folder with `state.json`.
        special_ids: The special tokens of the tokenizer, and what they stand for; the format doesn't know them, and
            without them no mask can leave them out.

    Attributes:
        context: Tokens of a sequence; if positions were sliced and that is known, those before slicing.

    Raises:
        UnweaveError: A cache that was never finished; files that are missing, cut off, or hold something else (all of
            them are named).
    """

    def __init__(self, folder: str | Path, *, special_ids: Mapping[int, str] | None = None) -> None:
        folder = Path(folder).expanduser()
        layout, names = _described(folder)
        context = next(iter(layout.values())).context
        bad, columns = [], _Columns({hook: [] for hook in layout})
        for name in names:
            try:
                _map(folder / name, layout, columns)
            except _Damaged as error:
                bad.append(f"{name} {error}")
        if bad:
            raise UnweaveError(f"SAELens' cache in {folder} is damaged or incomplete: {'; '.join(bad)}.")
        n_rows = columns.n_sequences * context
        if not n_rows:
            raise UnweaveError(f"SAELens' cache in {folder} holds no sequences.")
        if columns.token_ids and sum(map(len, columns.token_ids)) != n_rows:
            raise UnweaveError(f"some files of SAELens' cache in {folder} have {TOKEN_IDS}, and some have not.")

        positions, self.context = _positions(folder, context)
        records: dict[str, Column] = {
            "documents": Computed(n_rows, np.int64, lambda rows: rows // context),
            "positions": Computed(n_rows, np.int32, lambda rows: positions[rows % context]),
        }
        if columns.token_ids:
            records[TOKEN_IDS] = Joined(columns.token_ids)
        identity = ["saelens", {hook: asdict(column) for hook, column in layout.items()}, n_rows, positions.tolist()]
        super().__init__(f"SAELens' cache {folder}", columns.parts, records, identity, special_ids)


class _Damaged(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class _Layout:
    """What `dataset_info.json` says of a column of activations."""

    context: int
    d: int
    dtype: str


@dataclass
class _Columns:
    """What was mapped so far."""

    parts: dict[str, list[Tensor]]
    token_ids: list[NDArray[Any]] = field(default_factory=list)
    n_sequences: int = 0


def _described(folder: Path) -> tuple[dict[str, _Layout], list[str]]:
    """The columns of activations, and the names of the files in their order."""
    if (folder / UNFINISHED).is_dir():
        raise UnweaveError(f"SAELens' cache in {folder} was never finished: it still has {UNFINISHED}.")
    if (folder / SPLITS).is_file():
        raise UnweaveError(f"{folder} holds several splits: name the folder of one of them.")
    state, info = read_json(folder / STATE), read_json(folder / INFO)
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
        features = dict(info["features"])
        layout = {
            name: _Layout(int(feature["shape"][0]), int(feature["shape"][1]), str(feature["dtype"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "Array2D"
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnweaveError(f"{STATE} and {INFO} in {folder} do not describe a data set: {error!r}.") from error
    if state.get("_indices_data_files"):
        raise UnweaveError(f"{folder} holds a selection of its rows: load it with `datasets`, and save it flattened.")
    if not layout:
        raise UnweaveError(f"{folder} has no column of activations; its columns are {', '.join(features) or 'none'}.")
    if len({c.context for c in layout.values()}) > 1 or min(min(c.context, c.d) for c in layout.values()) < 1:
        raise UnweaveError(f"the columns of {folder} are not all of the same positions: {layout}.")
    if other := {c.dtype for c in layout.values()} - {"float32", "float16"}:
        raise UnweaveError(f"{folder} holds activations as {other.pop()}; float32 and float16 can be read.")
    if not names or any(Path(name).name != name for name in names):
        raise UnweaveError(f"{folder / STATE} does not list its files by name: {names[:3]}.")
    return layout, names


def _map(path: Path, layout: dict[str, _Layout], into: _Columns) -> None:
    """Map a file, and add its columns."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UnweaveError("SAELens' caches need pyarrow: pip install 'unweave[data]'.") from error
    if not path.is_file():
        raise _Damaged("is missing")
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(_END), 0))
        whole = file.read() == _END
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _Damaged(f"cannot be read ({error})") from error
    if not whole:
        raise _Damaged("is cut off")
    if missing := [name for name in layout if name not in table.column_names]:
        raise _Damaged(f"lacks the column {', '.join(missing)}")
    for batch in table.to_batches():
        for name, column in layout.items():
            numbers = _flat(name, batch.column(name), (column.context, column.d))
            if numbers.dtype != column.dtype:
                raise _Damaged(f"holds {name!r} as {numbers.dtype}, and {INFO} says {column.dtype}")
            into.parts[name].append(as_tensor(numbers.reshape(-1, column.d)))
        if TOKEN_IDS in table.column_names:
            into.token_ids.append(_flat(TOKEN_IDS, batch.column(TOKEN_IDS), (column.context,)))
        into.n_sequences += batch.num_rows


def _flat(name: str, column: pa.Array, shape: tuple[int, ...]) -> NDArray[Any]:
    """The values of a column of lists, whose lengths must be `shape` in every row, as they lie in the file."""
    import pyarrow as pa

    values = getattr(column, "storage", column)  # an extension type where `datasets` was imported
    for size in shape:
        if values.null_count:
            raise _Damaged(f"has rows without {name!r}")
        if pa.types.is_fixed_size_list(values.type):
            ragged = values.type.list_size != size
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            ragged = bool((np.diff(values.offsets.to_numpy()) != size).any())
        else:
            raise _Damaged(f"holds {name!r} as {column.type}, not as lists of numbers")
        if ragged:
            raise _Damaged(f"holds {name!r} in other shapes than {shape}")
        values = values.flatten()
    if values.null_count or not pa.types.is_primitive(values.type):
        raise _Damaged(f"holds {name!r} as {column.type}, not as lists of numbers")
    flat: NDArray[Any] = values.to_numpy(zero_copy_only=True)
    return flat


def _positions(folder: Path, stored: int) -> tuple[NDArray[np.int32], int]:
    """Where in its row of tokens each stored position was, and how many positions that row had."""
    if not (folder / RUNNER).is_file():
        return np.arange(stored, dtype=np.int32), stored
    config = read_json(folder / RUNNER)
    try:
        context = config["context_size"]
        chosen = range(context)[slice(*(config.get("seqpos_slice") or (None,)))]
    except (KeyError, TypeError, ValueError) as error:
        raise UnweaveError(f"{folder / RUNNER} does not say which positions were stored: {error!r}.") from error
    if len(chosen) != stored:
        raise UnweaveError(f"{folder / RUNNER} tells of {len(chosen)} positions, and the sequences have {stored}.")
    return np.array(chosen, dtype=np.int32), context
