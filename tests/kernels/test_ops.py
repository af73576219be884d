"""The sparse products, their gradients and their gradients' gradients against dense float64 products."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from unweave._errors import UnweaveError
from unweave.kernels import cpu, gather_sum, reference, scatter_outer, sddmm, transpose

# Nothing that a fixture sets up is changed by an example.
many = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Case(NamedTuple):
    """Codes of n rows over m latents, a weight `(m, d)` and rows `(n, d)`, all float64."""

    indices: Tensor
    values: Tensor
    offsets: Tensor
    weight: Tensor
    rows: Tensor

    @property
    def row_of(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.rows)), self.offsets.diff())

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The codes as a matrix; entries of the same place add up."""
        values = self.values if values is None else values
        empty = torch.zeros(len(self.rows), len(self.weight), dtype=values.dtype)
        return empty.index_put((self.row_of, self.indices), values, accumulate=True)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.indices, self.values.to(dtype), self.offsets, self.weight.to(dtype), self.rows.to(dtype))


def make(counts: list[int], m: int, d: int, seed: int, *, repeated: bool = False, everywhere: bool = False) -> Case:
    """A case of which each row has a number of entries; `everywhere`: the last latent is on each row that has any."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for count in counts:
        if repeated:
            row = torch.randint(0, m, (count,), generator=generator)
        else:
            row = torch.randperm(m, generator=generator)[:count]
        if everywhere and len(row) and m - 1 not in row:
            row[-1] = m - 1
        chosen.append(row.sort().values)
    indices = torch.cat([*chosen, torch.empty(0, dtype=torch.int64)])
    offsets = torch.tensor([0, *(len(row) for row in chosen)]).cumsum(0)
    sizes = [(len(indices),), (m, d), (len(counts), d)]
    values, weight, rows = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return Case(indices, values, offsets, weight, rows)


@st.composite
def cases(draw) -> Case:
    m, d = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33, 130]))
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(0, m), st.just(m)), min_size=0, max_size=9))
    options = {"repeated": draw(st.booleans()), "everywhere": draw(st.booleans())}
    return make(counts, m, d, draw(st.integers(0, 2**32)), **options)


def check_values(case: Case, exact: Case) -> None:
    dense, (row_of, m) = exact.dense(), (exact.row_of, len(exact.weight))
    dtype = case.weight.dtype
    pairs = [
        (gather_sum(case.indices, case.values, case.offsets, case.weight), dense @ exact.weight),
        (sddmm(case.indices, case.offsets, case.rows, case.weight),
         (exact.rows @ exact.weight.T)[row_of, exact.indices]),
        (scatter_outer(case.indices, case.values, case.offsets, case.rows, m), dense.T @ exact.rows),
    ]  # fmt: skip
    for got, expected in pairs:
        assert got.dtype == dtype
        assert got.shape == expected.shape
        # The sizes of the largest sums, in which errors are relative.
        scale = 1 + expected.abs().max().item() if expected.numel() else 1
        tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)


@many
@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_products_equal_dense_ones(backend, case, dtype):
    check_values(case.to(dtype), case.to(dtype).to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    case = make([3, 0, 11, 1, 20], 20, 17, seed=0).to(dtype)
    check_values(case, case.to(torch.float64))


@many
@given(cases())
def test_transposed_entries_go_latent_by_latent_and_row_by_row(backend, case):
    m = len(case.weight)
    order, rows, offsets = transpose(case.indices, case.offsets, m)
    position = sorted(range(len(case.indices)), key=lambda e: (int(case.indices[e]), e))
    assert order.tolist() == position
    assert rows.tolist() == case.row_of[position].tolist()
    counts = torch.bincount(case.indices, minlength=m).tolist()
    assert offsets.diff().tolist() == counts
    assert offsets[0] == 0


def test_many_entries_are_transposed_in_parts(backend):
    """With many entries for each latent the compiled kernel divides the rows among threads."""
    n, m, k = 2100, 37, 100
    indices, offsets = torch.randint(0, m, (n * k,)), torch.arange(n + 1) * k
    order, rows, ends = transpose(indices, offsets, m)
    expected = indices.sort(stable=True).indices
    assert torch.equal(order, expected)
    assert torch.equal(rows, expected // k)
    assert torch.equal(ends.diff(), torch.bincount(indices, minlength=m))


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    values, weight, rows = (t.clone().requires_grad_() for t in (case.values, case.weight, case.rows))
    return values, weight, rows


@many
@given(cases(), st.integers(0, 2**32))
def test_gradients_equal_those_of_dense_products(backend, case, seed):
    case = case.to(torch.float32)
    m = len(case.weight)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        values, weight, rows = leaves(case.to(dtype))
        if dtype == torch.float32:
            made = [
                gather_sum(case.indices, values, case.offsets, weight),
                sddmm(case.indices, case.offsets, rows, weight),
                scatter_outer(case.indices, values, case.offsets, rows, m),
            ]
        else:
            dense = case.dense(values)
            made = [dense @ weight, (rows @ weight.T)[case.row_of, case.indices], dense.T @ rows]
        generator = torch.Generator().manual_seed(seed)
        loss = sum((t.tanh() * torch.randn(t.shape, generator=generator).to(dtype)).sum() for t in made)
        outcomes.append(torch.autograd.grad(loss, (values, weight, rows)))
    for got, expected in zip(*outcomes, strict=True):
        scale = 1 + expected.abs().max().item() if expected.numel() else 1
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0], [4, 4, 4], []], ids=str)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradients_of_gradients(counts):
    case = make(counts, 4, 3, seed=1)
    indices, offsets, m = case.indices, case.offsets, len(case.weight)
    values, weight, rows = leaves(case)
    products = [
        (lambda v, w: gather_sum(indices, v, offsets, w), (values, weight)),
        (lambda r, w: sddmm(indices, offsets, r, w), (rows, weight)),
        (lambda v, r: scatter_outer(indices, v, offsets, r, m), (values, rows)),
    ]
    for product, inputs in products:
        assert torch.autograd.gradcheck(product, inputs)
        assert torch.autograd.gradgradcheck(product, inputs)


def test_only_what_is_asked_for_gets_a_gradient():
    case = make([2, 0, 3], 4, 3, seed=1)
    for index in range(2):
        inputs = [case.values.clone(), case.weight.clone()]
        inputs[index].requires_grad_()
        gather_sum(case.indices, inputs[0], case.offsets, inputs[1]).sum().backward()
        assert inputs[index].grad is not None
        assert inputs[1 - index].grad is None


class Made(TorchDispatchMode):
    """Sizes of the tensors that something makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for made in result if isinstance(result, tuple) else [result]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.sizes.append(made.numel())
        return result


