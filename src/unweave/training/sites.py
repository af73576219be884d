"""Where a coder reads and what it predicts: which hooks of a batch become its inputs and its targets.

An autoencoder has one hook, a transcoder a hook and a target, a crosscoder all hooks of the run at once, and a
cross-layer transcoder all hooks and all targets. Rows of all hooks come from the same tokens in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError

if TYPE_CHECKING:
    from unweave.training.config import SAEConfig


_LONGEST_FOLDER = 150
"""Characters of a folder's name; file systems take 255 bytes."""


class Rows(NamedTuple):
    """The activations of some tokens, as a coder takes them."""

    x: Float[Tensor, "n d_in"]
    """Inputs; several hooks lie side by side."""
    y: Float[Tensor, "n d_out"] | None = None
    """Targets; None: the inputs themselves."""


@dataclass(frozen=True)
class Site:
    """The place of a coder.

    Attributes:
        inputs: Names of the hooks that it reads.
        targets: Names of the hooks that it predicts; none: those that it reads.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = "+".join(self.inputs)
        return names if not self.targets else f"{names}->{'+'.join(self.targets)}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        name = str(self).replace("->", "_to_").replace(":", "_")
        if len(name) <= _LONGEST_FOLDER:
            return name
        return f"{name[:_LONGEST_FOLDER]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    def rows(self, batch: Mapping[str, Float[Tensor, "n d"]]) -> Rows:
        """The inputs and targets of a batch."""
        return Rows(_side_by_side(batch, self.inputs), _side_by_side(batch, self.targets) if self.targets else None)

    def widths(self, batch: Mapping[str, Float[Tensor, "n d"]]) -> tuple[dict[str, int], dict[str, int]]:
        """Width at each input, and at each target."""
        return self.widths_of({name: x.shape[1] for name, x in batch.items()})

    def sample(self, batch: Mapping[str, Float[Tensor, "n d"]]) -> dict[str, Any]:
        """A batch as the arguments of a trainee: `sample`, `target`, and the `widths` and `target_widths` of several
        hooks; None where no hooks lie side by side."""
        (x, y), widths = self.rows(batch), self.widths(batch)
        inputs, targets = (each if len(each) > 1 else None for each in widths)
        return {"sample": x, "target": y, "widths": inputs, "target_widths": targets}

    def widths_of(self, widths: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Those widths that are at its inputs, and at its targets."""
        return {h: widths[h] for h in self.inputs}, {h: widths[h] for h in self.targets}


def _side_by_side(batch: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    return batch[hooks[0]] if len(hooks) == 1 else torch.cat([batch[hook] for hook in hooks], 1)


def sites_of(config: SAEConfig, hooks: Sequence[str], targets: Sequence[str]) -> list[Site]:
    """Where one config is trained.

    Args:
        config: What is trained.
        hooks: The run's hooks, resolved; of a cross-layer transcoder, from the first layer to the last.
        targets: The run's targets, resolved; the n-th belongs to the n-th hook.

    Raises:
        UnweaveError: If there is not one target for each hook of a coder that needs them, or fewer hooks than a
            coder of several needs.
    """
    match config.coder:
        case "transcoder" | "clt" if len(hooks) != len(targets):
            raise UnweaveError(
                f"each hook needs a target of its own: the hooks are {', '.join(hooks)}, and the targets "
                f"{', '.join(targets)}."
            )
        case "crosscoder" | "clt" if len(hooks) < 2:
            raise UnweaveError(f"a {config.coder} needs two or more hooks, and there is only {hooks[0]!r}.")
        case "sae":
            return [Site((hook,)) for hook in hooks]
        case "transcoder":
            return [Site((hook,), (target,)) for hook, target in zip(hooks, targets, strict=True)]
        case "clt":
            return [Site(tuple(hooks), tuple(targets))]
        case _:
            return [Site(tuple(hooks))]


PREDICTS = ("transcoder", "clt")
"""Coders whose targets are not what they read."""


def check_sites(saes: Sequence[SAEConfig], targets: Sequence[str]) -> None:
    """Refuse coders without targets and targets without coders, before anything is loaded."""
    wanted = [sae.coder for sae in saes if sae.coder in PREDICTS]
    if wanted and not targets:
        raise UnweaveError(
            f"a {wanted[0]} needs the hook whose activations it predicts: give targets, one for each of the hooks."
        )
    if targets and not wanted:
        raise UnweaveError(
            f"the target {targets[0]!r} is predicted by nothing: give the coder 'transcoder' or 'clt', or no targets."
        )


def check_coder(config: SAEConfig) -> None:
    """Refuse what a kind of coder cannot do."""
    kind = config.coder
    if config.skip and kind not in PREDICTS:
        raise UnweaveError(f"a skip is a transcoder's linear map from its input to its target, and this is a {kind}.")
    if kind == "sae":
        return
    if config.normalize != "scalar":
        raise UnweaveError(
            f"normalize={config.normalize!r} is an autoencoder's: a {kind} scales each hook by one factor."
        )
    if config.dictionary is not None or config.activation.tied:
        raise UnweaveError(f"a {kind} has an encoder of its own: only an SAE can be tied or have a dictionary.")
    if kind == "clt":
        for name, why in (
            ("matryoshka", "prefixes of the dictionary would be its first layers"),
            ("multi_topk", "its second k would be chosen among all layers, and the first one is a layer's"),
            ("ghost", "ghosts of all layers would share one exponential"),
        ):
            if getattr(config, name) is not None:
                raise UnweaveError(f"a clt has no {name}: {why}.")
    if config.resampling is not None:
        raise UnweaveError(f"resampling writes input directions into the decoder, and a {kind} writes elsewhere.")


def where(site: Site, names: Mapping[str, str]) -> dict[str, object]:
    """The metadata that say where a coder belongs in its model, under SAELens' keys where it has them.

    Args:
        site: The place.
        names: TransformerLens' name of each hook, or the hook's own.
    """
    found: dict[str, object] = {}
    for hooks, suffix in ((site.inputs, ""), (site.targets, "_out")):
        if len(hooks) == 1:
            found |= {f"hook_name{suffix}": names[hooks[0]], f"hf_hook_name{suffix}": hooks[0]}
        elif hooks:
            found |= {f"hook_names{suffix}": [names[h] for h in hooks], f"hf_hook_names{suffix}": list(hooks)}
    return found
