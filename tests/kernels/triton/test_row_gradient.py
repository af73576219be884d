"""What is done to a decoder's gradient row by row, against the same in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import finish_rows


def unit_rows(m, d):
    return torch.nn.functional.normalize(torch.randn(m, d))


def reference(grad, weight, along, project):
    grad = grad.double()
    if along is not None:
        grad = grad + along.double()[:, None] * weight.double()
    if project:
        grad = grad - (grad * weight.double()).sum(1, keepdim=True) * weight.double()
    return grad, grad.square().sum(1)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(0, 70),
    d=st.sampled_from([1, 3, 16, 17, 40, 600]),
    penalised=st.booleans(),
    project=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_the_formula(device, close, m, d, penalised, project, seed):
    torch.manual_seed(seed)
    grad, weight, along = torch.randn(m, d), unit_rows(m, d), torch.randn(m) if penalised else None
    wanted, squares = reference(grad, weight, along, project)
    # In the guard's margins, because it is written in place.
    got = grad.to(device).new_empty(m, d).copy_(grad)
    close(finish_rows(got, weight.to(device), None if along is None else along.to(device), project), squares)
    close(got, wanted)


@pytest.mark.parametrize("project", [False, True])
def test_wide_rows(device, close, project):
    grad, weight, along = torch.randn(3, 5000) / 70, unit_rows(3, 5000), torch.randn(3)
    wanted, squares = reference(grad, weight, along, project)
    got = grad.to(device, copy=True)
    close(finish_rows(got, weight.to(device), along.to(device), project), squares)
    close(got, wanted)


def test_without_anything_to_do_the_gradient_is_only_read(device, close):
    wide = torch.randn(5, 40, device=device)
    before, grad = wide.clone(), wide[:, 3:20]
    close(finish_rows(grad, None, None, False), grad.cpu().double().square().sum(1))
    assert wide.equal(before)


def test_a_projected_row_is_orthogonal_to_its_weight_whatever_was_added_along_it(device, close):
    grad, weight = torch.randn(4, 30), unit_rows(4, 30)
    weight[1] = 0  # a row without a direction loses nothing
    with_penalty, without = grad.to(device, copy=True), grad.to(device, copy=True)
    finish_rows(with_penalty, weight.to(device), torch.full((4,), 3.0, device=device), True)
    finish_rows(without, weight.to(device), None, True)
    close((with_penalty.cpu() * weight).sum(1), torch.zeros(4))
    close(with_penalty, without.cpu())
    assert without[1].cpu().equal(grad[1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(device, wrong):
    grad, weight = torch.randn(3, 20), unit_rows(3, 20).to(device)
    grad[1, 7] = wrong
    for project in (False, True):
        squares = finish_rows(grad.to(device, copy=True), weight, None, project)
        assert squares.isfinite().tolist() == [True, False, True]


def test_wrong_arguments_are_named(device):
    grad, along = torch.randn(3, 4, device=device), torch.ones(3, device=device)
    with pytest.raises(UnweaveError, match=r"^finish_rows: weight is needed for along and for project"):
        finish_rows(grad, None, None, True)
    with pytest.raises(UnweaveError, match=r"^finish_rows: weight is needed for along and for project"):
        finish_rows(grad, None, along, False)
    with pytest.raises(UnweaveError, match=r"^finish_rows: weight must have shape \(m=3, d=4\), got \(3, 3\)"):
        finish_rows(grad, grad[:, :3], None, True)
    with pytest.raises(UnweaveError, match=r"^finish_rows: along must have shape \(m=3\), got \(2,\)"):
        finish_rows(grad, grad, along[:2], False)
    with pytest.raises(UnweaveError, match=r"^finish_rows: grad must be float32, got bfloat16"):
        finish_rows(grad.bfloat16(), None, None, False)
    with pytest.raises(UnweaveError, match=r"^finish_rows: grad is written in place and must be contiguous"):
        finish_rows(grad[:, ::2], grad[:, ::2], along, False)
    with pytest.raises(UnweaveError, match=r"^finish_rows: grad has rows of 32769 elements; at most 32768 fit"):
        finish_rows(torch.ones(1, 32769, device=device), None, None, False)
