"""In which type a model is run for its activations."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch

from unweave import kernels
from unweave._errors import UnweaveError, nearest
from unweave.models import LoadedModel, dtype_of, gains_from_bf16

ModelPrecision: TypeAlias = Literal["auto", "fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_dtype(precision: ModelPrecision, model: LoadedModel) -> torch.dtype | None:
    """The type to run a model in; None: as it is.

    Args:
        precision: "fp32", "bf16", or "auto" for bf16 where the hardware is faster at it and the model large enough.
        model: The model.

    Raises:
        UnweaveError: There is no such precision.
    """
    if precision not in get_args(ModelPrecision):
        raise UnweaveError(f"there is no model_precision {precision!r}{nearest(precision, get_args(ModelPrecision))}")
    if precision == "auto":
        fast = kernels.low("auto", model.device.type) and gains_from_bf16(model.module)
        return torch.bfloat16 if fast else None
    dtype = _DTYPES[precision]
    return None if dtype == dtype_of(model.module) else dtype
