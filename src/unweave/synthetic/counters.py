"""Running counts over batches of activations: L0, dead latents, shrinkage. Counts are int64, sums float64."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.evaluation.sums import NORM_FLOOR, wide
from unweave.sae import SparseCodes
from unweave.synthetic.joint import as_codes


class L0Calculator:
    """Mean number of activations that are not 0; every sample counts, those of which nothing fires as 0."""

    def __init__(self) -> None:
        self.n_samples = self.n_active = 0

    def add_batch(self, activations: Tensor | SparseCodes) -> None:
        """Add activations `(n, width)`: dense, COO or `SparseCodes`."""
        codes = as_codes(activations)
        self.n_samples += codes.n_rows
        self.n_active += len(codes.indices)

    def compute(self) -> float:
        """The mean; 0 before the first sample."""
        return self.n_active / self.n_samples if self.n_samples else 0.0


class DeadLatentsCalculator:
    """Number of latents that never fired, i.e. were never different from 0."""

    def __init__(self, num_latents: int) -> None:
        self.counts = torch.zeros(num_latents, dtype=torch.int64)

    def add_batch(self, sae_latents: Tensor | SparseCodes) -> None:
        """Add codes `(n, num_latents)`: dense, COO or `SparseCodes`."""
        codes = as_codes(sae_latents)
        if codes.d_sae != len(self.counts):
            raise UnweaveError(f"the codes have a width of {codes.d_sae}, and {len(self.counts)} was expected.")
        self.counts += codes.firing_counts().cpu()

    def compute(self) -> int:
        """How many are dead so far."""
        return int((self.counts == 0).sum())


class ShrinkageCalculator:
    """Mean of `‖x̂‖ / ‖x‖`; samples whose norm is not above `min_input_norm` have no ratio and are left out."""

    def __init__(self, min_input_norm: float = NORM_FLOOR) -> None:
        self.min_input_norm = min_input_norm
        self.n_ratios = 0
        self.sum_ratios = 0.0

    def add_batch(self, sae_output: Float[Tensor, "n d"], hidden_acts: Float[Tensor, "n d"]) -> None:
        """Add reconstructions and the inputs they belong to."""
        norm_out, norm_in = (torch.linalg.vector_norm(wide(x), dim=-1) for x in (sae_output, hidden_acts))
        long = norm_in > self.min_input_norm
        self.n_ratios += int(long.sum())
        self.sum_ratios += float((norm_out[long] / norm_in[long]).sum())

    def compute(self) -> float:
        """The mean; 0 before the first sample that has a ratio."""
        return self.sum_ratios / self.n_ratios if self.n_ratios else 0.0
