"""Linear layers as oneDNN computes them: with weights in its own layout, and with a GELU before the result is written.

PyTorch calls oneDNN too, but for `addmm` it first writes the bias over the whole output, and it lays the weights out
anew for each product. The operations used here are PyTorch's, though not public: they are taken only where they are
there and agree with the public ones on a small product, and everything runs without them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Then = Literal["none", "tanh"]
"""What is done to a product: nothing, or GELU in its tanh form."""

_ROWS = 512  # that a layout is chosen for; it is right for any number
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: Then = "none") -> Tensor:
    """`x @ weight.T + bias`, and perhaps a GELU; the weight, `(out, in)`, may be packed."""
    activation = ("none", "") if gelu == "none" else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation[0], [], activation[1])


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight `(out, in)` in oneDNN's layout: an opaque tensor for `linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


@functools.cache
def usable(dtype: torch.dtype) -> bool:
    """Whether the operations of this module exist and agree with PyTorch's public ones in that type."""
    if dtype not in _TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 48), (40, 48), (40,)))
    x, weight, bias = x.to(dtype), weight.div(7).to(dtype), bias.to(dtype)
    expected = F.linear(x.float(), weight.float(), bias.float())
    activated = F.gelu(expected, approximate="tanh")
    try:
        with torch.no_grad():
            pairs = [(linear(x, w, bias), expected) for w in (packed(weight), weight, weight.t().contiguous().t())]
            pairs += [(linear(x, packed(weight), bias, "tanh"), activated)]
            pairs += [(linear(x, packed(weight), None), expected - bias.float())]
    except (AttributeError, RuntimeError, TypeError):  # there is none, it takes other arguments, or not this type
        return False
    return all(
        got.shape == want.shape and torch.allclose(got.float(), want, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype])
        for got, want in pairs
    )


class _Linear(nn.Linear):
    """A linear layer whose weight may be packed; with a packed one there are no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) if runs_here(self, x) else super().forward(x)

    def with_gelu(self, x: Tensor) -> Tensor:
        """Its output behind a GELU in the tanh form, where it runs here."""
        return linear(x, self.weight, self.bias, "tanh")


@functools.cache
def _conv1d() -> tuple[type[nn.Module], type[nn.Module]]:
    """The linear layer of transformers' GPT-2, whose weight is `(in, out)`, and what takes its place."""
    from transformers.pytorch_utils import Conv1D

    class Transposed(Conv1D):
        """As `_Linear`. A packed weight is `(out, in)`."""

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self._rows(), self.bias) if runs_here(self, x) else super().forward(x)

        def with_gelu(self, x: Tensor) -> Tensor:
            return linear(x, self._rows(), self.bias, "tanh")

        def _rows(self) -> Tensor:
            return self.weight if self.weight.is_mkldnn else self.weight.t()

    return Conv1D, Transposed


def runs_here(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer that was changed here computes as oneDNN does; else as PyTorch, whatever became of its weight.

    A weight that is not packed is its owner's too, who may move it, give it another type, or turn autocast on.
    """
    weight = cast(Tensor, layer.weight)
    if weight.is_mkldnn:
        return True
    same = weight.dtype == x.dtype == torch.float32 and weight.device.type == x.device.type == "cpu"
    return same and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    return {nn.Linear: _Linear, **dict([_conv1d()])}


def use(module: nn.Module) -> None:
    """Let the linear layers of a model of transformers on a CPU run here, in place, with the weights that they have.

    In bf16 this gains nothing without packing: see `pack`.
    """
    for layer, kind in _layers(module):
        if layer.weight.dtype == torch.float32:
            layer.__class__ = kind


def pack(module: nn.Module, keep: set[int]) -> bool:
    """Replace weights in bf16 of a model of transformers on a CPU by packed ones, in place; the others are let go.

    Args:
        module: The model.
        keep: `id` of the parameters that are others' too, and stay. So do those that several modules share.

    Returns:
        Whether there were any.
    """
    shared = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    done = False
    for layer, kind in _layers(module):
        weight = layer.weight
        if weight.dtype == torch.bfloat16 and id(weight) not in keep and shared[id(weight)] == 1:
            data = weight.detach() if kind is _Linear else weight.detach().t()
            layer.weight = nn.Parameter(packed(data), requires_grad=False)
            layer.__class__ = kind
            done = True
    return done


def _layers(module: nn.Module) -> list[tuple[Any, type[nn.Module]]]:
    """The linear layers that are nothing else, whose type is one that can be used, and what takes their place."""
    kinds, layers = _kinds(), cast(Iterable[Any], module.modules())
    return [
        (layer, kinds[type(layer)])
        for layer in layers
        if type(layer) in kinds and layer.weight.device.type == "cpu" and usable(layer.weight.dtype)
        if layer.bias is None or layer.bias.is_contiguous()  # oneDNN takes it to be
    ]
