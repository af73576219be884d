"""The optimiser pass against `torch.optim.Adam` in float64, and what it does beside it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels import reference
from unweave.kernels.triton import adam_rows

MOMENTS = [torch.float32, torch.bfloat16]


def state(m, d, dtype=torch.float32):
    return torch.randn(m, d), torch.zeros(m, d, dtype=dtype), torch.zeros(m, d, dtype=dtype)


def in_float64(weight, grads, lr, betas, eps, unit):
    """torch's Adam, then renormalisation."""
    weight = weight.double().clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=lr, betas=betas, eps=eps)
    for grad in grads:
        weight.grad = grad.double()
        optimiser.step()
        if unit:
            norm = weight.detach().norm(dim=1, keepdim=True)
            weight.data /= torch.where(norm > 0, norm, 1.0)
    moments = optimiser.state[weight]
    return weight.detach(), moments["exp_avg"], moments["exp_avg_sq"]


def draw_slot(m, c):
    """Rows of a gradient of c rows, among them some that do not exist."""
    wrong = torch.tensor([-1, -5, c, c + 3, 2**40])
    return torch.where(torch.rand(m) < 0.5, wrong[torch.randint(0, 5, (m,))], torch.randint(-1, max(c, 1), (m,)))


def spread(grad, slot):
    """A gradient for each row: that of its slot, or 0."""
    padded = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
    return padded[torch.where((slot >= 0) & (slot < len(grad)), slot, len(grad))]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of 0 / 0 beyond the row with eps 0
