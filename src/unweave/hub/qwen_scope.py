"""Qwen Scope: one PyTorch file a layer; k stands in the name of the repository alone."""

from __future__ import annotations

import re

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import TopK
from unweave.sae.draft import Draft

FILES = ("layer*.sae.pt",)
LAYOUT = {"W_enc": "W_enc M d", "b_enc": "b_enc M", "W_dec": "W_dec d M", "b_dec": "b_dec d"}


def matches(source: Source) -> bool:
    return bool(source.find(*FILES))


def read(source: Source) -> Draft:
    name = source.one(*FILES)
    named = re.search(r"SAE-Res-([\w.-]+?)-W\d+K-L0_(\d+)", source.address)
    k = source.hints.get("k", named and int(named[2]))
    if k is None:
        raise UnweaveError(f"only the name of its repository says the k of {source}: pass k=, or repo= with the name.")
    layer = re.search(r"layer(\d+)", name)
    metadata = {"hf_hook_name": f"model.layers.{layer[1]}"} if layer else {}
    metadata |= {"model_name": f"Qwen/{named[1]}"} if named else {}
    return plain(take(source.tensors(name), LAYOUT, source), TopK(int(k)), source, metadata=metadata)
