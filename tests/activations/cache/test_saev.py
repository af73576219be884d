"""saev's shards: every row comes from where the format says it lies, and what is damaged or odd is said."""

from __future__ import annotations

import base64
import json
import os
import pickle
import pickletools
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.activations import ActivationStream, MaskConfig
from unweave.activations.cache.foreign import Computed, MappedStore
from unweave.activations.cache.saev import SaevShards
from unweave.activations.cache.saev_write import write_saev_shards
from unweave.activations.cache.store import Store
from unweave.models import Hook, LoadedModel

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def activations(n=23, n_layers=3, patches=4, cls=True, d=5):
    """Every number differs from every other, and from 0."""
    shape = (n, n_layers, patches + cls, d)
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


def write(folder, x, layers=(2, 5, 7), *, cls=True, per_shard=5, protocol="2.1", labels=None, surplus=True, data="x"):
    """Shards as saev leaves them, with its surplus file where the examples fill the last one."""
    n, n_layers, tokens, d = x.shape
    folder.mkdir(parents=True, exist_ok=True)
    at_most = per_shard * n_layers * tokens + n_layers * tokens - 1  # the rest that fits no example is not used
    if protocol == "1":
        metadata = {
            "vit_family": "clip", "vit_ckpt": "ViT-L-14/openai", "layers": list(layers),
            "n_patches_per_img": tokens - cls, "cls_token": cls, "d_vit": d, "seed": 42, "n_imgs": n,
            "n_patches_per_shard": at_most, "data": data,
        }  # fmt: skip
    else:
        metadata = {
            "family": "clip", "ckpt": "ViT-L-14/openai", "layers": list(layers),
            "content_tokens_per_example": tokens - cls, "cls_token": cls, "d_model": d, "n_examples": n,
            "max_tokens_per_shard": at_most, "data": data, "dataset": "/some/where", "pixel_agg": "majority",
            "dtype": "float32", "protocol": protocol,
        }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=4))
    shards = []
    for i in range(n // per_shard + 1):
        part = x[i * per_shard : (i + 1) * per_shard]
        if len(part) or surplus:
            full = np.zeros((per_shard, n_layers, tokens, d), "<f4")
            full[: len(part)] = part
            full.tofile(folder / f"acts{i:06d}.bin")
            shards.append({"name": f"acts{i:06d}.bin", "n_examples": len(part)})
    if protocol != "1":
        (folder / "shards.json").write_text(json.dumps(shards))
    if labels is not None:
        labels.astype(np.uint8).tofile(folder / "labels.bin")
    return folder


def change(file, **values):
    """Set keys of a JSON file; None deletes."""
    described = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["1", "1.0.0", "2.1"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("n", "per_shard"), [(23, 5), (20, 5), (3, 5), (5, 5), (7, 1)])
def test_every_row_is_read_and_the_padding_is_not(tmp_path, protocol, cls, n, per_shard):
    """pitfall_212, pitfall_213: a last file filled up with zeros, and one of nothing but zeros, add no rows."""
    x = activations(n, cls=cls)
    store = SaevShards(write(tmp_path, x, protocol=protocol, cls=cls, per_shard=per_shard))
    assert isinstance(store, Store)
    assert store.hooks == ("layer.2", "layer.5", "layer.7")
    assert store.widths == dict.fromkeys(store.hooks, 5)
    assert store.dtypes == dict.fromkeys(store.hooks, torch.float32)
    assert store.n_rows == n * x.shape[2]
    rows = store.read(0, store.n_rows)
    for slot, hook in enumerate(store.hooks):
        assert np.array_equal(rows[hook].numpy(), x[:, slot].reshape(-1, 5))
    order = torch.randperm(store.n_rows)
    assert torch.equal(store.gather(order)["layer.5"], rows["layer.5"][order])
    assert torch.equal(store.gather(order, ["layer.7"], torch.bfloat16)["layer.7"], rows["layer.7"][order].bfloat16())
    store.prefetch(0, store.n_rows)


@FEW
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.data())
def test_a_row_lies_where_the_formula_says(tmp_path_factory, n, per_shard, n_layers, patches, cls, data):
    """pitfall_217: the number of a row and its place in the files determine each other."""
    x = activations(n, n_layers, patches, cls, 3)
    layers = sorted(data.draw(st.sets(st.integers(0, 30), min_size=n_layers, max_size=n_layers)))
    folder = write(tmp_path_factory.mktemp("shards"), x, layers, cls=cls, per_shard=per_shard)
    store = SaevShards(folder)
    tokens = patches + cls
    example, token = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, tokens - 1))
    layer = data.draw(st.sampled_from(layers))
    with (folder / f"acts{example // per_shard:06d}.bin").open("rb") as file:
        file.seek((((example % per_shard) * n_layers + layers.index(layer)) * tokens + token) * 3 * 4)
        expected = np.frombuffer(file.read(12), "<f4")
    row = example * tokens + token
    assert np.array_equal(store.gather([row])[f"layer.{layer}"][0].numpy(), expected)
    assert np.array_equal(store.read(row, row + 1)[f"layer.{layer}"][0].numpy(), expected)
    place = {name: int(store.records[name][row : row + 1][0]) for name in ("documents", "positions")}
    assert place == {"documents": example, "positions": token}
    start, stop = sorted((row, data.draw(st.integers(0, n * tokens))))
    store.prefetch(start, stop, [f"layer.{layer}"])


