"""Selection from the encoder product: every spec on every back-end, against sorting and against float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unweave._errors import UnweaveError
from unweave.kernels import (
    Above,
    Largest,
    LargestOfBatch,
    LargestOfGroups,
    Precision,
    Screen,
    Selection,
    TooDense,
    adam_rows,
    cpu,
    encode,
    encode_select,
    scratch,
    screen,
)

# Nothing that a fixture sets up is changed by an example.
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
# "auto" is int8 in these tests, whether or not this processor is fast at it.
PRECISIONS = ("fp32", "bf16", "auto")


@pytest.fixture(autouse=True)
def _int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_fast_int8", lambda: True)
    monkeypatch.setattr(screen, "_NARROWEST", 1)


class Problem(NamedTuple):
    x: torch.Tensor
    rows: torch.Tensor
    """The encoder latent by latent, `(m, d)`."""
    bias: torch.Tensor
    tile: int
    chunk: int
    coarsest: float
    """Rounding of inputs above which int8 gives way to bf16."""


CASES = (
    "plain", "whole numbers", "duplicated latents", "constant rows", "zeros", "denormals", "one huge latent",
    "rows of very different norm", "a large mean",
)  # fmt: skip


@st.composite
def problems(draw) -> Problem:
    n, m = draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 16, 30, 129, 300, 1030]))
    d = draw(st.sampled_from([1, 2, 7, 16, 17, 40, 70]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x, rows, bias = (torch.randn(s, generator=generator) for s in ((n, d), (m, d), (m,)))
    match draw(st.sampled_from(CASES)):
        case "whole numbers":  # every product is exact, so many are exactly equal
            x, rows, bias = x.round(), rows.round(), bias.round()
        case "duplicated latents":
            copied = torch.randint(0, m // 2 + 1, (m,), generator=generator)
            rows, bias = rows[copied], bias[copied]
        case "constant rows":
            rows, bias = rows[:1].expand(m, d).clone(), bias[:1].expand(m).clone()
        case "zeros":
            x, bias = x * 0, bias * draw(st.sampled_from([0, 1]))
        case "denormals":
            scale = draw(st.sampled_from([1e-40, 1e-30, 1e-20]))
            x, rows, bias = x * scale, rows * 1e-10, bias * 0
        case "one huge latent":
            rows[draw(st.integers(0, m - 1))] *= draw(st.sampled_from([1e3, 1e9, 1e15]))
        case "rows of very different norm":
            x = x * 10.0 ** torch.empty(n, 1).uniform_(-15, 15, generator=generator)
        case "a large mean":  # all latents that are alike cancel it, and the screen's error stays
            x = x + 1000
            rows = rows - rows.mean(1, keepdim=True)
    return Problem(
        x, rows, bias, draw(st.sampled_from([16_384, 100, 7])), draw(st.sampled_from([512, 2])),
        draw(st.sampled_from([screen._COARSEST, math.inf]))
    )  # fmt: skip


def select(problem: Problem, spec, **options) -> Selection:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "TILE", problem.tile)
        patch.setattr(encode, "CHUNK_ROWS", problem.chunk)
        patch.setattr(encode, "FUSED_ROWS", problem.chunk)
        patch.setattr(screen, "_COARSEST", problem.coarsest)
        return encode_select(problem.x, problem.rows.T, problem.bias, spec, **options)


def select_in_all(problem: Problem, spec) -> Selection:
    """The selection, which must not depend on the product's precision by a single bit."""
    found, *others = (select(problem, spec, precision=precision) for precision in PRECISIONS)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(found, other, strict=True))
    assert found.counts.dtype == found.indices.dtype == torch.int64
    assert found.values.dtype == problem.x.dtype
    return found


def all_of(problem: Problem) -> torch.Tensor:
    """Every pre-activation as the back-end computes it, close to what float64 says."""
    x, rows, bias = (t.double() for t in problem[:3])
    m, d = rows.shape
    found = select_in_all(problem, Largest(m))
    assert found.counts.tolist() == [m] * len(x)
    assert found.indices.tolist() == list(range(m)) * len(x)
    pre = found.values.view(len(x), m)
    # Each of d + 1 roundings is at most 2^-24 of the sum of absolute values so far; products below the smallest
    # normal number lose up to half of the smallest denormal.
    size = x.abs() @ rows.abs().T + bias.abs()
    worst = (d + 1) * torch.finfo(pre.dtype).eps / 2 * 1.01 * size + (d + 1) * 2.0**-149
    assert ((pre - (x @ rows.T + bias)).abs() <= worst).all()
    return pre


