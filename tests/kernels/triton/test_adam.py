"""The optimiser pass against `torch.optim.Adam` in float64, and what it does beside it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import adam_rows


def state(m, d, dtype=torch.float32):
    return torch.randn(m, d), torch.zeros(m, d, dtype=dtype), torch.zeros(m, d, dtype=dtype)


def reference(weight, grads, lr, betas, eps, project, unit):
    """torch's Adam in float64 between projection and renormalisation."""
    weight = weight.double().clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=lr, betas=betas, eps=eps)
    for grad in grads:
        grad, row = grad.double(), weight.detach()
        if project:
            norm = row.square().sum(1, keepdim=True)
            grad = grad - (grad * row).sum(1, keepdim=True) / torch.where(norm > 0, norm, 1.0) * row
        weight.grad = grad
        optimiser.step()
        if unit:
            norm = weight.detach().norm(dim=1, keepdim=True)
            weight.data /= torch.where(norm > 0, norm, 1.0)
    moments = optimiser.state[weight]
    return weight.detach(), moments["exp_avg"], moments["exp_avg_sq"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of 0 / 0 beyond the row with eps 0
@settings(deadline=None, max_examples=20)
@given(
    m=st.integers(1, 6),
    d=st.sampled_from([1, 3, 16, 17, 40, 600]),
    project=st.booleans(),
    unit=st.booleans(),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.999), (0.5, 0.9)]),
    clip=st.sampled_from([None, 0.25]),
    eps=st.sampled_from([1e-6, 0.0]),
    seed=st.integers(0, 2**32),
)
def test_equals_torch(device, close, m, d, project, unit, betas, clip, eps, seed):
    # With d = 1 a projected gradient is nothing but rounding, which Adam makes as large as the learning rate.
    assume(not (project and d == 1))
    torch.manual_seed(seed)
    weight, first, second = state(m, d)
    weight[0] = 0
    grads = [torch.randn(m, d) for _ in range(3)]
    scaled = [grad * (1.0 if clip is None else clip) for grad in grads]
    expected = reference(weight, scaled, 0.01, betas, eps, project, unit)
    weight, first, second = (t.to(device) for t in (weight, first, second))
    factor = None if clip is None else torch.tensor(clip, device=device)
    image, squares = torch.empty(m, d, dtype=torch.bfloat16, device=device), torch.empty(m, device=device)
    for step, grad in enumerate(grads, 1):
        adam_rows(
            weight, grad.to(device), first, second, lr=0.01, step=step, betas=betas, eps=eps, clip=factor,
            project=project, unit=unit, image=image, squares=squares,
        )  # fmt: skip
    for actual, wanted in zip((weight, first, second), expected, strict=True):
        close(actual, wanted)
    assert image.equal(weight.bfloat16())
    close(squares, weight.cpu().double().square().sum(1))


def test_zero_rows_stay_zero_where_there_is_no_gradient(device):
    weight, first, second = (t.to(device) for t in state(3, 5))
    weight[1] = 0
    grad = torch.randn(3, 5, device=device)
    grad[1] = 0
    adam_rows(weight, grad, first, second, lr=0.1, step=1, project=True, unit=True)
    assert weight[1].tolist() == [0.0] * 5
    torch.testing.assert_close(weight.norm(dim=1).cpu(), torch.tensor([1.0, 0.0, 1.0]))


def test_a_projected_gradient_keeps_the_first_moment_orthogonal_to_the_row(device, close):
    weight, first, second = state(4, 30)
    row = weight.clone()
    weight, first, second = (t.to(device) for t in (weight, first, second))
    adam_rows(weight, torch.randn(4, 30, device=device), first, second, lr=0.1, step=1, project=True)
    close((first.cpu() * row).sum(1), torch.zeros(4), 1e-5)
    assert first.abs().sum() > 1


