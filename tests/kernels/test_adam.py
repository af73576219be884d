"""One pass of Adam over rows, against `torch.optim.Adam`, and what it does beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unweave._errors import UnweaveError
from unweave.kernels import Largest, adam_rows, encode_select, screen
from unweave.kernels.cpu import make_images
from unweave.kernels.screen import Images, Screen

# Nothing that a fixture sets up is changed by an example.
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def zeros(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(weight, dtype=dtype), torch.zeros_like(weight, dtype=dtype)


@many
@given(
    m=st.integers(1, 9),
    d=st.sampled_from([1, 2, 3, 15, 16, 17, 64, 130]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.999), (0.5, 0.9), (0.0, 0.0)]),
    eps=st.sampled_from([1e-8, 1e-3]),
    grad_scale=st.sampled_from([1.0, 0.25, 0.0]),
    some=st.booleans(),
    unit=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_equals_torch(backend, m, d, betas, eps, grad_scale, some, unit, dtype, seed):
    """pitfall_158, pitfall_173: four steps, with gradients of all rows or only of some, those of the others being 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, d, generator=generator, dtype=dtype)
    expected = weight.double().clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=0.01, betas=betas, eps=eps)
    first, second = zeros(weight)
    for step in range(1, 5):
        rows = torch.randperm(m, generator=generator)[: torch.randint(0, m + 1, (), generator=generator)]
        slot = None
        if some:
            slot = torch.full((m,), -1)
            slot[rows] = torch.arange(len(rows))
        grad = torch.randn(len(rows) if some else m, d, generator=generator, dtype=dtype)
        adam_rows(
            weight, grad, slot, first, second,
            lr=0.01, betas=betas, eps=eps, step=step, grad_scale=grad_scale, unit=unit,
        )  # fmt: skip
        dense = grad if slot is None else torch.zeros(m, d, dtype=dtype).index_copy(0, rows, grad)
        expected.grad = dense.double() * grad_scale
        optimizer.step()
        if unit:
            expected.data /= expected.data.norm(dim=1, keepdim=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    moments = optimizer.state[expected]
    for got, wanted in ((weight, expected.detach()), (first, moments["exp_avg"]), (second, moments["exp_avg_sq"])):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, **tolerance)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_one_pass_makes_nothing_of_the_weights_size(target, moments):
    """pitfall_305: moments, update and normalisation go through the rows once, in place."""

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and all(result.data_ptr() != a.data_ptr() for a in (weight, grad, *both)):
                self.bytes = max(self.bytes, result.nbytes)
            return result

    weight, grad = torch.randn(300, 64), torch.randn(300, 64)
    both = zeros(weight, moments)
    with Largest() as largest:
        adam_rows(weight, grad, None, *both, **PLAIN, step=1, grad_scale=0.5, unit=True)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(300))
    assert largest.bytes <= weight.nbytes // 16


def test_a_row_of_zeros_survives_normalisation(backend):
    weight = torch.randn(3, 20)
    weight[1] = 0
    adam_rows(weight, torch.zeros(3, 20), None, *zeros(weight), step=1, unit=True, **PLAIN)
    torch.testing.assert_close(weight.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))


def test_the_gradients_layout_does_not_matter(backend):
    start, grad, outcomes = torch.randn(5, 17), torch.randn(5, 17), []
    for layout in (grad, grad.T.contiguous().T, torch.stack([grad, -grad], dim=-1)[..., 0]):
        weight = start.clone()
        adam_rows(weight, layout, None, *zeros(weight), step=1, **PLAIN)
        outcomes.append(weight)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_bf16_moments_are_rounded_alike_on_every_back_end(backend, monkeypatch):
    """With numbers on which no float32 operation rounds, every bit is given by step and position."""
    shape, outcomes = (13, 37), []
    grads = [torch.randint(-64, 65, shape).float() / 64 for _ in range(3)]
    for use_this in (True, False):
        if not use_this:
            monkeypatch.setenv("UNWEAVE_KERNELS", "reference")
        weight = torch.zeros(shape)
        first, second = zeros(weight, torch.bfloat16)
        for step, grad in enumerate(grads, 1):
            adam_rows(weight, grad, None, first, second, lr=0.01, betas=(0.5, 0.75), eps=1e-8, step=step)
        outcomes.append((first, second))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    assert (first.float() != first.float().mul(4).round().div(4)).any()  # there was something to round


def test_bf16_moments_are_those_of_fp32_up_to_rounding(backend):
    torch.manual_seed(3)
    start = torch.randn(40, 33)
    weights, moments = [start.clone(), start.clone()], [zeros(start), zeros(start, torch.bfloat16)]
    for step in range(1, 21):
        grad = torch.randn(40, 33)
        for weight, (first, second) in zip(weights, moments, strict=True):
            adam_rows(weight, grad, None, first, second, step=step, **PLAIN)
    assert moments[1][0].dtype == torch.bfloat16
    # Twenty roundings, each of at most 2^-8 of the moment, up or down.
    torch.testing.assert_close(moments[1][1].float(), moments[0][1], rtol=0.05, atol=0)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0.05 * 20 * PLAIN["lr"])


