"""The operations as CUDA kernels, written in Triton.

    gather_sum      codes @ W_dec
    sddmm           the gradient of the codes: one dot product per active latent
    scatter_outer   codes.T @ grad, in two halves of which two gradients share the first: `transpose`, `segment_sum`
    squared_error   decode, residual, loss and code gradients of a row in one pass
    topk, group_max, topk_screened    what is kept of a tile of pre-activations
    count_above, write_above          the same, where nobody knows how much that is
    finish_rows     the last things done to a decoder's gradient, and the squared norms of its rows
    adam_rows       moments, update, renormalisation and the bf16 image of a matrix, row by row

Three rules hold everywhere. No function waits for the device: shapes of results follow from shapes of arguments, and
whatever depends on data (how many entries there are, whether a capacity was enough) stays on the device. No sum depends
on the order in which programs run: there are no atomics, so two runs agree bit for bit. Sums are fp32 sums.

Without waiting, a wrong index cannot raise an error. It is never followed either: the result that it belongs to becomes
NaN. Shapes, dtypes and devices are checked, and raise `UnweaveError`.

This package is imported only where there is a CUDA device, or to be run by Triton's interpreter
(`TRITON_INTERPRET=1`, CPU tensors).
"""

from unweave.kernels.triton.above import Bounds, count_above, write_above
from unweave.kernels.triton.adam import adam_rows
from unweave.kernels.triton.row_gradient import finish_rows
from unweave.kernels.triton.screened import topk_screened
from unweave.kernels.triton.sddmm import sddmm
from unweave.kernels.triton.segment_sum import ByLatent, gather_sum, scatter_outer, segment_sum, transpose
from unweave.kernels.triton.select import Chosen, group_max, topk
from unweave.kernels.triton.squared_error import SquaredError, squared_error

__all__ = [
    "Bounds",
    "ByLatent",
    "Chosen",
    "SquaredError",
    "adam_rows",
    "count_above",
    "finish_rows",
    "gather_sum",
    "group_max",
    "scatter_outer",
    "sddmm",
    "segment_sum",
    "squared_error",
    "topk",
    "topk_screened",
    "transpose",
    "write_above",
]
