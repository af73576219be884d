"""Several processes cache images: each is decoded by one of them, and the bytes are those of one process alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unweave as uw
from unweave import _files
from unweave._errors import UnweaveError
from unweave._files import claimed, write_json
from unweave.activations import ImageConfig, ImageRows
from unweave.activations.images.prepare import Preparation
from unweave.models import LoadedModel

N = 60
AtOnce = Callable[..., list[Any]]
pytestmark = pytest.mark.filterwarnings("ignore:skipped the image")
SETTINGS = {"hooks": "resid_post.0", "prompts_per_pass": 2, "shard_bytes": 2000, "dtype": "float32"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images with masks, six of them unreadable."""
    for kind in ("images", "masks"):
        (tmp_path / "scenes" / kind).mkdir(parents=True)
    for i in range(N):
        pixels = np.random.default_rng(i).integers(0, 256, (11, 9, 4), dtype=np.uint8)
        Image.fromarray(pixels[..., :3]).save(tmp_path / "scenes" / "images" / f"{i:02d}.png")
        Image.fromarray(pixels[..., 3] % 7).save(tmp_path / "scenes" / "masks" / f"{i:02d}.png")
    for i in (2, 3, 17, 31, 44, 58):
        (tmp_path / "scenes" / "images" / f"{i:02d}.png").write_bytes(b"no image %d" % i)
    return tmp_path / "scenes"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each image, as often as it is decoded."""
    names, prepare = list[str](), Preparation.prepare

    def counted(self: Preparation, entry: Any) -> Any:
        names.append(entry.name)
        time.sleep(random.random() * 0.004)  # so that processes overtake each other
        return prepare(self, entry)

    monkeypatch.setattr(Preparation, "prepare", counted)
    return names


class Paths:
    """A stream: as often as it is asked for, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "images").iterdir())

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)


def make(data: Any, out: Path, model: LoadedModel, **settings: Any) -> Any:
    """Two images in a pass, four or so in a shard."""
    config = {"held_out": 0.2, "workers": 0} | settings.pop("config", {})
    settings = SETTINGS | {"tokens": 150, "held_out_tokens": 20} | settings
    return uw.cache(data, out, model=model, config=ImageConfig(**config), **settings)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs ranks at the same time, in threads that take themselves for processes: each opens its own files."""
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + (threading.get_ident() << 32))
    monkeypatch.setattr(_files, "_lives", lambda process: True)

    def run(world: int, one: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    return run


@pytest.mark.parametrize(
    ("kind", "held_out", "settings"),
    [
        ("folder", 0.2, {}),
        ("folder", 0.0, {"tokens": 5 * N, "allow_fewer": True, "held_out_tokens": 0}),
        ("folder", 0.2, {"positions": "1::2", "tokens": 61, "shard_bytes": 900}),
        ("stream", 0.2, {"tokens": 5 * N, "allow_fewer": True}),
        ("stream", 0.0, {"held_out_tokens": 0}),
    ],
)
def test_no_image_is_decoded_twice(
    make_vit: Any,
    scenes: Path,
    tmp_path: Path,
    decoded: list[str],
    at_once: AtOnce,
    kind: str,
    held_out: float,
    settings: Any,
) -> None:
    """pitfall_293: what the ranks read is disjoint, and together all of it."""

    def data() -> Any:
        return scenes if kind == "folder" else Paths(scenes)

    settings = {"config": {"held_out": held_out}} | settings
    whole = make(data(), tmp_path / "whole", make_vit(), **settings)
    assert len(whole.manifest["sides"]["train"]["shards"]) > 5
    alone = sorted(decoded)
    assert len(set(alone)) == len(alone) > 30
    for attempt in range(3):
        decoded.clear()
        models, out = [make_vit() for _ in range(3)], tmp_path / f"shared{attempt}"
        made = at_once(3, lambda rank: make(data(), out, models[rank], rank=rank, world=3, **settings))  # noqa: B023
        assert any(made)
        assert sorted(decoded) == alone
        assert files_of(out) == files_of(tmp_path / "whole")


def test_whoever_ends_last_finishes_and_nobody_waits(
    vit: LoadedModel, scenes: Path, tmp_path: Path, decoded: list[str]
) -> None:
    whole = make(scenes, tmp_path / "whole", vit)
    shards = whole.manifest["sides"]["train"]["shards"]
    alone = sorted(decoded)
    decoded.clear()
    out = tmp_path / "shared"
    with claimed(tmp_path / "other") as mine:
        assert mine
        with claimed(tmp_path / "other") as again:
            assert not again
    out.mkdir()
    with claimed(out / ".train_00001.lock"):  # by a process that is slow, or is killed
        assert make(scenes, out, vit, rank=2, world=3) is None
        assert make(scenes, out, vit, rank=0, world=3) is None
    there = {path.name for path in out.glob("train_*")}
    assert "train_00001" not in there
    assert {shard["folder"] for shard in shards[:-2]} - {"train_00001"} <= there
    assert shards[-1]["folder"] not in there  # which rows of it are wanted depends on those of the missing one
    made = make(scenes, out, vit, rank=1, world=3)
    assert made.train.n_rows == 150
    assert sorted(decoded) == alone
    assert files_of(out) == files_of(tmp_path / "whole")


RANKS = """
import os, shutil, signal, sys, warnings
import unweave as uw
from unweave.activations.cache.shards import ShardWriter
from unweave.activations.images.prepare import Preparation

