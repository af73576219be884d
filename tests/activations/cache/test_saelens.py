"""SAELens' cached activations: every number is read where it lies in the Arrow files, and what is damaged is said."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.activations.cache.saelens import SaelensCache
from unweave.activations.cache.store import Store

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTEXT, D = 5, 6


def activations(n=23, dtype=torch.float32, context=CONTEXT, d=D):
    return torch.arange(n * context * d).view(n, context, d).to(dtype)


def tokens(n=23, context=CONTEXT):
    return torch.arange(n * context, dtype=torch.int32).view(n, context) * 7


def save(folder, columns, n=23, per_file=10, batch=4, list_of=pa.list_, dtype=None):
    """A folder as `datasets` saves it, written with nothing but pyarrow: `per_file` sequences a file.

    Args:
        columns: By name, `(n, context, d)` of activations or `(n, context)` of tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features, names = {}, []
    for name, x in columns.items():
        shape, kind = list(x.shape[1:]), dtype or str(x.numpy().dtype)
        features[name] = (
            {"shape": shape, "dtype": kind, "_type": "Array2D"}
            if x.ndim == 3
            else {"feature": {"dtype": kind, "_type": "Value"}, "length": shape[0], "_type": "List"}
        )
    n_files = -(-n // per_file)
    for i in range(n_files):
        arrays = {name: lists(x[i * per_file : (i + 1) * per_file], list_of) for name, x in columns.items()}
        names.append(f"data-{i:05d}-of-{n_files + 1:05d}.arrow")  # the number behind "of" is not reliable
        write_stream(folder / names[-1], pa.table(arrays), batch)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features, "citation": ""}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def lists(x, list_of):
    if x.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), x.shape[1])
    n, context, d = x.shape
    values = pa.array(x.flatten().numpy())
    if list_of is None:
        return pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(values, d), context)
    kind = pa.ListArray if list_of is pa.list_ else pa.LargeListArray
    offset = np.int32 if list_of is pa.list_ else np.int64
    inner = kind.from_arrays(pa.array(np.arange(n * context + 1, dtype=offset) * d), values)
    return kind.from_arrays(pa.array(np.arange(n + 1, dtype=offset) * context), inner)


