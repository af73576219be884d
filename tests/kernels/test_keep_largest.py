"""The k largest positive values of each row, as AuxK takes them from its dense tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave.kernels import cpu

many = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(values: torch.Tensor, k: int) -> torch.Tensor:
    order = values.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = torch.zeros_like(values).scatter(1, order, values.gather(1, order))
    return kept.clamp(min=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@many
@given(data=st.data())
def test_the_largest_positive_ones_stay_and_the_first_of_equals(target, dtype, data):
    n, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # Few different values, so that many are equal; some rows have fewer than k positive ones, or none.
    values = torch.randint(-3, data.draw(st.integers(-2, 9)), (n, width), generator=generator)
    scale = data.draw(st.sampled_from([1.0, -1.0, 1e-40, 1e30]))  # zeros of both signs, denormals
    values = (values * scale).to(dtype)
    made = values.clone()
    cpu.keep_largest_(made, k)
    assert torch.equal(made, expected(values, k))  # -0 equals 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_any_size(target, dtype):
    sizes = 10.0 ** torch.arange(-30, 34)[:, None]
    values = (torch.randn(64, 1229, generator=torch.Generator().manual_seed(0)) * sizes).to(dtype)
    made = values.clone()
    cpu.keep_largest_(made, 384)
    assert torch.equal(made, expected(values, 384))