def test_what_is_known_of_each_row(tmp_path):
    labels = np.random.default_rng(0).integers(1, 256, (23, 4))
    store = SaevShards(write(tmp_path, activations(), labels=labels))
    records = {name: column[:] for name, column in store.records.items()}
    assert {name: (str(c.dtype), len(c)) for name, c in records.items()} == {
        "documents": ("int64", 115), "positions": ("int32", 115), "kinds": ("uint8", 115), "labels": ("uint8", 115),
    }  # fmt: skip
    assert records["documents"].tolist() == [e for e in range(23) for _ in range(5)]
    assert records["positions"].tolist() == [0, 1, 2, 3, 4] * 23
    assert records["kinds"].tolist() == [1, 0, 0, 0, 0] * 23
    assert np.array_equal(records["labels"].reshape(23, 5)[:, 1:], labels)
    assert not records["labels"].reshape(23, 5)[:, 0].any()
    some = np.array([114, 0, 7, 7])
    for name, column in store.records.items():
        assert np.array_equal(column[some], records[name][some])
        assert np.array_equal(column[3:60:7], records[name][3:60:7])
    assert store.special_ids is None


def test_lengths_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("unweave.activations.cache.foreign._NORM_ROWS", 10)
    x = activations()
    store = SaevShards(write(tmp_path, x))
    expected = np.linalg.norm(x[:, 1].reshape(-1, 5), axis=1)
    norms = store.norms["layer.5"]
    assert (len(norms), norms.dtype) == (115, np.float32)
    some = np.array([114, 3, 3, 70, *range(20, 50)])
    assert np.allclose(norms[some], expected[some])
    assert np.allclose(norms[7:33:4], expected[7:33:4])
    assert np.allclose(norms[2:61], expected[2:61])
    assert np.allclose(norms[:], expected)
    assert norms[5:5].shape == norms[np.empty(0, np.int64)].shape == (0,)
    monkeypatch.setattr(store, "read", None)
    monkeypatch.setattr(store, "gather", None)
    assert np.allclose(store.norms["layer.5"][:], expected)
    assert np.allclose(store.norms["layer.5"][some], expected[some])


def test_without_a_cls_token_every_token_is_a_patch(tmp_path):
    """pitfall_245: 257 tokens tell nothing; the metadata do."""
    x = activations(4, 1, 257, cls=False, d=2)
    labels = np.arange(4 * 257).reshape(4, 257) % 256
    store = SaevShards(write(tmp_path, x, [3], cls=False, labels=labels))
    assert not store.records["kinds"][:].any()
    assert np.array_equal(store.records["labels"][:], labels.ravel())


