"""What every generator here asks of its arguments: counts and numbers in range, a dtype, a stream of its own."""

from __future__ import annotations

import math

import torch

from unweave._errors import UnweaveError, nearest

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def require_count(name: str, value: object, *, least: int = 1) -> int:
    """`value` as it is, if it is a whole number of at least `least`.

    Raises:
        UnweaveError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UnweaveError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def require_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> float:
    """`value` as a float, if it is a finite number with `value >= least`, `value > above` and `value <= most`.

    Raises:
        UnweaveError: If it is not.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number >= least and number > above and number <= most):
        bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf)
        wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise UnweaveError(f"{name} must be {wanted}, got {value!r}.")
    return number


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A real dtype from itself or from its name, with or without `torch.`.

    Raises:
        UnweaveError: If it is no real dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UnweaveError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(name, DTYPES)}.")
    return DTYPES[name]


def own_generator(seed: int | None) -> torch.Generator:
    """A CPU generator of its own, so that a seed gives the same draws on every device and whatever else runs.

    Args:
        seed: Where the stream starts. None: at a number drawn from torch's global state, so that
            `torch.manual_seed` repeats it.

    Raises:
        UnweaveError: If the seed is no whole number of 64 bits.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise UnweaveError(f"seed must be a whole number of at most 64 bits, or None, got {seed!r}.")
    return torch.Generator().manual_seed(seed)