def check(selection: Selection, pre: torch.Tensor, chosen: list[list[int]]) -> None:
    """That a selection consists of the chosen latents, ascending, each with its own pre-activation, bit for bit."""
    assert selection.counts.tolist() == [len(row) for row in chosen]
    assert selection.indices.tolist() == [j for row in chosen for j in sorted(row)]
    expected = torch.cat([pre[i, sorted(row)] for i, row in enumerate(chosen)])
    assert torch.equal(selection.values, expected)


def best(values: list[float], k: int) -> list[int]:
    """Positions of the k largest; ties go to the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


@many
@given(problems(), st.integers(1, 1030), st.booleans())
def test_largest(backend, problem, k, magnitude):
    """pitfall_042: a constant row has k latents, not all of them."""
    pre = all_of(problem)
    k = min(k, pre.shape[1]) if k % 2 else min(1 + k % 20, pre.shape[1])  # every k, and often a small one
    selection = select_in_all(problem, Largest(k, magnitude))
    check(selection, pre, [best(row, k) for row in (pre.abs() if magnitude else pre).tolist()])


@many
@given(problems(), st.data())
def test_largest_of_groups(backend, problem, data):
    pre = all_of(problem)
    m = pre.shape[1]
    groups = data.draw(st.sampled_from([g for g in range(1, m + 1) if m % g == 0]))
    size = m // groups
    chosen = [
        [start + best(row[start : start + size], 1)[0] for start in range(0, m, size)] for row in pre.tolist()
    ]  # fmt: skip
    check(select_in_all(problem, LargestOfGroups(groups)), pre, chosen)


@many
@given(problems(), st.sampled_from(["scalar", "one of them", "everywhere", "nowhere", "vector"]), st.data())
def test_above(backend, problem, kind, data):
    """Strictly above: a pre-activation that equals its bound stays out."""
    pre = all_of(problem)
    m = pre.shape[1]
    place = st.integers(0, len(pre) - 1), st.integers(0, m - 1)
    match kind:
        case "one of them":
            bounds = pre[data.draw(place[0]), data.draw(place[1])].item()
        case "vector":
            bounds = pre[data.draw(place[0])].clone()
            bounds[data.draw(place[1])] = data.draw(st.sampled_from([0.0, math.inf, -math.inf]))
        case "scalar":
            bounds = data.draw(st.floats(-3, 3, width=32))
        case _:
            bounds = -math.inf if kind == "everywhere" else math.inf
    chosen = (pre > bounds).tolist()
    selection = select_in_all(problem, Above(bounds))
    check(selection, pre, [[j for j, above in enumerate(row) if above] for row in chosen])


@many
@given(problems(), st.integers(1, 7300), st.sampled_from([None, 1.0, 0.97, 1.5, 0.1, -1.0, 1e6, math.inf, math.nan]))
def test_largest_of_batch(backend, problem, budget, hint):
    """The hint, relative to the right value, changes nothing but the time."""
    pre = all_of(problem)
    m = pre.shape[1]
    flat = pre.flatten().tolist()
    budget = budget % pre.numel() + 1
    positive = [i for i in best(flat, budget) if flat[i] > 0]
    guess = None if hint is None else hint * (flat[positive[-1]] if positive else 1.0)
    chosen: list[list[int]] = [[] for _ in pre]
    for i in positive:
        chosen[i // m].append(i % m)
    check(select_in_all(problem, LargestOfBatch(budget, guess)), pre, chosen)


def test_one_row_may_hold_every_winner_of_a_batch(backend):
    """A token of large norm may take the whole batch's budget; a limit per row would miss its latents."""
    x, rows = torch.full((64, 1), 1e-3), torch.rand(200, 1) + 1
    x[17] = 100
    found = select_in_all(Problem(x, rows, torch.zeros(200), 100, 10, 0.02), LargestOfBatch(3 * 64))
    assert found.counts[17] == 192
    assert len(found.values) == 192


@pytest.mark.parametrize("hint", [None, 0.0, 1.0])
def test_winners_do_not_hold_the_other_candidates(backend, hint):
    x, W = torch.randn(64, 32), torch.randn(32, 300)
    found = encode_select(x, W, torch.zeros(300), LargestOfBatch(200, hint))
    assert len(found.values) == 200
    for column in (found.indices, found.values):
        assert column.untyped_storage().nbytes() <= 1.25 * 200 * column.element_size()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [Largest(3), LargestOfGroups(3), Above(0.25), LargestOfBatch(9)], ids=str)