def test_numbers_of_images_have_64_bits():
    """pitfall_246."""
    column = Computed(2**40, np.int64, lambda rows: rows // 257)
    assert column[np.array([3_000_000_000 * 257])].tolist() == [3_000_000_000]
    assert column[2**39 : 2**39 + 1].tolist() == [2**39 // 257]


def test_files_are_mapped_and_not_read(tmp_path):
    """pitfall_223, pitfall_225, pitfall_239: a row of a file larger than memory costs one row."""
    tokens, d = 257, 1024
    write(tmp_path, activations(1, 1, tokens - 1, True, 1), [0], per_shard=1)
    per_shard = 2**20
    change(tmp_path / "metadata.json", d_model=d, n_examples=per_shard, max_tokens_per_shard=per_shard * tokens)
    (tmp_path / "shards.json").write_text(json.dumps([{"name": "acts000000.bin", "n_examples": per_shard}]))
    with (tmp_path / "acts000000.bin").open("r+b") as file:  # a terabyte, with holes
        try:
            file.truncate(per_shard * tokens * d * 4)
        except OSError:
            pytest.skip("no file of a terabyte can be made here")
        file.seek((per_shard - 1) * tokens * d * 4)
        file.write(np.full(d, 7, "<f4").tobytes())
    store = SaevShards(tmp_path)
    found = store.gather([(per_shard - 1) * tokens, 5])["layer.0"]
    assert (found == torch.tensor([[7.0], [0.0]])).all()
    assert len(store.fingerprint) == 32


def test_the_place_of_a_folder_does_not_matter(tmp_path):
    """pitfall_214, pitfall_219: any name, any depth, and a fingerprint that follows the content."""
    x = activations()
    store = SaevShards(write(tmp_path / "with a space", x))
    shutil.copytree(tmp_path / "with a space", tmp_path / "b" / "copy")
    change(tmp_path / "b" / "copy" / "metadata.json", data="eHg=", dataset="/another/machine")
    assert SaevShards(str(tmp_path / "b" / "copy")).fingerprint == store.fingerprint
    assert SaevShards(write(tmp_path / "other", x + 1)).fingerprint != store.fingerprint
    assert SaevShards(write(tmp_path / "layers", activations(), (2, 5, 8))).fingerprint != store.fingerprint


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_the_pickle_in_the_metadata_is_not_opened(tmp_path, monkeypatch):
    """pitfall_215."""
    monkeypatch.chdir(tmp_path)
    data = base64.b64encode(pickle.dumps(Hostile())).decode()
    store = SaevShards(write(tmp_path / "shards", activations(), data=data))
    store.read(0, 5)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(base64.b64decode(data))
    assert (tmp_path / "unpickled").exists()  # it would have been


# --- the order of layers ---------------------------------------------------------------------------------------------


def test_layers_that_were_not_listed_in_forward_order_are_pointed_out(tmp_path):
    """pitfall_210: saev fills slots in the order of the forward pass, whatever its list says."""
    x = activations(n_layers=2)
    write(tmp_path, x, [3, 0])
    with pytest.warns(UserWarning, match=r"lists the layers \[3, 0\].* makes it \[0, 3\].*layer_order=\"forward\""):
        listed = SaevShards(tmp_path)
    assert listed.hooks == ("layer.3", "layer.0")
    assert np.array_equal(listed.read(0, 5)["layer.3"].numpy(), x[0, 0])
    forward = SaevShards(tmp_path, layer_order="forward")
    assert forward.hooks == ("layer.0", "layer.3")
    assert np.array_equal(forward.read(0, 5)["layer.0"].numpy(), x[0, 0])
    assert forward.fingerprint != listed.fingerprint


def test_layers_counted_from_both_ends_are_pointed_out(tmp_path):
    write(tmp_path, activations(n_layers=2), [-2, 3])
    with pytest.warns(UserWarning, match="makes it another order"):
        assert SaevShards(tmp_path).hooks == ("layer.-2", "layer.3")
    with pytest.raises(UnweaveError, match="counted from the same end"):
        SaevShards(tmp_path, layer_order="forward")
    with pytest.raises(UnweaveError, match="neither"):
        SaevShards(tmp_path, layer_order="backward")


def test_layers_counted_from_the_end_in_forward_order_are_fine(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SaevShards(write(tmp_path, activations(n_layers=2), [-2, -1])).hooks == ("layer.-2", "layer.-1")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["1", "2.1"])
def test_all_missing_and_truncated_files_are_listed(tmp_path, protocol):
    """pitfall_216."""
    write(tmp_path, activations(), protocol=protocol, labels=np.zeros((23, 4)))
    (tmp_path / "acts000001.bin").unlink()
    os.truncate(tmp_path / "acts000003.bin", 100)
    with (tmp_path / "acts000004.bin").open("ab") as file:
        file.write(b"x")
    os.truncate(tmp_path / "labels.bin", 91)
    with pytest.raises(UnweaveError) as error:
        SaevShards(tmp_path)
    size = 5 * 3 * 5 * 5 * 4
    for text in ("acts000001.bin is missing", f"acts000003.bin has 100 bytes, not {size:,}",
                 f"acts000004.bin has {size + 1:,} bytes", "labels.bin has 91 bytes, not 92"):  # fmt: skip
        assert text in str(error.value)
    assert "acts000000" not in str(error.value)


def test_a_surplus_file_that_is_gone_is_not_missed(tmp_path):
    write(tmp_path, activations(20))
    (tmp_path / "acts000004.bin").unlink()
    assert SaevShards(tmp_path).n_rows == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": None}, "lacks layers"),
        ({"d_model": None, "family": None}, "lacks family, d_model"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"protocol": "3.0"}, "protocol '3.0'"),
        ({"d_model": 0}, "d_model=0"),
        ({"d_model": 5.0}, r"d_model=5\.0"),
        ({"n_examples": -3}, "n_examples=-3"),
        ({"n_examples": True}, "n_examples=True"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": "257"}, "layers='257'"),
        ({"layers": [1, 1, 2]}, "twice"),
        ({"cls_token": 1}, "cls_token=1"),
        ({"max_tokens_per_shard": 14}, "max_tokens_per_shard=14"),
        ({"d_model": 6}, "acts000000.bin has 1,500 bytes, not 1,800"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tmp_path, values, message):
    write(tmp_path, activations())
    change(tmp_path / "metadata.json", **values)
    with pytest.raises(UnweaveError, match=message):
        SaevShards(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
@pytest.mark.parametrize("name", ["metadata.json", "shards.json"])
def test_damaged_json_is_refused(tmp_path, name, text):
    write(tmp_path, activations())
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UnweaveError, match=name):
        SaevShards(tmp_path)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([{"name": "../acts.bin", "n_examples": 23}], "does not list file names"),
        ([{"name": "a.bin", "n_examples": "5"}], "n_examples of a.bin='5'"),
        ([{"name": "a.bin", "n_examples": 5}, {"name": "a.bin", "n_examples": 5}], "twice"),
        ([{"name": "a.bin", "n_examples": 23}], r"\[23\] examples, and shards of 5 hold \[5, 5, 5, 5, 3\]"),
        ([], "0 of the 23"),
    ],
)
def test_lists_of_shards_that_make_no_sense_are_refused(tmp_path, shards, message):
    write(tmp_path, activations())
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    with pytest.raises(UnweaveError, match=message):
        SaevShards(tmp_path)