warnings.simplefilter("ignore")
folder, log, *runs = sys.argv[1:]
model, append, prepare = uw.load_model("demo-vit"), ShardWriter.append, Preparation.prepare
written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

def counted(self, entry):
    os.write(written, entry.name.encode() + b"\\n")
    return prepare(self, entry)

def killed(self, *arguments):
    append(self, *arguments)
    if dies_in in self.folder.name:
        os.kill(os.getpid(), signal.SIGKILL)

Preparation.prepare, ShardWriter.append = counted, killed
for run in runs:
    out, world, dies_in = run.split(":")
    os.write(written, b"run\\n")
    ranks = []
    for rank in range(int(world)):
        if not (process := os.fork()):
            uw.cache(folder, out, hooks="resid_post.0", tokens=600, model=model, config=uw.ImageConfig(held_out=0),
                     prompts_per_pass=2, shard_bytes=20000, resume=True, rank=rank, world=int(world))
            os._exit(0)
        ranks.append(process)
    print(*(os.waitpid(process, 0)[1] for process in ranks))
    if dies_in != "nowhere":
        shutil.copytree(out, out + "-then")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked from one")
def test_processes_that_are_killed_go_on(scenes: Path, tmp_path: Path) -> None:
    """Those that are left do the work of one that dies; and no image of a finished shard is decoded again."""
    log, folders = tmp_path / "log", [tmp_path / name for name in ("whole", "shared", "killed")]
    whole, shared, killed = folders
    runs = [f"{whole}:1:nowhere", f"{shared}:3:nowhere", f"{killed}:2:train_00003", f"{killed}:2:nowhere"]
    command = [sys.executable, "-c", RANKS, str(scenes), str(log), *runs]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert ended.stdout.splitlines() == ["0", "0 0 0", f"{signal.SIGKILL:d} {signal.SIGKILL:d}", "0 0"]
    alone, together, before, after = (run.split() for run in log.read_text().split("run\n")[1:])
    assert len(set(alone)) == len(alone) > 30
    assert sorted(together) == sorted(alone)
    assert files_of(shared) == files_of(whole)
    then = tmp_path / "killed-then"
    assert list(then.glob(".train_00003.*.tmp"))
    assert not (then / "train_00003").exists()
    shards = [json.loads(path.read_text()) for path in then.glob("train_*/shard.json")]
    assert len(shards) > 2
    order = np.random.default_rng([0, 0]).permutation(N)
    stored = {f"{i:02d}.png" for shard in shards for i in order[slice(*shard["images"])]}
    assert stored < set(before)
    assert sorted(after) == sorted(set(alone) - stored)
    assert files_of(killed) == files_of(whole)


def test_bad_images_of_all_ranks_count(vit: LoadedModel, scenes: Path, tmp_path: Path) -> None:
    def try_with(max_bad: int, **settings: Any) -> Any:
        return make(
            scenes, tmp_path / "c", vit, held_out_tokens=0, config={"held_out": 0, "max_bad": max_bad}, **settings
        )

    whole = make(scenes, tmp_path / "whole", vit, held_out_tokens=0, config={"held_out": 0})
    shards = sorted((tmp_path / "whole").glob("train_*/shard.json"))
    bad = {path.parent.name: json.loads(path.read_text())["bad"] for path in shards}
    slow = next(name for name, found in bad.items() if found)
    n = len(whole.images["bad"])
    assert n > len(bad[slow])
    (tmp_path / "c").mkdir()
    with claimed(tmp_path / "c" / f".{slow}.lock"):
        assert try_with(n - 1, rank=0, world=2) is None
    with pytest.raises(UnweaveError, match=f"{n} images .* more than max_bad={n - 1}") as error:
        try_with(n - 1, rank=1, world=2)
    assert all(name in str(error.value) for name in whole.images["bad"])
    assert try_with(n, resume=True).images["bad"] == whole.images["bad"]


