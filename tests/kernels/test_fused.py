"""Int8 products that the kernels make themselves, and pick candidates from: as exact as products that PyTorch makes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.kernels import (
    Above,
    Largest,
    LargestOfBatch,
    LargestOfGroups,
    Selection,
    Spec,
    TooDense,
    cpu,
    encode,
    encode_select,
    screen,
)
from unweave.kernels.collector import Collector
from unweave.kernels.cpu import make_images
from unweave.kernels.screen import Images, Screen, Screening

many = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Around the sizes of a tile, 12 rows and 32 latents, and of four bytes and a vector of them.
ROWS, WIDTHS = (1, 2, 11, 12, 13, 25), (1, 2, 3, 4, 5, 63, 64, 65, 130, 257)
LATENTS = (1, 2, 16, 31, 32, 33, 97, 300, 1030)


@pytest.fixture(autouse=True)
def _fused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_fast_int8", lambda: True)
    monkeypatch.setattr(screen, "_NARROWEST", 1)
    monkeypatch.setattr(screen, "_COARSEST", torch.inf)
    if not cpu.picks():
        pytest.skip("for this instruction set PyTorch makes the products")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each selection is of, those that are made again among them."""
    rows: list[int] = []
    collector = Collector.__init__

    def watched(self: Collector, n: int) -> None:
        rows.append(n)
        collector(self, n)

    monkeypatch.setattr(Collector, "__init__", watched)
    return rows


def both(x: Tensor, W: Tensor, bias: Tensor, spec: Spec) -> Selection:
    """What is found with the kernels' own products, which must be what PyTorch's lead to, bit for bit."""
    found = encode_select(x, W, bias, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "picks", lambda: False)
        expected = encode_select(x, W, bias, spec)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return found


