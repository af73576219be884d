"""Claiming the folder of a cache, or finding out that it holds this one already, or another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError
from unweave._files import write_json
from unweave.activations.cache.folder import hashed, is_cache, read_manifest
from unweave.activations.cache.format import FORMAT, IMAGES, MANIFEST, NAMED, TOKENS, VERSION, hash_of
from unweave.activations.tokenized.writer import difference


def manifest_head(made_from: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "hash": hash_of(hashed(made_from)), "made_from": made_from}


def begin(out: Path, made_from: dict[str, Any], *, resume: bool) -> bool:
    """Claim the folder, or find out that it is this very cache; whether that is finished.

    Raises:
        UnweaveError: It holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UnweaveError(f"the output {str(out)!r} is a file; name a folder.")
    if not is_cache(out):
        if not out.is_dir() or all(path.name.startswith(".") for path in out.iterdir()):
            write_json(out / MANIFEST, manifest_head(made_from) | {"complete": False})
            return False
        if not is_cache(out):  # which another rank may have made of it by now
            raise UnweaveError(f"the folder {str(out)!r} is not empty and holds no cache: choose another one.")
    manifest = read_manifest(out)
    before, now = hashed(manifest["made_from"]), hashed(json.loads(json.dumps(made_from)))
    for key in now:
        if _of_rows(before[key]) != _of_rows(now[key]):
            raise UnweaveError(_another(out, key, manifest["made_from"][key], made_from[key]))
    if not resume:
        state = "finished" if manifest["complete"] else "unfinished"
        hint = "choose another folder with --out" if manifest["complete"] else "pass --resume to go on"
        raise UnweaveError(f"the folder {str(out)!r} holds this cache already, {state}: {hint}.")
    return bool(manifest["complete"])


def _of_rows(about: Any) -> Any:
    """Without what changes no row: who met one unreadable image too many goes on where it was, and allows more."""
    return {k: v for k, v in about.items() if k not in ("max_bad", "workers")} if isinstance(about, dict) else about


def _another(out: Path, key: str, was: Any, here: Any) -> str:
    """In what a cache differs from what is asked for, and what to do."""
    if key in NAMED:
        old, new = ((each or {}).get("name") for each in (was, here))
        if old == new or not (old and new):
            what = f"was made with another {key}{f' of the name {old!r}' if old else ''}"
        else:
            what = f"was made with the {key} {old!r}, not {new!r}"
    else:
        what = f"was made with other settings: {difference(key, {key: _of_rows(was)}, _of_rows(here))}"
    return f"the cache {str(out)!r} {what}: choose another folder with --out, or make this one with what it began with."


def is_of_rank(name: str, rank: int, world: int) -> bool:
    """Whether a temporary file or folder is one that this process would write, and no other one.

    Of several, each may write the manifest, on machines from where it is not seen that it lives.
    """
    number = name.rpartition("_")[2]
    alone = (MANIFEST, IMAGES) if world == 1 else ()
    return name in (*alone, f"{TOKENS}-{rank}") or (number.isdigit() and int(number) % world == rank)
