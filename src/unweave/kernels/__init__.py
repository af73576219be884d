"""The operations that cost time, on plain tensors: each in a few lines of PyTorch, in C++, and in Triton.

    encode_select   x @ W_enc + b_enc, of which only the selected latents are kept
    gather_sum      codes @ W_dec
    sddmm           the gradient of the codes: one dot product per active latent
    scatter_outer   codes.T @ grad: the weight gradients, latent by latent
    adam_rows       one pass over the rows of a weight matrix
    gather_rows     rows out of mapped files into a batch
    attention       of the model that gives the activations
    copy_checked    weights out of files into memory

The encoder product is the only dense one. Nothing here knows what an SAE is. `dispatch` chooses between the back-ends.
"""

from unweave.kernels.adam import adam_rows
from unweave.kernels.attention import attention
from unweave.kernels.copying import Mapped, copy_checked, is_finite
from unweave.kernels.encode import encode_select, select_by_rows
from unweave.kernels.gather import RowTable, gather_rows
from unweave.kernels.ops import gather_sum, scatter_outer, sddmm, transpose
from unweave.kernels.ordered import ordered_sum, spread, squared_norm
from unweave.kernels.reference import Transposed, counts_of
from unweave.kernels.screen import Precision, Screen, low
from unweave.kernels.select import Above, Largest, LargestOfBatch, LargestOfGroups, Selection, Spec, TooDense

__all__ = [
    "Above",
    "Largest",
    "LargestOfBatch",
    "LargestOfGroups",
    "Mapped",
    "Precision",
    "RowTable",
    "Screen",
    "Selection",
    "Spec",
    "TooDense",
    "Transposed",
    "adam_rows",
    "attention",
    "copy_checked",
    "counts_of",
    "encode_select",
    "gather_rows",
    "gather_sum",
    "is_finite",
    "low",
    "ordered_sum",
    "scatter_outer",
    "sddmm",
    "select_by_rows",
    "spread",
    "squared_norm",
    "transpose",
]
