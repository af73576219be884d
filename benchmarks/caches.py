"""Reading a cache in random order and in order, against a plain sequential read and saev's loaders of the same rows.

    python benchmarks/caches.py [--write] [--images 2000] [--d 768] [--batch 4096] [--rounds 5]

The rows are those of images of 196 patches and a CLS token, in our cache in float32 and bfloat16, and in shards that
saev 0.1 reads, which is the only release of it: its `Dataset` in PyTorch's `DataLoader`, as its `train` has it. The
files are in the page cache. In each round every reader has its turn; of saev's, which takes long, a few batches count.
The sequential read is a file's own: the bytes of a batch at a time, into one buffer that stays. Beside it stand rows
that lie side by side, copied out of the map by all threads. Nothing runs beside the reading, so it is not done ahead.
`--write` puts the table into `benchmarks/results/caches.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import measure
from unweave._files import write_json
from unweave.activations import Pass
from unweave.activations.cache import Cache, OrderedBatches, StoreBatches, shuffle_quality
from unweave.activations.cache.begin import manifest_head
from unweave.activations.cache.folder import open_cache
from unweave.activations.cache.format import MANIFEST, shard_folder, slugs
from unweave.activations.cache.saev_write import write_saev_shards
from unweave.activations.cache.shards import new_shard

PATCHES, HOOK = 196, "layer.0"
SAEV_BATCHES = 3


def make_cache(out: Path, images: int, d: int, dtype: str, shards: int = 4) -> Cache:
    """A cache of random numbers."""
    tokens, generator = PATCHES + 1, torch.Generator().manual_seed(0)
    about = {
        "model": {"name": "none", "class": "none", "fingerprint": ""}, "hooks": [HOOK], "dtype": dtype,
        "model_precision": "float32", "positions": None, "tokens": {"train": images * tokens, "held_out": 0},
        "prompts_per_pass": 1, "shard_bytes": 1, "rows": "given", "tokenizer": None,
        "data": {"name": "none", "fingerprint": None}, "config": {"context": tokens},
    }  # fmt: skip
    done: list[dict[str, Any]] = []
    positions = torch.arange(tokens, dtype=torch.int32)
    for shard in range(shards):
        mine = range(images * shard // shards, images * (shard + 1) // shards)
        with new_shard(out / shard_folder("train", shard), slugs([HOOK]), dtype) as writer:
            for image in mine:
                records = {
                    "positions": positions,
                    "documents": torch.full((tokens,), image),
                    "kinds": (positions == 0).to(torch.uint8),
                }
                writer.append(Pass({HOOK: torch.randn(tokens, d, generator=generator)}, records), tokens)
            done.append({"folder": shard_folder("train", shard)} | writer.finish({"prompts": len(mine)}))
    parts = [{key: shard[key] for key in ("folder", "rows", "files")} for shard in done]
    sides = {"train": {"rows": images * tokens, "shards": parts}, "held_out": {"rows": 0, "shards": []}}
    hooks = [{"name": HOOK, "file": slugs([HOOK])[HOOK], "width": d, "tl_name": None, "head": None, "aliases": []}]
    whole = {"dtype": dtype, "hooks": hooks, "records": done[0]["records"], "special_ids": None, "sides": sides}
    write_json(out / MANIFEST, manifest_head(about) | whole | {"complete": True})
    return open_cache(out)


def saev_loader(folder: Path, batch: int, *, shuffle: bool, workers: int) -> Iterator[Any]:
    """What saev's `train` and `evaluate` iterate over."""
    torchvision, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    torchvision.datasets, datasets.ImageFolder = datasets, object  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": torchvision, "torchvision.datasets": datasets}  # imported, and not used here
    from saev import activations, config

    data = config.DataLoad(shard_root=str(folder), patches="patches", layer=0, scale_mean=False, scale_norm=False)
    dataset = activations.Dataset(data)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=shuffle, num_workers=workers))


