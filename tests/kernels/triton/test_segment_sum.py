"""`gather_sum`, `transpose` and `segment_sum` against dense products in float64."""

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import gather_sum, scatter_outer, segment_sum, transpose
from unweave.kernels.triton.segment_sum import PIECE, piece_for, room_for_partials

shapes = given(
    n=st.integers(1, 6),
    m=st.integers(1, 9),
    d=st.sampled_from([1, 3, 16, 17, 40]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None, max_examples=25)
@shapes
def test_gather_sum_is_the_dense_product(device, csr, random_codes, close, n, m, d, density, dtype, seed):
    torch.manual_seed(seed)
    dense, weight = random_codes(n, m, density), torch.randn(m, d).to(dtype)
    out = gather_sum(*csr(dense), weight.to(device))
    assert out.dtype == torch.float32
    close(out, dense.double() @ weight.double())


@settings(deadline=None, max_examples=25)
@shapes
def test_scatter_outer_is_the_transposed_product(device, csr, random_codes, close, n, m, d, density, dtype, seed):
    torch.manual_seed(seed)
    dense, x = random_codes(n, m, density), torch.randn(n, d).to(dtype)
    close(scatter_outer(*csr(dense), x.to(device), m), dense.double().T @ x.double())


def test_rows_wider_than_a_tile(device, csr, random_codes, close):
    dense, weight, x = random_codes(2, 5, 0.8), torch.randn(5, 1100), torch.randn(2, 1100)
    close(gather_sum(*csr(dense), weight.to(device)), dense.double() @ weight.double())
    close(scatter_outer(*csr(dense), x.to(device), 5), dense.double().T @ x.double())


def test_a_matrix_that_is_not_contiguous(device, csr, random_codes, close):
    dense, weight = random_codes(3, 5, 0.8), torch.randn(7, 5).T
    close(gather_sum(*csr(dense), weight.to(device)), dense.double() @ weight.double())


def test_a_latent_on_every_row_is_cut_into_pieces(device, csr, close):
    n = 2 * PIECE + 37
    dense = torch.zeros(n, 5)
    dense[:PIECE, 0] = 1.5  # exactly one piece
    dense[:, 1] = torch.randn(n)
    dense[::7, 3] = 2.0
    dense[: PIECE + 1, 4] = torch.randn(PIECE + 1)
    indices, values, offsets = csr(dense)
    by_latent, x = transpose(indices, offsets, 5), torch.randn(n, 20)
    assert by_latent.first_piece.diff().tolist() == [1, 3, 1, 1, 2]
    close(segment_sum(by_latent, values, x.to(device)), dense.double().T @ x.double())
    close(segment_sum(by_latent, values, torch.ones(n, 1, device=device))[:, 0], dense.double().sum(0))


@settings(deadline=None, max_examples=60)
@example(counts=[PIECE + 1] * 5, seed=0)  # the most pieces for the number of entries
@given(counts=st.lists(st.just(0) | st.integers(0, 3 * PIECE), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_the_started_programs_are_enough_for_every_piece(device, counts, seed):
    """Grids and room for partial sums are fixed by nnz and m alone; no distribution of the entries may exceed them."""
    m, nnz = len(counts), sum(counts)
    indices = torch.repeat_interleave(torch.arange(m), torch.tensor(counts))
    indices = indices[torch.randperm(nnz, generator=torch.Generator().manual_seed(seed))]
    by_latent = transpose(indices.to(device), torch.tensor([0, nnz // 3, nnz], device=device), m)
    order = sorted(range(nnz), key=lambda entry: (int(indices[entry]), entry))
    assert by_latent.order.tolist() == order
    assert by_latent.rows.tolist() == [int(entry >= nnz // 3) for entry in order]
    assert by_latent.offsets.diff().tolist() == counts

    pieces = [max(1, -(-count // PIECE)) for count in counts]
    long = [latent for latent in range(m) if pieces[latent] > 1]
    assert by_latent.first_piece.diff().tolist() == pieces
    owners = [latent for latent in range(m) for _ in range(pieces[latent])]
    assert by_latent.latent_of_piece.tolist() == owners + [m] * (nnz // PIECE + m - len(owners))
    assert by_latent.long.tolist() == long + [m] * (nnz // (PIECE + 1) - len(long))
    starts = [sum(pieces[before] for before in long[:i]) for i in range(len(long))]
    assert by_latent.first_partial[long].tolist() == starts
    assert sum(pieces[latent] for latent in long) <= room_for_partials(nnz)


def test_room_that_was_not_filled_is_ignored(device, close):
    """Entries beyond the last offset, which are room that was not filled, belong to no row and to no latent."""
    indices = torch.tensor([0, 2, 1, -1, 7], device=device)
    values = torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0], device=device)
    offsets = torch.tensor([0, 2, 3], device=device)
    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    dense = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    close(gather_sum(indices, values, offsets, weight.to(device)), dense @ weight.double())
    close(scatter_outer(indices, values, offsets, x.to(device), 3), dense.T @ x.double())


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_an_index_out_of_range_makes_its_result_nan_and_no_other(device, wrong):
    indices = torch.tensor([0, wrong, 1], device=device)
    values, offsets = torch.ones(3, device=device), torch.tensor([0, 2, 3], device=device)
    rows = gather_sum(indices, values, offsets, torch.ones(3, 4, device=device)).isnan().all(1)
    assert rows.tolist() == [True, False]
    latents = scatter_outer(indices, values, offsets, torch.ones(2, 4, device=device), 3).isnan().all(1)
    assert latents.tolist() == [wrong < 0, False, wrong > 0]


@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 2, 9], [-4, 0, 3]])
def test_offsets_out_of_range_are_not_followed(device, offsets):
    out = gather_sum(
        torch.tensor([0, 1, 2], device=device), torch.ones(3, device=device), torch.tensor(offsets, device=device),
        torch.ones(3, 4, device=device),
    )  # fmt: skip
    assert out.isnan().any()


def test_two_runs_agree_bit_for_bit(device, csr, random_codes):
    """pitfall_301; tests/kernels/test_threads.py says the same of the other back-ends."""
    codes, x = csr(random_codes(300, 3, 0.9)), torch.randn(300, 24, device=device)
    assert scatter_outer(*codes, x, 3).equal(scatter_outer(*codes, x, 3))


def test_wrong_arguments_are_named(device):
    indices, values, offsets = torch.zeros(2, dtype=torch.long), torch.ones(2), torch.tensor([0, 1, 2])
    weight = torch.ones(3, 4)
    indices, values, offsets, weight = (t.to(device) for t in (indices, values, offsets, weight))
    with pytest.raises(UnweaveError, match=r"^gather_sum: indices must be int64, got int32"):
        gather_sum(indices.int(), values, offsets, weight)
    with pytest.raises(UnweaveError, match=r"^gather_sum: weight must be float32 or bfloat16, got float64"):
        gather_sum(indices, values, offsets, weight.double())
    with pytest.raises(UnweaveError, match=r"^gather_sum: values must have shape \(nnz=2\), got \(3,\)"):
        gather_sum(indices, torch.ones(3, device=device), offsets, weight)
    with pytest.raises(UnweaveError, match=r"^gather_sum: weight must have shape \(m, d\), got \(3,\)"):
        gather_sum(indices, values, offsets, torch.ones(3, device=device))
    with pytest.raises(UnweaveError, match=r"^gather_sum: weight is on meta, but indices is on"):
        gather_sum(indices, values, offsets, weight.to("meta"))
    with pytest.raises(UnweaveError, match=r"^gather_sum: indices is on meta, but this kernel runs on CUDA devices"):
        gather_sum(indices.to("meta"), values, offsets, weight)
    with pytest.raises(UnweaveError, match=r"^scatter_outer: x must have shape \(n=2, d\), got \(3, 4\)"):
        scatter_outer(indices, values, offsets, torch.ones(3, 4, device=device), 3)
    with pytest.raises(UnweaveError, match=r"^transpose: m must be positive"):
        transpose(indices, offsets, 0)


def test_pieces_grow_with_the_entries(device, close, monkeypatch):
    """Partial sums never take more than the result, but for narrow results, which take little."""
    assert piece_for(131_072, 12_288) == PIECE
    for nnz, m in ((21_000_000, 65_536), (10**9, 65_536), (10**9, 2**20)):
        assert room_for_partials(nnz, piece_for(nnz, m)) <= m
    monkeypatch.setattr(sys.modules[piece_for.__module__], "piece_for", lambda nnz, m: 512)
    dense = torch.randn(1300, 3)
    x = torch.randn(1300, 5)
    indices = torch.arange(3).repeat(1300).to(device)
    offsets = (3 * torch.arange(1301)).to(device)
    got = scatter_outer(indices, dense.flatten().to(device), offsets, x.to(device), 3)
    close(got, dense.double().T @ x.double(), tolerance=1e-4)