def test_no_row_is_copied_for_an_entry(backend):
    """pitfall_295, pitfall_297: neither `(nnz, d)` of gathered rows nor a second decoder is ever made."""
    n, m, d, k = 40, 30, 64, 20
    indices = torch.cat([torch.randperm(m)[:k].sort().values for _ in range(n)])
    offsets = torch.arange(n + 1) * k
    values, weight = torch.randn(n * k), torch.randn(m, d)
    made_of = reference if backend == "reference" else cpu  # what an operator does inside is hidden from a mode
    with torch.no_grad(), Made() as made:
        made_of.gather_sum(indices, values, offsets, weight)
        made_of.sddmm(indices, offsets, torch.randn(n, d), weight)
    assert m * d not in made.sizes
    assert max(made.sizes) <= n * d
    with torch.no_grad(), Made() as made:
        made_of.scatter_outer(made_of.transpose(indices, offsets, m), values, torch.randn(n, d))
    assert max(made.sizes) <= n * d


def test_places_beyond_32_bits(backend, tmp_path):
    """pitfall_300: rows of a weight of more than 2^31 elements, in a file that holds nothing but its last ones."""
    m, d = 2**31 // 64 + 1003, 64
    with (tmp_path / "weight").open("wb") as file:
        file.truncate(4 * m * d)
    weight = torch.from_file(str(tmp_path / "weight"), shared=True, size=m * d).view(m, d)
    weight[-3:] = torch.arange(3.0)[:, None] + 1
    indices, values = torch.tensor([0, m - 3, m - 1]), torch.tensor([5.0, 2.0, 3.0])
    offsets, x = torch.tensor([0, 2, 3]), torch.ones(2, d)
    assert gather_sum(indices, values, offsets, weight)[:, 0].tolist() == [2.0, 9.0]
    assert sddmm(indices, offsets, x, weight).tolist() == [0.0, 64.0, 192.0]


