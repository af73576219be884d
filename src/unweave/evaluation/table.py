"""A report as a table for the terminal: plain names, units, and what each number means, within 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType

    from unweave.evaluation.report import Report

BARS = "·▁▂▃▄▅▆▇█"
"""The first for none: a space would be lost at the ends."""


class Row(NamedTuple):
    """One line of the table."""

    metric: str
    name: str
    show: Callable[[float], str]
    meaning: str


def _decimals(value: float) -> str:
    return f"{value:.3f}"


def _digits(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


ROWS = {
    "Reconstruction": [
        Row("reconstruction/explained_variance", "explained variance", _decimals, "1 is perfect, 0 predicts the mean"),
        Row("reconstruction/mse", "squared error", _digits, "per token, summed over dimensions"),
        Row("reconstruction/cosine", "cosine", _decimals, "between input and reconstruction"),
        Row("shrinkage/l2_ratio", "norm ratio", _decimals, "reconstruction to input, 1 is unshrunk"),
        Row("shrinkage/relative_reconstruction_bias", "relative bias", _decimals, "1 is unbiased, below 1 shrinks"),
    ],
    "Sparsity": [
        Row("sparsity/l0", "L0", _digits, "latents active on a token, mean"),
        Row("sparsity/l1", "L1", _digits, "sum of the codes of a token, mean"),
        Row("sparsity/n_dead", "dead", _count, "latents silent on these tokens"),
        Row("sparsity/n_dense", "dense", _count, "latents active on over 10 % of tokens"),
        Row("weights/average_max_decoder_cosine", "nearest decoder", _decimals, "cosine with the most similar, mean"),
    ],
    "The model with the SAE in place": [
        Row("behaviour/ce_loss_score", "loss recovered", _percent, "of what the ablation costs"),
        Row("behaviour/ce_loss_without_sae", "loss without SAE", _decimals, "nats per token"),
        Row("behaviour/ce_loss_with_sae", "loss with SAE", _decimals, "nats per token"),
        Row("behaviour/ce_loss_with_ablation", "loss ablated", _decimals, "nats per token, {baseline}"),
        Row("behaviour/kl_div_with_sae", "KL divergence", _decimals, "nats, from the model without the SAE"),
    ],
}
"""What is shown; all other metrics are in the report."""


def report_table(report: Report) -> RenderableType:
    """The numbers that matter most, in groups."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts, (bars, span) = _title(report), _density(report)
    for group, rows in ROWS.items():
        if all(report.metrics[row.metric] is None for row in rows):
            continue  # a note says why
        parts += [Text(), Text(group, style="bold")]
        table = Table.grid(padding=(0, 2))
        table.add_column(width=20)
        table.add_column(width=max(9, len(bars)), justify="right", style="cyan")
        table.add_column(style="dim")
        for row in rows:
            value = report.metrics[row.metric]
            meaning = row.meaning.format(baseline=report.baseline)
            table.add_row(f"  {row.name}", "–" if value is None else row.show(value), meaning)
        if group == "Sparsity":
            table.add_row("  density", bars, span)
        parts.append(table)
    notes = [Text(f"Note: {note}.", style="yellow") for note in report.notes]
    return Group(*parts, *([Text(), *notes] if notes else []))


def _title(report: Report) -> list[RenderableType]:
    from rich.text import Text

    sae, model, data = (report.provenance[part] for part in ("sae", "model", "data"))
    hook, kept = report.provenance["hook"], report.provenance["tokens"]["kept"]
    split = "" if data["split"] == "all" else f"{data['split']} "
    return [
        Text(f"{sae['activation']} SAE, {sae['d_sae']:,} latents, at {hook} of {model['name']}", style="bold"),
        Text(f"on {kept:,} {split}tokens of {data['name']}", style="dim"),
    ]


def _density(report: Report) -> tuple[str, str]:
    """How many latents fire how often: bars, and what they span."""
    counts, most = report.density_histogram["counts"], max(report.density_histogram["counts"], default=0)
    bars = "".join(BARS[-(-8 * count // most)] if most else BARS[0] for count in counts)
    lowest = round(report.density_histogram["log10_edges"][0])
    return bars, f"latents firing on 1e{lowest} to 1 of tokens"
