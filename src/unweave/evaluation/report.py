"""What an evaluation found: numbers, what each of them means, the sums they come from, and where it all comes from.

None means "not computed" or "undefined here". Everything else is a finite number that can be recomputed from the sums.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave._files import write_json

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, eq=False)
class Report:
    """The result of `evaluate`.

    `print(report)` gives a table as plain text, rich prints it in colour, `report["l0"]` is a number or None.
    """

    metrics: dict[str, float | None]
    """`group/name` to number. Cross-entropies and divergences are in nats."""
    definitions: dict[str, dict[str, str]]
    """`group/name` to the definition's `id`, such as `explained_variance@exact-1`, and the `definition` in words."""
    sums: dict[str, dict[str, Any]]
    """The sums behind the metrics of reconstruction, codes and behaviour."""
    per_feature: dict[str, Shaped[Tensor, " d_sae"]]
    """`n_fired`, `feature_density`, `consistent_activation_heuristic`, `encoder_bias`, `encoder_norm`, `decoder_norm`,
    `max_encoder_cosine`, `max_decoder_cosine` and `encoder_decoder_cosine` of every latent; NaN where undefined."""
    density_histogram: dict[str, Any]
    """`log10_edges`, `counts` of latents between them, and the number of `dead` latents."""
    provenance: dict[str, Any]
    """Versions, seed, SAE and weight hash, model, data and hash of the token ids, tokens before and after masking."""
    baseline: str
    """What "ablated" means."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know beside the numbers."""

    def __getitem__(self, name: str) -> float | None:
        """A metric by its name, with its group or without."""
        if name in self.metrics:
            return self.metrics[name]
        short = {full.partition("/")[2]: value for full, value in self.metrics.items()}
        if name not in short:
            raise UnweaveError(f"a report has no metric {name!r}{nearest(name, [*short, *self.metrics]) or '.'}")
        return short[name]

    def to_json(self) -> dict[str, Any]:
        """The report in the shape of SAEBench's `core` results; see `unweave.evaluation.saebench`."""
        from unweave.evaluation.saebench import core_result

        return core_result(self)

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` to a file, whole or not at all."""
        write_json(path, self.to_json())
        return Path(path)

    def table(self) -> RenderableType:
        """The numbers that matter most and their meaning, for a terminal of 80 columns."""
        from unweave.evaluation.table import report_table

        return report_table(self)

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=80, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def plain(value: Any) -> Any:
    """The same value in types that JSON knows: tensors as lists, and null for every number that is not finite."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
