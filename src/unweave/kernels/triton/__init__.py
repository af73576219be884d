"""The operations as CUDA kernels, written in Triton.

    gather_sum      codes @ W_dec
    sddmm           the gradient of the codes: one dot product per active latent
    scatter_outer   codes.T @ grad, in two halves of which two gradients share the first: `transpose`, `segment_sum`
    squared_error   decode, residual, loss and code gradients of a row in one pass
    topk, above, group_max, topk_screened    what is kept of a tile of pre-activations
    adam_rows       moments, update, projection, renormalisation and the bf16 image of a matrix, row by row

Three rules hold everywhere. No function waits for the device: shapes of results follow from shapes of arguments, and
whatever depends on data (how many entries there are, whether a capacity was enough) stays on the device. No sum depends
on the order in which programs run: there are no atomics, so two runs agree bit for bit. Sums are fp32 sums.

Without waiting, a wrong index cannot raise an error. It is never followed either: the result that it belongs to becomes
NaN. Shapes, dtypes and devices are checked, and raise `UnweaveError`.

This package is imported only where there is a CUDA device, or to be run by Triton's interpreter
(`TRITON_INTERPRET=1`, CPU tensors).
"""

from unweave.kernels.triton.above import Above, above, pack
from unweave.kernels.triton.adam import adam_rows
from unweave.kernels.triton.screened import Screened, topk_screened
from unweave.kernels.triton.sddmm import sddmm
from unweave.kernels.triton.segment_sum import ByLatent, gather_sum, scatter_outer, segment_sum, transpose
from unweave.kernels.triton.select import Chosen, group_max, topk
from unweave.kernels.triton.squared_error import SquaredError, squared_error

__all__ = [
    "Above",
    "ByLatent",
    "Chosen",
    "Screened",
    "SquaredError",
    "above",
    "adam_rows",
    "gather_sum",
    "group_max",
    "pack",
    "scatter_outer",
    "sddmm",
    "segment_sum",
    "squared_error",
    "topk",
    "topk_screened",
    "transpose",
]
