"""What the names of a published SAE say of it: its release, its id there and its path in the repository."""

from __future__ import annotations

import re

_SITES = (  # of ids, paths and releases that do not hold TransformerLens' name of the hook
    (r"transcoder|clt", "transcoder"), (r"hook_z", "hook_z"), (r"embed", "embed"), (r"attn_out|[_-]att\b", "attn_out"),
    (r"mlp_out|[_-]mlp\b", "mlp_out"), (r"resid_mid", "resid_mid"), (r"resid_pre", "resid_pre"),
)  # fmt: skip
_LLAMA_SCOPE = {"r": "resid_post", "a": "attn_out", "m": "mlp_out"}
_LAYER = re.compile(r"(?:layers?[._]?|blocks\.|\bl)(\d+)")
_HOOK = re.compile(r"blocks\.\d+\.(?:attn\.)?hook_(resid_pre|resid_mid|resid_post|mlp_out|attn_out|z)")
_WIDTHS = (  # of an id, a path, a Neuronpedia id or a release's name, the first that matches
    r"width[_-](2pow\d+|\d+[km])", r"_(\d+x)$", r"hook_resid_pre_(\d+)$", r"_(\d{5})(?:_anthropic|:v\d+)?$",
    r"[-_](?:w|res-|sm-)?(\d+k)(?=$|__|[-_](?:oai|l\d+|layer)\b)", r"[-_]w(\d+k)-",
)  # fmt: skip


def site(release: str, id: str, path: str) -> str:
    """What it reads; "resid_post" where nothing says otherwise."""
    if hook := _HOOK.search(id):
        return "hook_z" if hook[1] == "z" else hook[1]
    if release.startswith("llama_scope") and (kind := re.match(r"l\d+([ram])_", id)):
        return _LLAMA_SCOPE[kind[1]]
    if re.search(r"gemma-scope-.*-att", release):
        return "hook_z"  # though its folders say attn_out
    return next((name for text in (id, path, release) for p, name in _SITES if re.search(p, text)), "resid_post")


def layer(id: str, path: str) -> int | None:
    """Number of the block, from 0."""
    found = _LAYER.search(id) or _LAYER.search(path)
    return None if found is None else int(found[1])


def width(release: str, id: str, path: str, neuronpedia: str | None) -> str | None:
    """Number of latents, as it is written; of a power of 2, as a number."""
    texts = (id, path, neuronpedia or "", release)
    found = next((w[1] for pattern in _WIDTHS for text in texts if (w := re.search(pattern, text))), None)
    return str(2 ** int(found.removeprefix("2pow"))) if found is not None and found.startswith("2pow") else found


def l0(path: str) -> float | None:
    """Mean number of active latents."""
    stated = re.search(r"average_l0_(\d+)", path)
    return None if stated is None else float(stated[1])
