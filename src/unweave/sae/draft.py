"""An SAE between a file and its user: a shape without memory, the file's tensors, and the folds to do at the end.

A reader makes the SAE on PyTorch's `meta` device and gives the tensors that go into it, as they are mapped from the
file. Nothing is initialised at random, and what is mapped is copied once, so a file takes little more memory and time
than its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import is_own, own
from unweave.kernels import is_finite
from unweave.sae.activation_fns import Gated
from unweave.sae.pursuit import Pursuit
from unweave.sae.sae import SAE

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Draft:
    """What a reader returns.

    Attributes:
        sae: The SAE, on the meta device.
        tensors: What goes into it, by the names of its `state_dict`. `build` empties it, so that memory that is no
            longer needed is given back.
        where: The file, as errors call it.
        folds: What is done to the weights once they are there, in this order.
        stored_names: How the file calls tensors, where it matters for errors.
        kind: What the file calls its SAE, for errors; None: the class.
    """

    sae: SAE
    tensors: dict[str, Tensor]
    where: str
    folds: Sequence[Callable[[SAE], None]] = ()
    stored_names: dict[str, str] = field(default_factory=dict)
    kind: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the decoder, as it is stored."""
        return self.tensors[next(name for name in self.sae.state_dict() if name.startswith("W_dec"))].dtype

    @torch.no_grad()
    def build(self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> SAE:
        """The SAE with its weights, on a device, with nothing that learns.

        Args:
            dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.
            device: Where to put them.

        Raises:
            UnweaveError: If a tensor is missing, superfluous, of the wrong shape or type, or not finite, be it for the
                folds or for the range of `dtype`.
        """
        sae, expected = self.sae, self.sae.state_dict()
        self._check(expected)
        stored = self.dtype
        dtype = dtype or stored
        # Folds are not to round weights that are cast afterwards.
        wide = torch.promote_types(torch.promote_types(stored, dtype), torch.float32) if self.folds else dtype
        if isinstance(sae.activation, Pursuit) and not sae.apply_b_dec_to_input:
            self.tensors["b_dec"] = torch.zeros_like(self.tensors["b_dec"])  # SAELens leaves it out of both
        # Those first that are transposed, which takes the tensor twice for a moment.
        rows = {n: self.tensors.pop(n).T if n.startswith("W_enc") else self.tensors.pop(n) for n in expected}
        taken: set[int] = set()
        for name in sorted(rows, key=lambda name: rows[name].is_contiguous()):
            kept, tensor = torch.float32 if name == "threshold" else wide, rows[name]
            if tensor.dtype != kept or not is_own(tensor) or tensor.data_ptr() in taken:
                rows[name], finite = own(tensor, kept)
            else:
                finite = is_finite(tensor)
            taken.add(rows[name].data_ptr())
            cast = tensor.dtype != kept
            del tensor
            if name != "threshold" and not finite:
                or_large = f", or too large for {_short(kept)}" if cast else ""
                raise UnweaveError(f"{self._called(name)} in {self.where} holds values that are not finite{or_large}.")
        weights = {n: tensor.T if n.startswith("W_enc") else tensor for n, tensor in rows.items()}
        sae.load_state_dict(weights, assign=True)
        for name, buffer in sae.named_buffers():
            if buffer.is_meta:  # not part of files; zero by definition
                setattr(sae, name, torch.zeros(buffer.shape, dtype=wide))
        if sae.threshold is not None:
            sae.threshold.data.clamp_(min=0)  # codes are positive; below 0 training would differ from inference
        for fold in self.folds:
            fold(sae)
        if self.folds:
            self._cast(sae, dtype)
        return sae.to(device).requires_grad_(False)

    def _cast(self, sae: SAE, dtype: torch.dtype) -> None:
        """Cast what was folded, tensor by tensor, so that only one of them is there twice."""
        for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
            if name == "threshold":
                continue
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
            if not is_finite(tensor.T if name.startswith("W_enc") else tensor):
                stored = self._called(name)
                raise UnweaveError(f"{stored} in {self.where} is too large for {_short(dtype)} when it is folded.")

    def _called(self, name: str) -> str:
        return self.stored_names.get(name, name)

    def _check(self, expected: dict[str, Tensor]) -> None:
        for name, tensor in expected.items():
            called = self._called(name)
            if name not in self.tensors:
                raise UnweaveError(f"{self.where} lacks the tensor {called!r}.")
            found = self.tensors[name]
            if found.shape != tensor.shape:
                shapes = f"{tuple(found.shape)}, and its config says {tuple(tensor.shape)}"
                raise UnweaveError(f"{called} in {self.where} has the shape {shapes}.")
            if found.dtype not in DTYPES.values():
                raise UnweaveError(f"{called} in {self.where} is stored as {found.dtype}, which is none of {_NAMES}.")
        if extra := sorted(self.tensors.keys() - expected.keys()):
            kind = self.kind or f"{type(self.sae.activation).__name__} {type(self.sae).__name__}"
            raise UnweaveError(f"{self.where} holds the tensor {self._called(extra[0])!r}, which a {kind} has not.")


_NAMES = ", ".join(DTYPES)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_meta(make: Callable[[], SAE]) -> SAE:
    """An SAE without memory."""
    with torch.device("meta"):
        return make()


def rename_gate(tensors: dict[str, Tensor], where: str) -> None:
    """The gate's bias of a Gated SAE, which files call `b_gate`, under the name that it has in memory, in place."""
    if "b_gate" not in tensors:
        raise UnweaveError(f"{where} lacks the tensor 'b_gate', which {Gated.__name__} SAEs have.")
    if "b_enc" in tensors:
        raise UnweaveError(f"{where} holds the tensor 'b_enc', which a {Gated.__name__} SAE has not.")
    tensors["b_enc"] = tensors.pop("b_gate")