def test_a_recording_that_was_interrupted_is_refused_unless_asked_for(tmp_path):
    x = activations()
    write(tmp_path, x)
    shards = json.loads((tmp_path / "shards.json").read_text())[:3]
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    with pytest.raises(UnweaveError, match=r"lists 15 of the 23 examples.*allow_fewer=True"):
        SaevShards(tmp_path)
    store = SaevShards(tmp_path, allow_fewer=True)
    assert np.array_equal(store.read(0, store.n_rows)["layer.2"].numpy(), x[:15, 0].reshape(-1, 5))
    (tmp_path / "shards.json").write_text("[]")
    with pytest.raises(UnweaveError, match="hold no examples"):
        SaevShards(tmp_path, allow_fewer=True)


def test_rows_and_hooks_that_there_are_not_are_refused(tmp_path):
    store = SaevShards(write(tmp_path, activations()))
    with pytest.raises(UnweaveError, match=r"did you mean 'layer\.7'"):
        store.read(0, 1, ["layer.6"])
    with pytest.raises(UnweaveError, match=r"no activations at 'vit\.3'"):
        store.gather([0], ["vit.3"])
    for rows in ([115], [-1]):
        with pytest.raises(UnweaveError, match="has 115"):
            store.gather(rows)
    with pytest.raises(UnweaveError, match="has 115"):
        store.prefetch(0, 116)


# --- writing ---------------------------------------------------------------------------------------------------------

KINDS = [1, 2, 2, 0, 0, 0, 0]  # CLS, two registers, four patches


def images(n=23, hooks=("h.10", "h.9"), kinds=KINDS, dtype=torch.float32, **records):
    """A store of images, whose numbers are their own."""
    tokens = len(kinds)
    x = torch.arange(n * tokens * len(hooks) * 6).view(len(hooks), n * tokens, 6)
    known = {
        "documents": np.repeat(np.random.default_rng(0).permutation(n), tokens),
        "positions": np.tile(np.arange(tokens, dtype=np.int32), n),
        "kinds": np.tile(np.array(kinds, np.uint8), n),
    } | records
    return MappedStore("images", {hook: [x[i].to(dtype)] for i, hook in enumerate(hooks)}, known, None), x.float()