@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(0, 6),
    d=st.sampled_from([1, 3, 16, 17, 40, 600]),
    c=st.sampled_from([None, 0, 1, 3]),
    unit=st.booleans(),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.999), (0.5, 0.9)]),
    clip=st.sampled_from([None, 0.25]),
    eps=st.sampled_from([1e-6, 0.0]),
    seed=st.integers(0, 2**32),
)
def test_equals_torch(device, close, m, d, c, unit, betas, clip, eps, seed):
    assume(c is None or eps > 0)  # a row that never had a gradient is 0 / eps
    torch.manual_seed(seed)
    weight, first, second = state(m, d)
    weight[:1] = 0
    slots = [torch.arange(m) if c is None else draw_slot(m, c) for _ in range(3)]
    grads = [torch.randn(m if c is None else c, d) for _ in range(3)]
    scaled = [spread(grad, slot) * (1.0 if clip is None else clip) for grad, slot in zip(grads, slots, strict=True)]
    expected = in_float64(weight, scaled, 0.01, betas, eps, unit)
    weight, first, second = (t.to(device) for t in (weight, first, second))
    factor = None if clip is None else torch.tensor(clip, device=device)
    image = weight.new_empty(m, d, dtype=torch.bfloat16)
    for step, (grad, slot) in enumerate(zip(grads, slots, strict=True), 1):
        adam_rows(
            weight, grad.to(device), first, second, lr=0.01, step=step, betas=betas, eps=eps, clip=factor,
            slot=None if c is None else slot.to(device), unit=unit, image=image,
        )  # fmt: skip
    for actual, wanted in zip((weight, first, second), expected, strict=True):
        close(actual, wanted)
    assert image.equal(weight.bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@settings(deadline=None, max_examples=30)
@given(
    m=st.integers(1, 40),
    d=st.sampled_from([1, 3, 37, 600]),
    moments=st.sampled_from(MOMENTS),
    some=st.booleans(),
    unit=st.booleans(),
    wrong=st.sampled_from([0.0, torch.nan, torch.inf]),
    seed=st.integers(0, 2**32),
)
def test_a_clip_that_is_nan_changes_nothing(device, m, d, moments, some, unit, wrong, seed):
    torch.manual_seed(seed)
    start = torch.randn(m, d), torch.randn(m, d).to(moments), torch.rand(m, d).to(moments), torch.randn(m, d).bfloat16()
    weight, first, second, image = (t.to(device, copy=True) for t in start)
    grad, slot = torch.randn(m, d, device=device), draw_slot(m, m).to(device) if some else None
    grad[0, 0] = wrong
    adam_rows(
        weight, grad, first, second, lr=0.1, step=3, clip=torch.tensor(torch.nan, device=device), slot=slot, unit=unit,
        image=image,
    )  # fmt: skip
    for before, after in zip(start, (weight, first, second, image), strict=True):
        assert after.cpu().equal(before)


def test_zero_rows_stay_zero_where_there_is_no_gradient(device):
    weight, first, second = (t.to(device) for t in state(3, 5))
    weight[1] = 0
    grad = torch.randn(3, 5, device=device)
    grad[1] = 0
    adam_rows(weight, grad, first, second, lr=0.1, step=1, unit=True)
    assert weight[1].tolist() == [0.0] * 5
    torch.testing.assert_close(weight.norm(dim=1).cpu(), torch.tensor([1.0, 0.0, 1.0]))


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


@settings(deadline=None, max_examples=30)
@given(
    m=st.integers(1, 40),
    d=st.sampled_from([1, 3, 37, 600]),
    step=st.sampled_from([1, 2, 1000, 2**31 - 1, 2**33 + 5]),
    some=st.booleans(),
    clip=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_bf16_moments_are_rounded_as_the_reference_rounds_them(device, m, d, step, some, clip, seed):
    """With numbers on which no float32 operation rounds, every bit is given by step and position."""
    torch.manual_seed(seed)
    start, *zeros = state(m, d, torch.bfloat16)
    weight, wanted = start.to(device, copy=True), start.clone()
    got, expected = [t.to(device, copy=True) for t in zeros], [t.clone() for t in zeros]
    factor = None if clip is None else torch.tensor(clip, device=device)
    for now in range(step, step + 3):
        grad, slot = torch.randint(-64, 65, (m, d)) / 64, draw_slot(m, m) if some else torch.arange(m)
        adam_rows(
            weight, grad.to(device), *got, lr=0.01, step=now, betas=(0.5, 0.75), clip=factor,
            slot=slot.to(device) if some else None,
        )  # fmt: skip
        reference.adam_rows(
            wanted, spread(grad, slot), *expected, lr=0.01, step=now, betas=(0.5, 0.75), eps=1e-8,
            grad_scale=1.0 if clip is None else clip, unit=False,
        )  # fmt: skip
        assert all(mine.cpu().equal(its) for mine, its in zip(got, expected, strict=True))
    torch.testing.assert_close(weight.cpu(), wanted, rtol=1e-5, atol=1e-5)
    if m * d > 100 and not some:
        assert (got[1].cpu() != (got[1].cpu() * 64).round() / 64).any()  # there was something to round


def test_bf16_moments_of_any_numbers_are_those_of_the_reference_up_to_one_step_of_bf16(device):
    """The reference may round in fp32 where the kernel does not, which seldom changes the upper half of the bits."""
    torch.manual_seed(0)
    start = torch.randn(50, 200), torch.randn(50, 200).bfloat16(), torch.rand(50, 200).bfloat16()
    grad = torch.randn(50, 200)
    got, expected = [t.to(device, copy=True) for t in start], [t.clone() for t in start]
    adam_rows(got[0], grad.to(device), got[1], got[2], lr=0.01, step=7)
    reference.adam_rows(
        expected[0], grad, expected[1], expected[2],
        lr=0.01, step=7, betas=(0.9, 0.999), eps=1e-8, grad_scale=1.0, unit=False,
    )  # fmt: skip
    for mine, its in zip(got[1:], expected[1:], strict=True):
        apart = (mine.cpu().view(torch.int16).int() - its.view(torch.int16).int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3


def one_step(device, m, d, step):
    torch.manual_seed(0)
    weight, first, second = (t.to(device) for t in state(m, d, torch.bfloat16))
    adam_rows(weight, torch.randn(m, d).to(device), first, second, lr=0.1, step=step)
    return weight, first, second


def test_bf16_moments_round_up_and_down_and_right_in_the_mean(device):
    """Three quarters of the way from one number to the next must become the next one three times out of four."""
    m, d = 30, 200
    weight, grad = torch.zeros(m, d, device=device), torch.zeros(m, d, device=device)
    first, second = (torch.full((m, d), 1.0, dtype=torch.bfloat16, device=device) for _ in range(2))
    decay = 1 - 2**-10  # 1 becomes 1 - 2^-10, three quarters of the way from 1 - 2^-8 to 1
    adam_rows(weight, grad, first, second, lr=0.0, step=1, betas=(decay, decay))
    shares = []
    for moment in (first, second):
        assert set(moment.flatten().tolist()) == {1 - 2**-8, 1.0}
        shares.append(float((moment == 1).float().mean()))
    assert all(abs(share - 0.75) < 0.03 for share in shares)
    both = float(((first == 1) & (second == 1)).float().mean())
    assert abs(both - 0.75**2) < 0.03  # the two moments round independently


def test_rounding_is_a_function_of_step_and_element(device):
    _, first, second = one_step(device, 3, 40, step=2)
    _, again, again_second = one_step(device, 3, 40, step=2)
    assert first.equal(again)
    assert second.equal(again_second)
    assert not first.equal(one_step(device, 3, 40, step=3)[1])


def test_a_bf16_step_uses_the_moments_before_rounding(device, close):
    torch.manual_seed(0)
    weight, first, second = (t.to(device) for t in state(3, 40))
    adam_rows(weight, torch.randn(3, 40).to(device), first, second, lr=0.1, step=1)
    close(one_step(device, 3, 40, step=1)[0], weight.cpu())


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
    slot = torch.arange(3, device=device)
    with pytest.raises(UnweaveError, match=r"^adam_rows: grad must have shape \(m=3, d=4\), got \(2, 4\)"):
        adam_rows(weight, weight[:2], first, second, lr=0.1, step=1)
    with pytest.raises(UnweaveError, match=r"^adam_rows: grad must have shape \(c, d=4\), got \(2, 3\)"):
        adam_rows(weight, weight[:2, :3], first, second, lr=0.1, step=1, slot=slot)
    with pytest.raises(UnweaveError, match=r"^adam_rows: slot must have shape \(m=3\), got \(2,\)"):
        adam_rows(weight, weight[:2], first, second, lr=0.1, step=1, slot=slot[:2])
    with pytest.raises(UnweaveError, match=r"^adam_rows: slot must be int64, got int32"):
        adam_rows(weight, weight[:2], first, second, lr=0.1, step=1, slot=slot.int())
    with pytest.raises(UnweaveError, match=r"^adam_rows: step counts from 1, got 0"):
        adam_rows(weight, weight, first, second, lr=0.1, step=0)
    with pytest.raises(UnweaveError, match=r"^adam_rows: betas must lie between 0 and 1"):
        adam_rows(weight, weight, first, second, lr=0.1, step=1, betas=(0.9, 1.0))
