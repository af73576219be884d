"""The fused step on a pretended GPU: tensors without data, none of which may be anywhere else.

What needs data between two kernels raises an error there, and a tensor that is made on the CPU is noticed.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unweave.kernels import adam, dispatch, ordered
from unweave.objectives import L1, AuxK, Matryoshka, TargetL0
from unweave.sae import SAE, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, fused
from unweave.training.optimizer import Adam

D, M, N = 8, 40, 12


class OnOneDevice(TorchDispatchMode):
    """Refuses tensors elsewhere; single numbers may be, since a GPU gets these without waiting."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                assert tensor.device.type == "meta", (func, tensor.shape)
        return out


@pytest.fixture
def started(monkeypatch):
    """The kernels that are started, in place of running them."""
    from unweave.kernels.triton import launch

    kernels, require = [], launch.Arguments.require
    for name, module in list(sys.modules.items()):
        if name.startswith(str(launch.__package__)) and callable(getattr(module, "launch", None)):
            monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: kernels.append(kernel))
    for module in (adam, dispatch, ordered, fused):
        monkeypatch.setattr(module, "backend", lambda *_: "cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device

    def require_but_a_gpu(self, condition, problem):
        require(self, condition or "runs on CUDA devices" in problem, problem)

    monkeypatch.setattr(launch.Arguments, "require", require_but_a_gpu)
    return kernels


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("activation", "dense", "settings"),
    [
        (TopK(3), False, {}),
        (TopK(3), False, {"matryoshka": Matryoshka((0.3, 0.6))}),
        (ReLU(), False, {"sparsity": L1(0.5), "unit_norm": False}),
        (ReLU(), True, {"sparsity": L1(0.5), "unit_norm": False}),
        (JumpReLU(0.3, 0.5), False, {"sparsity": TargetL0(2), "moments": "bf16"}),
        (JumpReLU(0.3, 0.5), True, {"sparsity": TargetL0(2)}),
    ],
    ids=["topk", "matryoshka", "relu", "dense relu", "jumprelu", "dense jumprelu"],
)
def test_a_step_stays_on_its_device(started, activation, dense, settings, precision):
    config = SAEConfig(d_sae=M, activation=activation, precision=precision, auxk=AuxK(k=3), **settings)
    sae = SAE(D, M, activation).to("meta")
    assert fused.supports(config, sae)
    widths = () if config.matryoshka is None else (12, 24, M)
    step = fused.Fused(sae, config, widths, 3, torch.empty(3, dtype=torch.long, device="meta") if widths else None)
    step.dense, step.begun = dense, True
    parameters = dict(sae.named_parameters())
    optimizer = Adam(parameters, config.betas, torch.bfloat16 if config.moments == "bf16" else torch.float32)
    x, latents = torch.empty(N, D, device="meta"), torch.empty(5, device="meta", dtype=torch.long)
    with OnOneDevice(), torch.no_grad():
        made = step(x, latents, 0.3, None)
        clip = made.squares.sqrt().float()
        optimizer.step(made.grads, dict.fromkeys(parameters, 1e-3), grad_scale=clip, unit="W_dec")
    assert len(started) >= len(parameters)