def test_stochastic_rounding_is_unbiased_where_the_nearest_sticks(backend):
    """A second moment that decays by a thousandth moves by less than half a unit of bf16: to the nearest, never."""
    weight = torch.zeros(64, 128)
    first, second = zeros(weight, torch.bfloat16)
    second.fill_(1.0)
    nearest = second.clone()
    steps = 500
    for step in range(1, steps + 1):
        adam_rows(weight, torch.zeros(64, 128), None, first, second, step=step, **PLAIN)
        nearest = (nearest.float() * 0.999).bfloat16()
    assert (nearest == 1).all()
    mean = second.double().mean().item()
    # Each of the steps moves an element by one unit of at most 2^-8 or not at all; over 8192 elements the mean's
    # standard deviation stays below sqrt(500 / 8192) * 2^-9 = 5e-4.
    assert abs(mean - 0.999**steps) < 2e-3
    assert second.float().std() > 1e-3  # elements differ, so positions are rounded independently


def test_each_step_and_each_moment_has_its_own_random_bits(backend):
    made = []
    for step in (1, 1, 2):
        weight = torch.zeros(16, 32)
        first, second = (t.fill_(1.0) for t in zeros(weight, torch.bfloat16))
        adam_rows(
            weight, torch.zeros(16, 32), None, first, second, step=step, lr=0.01, betas=(0.998, 0.998), eps=1e-8
        )  # both moments become 0.998, between the two bf16 numbers 0.99609375 and 1
        made.append((first, second))
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.equal(made[0][0], made[2][0])
    assert not torch.equal(made[0][0], made[0][1])
    for moment in made[0]:
        assert set(moment.unique().tolist()) == {0.99609375, 1.0}


KINDS = {"fp32": (False, False), "bf16": (True, False), "auto": (True, True)}


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("d", [1, 16, 37, 130])
def test_the_screen_is_that_of_the_new_rows(target, monkeypatch, precision, unit, d):
    monkeypatch.setattr(screen, "_fast_int8", lambda: True)
    monkeypatch.setattr(screen, "_NARROWEST", 1)
    weight, slot = torch.randn(9, d), torch.tensor([2, -1, 0, -1, 1, -1, -1, 3, -1])
    weight[3] = 0
    made = adam_rows(weight, torch.randn(4, d), slot, *zeros(weight), step=1, unit=unit, screen=precision, **PLAIN)
    assert made is not None
    fresh = Screen.room_for(weight, precision)
    make_images(weight, fresh.images)
    assert made.kind == fresh.kind
    for name, own in vars(fresh.images).items():
        other = getattr(made.images, name)
        assert (own is None) == (other is None), name
        assert own is None or torch.equal(own, other), name