def test_shards_of_any_length_are_read(vit: LoadedModel, scenes: Path, tmp_path: Path) -> None:
    """One has no image that can be read, others a few."""
    order = np.random.default_rng([0, 0]).permutation(N)
    for i in order[4:8]:
        (scenes / "images" / f"{i:02d}.png").write_bytes(b"no image")
    settings = {"tokens": 200, "held_out_tokens": 0, "config": {"held_out": 0, "max_bad": 10}}
    made = make(scenes, tmp_path / "c", vit, **settings)
    shards = made.manifest["sides"]["train"]["shards"]
    assert "train_00001" not in {shard["folder"] for shard in shards}
    assert len({shard["rows"] for shard in shards}) > 1
    assert {int(path.name[-5:]) for path in (tmp_path / "c").glob("train_*")} == set(range(len(shards) + 1))
    rows = ImageRows(scenes, vit, ImageConfig(held_out=0, max_bad=10), held_out=False)
    known = {name: value.flatten()[:200] for name, value in rows.next_rows(N).records().items()}
    for name, values in known.items():
        assert made.train.records[name][:].tolist() == values.tolist()
    ordered = list(uw.OrderedBatches(made.train, 7))
    assert [i for batch in ordered for i in batch.records["documents"].tolist()] == known["documents"].tolist()
    chosen = uw.StoreBatches(made.train, 8, selection=uw.Selection(only_labels=[3]), epochs=1, seed=0)
    assert chosen.selected.n_rows == int((known["labels"] == 3).sum()) > 8
    shuffled = list(uw.StoreBatches(made.train, 8, epochs=1, seed=0))
    assert sum(len(batch["layers.0"]) for batch in shuffled) == 200
    made.verify()


def test_an_iterator_is_enough_for_many_shards(vit: LoadedModel, scenes: Path, tmp_path: Path) -> None:
    settings = {"tokens": 150, "held_out_tokens": 0, "config": {"held_out": 0}}
    made = make(iter(Paths(scenes)), tmp_path / "c", vit, **settings)
    assert len(made.manifest["sides"]["train"]["shards"]) > 5
    assert made.train.records["documents"][::5].tolist() == [i for i in range(40) if i not in (2, 3, 17, 31)][:30]


def as_before(folder: Path) -> None:
    """The shards as they were described when borders depended on which images can be read."""
    for path in folder.glob("*/shard.json"):
        about = json.loads(path.read_text())
        del about["images"], about["bad"]
        path.write_text(json.dumps(about | {"prompts": 4, "position": {"epoch": 0, "done": 4, "bad": {}}}))


def test_caches_of_an_earlier_version_are_read_and_not_gone_on_with(
    vit: LoadedModel, scenes: Path, tmp_path: Path
) -> None:
    whole = make(scenes, tmp_path / "whole", vit)
    shutil.copytree(tmp_path / "whole", tmp_path / "before")
    as_before(tmp_path / "before")
    before = make(scenes, tmp_path / "before", vit, resume=True)
    assert before.train.read(0, 150)["layers.0"].equal(whole.train.read(0, 150)["layers.0"])
    uw.open_cache(tmp_path / "before", verify=True)

    manifest = json.loads((tmp_path / "before" / "manifest.json").read_text())
    (tmp_path / "before" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(UnweaveError, match="was begun by an earlier state of unweave, whose shards of images"):
        make(scenes, tmp_path / "before", vit, resume=True)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_held_out_images_may_be_others(vit: LoadedModel, scenes: Path, tmp_path: Path, held_out: float) -> None:
    """Of which a shard has as many as one of the training images."""
    rows = [ImageRows(scenes / "images", vit, ImageConfig(held_out=held_out), held_out=False) for _ in range(2)]
    made = make(rows[0], tmp_path / "c", vit, held_out_tokens=150, held_out_data=rows[1])
    train, held = (made.manifest["sides"][side]["shards"] for side in ("train", "held_out"))
    assert len(train) > 5
    assert [(shard["rows"], shard["files"]) for shard in train] == [(shard["rows"], shard["files"]) for shard in held]


def test_that_all_are_bad_is_said_when_resumed_too(vit: LoadedModel, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image %d" % i)
    for resume in (False, True):
        with pytest.raises(UnweaveError, match=r"holds no images; 3 could not be read\.$"):
            make(tmp_path, tmp_path / "c", vit, config={"held_out": 0}, held_out_tokens=0, resume=resume)


@pytest.mark.parametrize("world", [1, 2])
def test_what_a_killed_process_left_of_the_list_is_removed_by_one_that_is_alone(
    vit: LoadedModel, scenes: Path, tmp_path: Path, world: int
) -> None:
    """Of several, another one may be writing it, on a machine whose processes this one does not know."""
    whole = make(scenes, tmp_path / "c", vit)
    before = files_of(tmp_path / "c")
    write_json(tmp_path / "c" / "manifest.json", whole.manifest | {"complete": False})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = {f".{name}.{dead.pid}.tmp": b"{" for name in ("images.json", "manifest.json")}
    for name, content in left.items():
        (tmp_path / "c" / name).write_bytes(content)
    assert make(scenes, tmp_path / "c", vit, resume=True, rank=0, world=world)
    assert files_of(tmp_path / "c") == before | (left if world > 1 else {})
