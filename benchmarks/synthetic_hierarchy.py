"""Applying a hierarchy to activations: unweave's modifier beside sae-lens', the same forests and batches.

    .venv-oracles/bin/python benchmarks/synthetic_hierarchy.py --write

Both get what they generate themselves by default, a dense tensor, and their sparse form: unweave codes, sae-lens a COO
tensor. Forests without exclusive children leave nothing to chance, and there both must give the same result.
`--write` puts the table into `benchmarks/results/synthetic_hierarchy.md`.
"""

from __future__ import annotations

import argparse
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import measure
from unweave import SparseCodes
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig, generate_hierarchy


class World(NamedTuple):
    """A forest and how often its features fire before it is applied."""

    name: str
    num_features: int
    config: HierarchyConfig
    probability: float
    dense: bool = True
    """Whether a dense batch is worth its memory."""


def worlds() -> list[World]:
    """Wide and deep forests, with and without exclusion and scaling, at low and high density."""
    wide = HierarchyConfig(100, 100, 2)
    deep = HierarchyConfig(64, 3, 6)
    exclusive = HierarchyConfig(64, 3, 6, mutually_exclusive_portion=1.0)
    scaling = HierarchyConfig(64, 3, 6, scale_children_by_parent=True)
    million = HierarchyConfig(1000, 100, 2, mutually_exclusive_portion=0.5)
    return [
        World("wide", 16_384, wide, 0.02),
        World("deep", 16_384, deep, 0.02),
        World("deep, exclusive", 16_384, exclusive, 0.003),
        World("deep, exclusive", 16_384, exclusive, 0.02),
        World("deep, scaling", 16_384, scaling, 0.02),
        World("deep, exclusive", 16_384, exclusive, 0.2),  # compensated children fire that often
        World("deep, exclusive", 1024, exclusive, 0.3),
        World("wide, half exclusive", 1_000_000, million, 5e-5, dense=False),
    ]


class Batch(NamedTuple):
    """The same activations in three forms."""

    dense: Tensor | None
    coo: Tensor
    codes: SparseCodes


def make_batch(world: World, n: int, seed: int) -> Batch:
    """Independent features of uniform magnitudes."""
    rng = torch.Generator().manual_seed(seed)
    k = world.num_features
    if world.dense:
        dense = torch.rand(n, k, generator=rng) * (torch.rand(n, k, generator=rng) < world.probability)
        return Batch(dense, dense.to_sparse().coalesce(), SparseCodes.from_dense(dense))
    places = torch.randint(n * k, (round(n * k * world.probability),), generator=rng).unique()
    values = torch.rand(len(places), generator=rng)
    coo = torch.sparse_coo_tensor(torch.stack((places // k, places % k)), values, (n, k), check_invariants=False)
    return Batch(None, coo.coalesce(), SparseCodes.from_entries(places // k, places % k, values, n, k))


def in_sae_lens(hierarchy: Hierarchy) -> Any:
    """The forest's modifier as sae-lens builds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.synthetic import HierarchyNode, hierarchy_modifier

    def convert(tree: dict[str, Any]) -> dict[str, Any]:
        return {**tree, "id": tree["feature_id"], "children": [convert(child) for child in tree["children"]]}

    return hierarchy_modifier([HierarchyNode.from_dict(convert(root.to_dict())) for root in hierarchy.roots])


def check(world: World, batch: Batch, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise unless both give the same result, or as many active features where survivors are drawn."""
    for form in ours:
        found, expected = ours[form](batch), theirs[form](batch)
        if form == "sparse":
            found = torch.sparse_coo_tensor(
                torch.stack((found.rows, found.indices)), found.values, expected.shape, check_invariants=False
            ).coalesce()
            expected = expected.coalesce()
        if not world.config.mutually_exclusive_portion:
            torch.testing.assert_close(found, expected)
        a, b = (float((t.values() if form == "sparse" else t).count_nonzero()) for t in (found, expected))
        if abs(a - b) > 6 * (a + b) ** 0.5:
            raise RuntimeError(f"{world.name}: {a:g} active features, sae-lens has {b:g}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/synthetic_hierarchy.md")
    args = parser.parse_args()
    lines = []
    for world in worlds():
        hierarchy = generate_hierarchy(world.num_features, world.config, seed=0)
        modifier, peer = hierarchy.modifier, in_sae_lens(hierarchy)
        generator = SimpleNamespace(mean_firing_magnitudes=torch.full((world.num_features,), 0.5))
        rest = (generator,) if world.config.scale_children_by_parent else ()
        batches = [make_batch(world, args.batch, seed) for seed in range(3)]
        forms = ["dense", "sparse"] if world.dense else ["sparse"]
        ours = {"dense": lambda b: modifier(b.dense, *rest), "sparse": lambda b: modifier(b.codes, *rest)}  # noqa: B023
        theirs = {"dense": lambda b: peer(b.dense, *rest), "sparse": lambda b: peer(b.coo, *rest)}  # noqa: B023
        ours, theirs = ({form: side[form] for form in forms} for side in (ours, theirs))
        check(world, batches[0], ours, theirs)
        contestants = {
            **{f"{form}, ours": function for form, function in ours.items()},
            **{f"{form}, theirs": function for form, function in theirs.items()},
        }
        t = measure.medians(contestants, batches, args.rounds)
        for form in forms:
            a, b = t[f"{form}, ours"], t[f"{form}, theirs"]
            l0 = len(batches[0].codes.indices) / args.batch
            lines.append([
                world.name, f"{world.num_features:,}", f"{l0:.0f}", form, f"{1000 * b:.2f}", f"{1000 * a:.2f}",
                f"{b / a:.1f}×",
            ])  # fmt: skip
    text = "\n\n".join([
        *measure.machine(["sae-lens"]),
        f"One call of the modifier on {args.batch} samples; medians of {args.rounds} interleaved calls, in ms. L0 is "
        "before the hierarchy is applied. Sparse: unweave codes, sae-lens a COO tensor.",
        measure.table(["forest", "features", "L0", "form", "sae-lens", "unweave", "sae-lens takes"], lines),
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("synthetic_hierarchy.md", text)


if __name__ == "__main__":
    main()