@pytest.mark.parametrize("protocol", ["1", "2.1"])
@pytest.mark.parametrize("n", [23, 20])
def test_what_is_written_is_read_back(tmp_path, protocol, n):
    """pitfall_210, pitfall_212: slots in forward order, and no surplus file."""
    labels = np.random.default_rng(0).integers(0, 256, n * 7)
    source, x = images(n, labels=labels)
    per_shard = {"max_tokens_per_shard": 5 * 2 * 5}
    folder = write_saev_shards(source, tmp_path, family="dinov2", ckpt="some/vit", protocol=protocol, **per_shard)
    assert folder.parent == (tmp_path if protocol == "1" else tmp_path / "saev" / "shards")
    assert len(folder.name) == (64 if protocol == "1" else 8)
    assert sorted(p.name for p in folder.glob("acts*")) == [f"acts{i:06d}.bin" for i in range(-(-n // 5))]
    assert {p.stat().st_size for p in folder.glob("acts*")} == {5 * 2 * 5 * 6 * 4}
    store = SaevShards(folder)
    assert store.hooks == ("layer.9", "layer.10")
    kept = [0, 3, 4, 5, 6]
    found = store.read(0, store.n_rows)
    assert torch.equal(found["layer.9"], x[1].view(n, 7, 6)[:, kept].reshape(-1, 6))
    assert torch.equal(found["layer.10"], x[0].view(n, 7, 6)[:, kept].reshape(-1, 6))
    assert store.records["kinds"][:5].tolist() == [1, 0, 0, 0, 0]
    assert ("labels" in store.records) == (protocol != "1")
    if protocol != "1":
        assert np.array_equal(store.records["labels"][:].reshape(n, 5)[:, 1:], labels.reshape(n, 7)[:, 3:])
        assert json.loads((folder / "shards.json").read_text())[-1]["n_examples"] == (n - 1) % 5 + 1


def test_the_written_pickle_is_none(tmp_path):
    folder = write_saev_shards(images()[0], tmp_path, family="dinov2", ckpt="some/vit")
    data = base64.b64decode(json.loads((folder / "metadata.json").read_text())["data"])
    assert [opcode.name for opcode, _, _ in pickletools.genops(data)] == ["NONE", "STOP"]


def test_chunks_and_precisions_do_not_matter(tmp_path, monkeypatch):
    source, _ = images(dtype=torch.float16)
    whole = write_saev_shards(source, tmp_path / "a", family="clip", ckpt="x", max_tokens_per_shard=70)
    monkeypatch.setattr("unweave.activations.cache.saev_write._CHUNK_BYTES", 3 * 7 * 2 * 6 * 4)
    monkeypatch.setattr("unweave.activations.cache.saev_write._LOOK_AHEAD", 2)
    cut = write_saev_shards(source, tmp_path / "b", family="clip", ckpt="x", max_tokens_per_shard=70)
    assert whole.name == cut.name
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in cut.iterdir()}


def changed(name, row, value):
    """The records of `images()` with one other value."""
    records = dict(images()[0].records)
    records[name] = records[name].copy()
    records[name][row] = value
    return records


def of(records, *widths, rows=161):
    return MappedStore("stored", {f"h.{i}": [torch.ones(rows, d)] for i, d in enumerate(widths or (2,))}, records, None)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (images(kinds=[1, 1, 0, 0])[0], {}, "one CLS token"),
        (images(kinds=[0, 0, 1])[0], {}, "one CLS token"),
        (images(kinds=[1])[0], {}, "0 patches"),
        (images(kinds=[2])[0], {}, "0 patches"),
        (images()[0], {"n_examples": 0}, "n_examples=0"),
        (images(n=1)[0], {"n_examples": 2}, "2 images were asked for, and there are 1"),
        (images()[0], {"max_tokens_per_shard": 9}, "hold an image"),
        (images()[0], {"protocol": "2"}, "protocol='2'"),
        (of(changed("kinds", 10, 2)), {}, "whole images of one size, 7 tokens"),
        (of(changed("positions", 15, 9)), {}, "whole images of one size"),
        (of(changed("documents", 8, 99)), {}, "whole images of one size"),
        (of({name: column[:160] for name, column in images()[0].records.items()}, rows=160), {}, "whole images"),
        (of({"documents": np.zeros(161)}), {}, "stored does not hold images"),
        (of(images()[0].records, 2, 3), {}, "one width"),
        (images(hooks=("h.1.k.2", "h.3"))[0], {}, "which layer is the hook 'h.1.k.2'"),
        (images(hooks=("a", "b"))[0], {"layers": {"a": 1}}, "which layer is the hook 'b'"),
        (images(hooks=("a", "b"))[0], {"layers": {"a": 1, "b": 1}}, "must differ"),
        (images(hooks=("a", "b"))[0], {"layers": {"a": 1, "b": -1}}, "same end"),
        (images(labels=np.full(161, 300))[0], {}, "class 300"),
        (images(n=0)[0], {}, "no images"),
    ],
)
def test_what_shards_cannot_hold_is_refused(tmp_path, source, options, message):
    """pitfall_241 and others: nothing is cut or wrapped to fit, and nothing is left behind."""
    with pytest.raises(UnweaveError, match=message):
        write_saev_shards(source, tmp_path, family="clip", ckpt="x", **options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_last_image_that_was_cut_can_be_left_out(tmp_path):
    source = of({name: column[:160] for name, column in images()[0].records.items()}, rows=160)
    folder = write_saev_shards(source, tmp_path, family="clip", ckpt="x", n_examples=22)
    assert SaevShards(folder).n_rows == 22 * 5
    with pytest.raises(UnweaveError, match="whole images"):
        write_saev_shards(source, tmp_path, family="clip", ckpt="x", n_examples=23)


def test_layers_may_be_named(tmp_path):
    source, x = images(hooks=("early", "late"))
    folder = write_saev_shards(source, tmp_path, family="clip", ckpt="x", layers={"early": -9, "late": -2})
    assert torch.equal(SaevShards(folder).read(0, 1)["layer.-2"], x[1][:1])


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    folder = write_saev_shards(images()[0], tmp_path, family="clip", ckpt="x")
    with pytest.raises(UnweaveError, match=f"{folder.name} is there already"):
        write_saev_shards(images()[0], tmp_path, family="clip", ckpt="x")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UnweaveError, match="and the disk has 1e-06 GB"):
        write_saev_shards(images()[0], tmp_path, family="clip", ckpt="x")