def test_layout_does_not_matter(backend):
    case = make([3, 0, 11, 1, 20], 20, 17, seed=0).to(torch.float32)
    strided = Case(*(torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0] for t in case))
    assert not any(t.is_contiguous() for t in strided)
    check_values(strided, case.to(torch.float64))
    transposed = case._replace(weight=case.weight.T.contiguous().T, rows=case.rows.T.contiguous().T)
    check_values(transposed, case.to(torch.float64))
    order = [transpose(c.indices, c.offsets, 20) for c in (strided, case)]
    assert all(torch.equal(*pair) for pair in zip(*order, strict=True))


@pytest.mark.parametrize("name", ["gather_sum", "sddmm", "scatter_outer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registered_as_pytorch_wants_it(backend, name, dtype):
    """Schema, gradients, meta tensors, and tracing with them, all by PyTorch's own checks."""
    case = make([3, 0, 5], 6, 4, seed=0).to(dtype)
    values, weight, rows = leaves(case)
    arguments = {
        "gather_sum": (case.indices, values, case.offsets, weight),
        "sddmm": (case.indices, case.offsets, rows, weight),
        "scatter_outer": (case.indices, values, case.offsets, rows, 6),
    }[name]
    operator = getattr(torch.ops.unweave, name).default
    outcome = torch.library.opcheck(operator, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_sums_are_fp32(backend, dtype):
    case = make([3, 0, 5], 6, 4, seed=0).to(torch.float32)
    values, weight, rows = leaves(case)
    plain = [
        gather_sum(case.indices, values, case.offsets, weight), sddmm(case.indices, case.offsets, rows, weight),
        scatter_outer(case.indices, values, case.offsets, rows, 6),
    ]  # fmt: skip
    with torch.autocast("cpu", dtype=dtype):
        # What a product before them leaves behind, next to an fp32 weight.
        half = rows @ torch.eye(4)
        assert half.dtype == dtype
        cast = [
            gather_sum(case.indices, values, case.offsets, weight), sddmm(case.indices, case.offsets, half, weight),
            scatter_outer(case.indices, values, case.offsets, half, 6),
        ]  # fmt: skip
        sum(t.sum() for t in cast).backward()
    for got, expected in zip(cast, plain, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=5e-2)
    assert [t.grad.dtype for t in (values, weight, rows)] == [torch.float32] * 3


def test_meta_tensors_give_shapes():
    case = make([3, 0, 5], 6, 4, seed=0)
    with FakeTensorMode() as mode:
        indices, values, offsets, weight, rows = (mode.from_tensor(t) for t in case)
        assert gather_sum(indices, values, offsets, weight).shape == (3, 4)
        assert sddmm(indices, offsets, rows, weight).shape == (8,)
        assert scatter_outer(indices, values, offsets, rows, 6).shape == (6, 4)
    meta = Case(*(t.to("meta") for t in case))
    made = gather_sum(meta.indices, meta.values, meta.offsets, meta.weight)
    assert made.device.type == "meta"
    assert made.shape == (3, 4)


def test_inside_of_torch_compile(backend):
    """One graph, forward and backward, without a compiler."""
    case = make([3, 0, 5], 6, 4, seed=0).to(torch.float32)

    def loss(values, weight, rows):
        decoded = gather_sum(case.indices, values, case.offsets, weight)
        dots = sddmm(case.indices, case.offsets, rows, weight)
        outer = scatter_outer(case.indices, values, case.offsets, rows, 6)
        return decoded.square().sum() + dots.square().sum() + outer.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (loss, compiled):
        inputs = leaves(case)
        result = function(*inputs)
        outcomes.append((result, *torch.autograd.grad(result, inputs)))
    for eager, traced in zip(*outcomes, strict=True):
        assert torch.equal(eager, traced)


INDICES, OFFSETS = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3])
VALUES, WEIGHT, ROWS = torch.ones(3), torch.ones(3, 4), torch.ones(2, 4)
GIVEN = {"i": INDICES, "v": VALUES, "o": OFFSETS, "w": WEIGHT, "x": ROWS}
BEYOND = "indices are out of range: not all are from 0 to 2"
FALLING = "offsets must rise from 0 to the number of indices, 3"
PRODUCTS = {
    "gather_sum": lambda i, v, o, w, x: gather_sum(i, v, o, w),
    "sddmm": lambda i, v, o, w, x: sddmm(i, o, x, w),
    "scatter_outer": lambda i, v, o, w, x: scatter_outer(i, v, o, x, len(w)),
    "transpose": lambda i, v, o, w, x: transpose(i, o, len(w)),
}
ALL = tuple(PRODUCTS)


@pytest.mark.parametrize(
    ("names", "changed", "message"),
    [
        (ALL, {"i": torch.tensor([0, 3, 1])}, BEYOND),
        (ALL, {"i": torch.tensor([0, -1, 1])}, BEYOND),
        (ALL, {"i": torch.tensor([0, 2**40, 1])}, BEYOND),
        (ALL, {"i": INDICES.int()}, "indices must be int64 of one dimension, not torch.int32 of 1"),
        (ALL, {"i": INDICES[None]}, "indices must be int64 of one dimension, not torch.int64 of 2"),
        (ALL, {"i": INDICES.double()}, "indices must be int64"),
        (ALL, {"o": torch.tensor([0, 2, 2])}, FALLING),
        (ALL, {"o": torch.tensor([0, 2, 4])}, FALLING),
        (ALL, {"o": torch.tensor([1, 2, 3])}, FALLING),
        (ALL, {"o": torch.tensor([-1, 2, 3])}, FALLING),
        (("gather_sum", "transpose"), {"o": torch.tensor([0, 5, 2, 3])}, FALLING),
        (ALL, {"o": OFFSETS.float()}, "offsets must be int64"),
        (ALL, {"o": OFFSETS[:0]}, "offsets has 0 elements"),
        (("sddmm", "scatter_outer"), {"o": torch.tensor([0, 1, 2, 3])}, "offsets has 4 elements, and 3 are needed"),
        (("gather_sum", "scatter_outer"), {"v": VALUES[:2]}, r"there are 3 indices and values of shape \(2,\)"),
        (("gather_sum", "scatter_outer"), {"v": VALUES[:, None]}, r"there are 3 indices and values of shape \(3, 1\)"),
        (("gather_sum", "scatter_outer"), {"v": VALUES.double()}, "values is torch.float64"),
        (("gather_sum", "sddmm"), {"w": WEIGHT.double()}, "weight is torch.float64"),
        (("sddmm",), {"x": ROWS.half()}, "grad is torch.float16"),
        (("scatter_outer",), {"x": ROWS.half()}, "x is torch.float16"),
        (("gather_sum",), {"v": VALUES.long(), "w": WEIGHT.long()}, "values is torch.int64"),
        (("sddmm",), {"x": ROWS.long(), "w": WEIGHT.long()}, "grad is torch.int64"),
        (("scatter_outer",), {"v": VALUES.long(), "x": ROWS.long()}, "values is torch.int64"),
        (("gather_sum", "sddmm"), {"w": WEIGHT[0]}, r"weight has the shape \(4,\)"),
        (("sddmm",), {"x": ROWS[:, :3]}, r"grad has the shape \(2, 3\), and \(\., 4\) was expected"),
        (("scatter_outer",), {"x": ROWS[0]}, r"x has the shape \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(backend, names, changed, message):
    arguments = GIVEN | changed
    for name in names:
        with pytest.raises(UnweaveError, match=rf"^{name}: .*{message}"):
            PRODUCTS[name](**arguments)


@pytest.mark.parametrize("moved", ["i", "v", "o", "w", "x"])
def test_tensors_on_different_devices_are_refused(moved):
    arguments = GIVEN | {moved: GIVEN[moved].to("meta")}
    uses = {"gather_sum": "ivow", "sddmm": "iowx", "scatter_outer": "ivox", "transpose": "io"}
    for name in ALL:
        if moved in uses[name]:
            with pytest.raises(UnweaveError, match=rf"^{name}: the tensors are on different devices"):
                PRODUCTS[name](**arguments)


def test_a_negative_number_of_latents_is_refused(backend):
    for product in (
        lambda m: transpose(INDICES[:0], OFFSETS[:1], m),
        lambda m: scatter_outer(INDICES[:0], VALUES[:0], OFFSETS[:1], ROWS[:0], m),
    ):
        with pytest.raises(UnweaveError, match="-1"):
            product(-1)