def test_other_dtypes(dtype, spec):
    """Whole numbers, whose products are exact in each of them."""
    torch.manual_seed(1)
    x, rows, bias = torch.randn(4, 5).round(), torch.randn(12, 5).round(), torch.randn(12).round()
    expected = encode_select(x, rows.T, bias, spec)
    found = encode_select(x.to(dtype), rows.T.to(dtype), bias.to(dtype), spec)
    assert found.values.dtype == dtype
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(expected, found, strict=True))


EXTREMES = {
    "latents whose squared norm overflows": (1.0, 1e25, 1.0),
    "inputs whose squared norm overflows": (1e30, 1.0, 1.0),
    "inputs whose squared norm underflows": (1e-25, 1e10, 0.0),
    "latents whose squared norm underflows": (1e20, 1e-25, 0.0),
    "both": (1e-25, 1e25, 0.0),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
def test_norms_that_fp32_cannot_square(backend, extreme, mixed):
    of_x, of_rows, of_bias = EXTREMES[extreme]
    x, rows, bias = torch.randn(5, 24) * of_x, torch.randn(256, 24) * of_rows, torch.randn(256) * of_bias
    if mixed:
        x[1], x[2], rows[17], rows[40] = 0, torch.randn(24), torch.randn(24), 0
    problem = Problem(x, rows, bias, 100, 512, math.inf)
    pre = all_of(problem)
    for magnitude in (False, True):
        chosen = [best(row, 3) for row in (pre.abs() if magnitude else pre).tolist()]
        check(select_in_all(problem, Largest(3, magnitude)), pre, chosen)
    bound = pre.median().item()
    chosen = [[j for j, v in enumerate(row) if v > bound] for row in pre.tolist()]
    check(select_in_all(problem, Above(bound)), pre, chosen)
    chosen = [[64 * g + best(row[64 * g : 64 * g + 64], 1)[0] for g in range(4)] for row in pre.tolist()]
    check(select_in_all(problem, LargestOfGroups(4)), pre, chosen)


SPECS = [Largest(3), Largest(3, magnitude=True), LargestOfGroups(5), Above(2.5), LargestOfBatch(40)]


@pytest.mark.parametrize("spec", [*SPECS, Above(torch.full((40,), 2.5))], ids=repr)
def test_layout_does_not_matter(backend, spec):
    x, W, bias = torch.randn(9, 17), torch.randn(17, 40), torch.randn(40)
    spread = [torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for t in (x, W, bias)]
    assert not any(t.is_contiguous() for t in spread)
    if isinstance(spec, Above) and isinstance(spec.bounds, torch.Tensor):
        strided = Above(torch.stack([spec.bounds, torch.full_like(spec.bounds, math.nan)], dim=-1)[:, 0])
    else:
        strided = spec
    expected = encode_select(x, W, bias, spec)
    for layout in (spread, [x, W.T.contiguous().T, bias]):
        found = encode_select(*layout, strided)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_an_empty_batch_has_no_entries(backend, spec):
    found = encode_select(torch.empty(0, 6), torch.randn(6, 40), torch.randn(40), spec)
    assert [tuple(t.shape) for t in found] == [(0,)] * 3
    assert [t.dtype for t in found] == [torch.int64, torch.int64, torch.float32]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_widest_int8_rows_overflow_nothing(target, sign):
    """Rows of nothing but large bytes and large rests; UBSan sees sums that leave int32 (scripts/sanitize.sh)."""
    d = screen._WIDEST
    x, rows = torch.full((2, d), 0.12649), sign * torch.full((9, d), 0.12649)
    x[:, 0], rows[:, 0] = 0.127, sign * 0.127
    rows *= 1 + 1e-6 * torch.arange(9)[:, None]
    assert screen.kind_of("auto", d) == "int8"
    found, expected = (encode_select(x, rows.T, torch.zeros(9), Largest(3), precision=p) for p in ("auto", "fp32"))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def prepared(rows: torch.Tensor, precision: Precision) -> Screen:
    """Of rows that a step of the optimiser has just changed."""
    moments = torch.zeros_like(rows), torch.zeros_like(rows)
    made = adam_rows(
        rows, torch.randn_like(rows), None, *moments, lr=0.1, betas=(0.9, 0.999), eps=1e-8, step=1, screen=precision
    )
    assert made is not None
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_prepared_screen_gives_the_same(target, spec, precision):
    x, rows, bias = torch.randn(9, 20), torch.randn(40, 20), torch.randn(40)
    made = prepared(rows, precision)
    found, expected = encode_select(x, rows.T, bias, spec, screen=made), encode_select(x, rows.T, bias, spec)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_result_stays_when_the_next_is_computed(backend):
    """Buffers are used again, results are not."""
    x, W, bias = torch.randn(9, 20), torch.randn(20, 40), torch.randn(40)
    for spec in SPECS:
        found = encode_select(x, W, bias, spec)
        copies = [t.clone() for t in found]
        encode_select(-x, W, bias, spec)
        assert all(torch.equal(*pair) for pair in zip(found, copies, strict=True))


class Watch(TorchDispatchMode):
    """The bytes of the largest tensor that anything returns, and the sizes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        if func.overloadpacket.__name__ in ("mm", "addmm", "_int_mm", "_scaled_mm", "bmm", "baddbmm", "matmul"):
            self.products.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "spec", [Largest(3), LargestOfGroups(125), Above(9.0), LargestOfBatch(3000, hint=7.0)], ids=repr
)
def test_one_product_and_no_tensor_of_batch_times_latents(backend, monkeypatch, spec, precision):
    """pitfall_296, pitfall_304: nothing dense is searched for what is not 0, or sorted."""
    monkeypatch.setattr(encode, "TILE", 256)
    monkeypatch.setattr(scratch._pool, "buffers", {})  # what larger calls before this one have left
    n, d, m = 1300, 8, 1000
    x, W, bias = torch.randn(n, d), torch.randn(m, d).T, torch.randn(m)
    with Watch() as watch:
        found = encode_select(x, W, bias, spec, precision=precision)
    computed = sum(rows * columns for rows, columns in watch.products)
    if precision == "auto" and cpu.picks() and backend != "reference":
        assert computed == 0  # the kernels make int8 products themselves, and write down none
        assert watch.largest <= max(4 * n * m / 20, found.indices.nbytes)
        return
    if precision == "auto" and isinstance(spec, Largest):
        assert n * m <= computed <= 2 * n * m  # a chunk whose floor was guessed too high is computed again
        return
    assert computed == n * m
    chunks = math.ceil(n / encode.CHUNK_ROWS)
    if backend == "reference":
        assert len(watch.products) == chunks
        assert watch.largest <= 8 * encode.CHUNK_ROWS * m
    else:
        assert len(watch.products) == chunks * math.ceil(m / 256)
        assert watch.largest <= max(4 * encode.CHUNK_ROWS * 256, 4 * n * d, found.indices.nbytes)


def test_a_batch_without_a_hint_looks_at_a_few_rows_first(backend, monkeypatch):
    monkeypatch.setattr(cpu, "picks", lambda: False)
    with Watch() as watch:
        encode_select(torch.randn(1300, 8), torch.randn(8, 100), torch.randn(100), LargestOfBatch(3000))
    assert 1300 * 100 <= sum(rows * columns for rows, columns in watch.products) <= (1300 + 2 * 64) * 100


@pytest.mark.parametrize("fused", [False, True])
def test_too_dense_is_found_out_early(backend, monkeypatch, fused):
    monkeypatch.setattr(encode, "CHUNK_ROWS", 10)
    monkeypatch.setattr(encode, "FUSED_ROWS", 10)
    if not fused:
        monkeypatch.setattr(cpu, "picks", lambda: False)
    elif backend == "reference" or not cpu.picks():
        pytest.skip("this back-end makes no products itself")
    x, W, bias = torch.randn(60, 8), torch.randn(8, 200), torch.zeros(200)
    with Watch() as watch, pytest.raises(TooDense):
        encode_select(x, W, bias, Above(0.0), max_density=0.3)
    assert sum(rows * columns for rows, columns in watch.products) == (0 if fused else 10 * 200)
    found = encode_select(x, W, bias, Above(0.0), max_density=0.7)
    assert len(found.values) > 0.3 * 60 * 200
    # Only what the first rows show counts.
    x[:10] = 0
    assert encode_select(x, W, bias - 1e-3, Above(0.0), max_density=0.3).counts[:10].sum() == 0


BAD = (math.nan, math.inf, -math.inf)


def not_finite(where: str, row: int) -> str:
    """The message: of the pre-activations, or of the argument where that is looked at by itself."""
    argument = rf"{where} holds values that are NaN or infinite" + (f", the first in row {row}" * (where == "x"))
    return rf"^encode_select: (pre-activations of row {row} are NaN or infinite|{argument})\.$"


@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
@pytest.mark.parametrize("spec", [*SPECS, LargestOfBatch(40, hint=1.0), Above(math.inf)], ids=repr)
def test_pre_activations_that_are_not_finite_are_refused(backend, monkeypatch, spec, where):
    """Wherever the latent lies: in a whole vector, in the rest of a row, in the last tile."""
    monkeypatch.setattr(encode, "TILE", 37)
    monkeypatch.setattr(encode, "CHUNK_ROWS", 2)
    for bad, latent, precision in [(b, j, p) for b in BAD for j in (0, 20, 36, 89) for p in PRECISIONS]:
        x, W, bias = torch.randn(5, 6), torch.randn(6, 90), torch.randn(90)
        row = 0
        if where == "x":
            row = 3
            x[3, latent % 6] = bad
        elif where == "W_enc":
            W[latent % 6, latent] = bad
        else:
            bias[latent] = bad
        with pytest.raises(UnweaveError, match=not_finite(where, row)):
            encode_select(x, W, bias, spec, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("where", ["x", "W_enc"])
def test_no_kind_of_nan_becomes_a_number(backend, spec, precision, where):
    x, W = torch.randn(5, 16), torch.randn(40, 16)
    matrix, row = (x, 3) if where == "x" else (W, 0)
    matrix.view(torch.int32)[3, 5] = -1  # all bits set
    assert matrix[3, 5].isnan()
    with pytest.raises(UnweaveError, match=not_finite(where, row)):
        encode_select(x, W.T, torch.zeros(40), spec, precision=precision)


def test_pre_activations_that_overflow_are_refused(backend):
    with pytest.raises(UnweaveError, match="row 1 are NaN or infinite"):
        encode_select(torch.tensor([[1.0], [1e20]]), torch.tensor([[1e20]]), torch.zeros(1), Largest(1))


def f32(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, device=device)


@pytest.mark.parametrize(
    ("x", "W", "b", "spec", "message"),
    [
        (f32(3), f32(4, 5), f32(5), Largest(1), r"shapes that do not fit: \(3,\), \(4, 5\), \(5,\)"),
        (f32(3, 4), f32(5, 4), f32(5), Largest(1), r"shapes that do not fit: \(3, 4\), \(5, 4\), \(5,\)"),
        (f32(3, 4), f32(4, 5), f32(4), Largest(1), r"shapes that do not fit: \(3, 4\), \(4, 5\), \(4,\)"),
        (f32(3, 4).half(), f32(4, 5), f32(5), Largest(1), "x is torch.float16, W_enc torch.float32"),
        (f32(3, 4), f32(4, 5), f32(5).double(), Largest(1), "b_enc torch.float64"),
        (f32(3, 4).long(), f32(4, 5).long(), f32(5).long(), Largest(1), "torch.int64"),
        (f32(3, 4), f32(4, 5, device="meta"), f32(5), Largest(1), "different devices"),
        (f32(3, 4), f32(4, 5), f32(5), Largest(0), "k=0 is not between 1 and the number of latents, 5"),
        (f32(3, 4), f32(4, 5), f32(5), Largest(6), "k=6 is not between"),
        (f32(3, 4), f32(4, 5), f32(5), LargestOfGroups(2), "2 groups do not divide 5 latents"),
        (f32(3, 4), f32(4, 5), f32(5), LargestOfGroups(0), "0 groups"),
        (f32(3, 4), f32(4, 5), f32(5), LargestOfBatch(0), "a budget of 0 is not positive"),
        (f32(3, 4), f32(4, 5), f32(5), Above(f32(4)), r"bounds have the shape \(4,\), not \(5,\)"),
        (f32(3, 4), f32(4, 5), f32(5), Above(f32(5, device="meta")), "different devices"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(backend, x, W, b, spec, message):
    with pytest.raises(UnweaveError, match=f"^encode_select: .*{message}"):
        encode_select(x, W, b, spec)


@pytest.mark.parametrize(
    ("shape", "precision"), [((4, 4), "fp32"), ((6, 4), "bf16"), ((5, 3), "bf16"), ((4, 4), "auto"), ((5, 3), "auto")]
)
def test_the_screen_of_another_encoder_is_refused(target, shape, precision):
    """Its images would be read beyond their end."""
    made = prepared(torch.randn(shape), precision)
    with pytest.raises(UnweaveError, match=r"^encode_select: the screen is of another encoder, .* \(4, 5\)\.$"):
        encode_select(f32(3, 4), f32(5, 4).T, f32(5), Largest(1), screen=made)