def specs(m: int, values: Tensor) -> list[Spec]:
    divisor = next(g for g in (7, 5, 3, 2, 1) if m % g == 0)
    return [
        Largest(1), Largest(m), Largest((m + 3) // 4), Largest((m + 9) // 10, magnitude=True),
        LargestOfGroups(divisor), LargestOfGroups(m // divisor), LargestOfGroups(1), LargestOfGroups(m),
        Above(values.median().item()), Above(values[torch.arange(m) % len(values)]),
        Above(-torch.inf), Above(torch.inf), LargestOfBatch(max(1, len(values) // 10)),
    ]  # fmt: skip


CASES = (
    "plain", "zeros", "zero rows", "whole range", "duplicates", "tiny", "denormals", "huge", "one huge latent",
    "too huge for int8", "norms apart", "biased",
)  # fmt: skip


@many
@given(
    st.sampled_from(ROWS), st.sampled_from(WIDTHS), st.sampled_from(LATENTS), st.sampled_from(CASES),
    st.sampled_from([2, 24, 2048]), st.integers(0, 2**32),
)  # fmt: skip
def test_the_same_as_from_products_of_pytorch(n, d, m, case, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((n, d), (m, d), (m,)))
    match case:
        case "zeros":
            x, rows, bias = x * 0, rows * 0, bias * 0
        case "zero rows":
            x[::2], rows[::3] = 0, 0
        case "whole range":  # every byte is 127 or -127, all of one sign in the first rows
            x, rows = x.sign(), rows.sign()
            x[0], rows[0], rows[-1] = 1, 1, -1
        case "duplicates":
            rows, bias = rows[torch.arange(m) % (m // 4 + 1)], bias[torch.arange(m) % (m // 4 + 1)]
        case "tiny":
            x, rows, bias = x * 1e-12, rows * 1e-12, bias * 1e-24
        case "denormals":
            x, rows, bias = x * 1e-40, rows * 1e-3, bias * 1e-42
        case "huge":
            x, rows = x * 1e14, rows * 1e14
        case "one huge latent":
            rows[seed % m] *= 1e12
        case "too huge for int8":  # the bound on what products give leaves fp32, the products do not
            x, rows = x * 1e17, rows * 1e17
        case "norms apart":
            x = x * 10.0 ** torch.empty(n, 1).uniform_(-12, 12, generator=generator)
        case "biased":
            bias = bias * 1e4
    values = encode_select(x, rows.T, bias, Largest(m), precision="fp32").values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "FUSED_ROWS", chunk)
        for spec in specs(m, values):
            both(x, rows.T, bias, spec)


@pytest.mark.parametrize("d", [256, 1021])
def test_floors_rise_many_times(d):
    """Latents in rising and in falling order: every tile has new winners, or none has."""
    x, rows = torch.randn(40, d).abs(), torch.rand(5000, d).sort(dim=0).values
    for ordered in (rows, rows.flip(0)):
        for spec in (Largest(32), Largest(700), LargestOfGroups(10), Above(x.sum(1).mean().item() / 2)):
            both(x, ordered.T, torch.zeros(5000), spec)


@pytest.mark.parametrize("lift", [1e2, 1e4, 1e7])
def test_fewer_than_k_latents_lie_far_above_the_others(lift):
    """Halving what lies between the picks has to go on until the others are told apart."""
    x, rows, bias = torch.randn(30, 256), torch.randn(5000, 256) / 16, torch.zeros(5000)
    bias[::1000] = lift
    for magnitude in (False, True):
        found = both(x, rows.T, bias, Largest(32, magnitude))
        assert torch.isin(torch.arange(0, 5000, 1000), found.indices[:32]).all()


@many
@given(
    st.sampled_from([1024, 1030, 1055, 2100]), st.sampled_from([1, 3, 30, 900, 1024]), st.booleans(),
    st.sampled_from(["long", "lengths", "rounded", "hidden by their bias"]), st.integers(1, 40), st.integers(0, 2**32),
)  # fmt: skip
def test_outliers_are_selected_like_all_others(m, k, magnitude, kind, count, seed):
    """Latents far longer than most, or changed far more by rounding, leave the floors of TopK to the others."""
    generator = torch.Generator().manual_seed(seed)
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((14, 70), (m, 70), (m,)))
    far = torch.randperm(m, generator=generator)[:count]
    match kind:
        case "long":
            rows[far] *= 100
        case "lengths":
            rows *= 10.0 ** torch.linspace(0, 2, m)[:, None] ** 3
        case "rounded":  # one large element takes the range of the bytes
            rows[far] *= 0.01
            rows[far, 0] = rows.norm(dim=1).mean()
        case "hidden by their bias":
            rows[far], bias[far] = rows[far] * 100, -1000.0
    both(x, rows.T, bias, Largest(k, magnitude))


class _Row(ctypes.Structure):  # csrc/candidates.h
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "room", "certain"))]
    _fields_ += [("floor", ctypes.c_float), ("finite", ctypes.c_bool)]


class _Collector(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("rows", ctypes.POINTER(_Row))]


@pytest.mark.parametrize("length", [1, 4, 1000])
def test_an_outlier_leaves_few_others_in_question(monkeypatch, length):
    """With the slack of a latent of a thousand times the length, none would ever be out of it."""
    counts: list[int] = []
    call = cpu.call

    def watched(name, *arguments):
        if name == "finish_topk":
            collector = ctypes.cast(arguments[0], ctypes.POINTER(_Collector)).contents
            counts.extend(collector.rows[i].count for i in range(collector.n))
        return call(name, *arguments)

    monkeypatch.setattr(cpu, "call", watched)
    x, rows = torch.randn(50, 512), torch.randn(4000, 512)
    rows[1234] *= length
    encode_select(x, rows.T, torch.zeros(4000), Largest(16))
    assert len(counts) == 50
    assert max(counts) < 200, max(counts)


@pytest.mark.parametrize("own_products", [True, False])
def test_only_rows_with_a_wrong_guess_are_computed_again(monkeypatch, made, own_products):
    """Floors that are put where they are seen are too high for some rows."""
    monkeypatch.setattr(encode, "_GUESS", 0.0)
    if not own_products:
        monkeypatch.setattr(cpu, "picks", lambda: False)
    x, rows = torch.randn(300, 100), torch.randn(400, 100)
    expected = encode_select(x, rows.T, torch.zeros(400), Largest(5), precision="fp32")
    made.clear()
    found = encode_select(x, rows.T, torch.zeros(400), Largest(5))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert made == [300, made[1]]
    assert 0 < made[1] < 300


def test_what_was_guessed_hardly_ever_fails(made):
    x, rows = torch.randn(2000, 256), torch.randn(1000, 256)
    encode_select(x, rows.T, torch.zeros(1000), Largest(8))
    assert made[0] == 2000
    assert sum(made[1:]) < 10


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.998, 1.0])
@pytest.mark.parametrize("magnitude", [False, True])
def test_what_other_rows_reach_only_decides_how_fast_it_is(made, share, magnitude):
    """Rows begin at what the first ones reach, for their length; some rows reach far less."""
    x, rows, bias = torch.randn(3000, 40), torch.randn(600, 40), 0.1 * torch.randn(600)
    rows[:, 20:] = 0
    x[torch.rand(3000) < share, :20] *= 0.2
    expected = encode_select(x, rows.T, bias, Largest(5, magnitude), precision="fp32")
    made.clear()
    found = encode_select(x, rows.T, bias, Largest(5, magnitude))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert sum(made) < 3000 + 60, made
    assert (sum(made) > 3000 + 5) == (share == 0.002), made  # so few were not among the first


