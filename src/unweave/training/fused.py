"""One step of a squared-error objective with the usual penalties, fused: loss and gradients without autograd.

The same numbers as `Trainee.loss` and its backward pass, in fewer passes over memory: decode, residual, loss and the
codes' gradients row by row; both weight gradients latent by latent, with what penalties and projections add to them.
Runs where the compiled kernels do; everything else goes through autograd. On a GPU its host waits for nothing, unless
nobody can say how much room codes take: where tokens of a batch are ranked against each other (BatchTopK), and where
codes of any density stay sparse (Gated, Matryoshka with thresholds).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import TypeGuard

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from unweave import kernels
from unweave.kernels import cpu
from unweave.kernels.dispatch import WIDEST_ON_GPU, backend, compiled
from unweave.kernels.scratch import LIKE_W_ENC, forget, scratch, scratch_like
from unweave.kernels.screen import kind_of
from unweave.objectives import L1, RandomMatryoshka, TargetL0
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training.config import SAEConfig
from unweave.training.dense import DENSE_SCRATCH, add_rows_, auxk_bytes, auxk_gradients, dense_gradients
from unweave.training.optimizer import squares_of
from unweave.training.step import Step
from unweave.training.weight_gradients import weight_gradients

SPARSE_BELOW, DENSE_ABOVE = 0.04, 0.06
"""Densities at which execution changes from dense to sparse and back; between them it stays as it is."""
_FIRST_ROWS = 32
_NARROWEST_MARGIN, _WIDEST_MARGIN = 0.005, 0.03
"""Bounds of `Fused.margin`. A wide one computes more for nothing; with a narrow one more products are made twice."""
_ENTRY_BYTES = 45
"""What a sparse step takes for each code at its peak: indices, values, gradients, and their order by latent."""
_MOST_ROOM, _LEAST_ROOM = 2 * DENSE_ABOVE, 0.01
"""Share of all entries that a GPU has room for in a sparse step, since it learns only later how many there were: twice
what there were two steps ago, between these two."""
_ROOM_BYTES = 90
"""What a sparse step on a GPU takes for each of these entries at its peak."""


def supports(config: SAEConfig, sae: SAE) -> bool:
    """Whether a configuration can take the fused step."""
    kind = type(config.activation)
    plain = kind in (ReLU, TopK, BatchTopK, JumpReLU, Gated)  # a subclass has its own formula
    if isinstance(config.activation, JumpReLU):
        plain = plain and config.activation.is_published
    terms = config.sparsity_terms
    plain = plain and len(terms) <= 1 and all(type(term) in (L1, TargetL0) for term in terms)
    plain = plain and config.error == "squared" and config.auxk.schedule is None and config.dictionary is None
    others = config.multi_topk or config.ghost or config.pre_act or config.reanimation or config.k_schedule
    plain = plain and not isinstance(config.matryoshka, RandomMatryoshka)
    plain = plain and not sae.glu
    own = backend("training step", sae.W_dec, sae.b_dec)
    # There, a logarithm that changes nothing still rounds; and one program takes a whole row.
    goes = sae.d_in <= WIDEST_ON_GPU and not getattr(config.activation, "log_threshold", False)
    runs = own == "cpu" or (own == "cuda" and goes)
    return type(sae) is SAE and plain and not others and runs


@dataclass
class Fused:
    """The fused step of one SAE, and what it remembers between steps.

    Args:
        sae: The SAE.
        config: How it is trained.
        widths: Matryoshka prefixes, the last `d_sae`; empty for none.
        k_aux: Dead latents used on each token; 0 for no AuxK.
    """

    sae: SAE
    config: SAEConfig
    widths: tuple[int, ...] = ()
    k_aux: int = 0
    ends: Tensor | None = None
    """`widths`, on the device."""
    dense: bool = False
    """Whether the last step was dense enough for dense products."""
    begun: bool = False
    """Whether a step was taken, or tried."""
    density: float | None = None
    """Share of entries that a product kept on a GPU, two steps ago."""
    bound: float | None = None
    """Smallest winner of the last batch (BatchTopK)."""
    margin: float = _WIDEST_MARGIN
    """How far below it that of the next batch is looked for, as a share: as far as it moved in the last few steps."""

    @property
    def ops(self) -> ModuleType:
        """The kernels of the device."""
        return compiled("training step", self.sae.W_dec) or cpu

    def __call__(
        self, x: Float[Tensor, "n d_in"], latents: Int64[Tensor, " c"], penalty: float, screen: kernels.Screen | None
    ) -> Step:
        """Loss and gradients of a batch; the next step or encoding of any SAE uses the gradients' memory again.

        Args:
            x: Inputs at the scale of training. `b_dec` is taken from them, so that they need no second place.
            latents: Those that AuxK revives, ascending; `d_sae` stands for none.
            penalty: Coefficient of the sparsity term, its schedule included.
            screen: Of the encoder as it is now; None: it is made.

        Raises:
            TooDense: If a gate is open so often that dense products are faster.
        """
        low = kernels.low(self.config.precision, x.device.type)
        if self.widths and self.ends is None:
            self.ends = torch.tensor(self.widths, device=x.device)
        centred = x.sub_(self.sae.b_dec.detach())
        # The precision is the configuration's, whatever surrounds the step.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not self.begun:
                self.begun, self.dense = True, self.dense or self._surely_dense(centred)
            if not self.dense:
                try:
                    return self._sparse(centred, latents, penalty, screen, low)
                except kernels.TooDense:
                    if isinstance(self.config.activation, Gated):
                        raise  # its dense form is autograd's
                    self.dense = True
            step = dense_gradients(self.sae, self.config, centred, latents, self.k_aux, penalty, low)
        if self.ops is cpu:
            assert step.density is not None
            self.observe(step.density.item())
        return step

    def observe(self, density: float) -> None:
        """Learn the density of a step, which decides how the next ones are computed; a GPU's is told by the caller."""
        was_dense, self.density = self.dense, density
        self.dense = density > (SPARSE_BELOW if was_dense else DENSE_ABOVE)
        if was_dense and not self.dense:
            forget(*DENSE_SCRATCH)  # sparse steps need the memory for other things

    def revival_bytes(self, n: int, c: int) -> int:
        """Memory that a step of `n` tokens takes besides once `c` latents are dead."""
        low = kernels.low(self.config.precision, self.sae.device.type)
        return auxk_bytes(n, self.sae.d_in, c, low) if self.k_aux else 0

    def sparse_bytes(self, n: int) -> tuple[int, int]:
        """Memory that dense execution leads to once it turns sparse: lasting, and more in a step of `n` tokens."""
        m, d = self.sae.W_dec.shape
        if self.ops is not cpu:  # both gradients' partial sums take as much as one of them
            low = kernels.low(self.config.precision, self.sae.device.type)
            return 2 * m * d * low, round(2 * SPARSE_BELOW * n * m) * _ROOM_BYTES + 4 * m * d
        screen = {"fp32": 0, "bf16": 2, "int8": 1}[kind_of(self.config.precision, d)] * m * d
        return screen, round(SPARSE_BELOW * n * m) * _ENTRY_BYTES

    def _surely_dense(self, centred: Tensor) -> bool:
        """Whether a few rows are so dense that a sparse step, which leaves memory behind, need not be tried first."""
        sae, rows = self.sae, centred[:: max(1, len(centred) // _FIRST_ROWS)][:_FIRST_ROWS]
        spec = sae.activation.selection(sae.threshold, len(rows))
        if not self._switches(spec):
            return False
        above = torch.addmm(sae.b_enc, rows, sae.W_enc) > spec.bounds
        return above.float().mean().item() > 2 * DENSE_ABOVE

    def _switches(self, spec: kernels.Spec) -> TypeGuard[kernels.Above]:
        """Whether steps can be dense ones."""
        # Matryoshka stays sparse: each of its prefixes would take dense products of its own.
        return isinstance(spec, kernels.Above) and not self.widths and not isinstance(self.config.activation, Gated)

    def _select(self, centred: Tensor, screen: kernels.Screen | None, low: bool) -> kernels.Selection:
        sae, config = self.sae, self.config
        spec, ops = sae.activation.selection(sae.threshold, len(centred)), self.ops
        if ops is not cpu:
            half = None if screen is None else screen.images.half
            if isinstance(spec, kernels.Largest):
                return ops.largest(centred, sae.W_enc, sae.b_enc, spec, low, half)
            if self._switches(spec):
                share = _MOST_ROOM if self.density is None else max(_LEAST_ROOM, 2 * self.density)
                room = math.ceil(min(share, _MOST_ROOM) * len(centred) * sae.d_sae)
                return ops.above(centred, sae.W_enc, sae.b_enc, spec.bounds, low, room, half)
        if isinstance(spec, kernels.LargestOfBatch):
            hint = spec.hint if self.bound is None else (1 - self.margin) * self.bound
            spec = kernels.LargestOfBatch(spec.budget, hint)
        sparse_only = not isinstance(spec, kernels.Above) or self.widths
        found = kernels.encode_select(
            centred, sae.W_enc, sae.b_enc, spec, screen=screen, max_density=1.0 if sparse_only else DENSE_ABOVE,
            precision=config.precision if ops is cpu else "bf16" if low else "fp32",
        )  # fmt: skip
        if isinstance(spec, kernels.LargestOfBatch):
            before, self.bound = self.bound, found.values.min().item() if len(found.values) == spec.budget else None
            if before and self.bound:
                change = abs(self.bound / before - 1)
                self.margin = min(max(2 * change, 0.8 * self.margin, _NARROWEST_MARGIN), _WIDEST_MARGIN)
        return found

    def _sparse(
        self, centred: Tensor, latents: Tensor, penalty: float, screen: kernels.Screen | None, low: bool
    ) -> Step:
        sae, config, (n, d), m = self.sae, self.config, centred.shape, self.sae.d_sae
        # The error is that of the centred reconstruction of what is centred.
        W_dec, no_bias, ops = sae.W_dec.detach(), centred.new_zeros(d), self.ops
        counts, indices, pre = self._select(centred, screen, low)
        density = fits = None
        if ops is not cpu and not isinstance(config.activation, TopK | BatchTopK | Gated) and not self.widths:
            found = counts.sum()
            density, fits = found / (n * m), found <= len(indices)
        theta = window = None
        if isinstance(sae.activation, JumpReLU):
            theta = sae.threshold.detach()[indices]  # type: ignore[union-attr]
            window = (pre - theta).abs_() < sae.activation.bandwidth / 2
        magnitudes = pre
        if isinstance(config.activation, Gated):
            gain = sae.r_mag.detach().exp()
            magnitudes = gain[indices].mul_(pre).add_((sae.b_mag.detach() - gain * sae.b_enc.detach())[indices])
        active = magnitudes > (0.0 if theta is None else theta)
        on, l0 = active.to(magnitudes.dtype), active.sum()
        del active
        codes = magnitudes.mul_(on)  # there are many: what can be is done in place

        groups = len(self.widths) or 1
        rows = pad(counts.cumsum(0), (1, 0)).clamp_(max=len(indices))
        offsets = rows if self.ends is None else _cut(indices, rows, self.ends)
        by_latent = ops.transpose(indices, offsets, m)
        scales = centred.new_full((groups,), 2 / (n * groups))
        residual = scratch_like(centred, "residual", centred.shape) if len(latents) else None
        # The output's gradient takes the memory of W_enc's, which is made when that of the output is done with.
        room, gate = scratch(LIKE_W_ENC, (n * groups, d)) if ops is cpu else None, None
        if isinstance(config.activation, Gated):
            # The gate reconstructs by itself, with the decoder frozen: its output's gradient is not used.
            scale, into = centred.new_full((1,), 2 / n), None if room is None else room[:n]
            gate = ops.squared_error_rows(indices, pre, rows, scale, W_dec, no_bias, centred, None, into)
        errors, grad, code_grad = ops.squared_error_rows(
            indices, codes, offsets, scales, W_dec, no_bias, centred, residual, room
        )
        loss = kernels.ordered_sum(errors) / (n * groups)

        own: dict[str, Tensor] = {}  # gradients of the activation function's parameters
        along = None
        penalised, penalised_grad = codes, code_grad
        if gate is not None:
            loss = loss + kernels.ordered_sum(gate.errors) / n
            code_grad *= on
            own["b_mag"] = ops.sum_by_latent(by_latent, code_grad)
            code_grad *= gain[indices]
            own["r_mag"] = ops.sum_by_latent(by_latent, (-sae.b_enc.detach())[indices].add_(pre).mul_(code_grad))
            penalised, penalised_grad = pre, gate.code_grad
        if isinstance(config.sparsity_term, L1):
            norms, sums = W_dec.norm(dim=1), ops.sum_by_latent(by_latent, penalised)
            loss = loss + penalty / n * kernels.ordered_sum(sums * norms)
            penalised_grad += (penalty / n * norms)[indices]
            along = penalty / n * sums / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        if isinstance(sae.activation, JumpReLU):
            assert theta is not None
            assert window is not None
            towards = theta.mul_(code_grad).neg_()
            if isinstance(config.sparsity_term, TargetL0):
                target = config.sparsity_term.l0
                value, slope = TargetL0.of(l0 / n / target - 1)
                loss = loss + penalty * value
                towards -= penalty * slope / (target * n)
            own["threshold"] = ops.sum_by_latent(by_latent, towards.mul_(window).div_(sae.activation.bandwidth))

        aux = None
        if residual is not None:
            aux = auxk_gradients(sae, config.auxk.coefficient, residual, centred, latents, self.k_aux, low)
            loss = loss + aux.loss
        pre_grad = code_grad.mul_(on) if gate is None else code_grad.add_(gate.code_grad)
        out_sum = ops.sum_rows(grad.view(n, groups, d)[:, 0])
        grads, squares = weight_gradients(
            by_latent, codes, pre_grad, grad, centred, W_dec,
            groups=groups, aux=aux, along=along, project=config.decoder_is_unit,
        )  # fmt: skip
        sums_of_pre = ops.sum_by_latent(by_latent, pre_grad)
        # A gate's bias is taken out of the magnitudes again.
        b_enc_grad = sums_of_pre.clone() if gate is None else ops.sum_by_latent(by_latent, gate.code_grad)
        if aux is not None:
            add_rows_(sums_of_pre, latents, aux.b_enc)
            add_rows_(b_enc_grad, latents, aux.b_enc)
        grads["b_enc"] = b_enc_grad
        grads["b_dec"] = out_sum - ops.sum_rows(sae.W_enc.detach().T, sums_of_pre)
        grads |= own
        squares = squares + squares_of(grads)
        fired = ops.sum_by_latent(by_latent, on) > 0
        smallest = None
        if isinstance(config.activation, BatchTopK):
            smallest = codes.min() if len(codes) else None  # all of them are positive
        return Step(loss, kernels.ordered_sum(errors[:, -1]), l0, fired, smallest, grads, squares, density, fits)


def _cut(indices: Int64[Tensor, " nnz"], rows: Int64[Tensor, " n+1"], ends: Int64[Tensor, " p"]) -> Tensor:
    """Where the entries of each row and block of latents begin, `(n * p + 1,)`."""
    n, p = len(rows) - 1, len(ends)
    row = torch.searchsorted(rows, torch.arange(len(indices), device=rows.device), right=True) - 1
    counts = kernels.counts_of(row * p + torch.bucketize(indices, ends, right=True), n * p)
    return pad(counts.cumsum(0), (1, 0))
