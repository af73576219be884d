"""The page of a repository: what its SAEs are, how good they were measured to be, and code that loads them.

The front matter is what the Hub and other libraries go by: `library_name` and tags list the repository among SAELens'
SAEs where SAELens can read them, `model-index` holds the measured numbers. The generated part stands between two
markers. What somebody writes around it stays when the next SAE is pushed, and so do keys that they add on top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unweave.hub.repo import HUB_NAME

SAE_LENS = {
    "standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal", "transcoder",
    "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
}  # fmt: skip
"""Architectures that SAELens reads; it refuses the others' names."""
BEGIN, END = "<!-- made by unweave: begin -->", "<!-- made by unweave: end -->"

_OWNERS = (  # of models that TransformerLens calls by a name without an owner
    (r"gpt2(-small)?", "openai-community/gpt2"), (r"gpt2-(medium|large|xl)", r"openai-community/gpt2-\1"),
    (r"(pythia-.*)", r"EleutherAI/\1"), (r"(gemma-.*)", r"google/\1"),
)  # fmt: skip
_METRICS = {
    "l0": ("sparsity/l0", "L0"),
    "explained_variance": ("reconstruction/explained_variance", "explained variance"),
    "mse": ("reconstruction/mse", "squared error"),
    "ce_loss_score": ("behaviour/ce_loss_score", "loss recovered"),
    "kl_div_score": ("behaviour/kl_div_score", "KL divergence recovered"),
    "frac_alive": ("sparsity/frac_alive", "share of latents that fire"),
}
"""Type in the model-index, our metric behind it, and its name."""


@dataclass(frozen=True)
class Entry:
    """One SAE of a repository.

    Attributes:
        path: Its folder.
        config: Its `cfg.json`.
        results: Its results in the model-index; empty if nothing was measured.
        has_page: Whether there is a page of its features.
    """

    path: str
    config: dict[str, Any]
    results: Sequence[dict[str, Any]] = ()
    has_page: bool = False

    @property
    def metadata(self) -> dict[str, Any]:
        return self.config.get("metadata") or {}

    @property
    def sae_lens(self) -> bool:
        """Whether SAELens reads it."""
        return self.config["architecture"] in SAE_LENS

    def metric(self, kind: str) -> str:
        """A measured number, as text."""
        found = [m["value"] for r in self.results for m in r["metrics"] if m["type"] == kind]
        return f"{found[0]:.4g}" if found else "–"


def results_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """What an `eval.json` measured, as results of a model-index."""
    details = evaluation["eval_result_unstructured"]
    metrics = [
        {"type": kind, "value": float(f"{value:.6g}"), "name": name}
        for kind, (metric, name) in _METRICS.items()
        if (value := details["metrics"].get(metric)) is not None
    ]
    data, tokens = details["provenance"]["data"], details["provenance"]["tokens"]["kept"]
    name = Path(str(data["name"])).name or "unnamed"
    dataset = {"type": "text", "name": f"{tokens:,} {data['split']} tokens of {name}"}
    task = {"type": "feature-extraction", "name": "sparse autoencoding"}
    return [{"task": task, "dataset": dataset, "metrics": metrics}] if metrics else []


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The keys on top of a card, and its text."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", card, re.DOTALL)
    if found is None:
        return {}, card
    try:
        keys = yaml.safe_load(found[1])
    except yaml.YAMLError:
        keys = None
    return (keys if isinstance(keys, dict) else {}), card[found.end() :]


def measured_before(card: str) -> dict[str, list[dict[str, Any]]]:
    """The results in a card's model-index, by the folder of the SAE."""
    models = front_matter(card)[0].get("model-index")
    return {m["name"]: m.get("results") or [] for m in models or [] if isinstance(m, dict) and "name" in m}


def sae_card(repo_id: str, entries: Sequence[Entry], before: str = "", license: str | None = None) -> str:
    """The card of a repository of SAEs.

    Args:
        repo_id: Owner and name.
        entries: All SAEs that it holds.
        before: The card that it has.
        license: Of the weights, by its name on the Hub ("mit"); None: what the card says, if anything.
    """
    readable = any(entry.sae_lens for entry in entries)
    models = _hub_models(entry.metadata.get("model_name") for entry in entries)
    data = _hub_names(entry.metadata.get("dataset_path") for entry in entries)
    paths = {e.path or repo_id for e in entries}
    others = {name: results for name, results in measured_before(before).items() if name not in paths}
    measured = others | {e.path or repo_id: list(e.results) for e in entries if e.results}
    index = [{"name": name, "results": results} for name, results in measured.items()]
    tags = ["sparse-autoencoder", *["saelens"] * readable, "unweave", "interpretability"]
    made = {
        "library_name": "saelens" if readable else "unweave", "license": license,
        "base_model": models[0] if len(models) == 1 else models, "datasets": data, "model-index": index,
    }  # fmt: skip
    return _card(repo_id, made, tags, _sae_text(repo_id, entries), before)


