"""What `unweave info` says of folders that hold no single SAE: caches, token folders, runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError

KINDS = {"unweave-cache": "cached activations", "unweave-tokens": "text as tokens"}


def folder_facts(folder: Path) -> dict[str, Any] | None:
    """What a cache or a token folder says of itself; None of any other folder.

    Raises:
        UnweaveError: Its manifest is damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes()) if path.is_file() else None
        if not isinstance(manifest, dict) or manifest.get("format") not in KINDS:
            return None
        return _facts(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error!r}.") from error


def _facts(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    made = manifest.get("made_from", manifest)
    complete = bool(manifest.get("complete"))
    facts: dict[str, Any] = {"what": KINDS[manifest["format"]] + ("" if complete else ", unfinished")}
    if "model" in made:
        facts["model"] = made["model"]["name"]
    if "hooks" in manifest:
        facts["hooks"] = {hook["name"]: hook["width"] for hook in manifest["hooks"]}
    data = made.get("data")  # of a token folder its fingerprint
    facts["data"] = data.get("name") if isinstance(data, dict) else manifest.get("source")
    facts["tokenizer"] = (made.get("tokenizer") or {}).get("name")
    facts["context"] = (made.get("config") or {}).get("context")
    facts["dtype"] = manifest.get("dtype")
    for side, about in (manifest.get("sides") or {}).items():
        facts[f"{side}_rows"] = about["rows"]
    facts["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    facts["complete"] = complete
    facts["where"] = str(folder)
    return facts


def verify(folder: Path) -> None:
    """Compare every file of a cache or token folder that has a checksum with it: all but the manifests.

    Raises:
        UnweaveError: It is unfinished; or files are missing or differ, all of which are named.
    """
    from unweave.activations.cache import is_cache, open_cache
    from unweave.activations.tokenized.folder import open_token_folder

    open_cache(folder, verify=True) if is_cache(folder) else open_token_folder(folder, verify=True)


def fact_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same in lines for people: a row of a cache is one token's activations, a row of tokens is a text."""
    from unweave.training.buffers import size

    row = "tokens" if "hooks" in facts else f"rows of {facts['context']} tokens"
    sides = {name: facts.get(f"{name}_rows") for name in ("train", "held_out")}
    counts = ", ".join(f"{n:,} {row} {'for training' if side == 'train' else 'held out'}" for side, n in sides.items()
                       if n)  # fmt: skip
    hooks = ", ".join(f"{name} (width {width})" for name, width in (facts.get("hooks") or {}).items())
    rows = [
        ("what", facts["what"]), ("model", facts.get("model")), ("hooks", hooks), ("data", facts["data"]),
        ("tokenizer", facts["tokenizer"]), ("holds", counts), ("type", facts["dtype"]),
        ("size", size(facts["bytes"])), ("where", facts["where"]),
        ("checked", "the data, all as they were written" if facts.get("verified") else None),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in rows if value]
