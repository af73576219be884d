"""Opening caches: all that is wrong is said at once, and nothing is believed that can be checked.

pitfall_211, pitfall_213, pitfall_215, pitfall_216, pitfall_217, pitfall_219.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from unweave import UnweaveError, open_cache
from unweave.activations.cache import Cache
from unweave.activations.cache.folder import hashed
from unweave.activations.cache.format import hash_of

Make = Callable[..., Any]


def test_everything_that_is_missing_or_damaged_is_listed_at_once(make_cache: Make, tmp_path: Path) -> None:
    make_cache()
    folder = tmp_path / "cache"
    (folder / "train_00000" / "h.0.npy").unlink()
    shutil.rmtree(folder / "train_00001")
    cut = folder / "train_00002" / "h.1.npy"
    cut.write_bytes(cut.read_bytes()[:-5])
    (folder / "train_00003" / "documents.npy").write_bytes(b"nonsense")
    np.save(folder / "train_00004" / "positions.npy", np.zeros(3, dtype=np.int16))
    with pytest.raises(UnweaveError) as error:
        open_cache(folder)
    for part in ("train_00000/h.0.npy is missing", "train_00001/h.0.npy is missing", "train_00001/h.1.npy is missing",
                 "train_00002/h.1.npy has", "train_00003/documents.npy cannot be read",
                 "train_00004/positions.npy holds int16 (3,)"):  # fmt: skip
        assert part in str(error.value)


def test_a_flipped_byte_is_found_by_its_checksum(make_cache: Make, tmp_path: Path) -> None:
    make_cache()
    file = tmp_path / "cache" / "train_00001" / "h.1.npy"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    open_cache(tmp_path / "cache")
    with pytest.raises(UnweaveError, match=r"train_00001/h\.1\.npy changed"):
        open_cache(tmp_path / "cache", verify=True)
    tokens = tmp_path / "cache" / "tokens" / "train_00000.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"x")
    with pytest.raises(UnweaveError, match=r"train_00001/h\.1\.npy, tokens/train_00000\.npy changed"):
        open_cache(tmp_path / "cache", verify=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_manifest_of_an_earlier_state_is_refused_in_one_sentence(
    make_cache: Make, tmp_path: Path, finished: bool
) -> None:
    """Its hash is right: it only says less of how the cache was made."""
    make_cache()
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["made_from"]["model_precision"]
    manifest |= {"hash": hash_of(hashed(manifest["made_from"])), "complete": finished}
    path.write_text(json.dumps(manifest))
    for act in (lambda: open_cache(tmp_path / "cache"), lambda: make_cache(resume=True)):
        with pytest.raises(UnweaveError, match="earlier state of unweave: its manifest does not say model_precision;"):
            act()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(hash="0" * 32),
        lambda m: m.update(version=99),
        lambda m: m.pop("hooks"),
        lambda m: m["hooks"][0].update(width=-1),
        lambda m: m["hooks"][0].update(file="../../etc/passwd"),
        lambda m: m.update(dtype="int8"),
        lambda m: m["made_from"].update(dtype="int8"),
        lambda m: m["sides"]["train"].update(rows=299),
        lambda m: m["sides"]["train"]["shards"][0].update(folder="../x"),
        lambda m: m["sides"]["train"]["shards"].pop(),
        lambda m: m["sides"]["train"]["shards"][0]["files"].popitem(),
        lambda m: m["made_from"]["config"].update(context=1),
    ],
)
def test_an_edited_manifest_is_refused(make_cache: Make, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    make_cache()
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnweaveError, match=r"manifest|version"):
        open_cache(tmp_path / "cache")


def test_a_manifest_of_another_width_is_contradicted_by_the_files(make_cache: Make, tmp_path: Path) -> None:
    make_cache()
    path = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["hooks"][0]["width"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnweaveError, match=r"holds float32 \(\d+, 6\), not float32 \(\d+, 7\)"):
        open_cache(tmp_path / "cache")


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="is no cache"):
        open_cache(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UnweaveError, match="is no cache"):
        open_cache(tmp_path)


def test_a_cache_can_be_moved(make_cache: Make, tmp_path: Path) -> None:
    made = make_cache()
    x = made.train.read(0, 300)
    (tmp_path / "cache").rename(tmp_path / "a new place")
    moved = open_cache(tmp_path / "a new place", verify=True)
    assert moved.hash == made.hash
    assert moved.train.fingerprint == made.train.fingerprint
    assert all(torch.equal(moved.train.read(0, 300)[hook], x[hook]) for hook in x)


def test_its_rows_of_tokens_are_checked_when_it_is_opened(make_cache: Make) -> None:
    """They are what an SAE is evaluated on, once all of the training is done."""
    file = make_cache().path / "tokens" / "train_00000.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UnweaveError, match=r"train_00000\.npy changed after being written"):
        open_cache(file.parents[1], verify=True)
    file.unlink()
    with pytest.raises(UnweaveError, match=r"damaged: train_00000\.npy is missing"):
        open_cache(file.parents[1])


def test_hooks_are_found_as_in_the_model(make_cache: Make, tmp_path: Path) -> None:
    made = make_cache()
    assert made.resolve(["h.1", "h.0"]) == ["h.0", "h.1"]
    assert made.resolve("h.*") == ["h.0", "h.1"]
    assert made.resolve("0") == ["h.0"]
    with pytest.raises(UnweaveError, match=r"no hook 'h\.7'; it has h\.0, h\.1; did you mean"):
        made.resolve("h.7")
    hooks = ["h.0:in", "h.0.mlp", "h.0", "h.1.mlp", "h.1"]
    about = [{"name": hook, "aliases": [f"resid_post.{hook[-1]}"] if hook[-2] == "." else []} for hook in hooks]
    side = SimpleNamespace(hooks=tuple(hooks), name="the cache c")
    several = Cache(tmp_path, {"hooks": about}, side, None)  # type: ignore[arg-type]
    assert several.resolve("h.*") == ["h.0", "h.1"]
    assert several.resolve("h.*:out") == ["h.0", "h.1"]
    assert several.resolve("h.*:in") == ["h.0:in"]
    assert several.resolve("*.mlp") == ["h.0.mlp", "h.1.mlp"]
    assert several.resolve(["1.mlp", "resid_post.0"]) == ["h.0", "h.1.mlp"]
    with pytest.raises(UnweaveError, match=r"'mlp' could be any of h\.0\.mlp, h\.1\.mlp in"):
        several.resolve("mlp")


def test_rows_by_number_range_and_slice(make_cache: Make) -> None:
    side = make_cache(tokens=300).train
    x = side.read(0, 300)
    rows = torch.tensor([299, 0, 5, 5, 130])
    for found in (side.gather(rows), side[rows], side[rows.tolist()]):
        assert all(torch.equal(found[hook], x[hook][rows]) for hook in x)
    assert torch.equal(side[10:200]["h.1"], x["h.1"][10:200])
    assert torch.equal(side[-5::2]["h.1"], x["h.1"][-5::2])
    assert side.read(7, 7, ["h.0"])["h.0"].shape == (0, 6)
    assert side.gather(rows, ["h.1"], torch.float64)["h.1"].dtype == torch.float64
    for bad in (lambda: side.read(0, 301), lambda: side.read(-1, 3), lambda: side.gather(torch.tensor([300])),
                lambda: side.gather(torch.tensor([0.5])), lambda: side.read(0, 1, ["h.2"])):  # fmt: skip
        with pytest.raises(UnweaveError):
            bad()


def test_what_is_read_is_a_copy(make_cache: Make) -> None:
    side = make_cache().train
    first = side.read(0, 3)["h.0"]
    before = first.clone()
    first.zero_()
    assert torch.equal(side.read(0, 3)["h.0"], before)
