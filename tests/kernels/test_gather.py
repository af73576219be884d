"""Rows out of arrays: every back-end copies the same rows, of every type and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.kernels import RowTable, gather_rows

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def values(shape, dtype, generator):
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-9, 5, shape, generator=generator)
    return x.to(dtype)  # with zeros, subnormal numbers and infinities of float16


@FEW
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_rows_asked_for_come_in_their_order(backend, lengths, d, dtype, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [values((n, d), dtype, generator) for n in lengths]
    scales = [torch.rand(n, generator=generator) for n in lengths] if dtype == torch.int8 else None
    rows = torch.randint(sum(lengths), (int(torch.randint(20, (), generator=generator)),), generator=generator)
    found = gather_rows(RowTable(parts, scales), rows, torch.float32 if wide else None, threads=2)
    expected = torch.cat(parts)[rows]
    if scales is not None:
        expected = expected.float() * torch.cat(scales)[rows, None]
    expected = expected.float() if wide else expected
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("backend")
def test_rows_may_lie_in_groups_and_in_columns_of_wider_arrays():
    whole = torch.arange(5 * 3 * 4 * 8, dtype=torch.float32).view(5, 3, 4, 8)  # examples, layers, tokens, width
    table = RowTable([whole[:2, 1], whole[2:, 1]])
    assert len(table) == 20
    flat = whole[:, 1].reshape(20, 8)
    rows = torch.tensor([19, 0, 7, 8, 7])
    assert torch.equal(gather_rows(table, rows), flat[rows])
    columns = RowTable([whole.view(60, 8)[:, 2:5]])
    assert torch.equal(gather_rows(columns, rows), whole.view(60, 8)[rows, 2:5])


def test_every_value_of_16_bits_is_widened_exactly(backend):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(-1, 256)
    for dtype in (torch.float16, torch.bfloat16):
        table = RowTable([patterns.view(dtype)])
        found = gather_rows(table, torch.arange(256), torch.float32)
        assert torch.equal(found.nan_to_num(nan=1.5), patterns.view(dtype).float().nan_to_num(nan=1.5))


@pytest.mark.usefixtures("backend")
def test_rows_that_there_are_not_are_refused():
    table = RowTable([torch.zeros(3, 2)])
    for rows in ([3], [-1], [0, 7]):
        with pytest.raises(UnweaveError, match="of 3 were asked for"):
            gather_rows(table, torch.tensor(rows))
    assert gather_rows(table, torch.empty(0, dtype=torch.int64)).shape == (0, 2)


def test_tables_that_cannot_be_read_are_refused():
    x = torch.zeros(4, 6)
    for parts, scales, message in (
        ([], None, "no arrays"),
        ([x, x[:, :5]], None, "one width"),
        ([x, x.half()], None, "one width and type"),
        ([x.T], None, "side by side"),
        ([x.double()], None, "not known"),
        ([x.to(torch.int8)], None, "have scales"),
        ([x], [torch.ones(4)], "have scales"),
        ([x.to(torch.int8)], [torch.ones(3)], "as many float32 scales"),
    ):
        with pytest.raises(UnweaveError, match=message):
            RowTable(parts, scales)


def test_memory_is_taken_again_but_never_while_it_is_looked_at():
    table = RowTable([torch.arange(4096.0)[:, None].expand(4096, 512).contiguous()])
    first = gather_rows(table, torch.arange(1024))
    part = first[5:7, 3:]  # shares its memory
    kept = [gather_rows(table, torch.full((1024,), i)) for i in range(6)]
    address = first.data_ptr()
    del first
    others = [gather_rows(table, torch.full((1024,), 9)) for _ in range(6)]
    assert torch.equal(part, torch.tensor([[5.0], [6.0]]).expand(2, 509))
    assert all(torch.equal(x, torch.full_like(x, i)) for i, x in enumerate(kept))
    assert address not in {x.data_ptr() for x in others}
    del part
    assert torch.equal(gather_rows(table, torch.arange(1024))[:, 0], torch.arange(1024.0))
