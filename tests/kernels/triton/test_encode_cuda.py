"""Encoding on a GPU: what is selected, from fp32 and from bf16 products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Above, Largest, LargestOfBatch, LargestOfGroups, encode_cuda, reference, select

# Numpy, which the interpreter computes with, warns where infinite numbers are subtracted and multiplied.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def problem(device, n, m, d, seed=0, bias=0.3):
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((n, d), (m, d), (m,)))
    return x.to(device), (W / d**0.5).T.to(device), (bias * b).to(device)


@pytest.fixture(autouse=True)
def _on_these_kernels(monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "cuda")
    monkeypatch.setattr(encode_cuda, "_CHUNK_BYTES", 1 << 10)  # several chunks


def expected(x, W, b, spec):
    """In float64, by the plain selections."""
    pre = (x.double() @ W.double() + b.double()).cpu()
    match spec:
        case Largest():
            return select.largest(pre, spec)
        case LargestOfGroups():
            return select.largest_of_groups(pre, spec)
        case LargestOfBatch(budget):
            positive = select.above(pre, 0.0)
            return positive if len(positive.values) <= budget else select.largest_of_batch(positive, budget)
        case Above(bounds):
            return select.above(pre, bounds.cpu().double() if isinstance(bounds, torch.Tensor) else bounds)


@settings(deadline=None, max_examples=15)
@given(
    n=st.integers(1, 9),
    m=st.sampled_from([6, 30, 60]),
    d=st.sampled_from([1, 5, 16]),
    kind=st.sampled_from(["topk", "abs", "groups", "above", "vector", "batch"]),
    seed=st.integers(0, 2**32),
)
def test_selections_are_those_of_float64(device, n, m, d, kind, seed):
    x, W, b = problem(device, n, m, d, seed)
    spec = {
        "topk": Largest(3), "abs": Largest(4, magnitude=True), "groups": LargestOfGroups(3), "above": Above(0.2),
        "vector": Above(0.1 * torch.arange(m, device=device)), "batch": LargestOfBatch(2 * n),
    }[kind]  # fmt: skip
    got, wanted = kernels.encode_select(x, W, b, spec), expected(x, W, b, spec)
    assert got.counts.tolist() == wanted.counts.tolist()
    assert got.indices.tolist() == wanted.indices.tolist()
    torch.testing.assert_close(got.values.cpu().double(), wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [0.0, 10.0])
def test_what_rounding_moves_below_its_bound_is_kept(device, monkeypatch, bias):
    """`MARGIN` is what makes the difference; values are exact, in a room or counted."""
    monkeypatch.setattr(encode_cuda, "_CHUNK_BYTES", 1 << 20)
    x, W, b = problem(device, 60, 300, 48, bias=bias)
    spec = Above(0.0)
    wanted = expected(x, W, b, spec)
    kept = encode_cuda.above(x, W, b, 0.0, True, 60 * 300)
    filled = int(kept.counts.sum())
    offsets = torch.nn.functional.pad(kept.counts.cumsum(0), (1, 0))
    rows = reference.rows_of(offsets, filled)
    exact = x.double() @ W.double() + b.double()
    torch.testing.assert_close(kept.values[:filled].double(), exact[rows, kept.indices[:filled]], rtol=1e-5, atol=1e-5)
    assert not kept.values[filled:].any()

    def found():
        return kernels.encode_select(x, W, b, spec, precision="bf16").indices.tolist()

    assert found() == wanted.indices.tolist()
    monkeypatch.setattr(encode_cuda, "MARGIN", 0.0)
    assert found() != wanted.indices.tolist()


def test_what_has_no_room_is_left_out_and_counted(device):
    x, W, b = problem(device, 5, 30, 4)
    wanted = expected(x, W, b, Above(0.0))
    total = len(wanted.indices)
    for room in (0, 1, total - 1, total, total + 7):
        kept = encode_cuda.above(x, W, b, 0.0, False, room)
        assert kept.counts.tolist() == wanted.counts.tolist()
        assert kept.indices.tolist() == (wanted.indices.tolist() + [-1] * 7)[:room]


def test_a_shortlist_repairs_what_rounding_misordered(device, monkeypatch):
    monkeypatch.setattr(encode_cuda, "_CHUNK_BYTES", 1 << 20)
    x, W, b = problem(device, 40, 300, 48)
    exact = encode_cuda.largest(x, W, b, Largest(20), low=False)
    assert torch.equal(encode_cuda.largest(x, W, b, Largest(20), low=True).indices, exact.indices)
    monkeypatch.setattr(encode_cuda, "SPARE", 0)
    assert not torch.equal(encode_cuda.largest(x, W, b, Largest(20), low=True).indices, exact.indices)


def test_too_many_are_refused(device):
    x, W, b = problem(device, 20, 30, 4)
    with pytest.raises(kernels.TooDense):
        kernels.encode_select(x, W, b, Above(0.0), max_density=0.2)
    assert kernels.encode_select(x, W, b, Above(0.0), max_density=0.9).counts.sum() > 0


@pytest.mark.parametrize("spec", [Largest(2), LargestOfGroups(3), Above(0.0), LargestOfBatch(4)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_row_that_is_not_finite_is_named(device, spec, bad):
    x, W, b = problem(device, 6, 30, 4)
    x[4] = 0
    x[4, 1] = bad
    with pytest.raises(UnweaveError, match=r"^encode_select: pre-activations of row 4 are NaN or infinite"):
        kernels.encode_select(x, W, b, spec)


@pytest.mark.parametrize("spec", [Largest(2), LargestOfGroups(3), Above(0.0), LargestOfBatch(4)], ids=str)
def test_no_rows(device, spec):
    x, W, b = problem(device, 0, 30, 4)
    found = kernels.encode_select(x, W, b, spec)
    assert [len(column) for column in found] == [0, 0, 0]