class Patches(torch.nn.Module):
    """Each pixel is a token, behind a CLS token."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 3) for _ in range(2)])

    def forward(self, pixels):
        x = torch.cat([torch.full((len(pixels), 1), -1.0), pixels], 1)[..., None]
        return [layer(x) for layer in self.layers]


class Pixels:
    """Rows of images of four pixels."""

    context = 5

    def __init__(self, images):
        self.images, self.at = images, 0

    def next_rows(self, n):
        self.at += n
        return PixelBatch(self.images[self.at - n : self.at], self.at - n)


class PixelBatch:
    def __init__(self, pixels, first):
        self.pixels = pixels
        self.real = torch.ones(len(pixels), 5, dtype=torch.bool)
        self.documents = torch.arange(first, first + len(pixels))[:, None].expand(-1, 5)

    def __len__(self):
        return len(self.pixels)

    def inputs(self, device):
        return self.pixels.to(device), {}

    def records(self):
        shape = self.real.shape
        kinds, positions = torch.tensor([1, 0, 0, 0, 0]), torch.arange(5)
        return {"documents": self.documents, "kinds": kinds.expand(shape), "positions": positions.expand(shape)}


def test_a_model_at_work_is_recorded(tmp_path):
    module, pixels = Patches(), torch.randn(12, 4)
    masks = MaskConfig(token_kinds=("cls", "patch"), norm_multiple=None)

    def stream(masks=masks):
        hooks = [Hook("layers.1"), Hook("layers.0")]
        return ActivationStream(LoadedModel(module, None, "patches"), hooks, Pixels(pixels), masks, prompts_per_pass=3)

    with pytest.raises(UnweaveError, match="n_examples"):
        write_saev_shards(stream(), tmp_path, family="x", ckpt="y")
    with pytest.raises(UnweaveError, match="13 images were asked for, and there are 12"):
        write_saev_shards(stream(), tmp_path, family="x", ckpt="y", n_examples=13)
    folder = write_saev_shards(stream(), tmp_path, family="x", ckpt="y", n_examples=10, max_tokens_per_shard=40)
    store = SaevShards(folder)
    with torch.no_grad():
        expected = module(pixels[:10])
    for layer in range(2):
        torch.testing.assert_close(store.read(0, 50)[f"layer.{layer}"].view(10, 5, 3), expected[layer])
    patches_alone = write_saev_shards(
        stream(MaskConfig(norm_multiple=None)), tmp_path, family="x", ckpt="y", n_examples=12
    )
    assert not SaevShards(patches_alone).metadata.cls_token
    with pytest.raises(UnweaveError, match="whole images"):
        write_saev_shards(stream(MaskConfig(norm_multiple=1.0)), tmp_path, family="x", ckpt="z", n_examples=10)
