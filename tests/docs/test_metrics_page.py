"""The page of metrics names every metric that a report publishes, and no other (pitfall_372)."""

from __future__ import annotations

import re
from pathlib import Path

from unweave.evaluation.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_names_every_metric_pitfall_372() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(metric.name.partition("/")[2] for metric in METRICS)