def _card(repo_id: str, made: dict[str, Any], tags: Sequence[str], text: str, before: str) -> str:
    keys, old = front_matter(before)
    old_tags = keys.get("tags") or []
    keys.pop("model-index", None)  # what was measured of an SAE that was replaced
    keys |= {key: value for key, value in made.items() if value}
    keys["tags"] = list(dict.fromkeys([*(old_tags if isinstance(old_tags, list) else [old_tags]), *tags]))
    made_part = f"{BEGIN}\n{text.strip()}\n{END}"
    if BEGIN in old and END in old:
        head, _, rest = old.partition(BEGIN)
        body = head + made_part + rest.partition(END)[2]
    elif old.strip():
        body = f"{old.rstrip()}\n\n{made_part}\n"
    else:
        body = f"# {repo_id.rpartition('/')[2]}\n\n{made_part}\n"
    front = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{front}---\n\n{body.lstrip()}"


def _sae_text(repo_id: str, entries: Sequence[Entry]) -> str:
    first = entries[0]
    columns = ("folder", "hook", "architecture", "width", "latents", "L0", "explained variance", "loss recovered")
    rows = [
        (f"[`{e.path}`]({e.path})" if e.path else "`.`", f"`{_hook(e)}`", e.config["architecture"],
         f"{e.config['d_in']:,}", f"{e.config['d_sae']:,}", e.metric("l0"), e.metric("explained_variance"),
         e.metric("ce_loss_score"))
        for e in entries
    ]  # fmt: skip
    names = sorted({str(e.metadata.get("model_name")) for e in entries if e.metadata.get("model_name")})
    what = "Sparse autoencoders" if len(entries) > 1 else "A sparse autoencoder"
    parts = [f"{what} of {', '.join(f'`{n}`' for n in names) or 'activations'}.", _table(columns, rows)]
    measured = {r["dataset"]["name"] for e in entries for r in e.results}
    if measured:
        parts.append(f"Measured on {'; '.join(sorted(measured))}. The full report is the `eval.json` beside each SAE.")
    if pages := [e for e in entries if e.has_page]:
        links = ", ".join(f"[`{e.path}`]({join(e.path, 'features.html')})" for e in pages)
        parts.append(f"Pages of features, to be downloaded and opened in a browser: {links}.")
    parts += ["## Use", _usage(repo_id, first)]
    if lens := next((e for e in entries if e.sae_lens and e.path), None):
        code = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "{lens.path}")'
        parts.append(f"With [SAELens](https://github.com/decoderesearch/SAELens):\n\n```python\n{code}\n```")
    if facts := _training(first):
        parts += ["## Training", facts]
    return "\n\n".join(parts)


def _usage(repo_id: str, entry: Entry) -> str:
    where = f'"{repo_id}", "{entry.path}"' if entry.path else f'"{repo_id}"'
    model = entry.metadata.get("model_name")
    of = f"activations at {_hook(entry)}" + (f" of {model}" if model else "")
    return (
        "```python\nimport torch\nimport unweave as uw\n\n"
        f"sae = uw.SAE.from_pretrained({where})\n"
        f"x = torch.randn(8, sae.d_in)  # stands for {of}\n"
        "codes = sae.encode(x)         # (8, sae.d_sae), mostly zeros\n"
        "x_hat = sae(x)\n```"
    )


def _training(entry: Entry) -> str:
    facts = {name: entry.metadata.get(key) for name, key in (
        ("model", "model_name"), ("data", "dataset_path"), ("tokens", "training_tokens"), ("context", "context_size"),
        ("seed", "seed"),
    )}  # fmt: skip
    rows = [(n, f"{v:,}" if n == "tokens" else str(v)) for n, v in facts.items() if v is not None]
    return _table(("", ""), rows) if rows else ""


def folder_card(
    repo_id: str,
    title: str,
    facts: dict[str, Any],
    usage: str,
    before: str = "",
    license: str | None = None,
    *,
    library: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a repository that holds something else: facts, and code that loads it."""
    rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in facts.items()]
    text = "\n\n".join([title, _table(("", ""), rows), "## Use", f"```python\n{usage}\n```"])
    return _card(repo_id, {"library_name": library, "license": license}, [*tags, "unweave"], text, before)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def _hook(entry: Entry) -> str:
    for key in ("hook_name", "hf_hook_name", "hook_names", "hf_hook_names"):
        if found := entry.metadata.get(key):
            return found if isinstance(found, str) else ", ".join(map(str, found))
    return "a hook that it does not name"


def _hub_models(names: Iterable[Any]) -> list[str]:
    """Repositories of models, for those whose name tells."""
    found = []
    for name in filter(None, names):
        known = (re.sub(pattern, owner, name) for pattern, owner in _OWNERS if re.fullmatch(pattern, name))
        found.append(next(known, name))
    return _hub_names(found)


def _hub_names(names: Iterable[Any]) -> list[str]:
    """Those that can be repositories, and are no folders on this machine, each once."""
    texts = [n for n in names if isinstance(n, str) and HUB_NAME.fullmatch(n) and not Path(n).exists()]
    return list(dict.fromkeys(texts))


def join(folder: str, name: str) -> str:
    """The name of a file in a folder of a repository; "" is the top."""
    return f"{folder}/{name}" if folder else name
