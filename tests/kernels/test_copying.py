"""Vectors and matrices are copied, turned and widened bit by bit, out of memory and files, and what is not finite is
found wherever it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.kernels import Mapped, copy_checked, copying

FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BAD = [float("nan"), float("inf"), -float("inf")]


@contextmanager
def in_file(tensor: Tensor, start: int = 5) -> Iterator[Mapped]:
    """A file with the memory of a tensor, behind some other bytes."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * start + whole.view(torch.uint8).numpy().tobytes())
        file.flush()
        before = tensor.data_ptr() - whole.data_ptr()
        yield Mapped(file.fileno(), start + before, lambda _: None)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-7, 4, shape, generator=generator)  # with zeros and subnormal numbers of float16
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@FEW
@given(
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()),
    st.data(),
)
def test_a_copy_is_equal_whatever_the_shape(backend, shape, stored, wanted, layout, data):
    """pitfall: blocks at the edges are smaller, and the only value that is not finite may be in any of them."""
    top, left, turned, narrow = layout
    whole = random(shape, stored, data.draw(st.integers(0, 2**31)))
    source = whole[top:, left:].T if turned else whole[top:, left:]
    target = torch.full((source.shape[0], source.shape[1] + 3 * narrow), -7, dtype=wanted)
    place = target[:, : source.shape[1]]
    expected = source.to(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_BLOCK", (20, 30))
        patch.setattr(copying, "_PIECE", 40)
        assert copy_checked(source, place) == expected.isfinite().all()
        assert torch.equal(place, expected)
        place.zero_()
        with in_file(source) as mapped:
            copy_checked(source, place, mapped)
        assert torch.equal(place, expected)
        assert (target[:, source.shape[1] :] == -7).all()
        if source.numel():
            row, column = (data.draw(st.integers(0, length - 1)) for length in source.shape)
            source[row, column] = data.draw(st.sampled_from(BAD))
            assert not copy_checked(source, place)
            with in_file(source) as mapped:
                assert not copy_checked(source, place, mapped)


@pytest.mark.parametrize(("n", "m"), [(33, 2049), (1, 5000), (5000, 1), (241, 2048), (3, 66_000), (31, 4500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_larger_than_a_block_come_out_of_files(backend, n, m, dtype):
    """With several threads, which share them out; as the last value of all is the one that is not finite."""
    matrix = random((n, m), dtype, 0)
    with threads(3):
        for source in (matrix, matrix.T, matrix[:, : m // 2 + 1].T, matrix[1:]):
            with in_file(source) as mapped:
                made = torch.empty(source.shape)
                assert copy_checked(source, made, mapped)
                assert torch.equal(made, source.float())
        matrix[-1, -1] = float("nan")
        with in_file(matrix.T) as mapped:
            assert not copy_checked(matrix.T, torch.empty(m, n, dtype=dtype), mapped)


@pytest.mark.usefixtures("target")
def test_the_mapping_is_not_looked_at_where_the_file_can_be_read():
    """Only its shape: so nothing happens to who reads a file that was cut off."""
    stored = random((40, 3000), torch.float32, 1)
    with in_file(stored) as mapped:
        made = torch.empty(3000, 40)
        assert copy_checked(torch.full_like(stored, float("nan")).T, made, mapped)
        assert torch.equal(made, stored.T)
        os.truncate(mapped.file, 5 + stored.nbytes - 1)
        for source in (stored, stored.T):
            with pytest.raises(OSError, match="ends before its tensors do"):
                copy_checked(source, torch.empty(source.shape), mapped)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("turned", [False, True])
def test_sums_may_overflow(turned):
    """pitfall: the sum of finite values may be infinite, which is no mistake of theirs."""
    large = torch.full((1000, 300), 1e38)
    assert copy_checked(large.T if turned else large, torch.empty(300, 1000) if turned else torch.empty(1000, 300))


@pytest.mark.usefixtures("backend")
def test_what_becomes_infinite_in_a_narrow_type_is_found():
    large = torch.full((20, 30), 1e6)
    assert not copy_checked(large.T, torch.empty(30, 20, dtype=torch.float16))
    assert not copy_checked(large, torch.empty(20, 30, dtype=torch.float16))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("turned", [False, True])
def test_a_factor_is_multiplied_with(turned):
    source = random((50, 60), torch.bfloat16, 2)
    source = source.T if turned else source
    made = torch.empty(source.shape)
    assert copy_checked(source, made, factor=0.3)
    assert torch.equal(made, (source * 0.3).float())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("turned", [False, True])
def test_several_threads_fill_an_ordinary_tensor(
    backend: str, mode: Callable[[], AbstractContextManager[None]], turned: bool
) -> None:
    """pitfall: the mode in which PyTorch runs is a thread's own."""
    matrix = torch.randn(1100, 4100, requires_grad=True)
    source = matrix.T if turned else matrix
    with threads(3), mode():
        made = torch.empty(source.shape)
        assert copy_checked(source, made)
    assert made.is_leaf
    assert not made.requires_grad
    assert torch.equal(made, source)
