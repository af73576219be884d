"""The operations that cost time, on plain tensors, each stated in a few lines of PyTorch.

    encode_select   x @ W_enc + b_enc, of which only the selected latents are kept
    gather_sum      codes @ W_dec
    sddmm           the gradient of the codes: one dot product per active latent
    scatter_outer   codes.T @ grad: the weight gradients, latent by latent

The encoder product is the only dense one. Nothing here knows what an SAE is.
"""

from unweave.kernels.encode_select import Selection, Selector, encode_select
from unweave.kernels.select import BatchTopKCandidates, above, batch_topk, topk, topk_among
from unweave.kernels.sparse import gather_sum, scatter_outer, sddmm

__all__ = [
    "BatchTopKCandidates",
    "Selection",
    "Selector",
    "above",
    "batch_topk",
    "encode_select",
    "gather_sum",
    "scatter_outer",
    "sddmm",
    "topk",
    "topk_among",
]
