"""SAEs of attention heads' outputs, side by side (Kissane and Krzyzanowski): `NAME.pt` and `NAME_cfg.json`."""

from __future__ import annotations

from pathlib import PurePosixPath

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import ReLU
from unweave.sae.draft import Draft

FILES = ("*.pt",)
LAYOUT = {"W_enc": "W_enc d M", "b_enc": "b_enc M", "W_dec": "W_dec M d", "b_dec": "b_dec d"}


def _config(name: str) -> str:
    return f"{PurePosixPath(name).with_suffix('')}_cfg.json"


def matches(source: Source) -> bool:
    return any(source.has(_config(name)) for name in source.find(*FILES))


def read(source: Source) -> Draft:
    names = [name for name in source.find(*FILES) if source.has(_config(name))]
    name = names[0] if len(names) == 1 else source.one(*FILES)
    config = source.json(_config(name))
    expected = {"d": config.get("act_size"), "M": config.get("dict_size")}
    site = config.get("act_name", "attn.hook_z")
    if "hook_z" not in str(site) and site != "z":
        raise UnweaveError(f"{source} reads {site!r}; this format is of 'hook_z'.")
    metadata = {"hook_name": f"blocks.{config['layer']}.attn.hook_z"} if "layer" in config else {}
    weights = take(source.tensors(name), LAYOUT, source, expected=expected)
    return plain(weights, ReLU(), source, metadata=metadata | {"hook_z": config}, pre_bias=True)
