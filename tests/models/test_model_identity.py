"""The same network has the same fingerprint everywhere, and another one has another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unweave import UnweaveError
from unweave.models.model_identity import SAMPLE, model_fingerprint


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 80), nn.BatchNorm1d(80), nn.Linear(80, 3))


def test_it_depends_on_what_the_network_is_and_not_on_where_it_lies() -> None:
    first = model_fingerprint(network())
    assert len(first) == 32
    assert model_fingerprint(network()) == first
    assert model_fingerprint(copy.deepcopy(network()).requires_grad_(False).eval()) == first


def test_every_change_of_a_matrix_a_type_or_a_name_shows() -> None:
    seen = {model_fingerprint(network())}
    changes = [
        lambda n: n[0].weight.data.mul_(1.0001),
        lambda n: n[2].bias.data.add_(1e-6),
        lambda n: n[1].running_mean.add_(1),
        lambda n: n[2].half(),
        lambda n: n.append(nn.Linear(3, 3)),
        lambda n: setattr(n[0], "weight", nn.Parameter(n[0].weight.detach().T.reshape(80, 100))),
    ]
    for change in changes:
        module = network()
        with torch.no_grad():
            change(module)
        seen.add(model_fingerprint(module))
    assert len(seen) == len(changes) + 1


def test_large_parameters_are_sampled_from_end_to_end() -> None:
    module = nn.Linear(1000, 1000, bias=False)
    seen = {model_fingerprint(module)}
    for at in ((0, 0), (999, 999)):
        with torch.no_grad():
            module.weight[at] += 1
        seen.add(model_fingerprint(module))
    assert len(seen) == 3
    assert module.weight.numel() > SAMPLE


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(UnweaveError, match="holds no values"):
        model_fingerprint(nn.Linear(3, 3, device="meta"))
