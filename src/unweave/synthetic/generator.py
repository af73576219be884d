"""Activations of known features: which fire, how strongly, and what modifiers such as a hierarchy make of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.sae.codes import SparseCodes
from unweave.synthetic.arguments import own_generator, require_count, to_dtype
from unweave.synthetic.copula import FullCopula, LowRankCopula, full_factor
from unweave.synthetic.correlation import LowRankCorrelationMatrix
from unweave.synthetic.correlation_checks import require_low_rank_correlation
from unweave.synthetic.firing import Firing, Independent
from unweave.synthetic.forms import Batch, to_codes, to_coo, to_dense

ActivationsModifier = Callable[..., Any]
"""Takes a batch of activations, and the `ActivationGenerator` if it has a second positional parameter; returns a batch.

It gets a dense tensor `(batch_size, num_features)`, or a COO tensor from a generator with `use_sparse_tensors`; with an
attribute `takes_codes = True` it gets `SparseCodes`. It may return any of the three.
"""
ActivationsModifierInput = ActivationsModifier | Sequence[ActivationsModifier] | None
CorrelationMatrixInput = Tensor | LowRankCorrelationMatrix | tuple[Tensor, Tensor]

_FARTHEST = 30.0  # standard deviations from the mean up to 0: beyond, the tail is below what float64 holds


class _Ready(NamedTuple):
    """What drawing needs of the parameters, on the CPU."""

    versions: tuple[tuple[Tensor, int], ...]
    firing: Firing
    mean: Float[Tensor, " num_features"]
    std: Float[Tensor, " num_features"] | None
    """None if all are 0."""
    positive: Float[Tensor, " num_features"]
    """Probability that the Gaussian is positive."""


class ActivationGenerator(nn.Module):
    """Draws activations of features with known firing probabilities, correlations and magnitudes.

    A feature fires with exactly its probability (before modifiers): independently, or by a Gaussian copula. Where it
    fires, its magnitude is a draw of a Gaussian given that it is positive; with a standard deviation of 0, the mean.
    Modifiers are applied in order, and what is negative afterwards becomes 0.

    Draws are made on the CPU, from a generator of this object alone, and then moved: a seed gives the same stream on
    every device and whatever else draws random numbers. Modifiers with a method `fork(seed)`, as hierarchies have, are
    forked with seeds from the same stream, so that `seed` repeats all of it. Only what fires is drawn, but for full
    correlation matrices.

    Args:
        num_features: Number of features, K.
        firing_probabilities: One or `(K,)`, in (0, 1].
        std_firing_magnitudes: Standard deviation of magnitudes, one or `(K,)`, at least 0.
        mean_firing_magnitudes: Mean of the Gaussian, one or `(K,)`. With a standard deviation of 0 it must be at least
            0, and a feature of mean 0 then never shows.
        modify_activations: One modifier, several, or None; see `ActivationsModifier`.
        correlation_matrix: Correlations of the normals that the copula compares with thresholds: `(K, K)`, or a
            `LowRankCorrelationMatrix` or such a pair. None: features fire independently.
        device: Where activations go.
        dtype: Of activations; probabilities and magnitudes are kept in float32 at least.
        use_sparse_tensors: Whether `sample` returns COO tensors.
        seed: Where the stream starts. None: at a number drawn from torch's global state, kept in `seed`.

    Raises:
        UnweaveError: If an argument has a wrong shape or is out of range.
    """

    firing_probabilities: Float[Tensor, " num_features"]
    std_firing_magnitudes: Float[Tensor, " num_features"]
    mean_firing_magnitudes: Float[Tensor, " num_features"]
    correlation_matrix: Float[Tensor, "num_features num_features"] | None
    correlation_factor: Float[Tensor, "num_features rank"] | None
    correlation_diag: Float[Tensor, " num_features"] | None
    given_modifiers: Sequence[ActivationsModifier]
    modify_activations: Sequence[ActivationsModifier]

    def __init__(
        self,
        num_features: int,
        firing_probabilities: Float[Tensor, " num_features"] | float,
        std_firing_magnitudes: Float[Tensor, " num_features"] | float = 0.0,
        mean_firing_magnitudes: Float[Tensor, " num_features"] | float = 1.0,
        modify_activations: ActivationsModifierInput = None,
        correlation_matrix: CorrelationMatrixInput | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "float32",
        use_sparse_tensors: bool = False,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.num_features = require_count("num_features", num_features)
        self.dtype, self.device, self.use_sparse_tensors = to_dtype(dtype), torch.device(device), use_sparse_tensors
        for name, value in (
            ("firing_probabilities", firing_probabilities),
            ("std_firing_magnitudes", std_firing_magnitudes),
            ("mean_firing_magnitudes", mean_firing_magnitudes),
        ):
            self.register_buffer(name, self._per_feature(name, value))
        matrix, low_rank = self._correlation(correlation_matrix)
        self.register_buffer("correlation_matrix", matrix)
        self.register_buffer("correlation_factor", low_rank[0] if low_rank else None)
        self.register_buffer("correlation_diag", low_rank[1] if low_rank else None)
        self._full_factor = None if matrix is None else full_factor(matrix, num_features)
        self._ready: _Ready | None = None
        self._prepared()
        modifiers = [modify_activations] if callable(modify_activations) else list(modify_activations or ())
        self.given_modifiers = modifiers
        self._start(seed)

    def _start(self, seed: int | None) -> None:
        self._rng = own_generator(seed)
        self.seed = self._rng.initial_seed()
        seeds = torch.randint(2**63 - 1, (len(self.given_modifiers),), generator=self._rng).tolist()
        self.modify_activations = [
            modifier.fork(own) if hasattr(modifier, "fork") else modifier
            for modifier, own in zip(self.given_modifiers, seeds, strict=True)
        ]

    def fork(self, seed: int | None = None) -> Self:
        """The same parameters with a stream of its own, at its start.

        Args:
            seed: As in the constructor.
        """
        other = copy.copy(self)
        other._buffers = dict(self._buffers)  # moving one leaves the other where it is
        other._start(seed)
        return other

    @property
    def low_rank_correlation(self) -> LowRankCorrelationMatrix | None:
        """Factor and diagonal of the correlations, if they were given so."""
        if self.correlation_factor is None or self.correlation_diag is None:
            return None
        return LowRankCorrelationMatrix(self.correlation_factor, self.correlation_diag)

    @torch.no_grad()
    def sample(self, batch_size: int) -> Float[Tensor, "batch_size num_features"]:
        """The next activations: dense, or a COO tensor with `use_sparse_tensors`."""
        batch = self._activations(batch_size)
        return to_coo(batch) if self.use_sparse_tensors else to_dense(batch)

    def forward(self, batch_size: int) -> Float[Tensor, "batch_size num_features"]:
        """`sample`."""
        return self.sample(batch_size)

    @torch.no_grad()
    def sample_codes(self, batch_size: int) -> SparseCodes:
        """The next activations as sparse codes, of which every entry is positive: the same draws as `sample`."""
        return to_codes(self._activations(batch_size))

    def _activations(self, batch_size: int) -> Batch:
        batch: Batch = self._draw(require_count("batch_size", batch_size))
        shape = (batch_size, self.num_features)
        for modifier in self.modify_activations:
            if getattr(modifier, "takes_codes", False):
                batch = to_codes(batch)
            else:
                batch = to_coo(batch) if self.use_sparse_tensors else to_dense(batch)
            batch = modifier(batch, self) if _takes_generator(modifier) else modifier(batch)
            found = (batch.n_rows, batch.d_sae) if isinstance(batch, SparseCodes) else getattr(batch, "shape", None)
            if found != shape:
                what = type(batch).__name__ if found is None else f"the shape {tuple(found)}"
                raise UnweaveError(f"a modifier must return activations of the shape {shape}, got {what}.")
        if isinstance(batch, Tensor) and batch.layout == torch.strided:
            return batch.relu()
        batch = to_codes(batch)
        positive = batch.values > 0
        return batch if positive.all() else batch.where(positive)

    def _draw(self, n_rows: int) -> SparseCodes:
        ready = self._prepared()
        cells = ready.firing.draw(n_rows, self._rng)
        rows = torch.div(cells, self.num_features, rounding_mode="floor")
        features = cells - rows * self.num_features
        values = self._magnitudes(features, ready).to(self.dtype)
        codes = SparseCodes.from_entries(rows, features, values, n_rows, self.num_features)
        return codes if self.device.type == "cpu" else codes.to(self.device)

    def _magnitudes(self, features: Tensor, ready: _Ready) -> Float[Tensor, " nnz"]:
        mean = ready.mean.index_select(0, features)
        if ready.std is None:
            return mean
        std = ready.std[features]
        normal = torch.randn(len(features), dtype=mean.dtype, generator=self._rng)
        values = torch.addcmul(mean, std, normal)
        # What is not positive is drawn again at once: the upper tail of a normal from -mean / std on, by its inverse.
        again = (values <= 0).nonzero().squeeze(1)
        if len(again):
            uniform = 1 - torch.rand(len(again), dtype=torch.float64, generator=self._rng)
            tail = torch.special.ndtri(uniform * ready.positive[features[again]])
            values[again] = (mean[again] - std[again] * tail).to(values.dtype)
        return values.clamp(min=torch.finfo(self.dtype).tiny).where(std > 0, mean)

    def _prepared(self) -> _Ready:
        """What drawing needs, made anew if a parameter was changed or replaced: thresholds follow probabilities."""
        given = (self.firing_probabilities, self.mean_firing_magnitudes, self.std_firing_magnitudes)
        if self._ready is not None and all(
            now is then and now._version == version
            for now, (then, version) in zip(given, self._ready.versions, strict=True)
        ):
            return self._ready
        for name in ("firing_probabilities", "mean_firing_magnitudes", "std_firing_magnitudes"):
            self._per_feature(name, getattr(self, name))
        p, mean, std = (t.detach().cpu() for t in given)
        ratio = torch.where(std > 0, mean.double() / std.double(), torch.inf)
        _require("std_firing_magnitudes", std, std >= 0, "at least 0")
        _require("mean_firing_magnitudes", mean, (mean >= 0) | (std > 0), "at least 0 where std_firing_magnitudes is 0")
        _require(
            "mean_firing_magnitudes", mean, ratio > -_FARTHEST, f"at most {_FARTHEST:g} standard deviations below 0"
        )
        firing: Firing
        if self._full_factor is not None:
            firing = FullCopula(p, self._full_factor)
        elif self.low_rank_correlation is not None:
            firing = LowRankCopula(p, self.low_rank_correlation)
        else:
            firing = Independent(p)
        spread = std if bool(std.any()) else None
        positive = torch.special.log_ndtr(ratio).exp()  # ndtr itself is 0 far out
        self._ready = _Ready(tuple((t, t._version) for t in given), firing, mean, spread, positive)
        return self._ready

    def _per_feature(self, name: str, value: Tensor | float) -> Float[Tensor, " num_features"]:
        """One number per feature, where activations go and in float32 at least."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensor = torch.as_tensor(value, dtype=dtype, device=self.device).detach()
        if tensor.shape not in ((), (self.num_features,)):
            raise UnweaveError(
                f"{name} must be a number or have the shape ({self.num_features},), got {tuple(tensor.shape)}."
            )
        _require(name, tensor, tensor.isfinite(), "finite")
        if name == "firing_probabilities":
            _require(name, tensor, (tensor > 0) & (tensor <= 1), "in (0, 1]")
        return tensor.expand(self.num_features).clone()  # never the caller's own

    def _correlation(
        self, given: CorrelationMatrixInput | None
    ) -> tuple[Tensor | None, LowRankCorrelationMatrix | None]:
        if given is None or isinstance(given, Tensor):
            return None if given is None else given.detach().to(self.device).clone(), None
        low_rank = LowRankCorrelationMatrix(*(t.detach().to(self.device).clone() for t in given))
        require_low_rank_correlation(low_rank, self.num_features)
        return None, low_rank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, or cast what comes out; parameters keep their precision, and the stream goes on where it was."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype, self.device = probe.dtype, probe.device
        ready = self._ready
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(self.device)
        if ready is not None:  # still right: what was moved has not changed
            moved = (self.firing_probabilities, self.mean_firing_magnitudes, self.std_firing_magnitudes)
            current = all(t._version == version for t, version in ready.versions)
            self._ready = ready._replace(versions=tuple((t, t._version) for t in moved)) if current else None
        return self

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, dtype={self.dtype}, device={self.device}, seed={self.seed}"


def _require(name: str, values: Tensor, fine: Tensor, wanted: str) -> None:
    if not bool(fine.all()):
        i = int((~fine).flatten().nonzero()[0])
        where = f" for feature {i}" if values.ndim else ""
        raise UnweaveError(f"{name} must be {wanted}, got {float(values.flatten()[i]):g}{where}.")


def _takes_generator(modifier: ActivationsModifier) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(modifier).parameters.values()
    except ValueError:  # written in C
        return False
    return sum(p.kind in kinds for p in parameters) > 1