@pytest.mark.parametrize("d", [1, 16, 37, 130])
def test_images_in_bf16_say_how_far_they_are_from_the_rows(target, d):
    weight = torch.randn(9, d) * 10.0 ** torch.arange(-4.0, 5.0)[:, None]
    weight[3] = 0
    images, exact = make_images(weight, Images.room_for(weight, "bf16")), weight.double()
    torch.testing.assert_close(images.norms.double(), exact.norm(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(images.half, weight.bfloat16())
    # Bounds that are too low by more than fp32's rounding would lose latents.
    error = (exact - images.half.double()).norm(dim=1)
    slack = 1e-5 * error + 2.0**-23 * exact.norm(dim=1)
    assert ((images.half_errors.double() - error).abs() <= slack).all()


def _undone(images):
    """Int8 images in units, with their dither taken off."""
    return images.bytes.double() - images.dither.double()


@pytest.mark.parametrize("d", [1, 16, 37, 130])
def test_images_in_int8_are_half_a_unit_from_the_rows(target, d):
    weight = torch.randn(9, d) * 10.0 ** torch.arange(-4.0, 5.0)[:, None]
    weight[3], weight[4] = 0, 1e-38 * torch.randn(d)
    images, scales = make_images(weight, Images.room_for(weight, "int8")), weight.double().abs().amax(1) / 126.5
    torch.testing.assert_close(images.norms.double(), weight.double().norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(images.byte_scales.double(), scales.clamp(min=1e-30), rtol=1e-6, atol=0)
    error = weight.double() / images.byte_scales.double()[:, None] - _undone(images)
    assert (error.abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("d", [1, 16, 37, 130])
def test_shifts_turn_products_of_bytes_into_those_of_images(target, d):
    x, w = torch.randn(2, 50, d).unbind()
    x[0], w[0], x[1], w[1] = 0, 0, 126.5, -126.5
    inputs = make_images(x, Images.room_for(x, "int8", inputs=True))
    encoder = make_images(w, Images.room_for(w, "int8"))
    assert torch.equal(inputs.dither, encoder.other_dither)
    assert torch.equal(encoder.dither, inputs.other_dither)
    assert not torch.equal(encoder.dither, inputs.dither)
    products = inputs.bytes.double() @ encoder.bytes.double().T
    shifted = products + inputs.byte_shifts.double()[:, None] + encoder.byte_shifts.double()
    assert ((shifted - _undone(inputs) @ _undone(encoder).T).abs() <= 1.01).all()  # each is rounded


def test_the_dither_is_nothing_that_data_are_made_of():
    """Of any seed that somebody may choose, and whatever the default dtype is."""
    before = torch.get_default_dtype()
    screen._dithers.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        dithers = torch.stack(screen._dithers(256))
    finally:
        torch.set_default_dtype(before)
        screen._dithers.cache_clear()
    assert dithers.dtype == torch.float32
    assert torch.equal(dithers, torch.stack(screen._dithers(256)))
    assert dithers.abs().max() <= 0.5
    drawn = torch.stack([torch.rand(1024, generator=torch.Generator().manual_seed(seed)) for seed in range(500)]) - 0.5
    assert (drawn.unflatten(1, (4, 256)) @ dithers.T).abs().max() < 6 * 256**0.5 / 12  # a deviation is a sixth of it


@pytest.mark.parametrize("value", [0.3, 1.0, 77.7])
def test_what_rounding_to_int8_changes_knows_nothing_of_the_row(target, value):
    """Without dither all columns of a row of equal numbers would be off by the same, and their errors add up."""
    d = 4096
    row = torch.full((1, d), value)
    row[0, 0] = 100
    images = make_images(row, Images.room_for(row, "int8"))
    error = (row.double() / images.byte_scales.double()[:, None] - _undone(images))[0]
    assert abs(error.mean()) < 4 * 12**-0.5 / d**0.5
    assert abs(error.std() - 12**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([error[1:], error[:-1]]))[0, 1]) < 4 / d**0.5


def test_the_reference_makes_no_screen(monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "reference")
    weight = torch.randn(3, 4)
    assert adam_rows(weight, torch.randn(3, 4), None, *zeros(weight), step=1, screen="bf16", **PLAIN) is None


def test_a_screen_serves_the_rows_it_was_made_of(target):
    weight = torch.randn(30, 20)
    made = adam_rows(weight, torch.randn(30, 20), None, *zeros(weight), step=1, unit=True, screen="bf16", **PLAIN)
    x, bias = torch.randn(7, 20), torch.zeros(30)
    found = encode_select(x, weight.T, bias, Largest(4), screen=made)
    assert all(torch.equal(*pair) for pair in zip(found, encode_select(x, weight.T, bias, Largest(4)), strict=True))


F, G = torch.ones(3, 4), torch.ones(2, 4)
SLOT = torch.tensor([0, -1, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": F[0]}, r"weight \(4,\)"),
        ({"first": F[:2]}, r"first \(2, 4\)"),
        ({"second": F[:, :3]}, r"second \(3, 3\)"),
        ({"first": F.bfloat16()}, "first .* torch.bfloat16 and second .* torch.float32"),
        ({"first": F.double(), "second": F.double()}, "torch.float64"),
        ({"first": F.half(), "second": F.half()}, "torch.float16"),
        ({"grad": G[:, :3]}, r"grad \(2, 3\)"),
        ({"slot": None}, r"grad \(2, 4\)"),
        ({"slot": SLOT[:2]}, "slot"),
        ({"slot": SLOT.int()}, "slot .*torch.int32"),
        ({"slot": torch.tensor([0, -1, 2])}, "slot .*out of range"),
        ({"slot": torch.tensor([0, -2, 1])}, "slot .*out of range"),
        ({"grad": G.double()}, "grad .*torch.float64"),
        ({"weight": F.long(), "grad": G.long(), "first": F.long(), "second": F.long()}, "torch.int64"),
        ({"weight": torch.ones(4, 3).T}, "weight .*contiguous"),
        ({"first": torch.ones(4, 3).T}, "first .*contiguous"),
        ({"second": torch.ones(4, 3).T}, "second .*contiguous"),
        ({"grad": G.to("meta")}, "different devices"),
        ({"first": F.to("meta")}, "different devices"),
        ({"slot": SLOT.to("meta")}, "different devices"),
        ({"step": 0}, "step"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(backend, changed, message):
    given = {"weight": F, "grad": G, "slot": SLOT, "first": F, "second": F, "step": 1} | changed
    arguments = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(UnweaveError, match=rf"^adam_rows: .*{message}"):
        adam_rows(**arguments, **PLAIN)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.device.type == "cpu":
            assert torch.equal(arguments[name], value)
