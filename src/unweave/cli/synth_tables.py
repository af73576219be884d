"""A world's statistics and what SAEs recovered of it, as tables for the terminal within 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from unweave.synthetic.study import Study


def statistics_table(study: Study) -> RenderableType:
    """What the world was asked for, and what its samples show."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    world, found, overlap = study.world, study.survey.summary(), study.superposition
    rates, magnitude, correlation = found["firing_rate"], found["magnitude"], found["correlation"]
    table = Table.grid(padding=(0, 2))
    table.add_column(width=20)
    for _ in range(2):
        table.add_column(width=12, justify="right", style="cyan", no_wrap=True)
    table.add_column(style="dim")
    table.add_row("", Text("requested", style="dim"), Text("measured", style="dim"))
    table.add_row("  L0", f"{found['l0']['requested']:.3f}", f"{found['l0']['measured']:.3f}",
                  f"on a sample, ± {found['l0']['std']:.2f}")  # fmt: skip
    table.add_row("  firing rate, least", f"{rates['requested_min']:.3g}", f"{study.survey.rates.min():.3g}",
                  f"{rates['never_fired']:,} never fired")  # fmt: skip
    table.add_row("  firing rate, most", f"{rates['requested_max']:.3g}", f"{study.survey.rates.max():.3g}")
    if rates["deviation_rms"] is not None:
        table.add_row("  rate deviation", "1", f"{rates['deviation_rms']:.3f}",
                      f"standard errors, ≤ {rates['deviation_max']:.1f}")  # fmt: skip
    table.add_row("  magnitude", f"{magnitude['requested']:.3f}", _number(magnitude["measured"]), "of a firing, mean")
    pairs = f"rms, pairs of {correlation['features']} features"
    asked, seen = (_number(correlation.get(f"{which}_rms")) for which in ("requested", "measured"))
    table.add_row("  correlation", asked, seen, pairs)
    ends = [
        "–" if correlation.get(f"{which}_max") is None
        else f"{correlation[f'{which}_min']:.2f}, {correlation[f'{which}_max']:.2f}"
        for which in ("requested", "measured")
    ]  # fmt: skip
    table.add_row("  its extremes", *ends)
    if "hierarchy" in found:
        rules = found["hierarchy"]
        table.add_row("  orphans", "0", f"{rules['children_without_parent']:,}", "fired without their parent")
        table.add_row("  rivals", "0", f"{rules['exclusive_together']:,}", "fired with an exclusive one")
    compared = len(overlap.feature_indices)
    which = "" if compared == overlap.num_features else f" of {compared:,} features"
    table.add_row("  largest |cosine|", "", f"{overlap.mean_max_abs_cos_sim:.3f}",
                  f"mean{which}")  # fmt: skip
    table.add_row("  interference", "", f"{overlap.mean_expected_interference:.3g}",
                  "mean square, in a projection")  # fmt: skip
    title = f"{world.name}: {overlap.num_features:,} features in {overlap.hidden_dim:,} dimensions"
    parts: list[RenderableType] = [
        Text(title, style="bold"), Text(f"on {study.survey.samples:,} samples", style="dim"), table,
    ]  # fmt: skip
    if not found["requested_rates_are_exact"]:
        parts.append(Text("Note: requested rates are those of the hierarchy without the correlations.", style="yellow"))
    return Group(*parts)


def scores_table(study: Study) -> RenderableType:
    """How well each SAE recovered the world."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first = study.scores[0]
    families = first.hierarchy is not None
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("SAE", overflow="fold")
    names = ["L0", "EV", "MCC", "F1", "unique", "shrink", "dead", *(["absorb", "split"] if families else [])]
    for name in names:
        table.add_column(name, justify="right", style="cyan", no_wrap=True)
    for name, s in zip(study.names, study.scores, strict=True):
        row = [
            f"{s.sae_l0:.2f}", _number(s.explained_variance), f"{s.mcc:.3f}", f"{s.classification.f1_score:.3f}",
            f"{s.uniqueness:.3f}", _number(s.shrinkage), f"{s.dead_latents:,}",
        ]  # fmt: skip
        if families:
            assert s.hierarchy is not None
            row += [_number(s.hierarchy.absorption), _number(s.hierarchy.split_parents)]
        table.add_row(name, *row)
    title = f"recovery, scored on {first.num_samples:,} samples of a true L0 of {first.true_l0:.2f}"
    greedy = first.matching == "greedy"
    note = "Latents and features were matched greedily, since there are very many."
    return Group(Text(title, style="bold"), table, *([Text(note, style="dim")] if greedy else []))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