def write_stream(path, table, batch):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_datasets_saved_is_read(tmp_path, dtype):
    """As SAELens writes it, here with two hooks and several files; `datasets` is imported, and knows the columns."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    name = str(dtype).removeprefix("torch.")
    columns = {"blocks.1.hook_resid_post": activations(dtype=dtype), "blocks.0.hook_mlp_out": -activations(dtype=dtype)}
    features = Features(
        {hook: Array2D(shape=(CONTEXT, D), dtype=name) for hook in columns}
        | {"token_ids": Sequence(Value("int32"), length=CONTEXT)}
    )
    dataset = Dataset.from_dict(columns | {"token_ids": tokens()}, features=features)
    dataset.save_to_disk(tmp_path / "cache", num_shards=3)
    store = SaelensCache(tmp_path / "cache")
    assert isinstance(store, Store)
    assert store.hooks == tuple(columns)
    assert store.widths == dict.fromkeys(columns, D)
    assert store.dtypes == dict.fromkeys(columns, dtype)
    found = store.read(0, store.n_rows)
    for hook, x in columns.items():
        assert torch.equal(found[hook], x.view(-1, D))
    assert np.array_equal(store.records["token_ids"][:], tokens().flatten().numpy())


@FEW
@given(
    st.integers(1, 30), st.integers(1, 11), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5),
    st.sampled_from([pa.list_, pa.large_list, None]), st.data(),
)  # fmt: skip
def test_a_row_is_a_token_of_a_sequence(tmp_path_factory, n, per_file, batch, context, d, list_of, data):
    """Whatever the files, batches and kinds of lists that a sequence lies in."""
    x, ids = activations(n, context=context, d=d), tokens(n, context)
    folder = save(tmp_path_factory.mktemp("cache"), {"h.1": x, "token_ids": ids}, n, per_file, batch, list_of)
    store = SaelensCache(folder)
    assert (store.n_rows, store.context) == (n * context, context)
    sequence, position = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, context - 1))
    row = sequence * context + position
    assert torch.equal(store.gather([row])["h.1"][0], x[sequence, position])
    expected = {"documents": sequence, "positions": position, "token_ids": int(ids[sequence, position])}
    assert {name: int(column[row : row + 1][0]) for name, column in store.records.items()} == expected
    assert {name: int(column[np.array([row])][0]) for name, column in store.records.items()} == expected
    start, stop = sorted((row, data.draw(st.integers(0, n * context))))
    store.prefetch(start, stop)
    assert torch.equal(store.read(start, stop)["h.1"], x.view(-1, d)[start:stop])


def test_batches_without_rows_are_passed_over(tmp_path):
    save(tmp_path, {"h.1": activations()})
    files, table = sorted(tmp_path.glob("*.arrow")), pa.table({"h.1": lists(activations(10), pa.list_)})
    with pa.OSFile(str(files[1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for rows in (table[:0], table[:4], table[:0], table[4:], table[:0]):
            stream.write_batch(rows.combine_chunks().to_batches()[0] if len(rows) else empty(table.schema))
    store = SaelensCache(tmp_path)
    expected = torch.cat([activations()[:10], activations(10), activations()[20:]]).view(-1, D)
    for start, stop in ((0, 115), (50, 70), (50, 50), (69, 70), (115, 115)):
        assert torch.equal(store.read(start, stop)["h.1"], expected[start:stop])
        store.prefetch(start, stop)


def empty(schema):
    return pa.record_batch([pa.array([], kind) for kind in schema.types], schema)


def test_rows_in_any_order(tmp_path):
    x = activations()
    store = SaelensCache(save(tmp_path, {"h.1": x, "token_ids": tokens()}))
    order = torch.randperm(store.n_rows)
    assert torch.equal(store.gather(order)["h.1"], x.view(-1, D)[order])
    assert torch.equal(store.gather(order, dtype=torch.bfloat16)["h.1"], x.view(-1, D)[order].bfloat16())
    assert np.array_equal(store.records["token_ids"][order.numpy()], tokens().flatten()[order].numpy())
    assert [str(column.dtype) for column in store.records.values()] == ["int64", "int32", "int32"]


def test_an_old_cache_without_token_ids_is_read(tmp_path):
    store = SaelensCache(save(tmp_path, {"h.1": activations()}))
    assert set(store.records) == {"documents", "positions"}


def test_positions_that_were_sliced_are_known_where_the_config_lies_beside(tmp_path):
    save(tmp_path, {"h.1": activations()})
    assert SaelensCache(tmp_path).records["positions"][:6].tolist() == [0, 1, 2, 3, 4, 0]
    before = SaelensCache(tmp_path).fingerprint
    config = tmp_path / "cache_activations_runner_cfg.json"
    config.write_text(json.dumps({"context_size": 16, "seqpos_slice": [2, 12, 2]}))
    assert SaelensCache(tmp_path).records["positions"][:6].tolist() == [2, 4, 6, 8, 10, 2]
    assert SaelensCache(tmp_path).fingerprint != before
    config.write_text(json.dumps({"context_size": 5, "seqpos_slice": None}))
    assert SaelensCache(tmp_path).fingerprint == before
    for text, message in (('{"context_size": 16}', "tells of 16 positions"), ("{}", "does not say"), ("3", "not say")):
        config.write_text(text)
        with pytest.raises(UnweaveError, match=message):
            SaelensCache(tmp_path)


def test_files_are_mapped_without_datasets(tmp_path, monkeypatch):
    """pitfall_243: nothing is decoded or copied until rows are asked for."""
    save(tmp_path, {"h.1": activations(2000, d=128)}, n=2000, per_file=700)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    before = pa.total_allocated_bytes()
    store = SaelensCache(tmp_path)
    assert store.n_rows == 10_000
    assert store.read(9_999, 10_000)["h.1"][0, -1] == 2000 * 5 * 128 - 1
    assert pa.total_allocated_bytes() - before < 100_000  # of 5 MB


def test_the_place_of_a_folder_does_not_matter(tmp_path):
    """pitfall_214, pitfall_219: what `datasets` calls its fingerprint plays no part."""
    a = SaelensCache(save(tmp_path / "a b", {"h.1": activations()}))
    save(tmp_path / "c", {"h.1": activations()}, per_file=7, batch=3)
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps(state | {"_fingerprint": "other"}))
    assert SaelensCache(tmp_path / "c").fingerprint == a.fingerprint
    assert SaelensCache(save(tmp_path / "d", {"h.1": activations() + 1})).fingerprint != a.fingerprint
    assert SaelensCache(save(tmp_path / "e", {"h.2": activations()})).fingerprint != a.fingerprint


# --- bad input -------------------------------------------------------------------------------------------------------


def test_all_damaged_files_are_listed(tmp_path):
    """pitfall_216: missing, cut inside a batch, and cut between two batches, which reads like a whole file."""
    save(tmp_path, {"h.1": activations(50)}, n=50)
    files = sorted(tmp_path.glob("*.arrow"))
    files[0].unlink()
    os.truncate(files[1], 700)
    os.truncate(files[3], files[3].stat().st_size - 8)
    files[4].write_bytes(b"")
    with pytest.raises(UnweaveError) as error:
        SaelensCache(tmp_path)
    for i, what in ((0, "is missing"), (1, "cannot be read"), (3, "is cut off"), (4, "cannot be read")):
        assert f"{files[i].name} {what}" in str(error.value)
    assert files[2].name not in str(error.value)


def test_an_unfinished_cache_is_refused(tmp_path):
    (tmp_path / ".tmp_shards" / "shard_00000").mkdir(parents=True)
    with pytest.raises(UnweaveError, match=r"never finished: it still has \.tmp_shards"):
        SaelensCache(tmp_path)
    save(tmp_path, {"h.1": activations()})
    with pytest.raises(UnweaveError, match="never finished"):
        SaelensCache(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pa.array([[[1.0, 2.0]] * 5] * 2, pa.list_(pa.list_(pa.float32()))), "other shapes than"),
        (pa.array([[[1.0] * 6] * 5, [[1.0] * 6] * 4], pa.list_(pa.list_(pa.float32()))), "other shapes than"),
        (pa.array([[[1.0] * 6] * 5, None], pa.list_(pa.list_(pa.float32()))), "rows without 'h.1'"),
        (pa.array([[[1.0] * 5 + [None]] * 5] * 2, pa.list_(pa.list_(pa.float32()))), "not as lists of numbers"),
        (pa.array([[[1.0] * 6] * 5] * 2, pa.list_(pa.list_(pa.float64()))), "float64, and dataset_info.json says"),
        (pa.array([["a" * 6] * 5] * 2), "not as lists of numbers"),
        (pa.array([[["a"] * 6] * 5] * 2), "not as lists of numbers"),
        (pa.array([1, 2]), "not as lists of numbers"),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, wrong, message):
    save(tmp_path, {"h.1": activations()})
    file = sorted(tmp_path.glob("*.arrow"))[1]
    write_stream(file, pa.table({"h.1": wrong}), 10)
    with pytest.raises(UnweaveError, match=f"{file.name} h.*{message}"):
        SaelensCache(tmp_path)
    write_stream(file, pa.table({"h.2": wrong}), 10)
    with pytest.raises(UnweaveError, match=f"{file.name} lacks the column h.1"):
        SaelensCache(tmp_path)


def test_token_ids_in_some_files_alone_are_refused(tmp_path):
    save(tmp_path, {"h.1": activations(), "token_ids": tokens()})
    file = sorted(tmp_path.glob("*.arrow"))[0]
    write_stream(file, pa.table({"h.1": lists(activations(10), pa.list_)}), 10)
    with pytest.raises(UnweaveError, match=r"some files .* have token_ids, and some have not"):
        SaelensCache(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state.json", "{", "state.json cannot be read"),
        ("state.json", "[]", "do not describe a data set"),
        ("state.json", '{"_data_files": []}', "does not list its files"),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "does not list its files by name"),
        ("state.json", '{"_data_files": [{"filename": "x"}], "_indices_data_files": [{}]}', "a selection of its rows"),
        ("dataset_info.json", '{"features": {}}', "no column of activations; its columns are none"),
        ("dataset_info.json", '{"features": {"text": {"dtype": "string"}}}', "its columns are text"),
        ("dataset_info.json", '{"features": {"a": {"_type": "Array2D", "shape": [3]}}}', "do not describe"),
        ("dataset_info.json", '{"features": {"a": {"_type": "Array2D", "shape": [3, 0], "dtype": "float32"}}}', "same"),
        (
            "dataset_info.json",
            '{"features": {"a": {"_type": "Array2D", "shape": [3, 2], "dtype": "float32"}, '
            '"b": {"_type": "Array2D", "shape": [4, 2], "dtype": "float32"}}}',
            "not all of the same positions",
        ),
        ("dataset_info.json", '{"features": {"a": {"_type": "Array2D", "shape": [3, 2], "dtype": "int8"}}}', "int8"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(tmp_path, name, value, message):
    save(tmp_path, {"h.1": activations()})
    (tmp_path / name).write_text(value)
    with pytest.raises(UnweaveError, match=message):
        SaelensCache(tmp_path)


def test_several_splits_and_nothing_at_all_are_refused(tmp_path):
    with pytest.raises(UnweaveError, match=r"state\.json cannot be read"):
        SaelensCache(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UnweaveError, match="several splits"):
        SaelensCache(tmp_path)
    (tmp_path / "dataset_dict.json").unlink()
    save(tmp_path, {"h.1": activations(1)[:0]}, n=1)
    with pytest.raises(UnweaveError, match="holds no sequences"):
        SaelensCache(tmp_path)


def test_rows_and_hooks_that_there_are_not_are_refused(tmp_path):
    store = SaelensCache(save(tmp_path, {"blocks.1.hook_resid_post": activations()}))
    with pytest.raises(UnweaveError, match="did you mean 'blocks"):
        store.read(0, 1, ["blocks.2.hook_resid_post"])
    with pytest.raises(UnweaveError, match="has 115"):
        store.gather([115])