def test_the_image_rounds_to_nearest_even(device):
    halves = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -1 - 3 * 2**-8, 1.99999]  # between two neighbours, and just below 2
    weight = torch.tensor([[*halves, 1.0, 0.0, 3e-39, 3.3e38, 1 - 2**-12]], device=device)
    zeros, image = torch.zeros_like(weight), torch.empty_like(weight, dtype=torch.bfloat16)
    adam_rows(weight, zeros, zeros.clone(), zeros.clone(), lr=0.1, step=1, image=image)
    assert image.equal(weight.bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_no_bits_of_a_nan_round_to_a_number(device):
    """The NaN that a GPU makes has every bit of its mantissa set, and rounding up would make 0 of it."""
    weight = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000]], dtype=torch.int32).view(torch.float32).to(device)
    zeros, image = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bfloat16)
    adam_rows(weight, zeros, zeros.clone(), zeros.clone(), lr=0.1, step=1, image=image)
    assert image.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_nan_and_infinity_survive_rounding(device):
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], device=device)
    grad = torch.tensor([[0.0, 0.0, 0.0, torch.nan]], device=device)
    first = torch.tensor([[0.0, torch.inf, -torch.inf, 0.0]], device=device, dtype=torch.bfloat16)
    second, image = torch.zeros_like(first), torch.empty_like(first)
    adam_rows(weight, grad, first, second, lr=0.1, step=1, image=image)
    assert image.isnan().tolist() == weight.isnan().tolist() == [[True, True, True, True]]
    assert first.tolist()[0][:3] == [0.0, torch.inf, -torch.inf]
    assert first[0, 3].isnan()
    assert second[0, 3].isnan()


def one_step(device, m, d, seed, step):
    torch.manual_seed(0)
    weight, first, second = (t.to(device) for t in state(m, d, torch.bfloat16))
    adam_rows(weight, torch.randn(m, d, device=device), first, second, lr=0.1, step=step, seed=seed)
    return weight, first, second


def test_bf16_moments_round_up_and_down_and_right_in_the_mean(device):
    """Half a unit in the last place above 1 must become 1 and the next number, half of the time each."""
    m, d = 30, 200
    weight, grad = torch.zeros(m, d, device=device), torch.zeros(m, d, device=device)
    first, second = (torch.full((m, d), 1.0, dtype=torch.bfloat16, device=device) for _ in range(2))
    decay = 1 - 2**-10  # 1 becomes 1 - 2^-10, three quarters of the way from 1 - 2^-8 to 1
    adam_rows(weight, grad, first, second, lr=0.0, step=1, betas=(decay, decay), seed=3)
    shares = []
    for moment in (first, second):
        assert set(moment.flatten().tolist()) == {1 - 2**-8, 1.0}
        shares.append(float((moment == 1).float().mean()))
    assert all(abs(share - 0.75) < 0.03 for share in shares)
    both = float(((first == 1) & (second == 1)).float().mean())
    assert abs(both - 0.75**2) < 0.03  # the two moments round independently


def test_rounding_is_a_function_of_seed_step_and_element(device):
    _, first, second = one_step(device, 3, 40, seed=1, step=2)
    _, again, again_second = one_step(device, 3, 40, seed=1, step=2)
    assert first.equal(again)
    assert second.equal(again_second)
    assert not first.equal(one_step(device, 3, 40, seed=2, step=2)[1])
    assert not first.equal(one_step(device, 3, 40, seed=1, step=3)[1])


def test_a_bf16_step_uses_the_moments_before_rounding(device, close):
    torch.manual_seed(0)
    weight, first, second = (t.to(device) for t in state(3, 40))
    grad = torch.randn(3, 40, device=device)
    adam_rows(weight, grad, first, second, lr=0.1, step=1, seed=1)
    close(one_step(device, 3, 40, seed=1, step=1)[0], weight.cpu())


def test_wrong_arguments_are_named(device):
    weight, first, second = (t.to(device) for t in state(3, 4))
    with pytest.raises(UnweaveError, match=r"^adam_rows: second must be float32, got bfloat16"):
        adam_rows(weight, weight, first, second.bfloat16(), lr=0.1, step=1)
    with pytest.raises(UnweaveError, match=r"^adam_rows: weight must be float32, got bfloat16"):
        adam_rows(weight.bfloat16(), weight, first, second, lr=0.1, step=1)
    with pytest.raises(UnweaveError, match=r"^adam_rows: weight is written in place and must be contiguous"):
        adam_rows(weight.T, weight.T, first.T, second.T, lr=0.1, step=1)
    with pytest.raises(UnweaveError, match=r"^adam_rows: clip must have shape \(\), got \(1,\)"):
        adam_rows(weight, weight, first, second, lr=0.1, step=1, clip=torch.ones(1, device=device))
    with pytest.raises(UnweaveError, match=r"^adam_rows: step counts from 1, got 0"):
        adam_rows(weight, weight, first, second, lr=0.1, step=0)
    with pytest.raises(UnweaveError, match=r"^adam_rows: betas must lie between 0 and 1"):
        adam_rows(weight, weight, first, second, lr=0.1, step=1, betas=(0.9, 1.0))