@pytest.mark.parametrize("inputs", ["normal", "equal", "few values", "one large", "a latent's own"])
def test_slacks_hold_whatever_the_inputs_are(inputs):
    """By far, and they are not wider than they need be: nothing is nearer to the slack than a few deviations."""
    d = 768
    x, W = torch.randn(200, d), torch.randn(500, d)
    match inputs:
        case "equal":
            x[:], W[:, :] = torch.rand(200, 1), torch.rand(500, 1)
            x[:, 0], W[:, 0] = 1.0, 1.5
        case "few values":
            x, W = torch.randint(-2, 3, x.shape) * 0.37, torch.randint(-2, 3, W.shape) * 0.41
        case "one large":
            x[:, 5] = 30
        case "a latent's own":
            x = W[:200] * torch.rand(200, 1)
    made = Screen.room_for(W, "auto")
    assert made.kind == "int8"
    make_images(W, made.images)
    screening = Screening(made, make_images(x, Images.room_for(x, "int8", inputs=True)), x, W, torch.zeros(500))
    buffer = torch.empty(200 * 500, dtype=torch.int32)
    products = screening.products(slice(0, 200), slice(0, 500), buffer).double()
    products += screening.inputs.byte_shifts[:, None] + screening.images.byte_shifts
    seen = products * screening.inputs.byte_scales.double()[:, None] * screening.images.byte_scales
    errors = (x.double() @ W.double().T - seen).abs()
    a, b = screening.by_norm[:, None] * screening.images.norms, screening.by_error[:, None] * screening.errors
    used = errors / (torch.maximum(a, b) + screening.of_smaller * torch.minimum(a, b))
    assert used.max() < 0.7
    assert 0.05 < used.square().mean().sqrt() < 0.2  # one deviation is 0.11; of equal columns all errors are one draw


def test_layout_of_inputs():
    x, W = torch.randn(70, 40)[::2, ::2], torch.randn(40, 600)[::2, ::2]
    assert not x.is_contiguous()
    found = both(x, W, torch.randn(600)[::2], Largest(9))
    assert found.indices.shape == (35 * 9,)


@pytest.mark.parametrize("spec", [Largest(20), Largest(20, True), LargestOfGroups(35), Above(15.0)], ids=repr)
def test_threads(spec):
    """More parts than threads, and as many; the rows of a part are never a multiple of those of a tile."""
    x, W, bias = torch.randn(2500, 130), torch.randn(700, 130).T, torch.randn(700)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(encode_select(x, W, bias, spec))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_too_dense_after_some_of_the_latents(monkeypatch):
    """The first rows are looked at in parts, so that few candidates are gathered in vain."""
    monkeypatch.setattr(encode, "FIRST_TILE", 100)
    seen: list[range] = []
    pick = Collector.pick

    def watched(self, what, latents, *rest):
        seen.append(latents)
        pick(self, what, latents, *rest)

    monkeypatch.setattr(Collector, "pick", watched)
    x, W, bias = torch.randn(50, 30), torch.randn(1000, 30).T, torch.zeros(1000)
    with pytest.raises(TooDense):
        encode_select(x, W, bias, Above(0.0), max_density=0.3)
    assert seen == [range(100)]
    assert encode_select(x, W, bias, Above(0.0), max_density=0.7).counts.sum() > 0.4 * 50 * 1000
    assert seen[1:] == [range(i, i + 100) for i in range(0, 1000, 100)]