def rate(batches: Callable[[], Iterator[int]], first: int = 0) -> float:
    """Rows per second, without the first batches."""
    made = batches()
    for _ in range(first):
        next(made)
    started, n = time.perf_counter(), 0
    for rows in made:
        n += rows
    return n / (time.perf_counter() - started)


def readers(cache: Cache, folder: Path, batch: int, workers: int) -> dict[str, Callable[[], Iterator[int]]]:
    store, files = cache.train, sorted(folder.rglob(f"{slugs([HOOK])[HOOK]}.npy"))
    if len(files) < 2:
        raise SystemExit(f"{folder} holds {len(files)} files of rows: the layout has changed.")
    row = store.widths[HOOK] * store.dtypes[HOOK].itemsize
    buffer = memoryview(bytearray(batch * row))

    def sequential() -> Iterator[int]:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while n := opened.readinto(buffer):
                    yield n // row

    def mapped() -> Iterator[int]:
        for start in range(0, store.n_rows - batch + 1, batch):
            yield len(store.read(start, start + batch)[HOOK])

    def shuffled() -> Iterator[int]:
        return (len(x[HOOK]) for x in StoreBatches(store, batch, workers=workers, drop_last=True))

    def ordered() -> Iterator[int]:
        return (len(x.activations[HOOK]) for x in OrderedBatches(store, batch, workers=0))

    return {"sequential": sequential, "sequential by map": mapped, "shuffled": shuffled, "ordered": ordered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="threads that read ahead, ours; processes, saev's")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/caches.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        contestants: dict[str, Callable[[], Iterator[int]]] = {}
        caches = {}
        for dtype in ("float32", "bfloat16"):
            caches[dtype] = make_cache(Path(place, dtype), args.images, args.d, dtype)
            found = readers(caches[dtype], Path(place, dtype), args.batch, args.workers)
            contestants |= {f"{name}, {dtype}": reader for name, reader in found.items()}
        folder = write_saev_shards(
            caches["float32"].train, Path(place, "saev"), family="clip", ckpt="none", protocol="1"
        )
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for reader in contestants.values():
            rate(reader)
        for name in ("shuffled, saev", "ordered, saev"):
            times[name] = []
        for _ in range(args.rounds):
            for name, reader in contestants.items():
                times[name].append(rate(reader))
            for name in ("shuffled, saev", "ordered, saev"):

                def theirs(name: str = name) -> Iterator[int]:
                    made = saev_loader(folder, args.batch, shuffle=name[0] == "s", workers=args.workers)
                    return (len(x["act"]) for x in islice(made, SAEV_BATCHES + 1))

                times[name].append(rate(theirs, first=1))
        rates = {name: statistics.median(measured) for name, measured in times.items()}
        quality = shuffle_quality(StoreBatches(caches["float32"].train, args.batch, workers=0))
    saev = {order: rates[f"{order}, saev"] for order in ("shuffled", "ordered")}
    rows = []
    for name, per_second in rates.items():
        order, _, what = name.partition(", ")
        against = rates.get(f"sequential, {what}")
        rows.append([
            order, what, f"{per_second:,.0f}", "" if against is None else f"{per_second / against:.2f}",
            f"{per_second / saev[order]:.1f}" if order in saev else "",
        ])  # fmt: skip
    heading = ["read", "rows in", "rows/s", "of the sequential read", "times saev's"]
    said = f"{args.images * (PATCHES + 1):,} rows of {args.d}, batches of {args.batch}, {args.workers} reading ahead"
    parts = [
        "\n".join(measure.machine(["saev"])),
        f"{said}; medians of {args.rounds} rounds.",
        measure.table(heading, rows),
        f"{str(quality).capitalize()}.",
    ]
    text = "\n\n".join(parts)
    print(text)
    if args.write:
        measure.write("caches.md", text)


if __name__ == "__main__":
    main()
