import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.synthetic import directions
from unweave.synthetic.directions import (
    blocks,
    bound_cosines,
    cosine_similarities,
    directions_of,
    normalize_rows_,
    orthogonalize_embeddings,
    unit_rows,
)


def largest_cosine(vectors):
    return float((vectors.double() @ vectors.double().T).fill_diagonal_(0).abs().max())


def loss(vectors):
    """What orthogonalize_embeddings minimises, written as it is defined."""
    gram = vectors @ vectors.T
    off = gram - torch.diag(gram.diagonal())
    return off.square().sum() + len(vectors) * (gram.diagonal() - 1).square().sum()


def test_cosines_by_hand():
    a = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[-2.0, 0.0], [0.0, 5.0]])
    root = math.sqrt(0.5)
    torch.testing.assert_close(cosine_similarities(a, b), torch.tensor([[-1.0, 0.0], [-root, root], [0.0, 0.0]]))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e25, 1e38])
def test_cosines_of_rows_of_any_size(scale):
    a = torch.randn(5, 8).clamp(-1, 1)
    torch.testing.assert_close(cosine_similarities(a * scale, a), cosine_similarities(a, a), atol=1e-4, rtol=0)
    assert cosine_similarities(a * scale, a).abs().max() <= 1


def test_unit_rows():
    x = torch.randn(5000, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(x), torch.nn.functional.normalize(x))
    assert unit_rows(x).requires_grad
    assert unit_rows(x.bfloat16()).dtype == torch.float32
    y = x.detach().clone()
    assert normalize_rows_(y) is y
    assert torch.equal(y, unit_rows(x))
    assert unit_rows(torch.zeros(0, 3)).shape == (0, 3)


@given(st.integers(0, 40), st.integers(0, 30), st.integers(1, 50))
def test_blocks_cover_every_row_once(n_rows, n_columns, chunk_size):
    parts = list(blocks(n_rows, n_columns, chunk_size))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(n_rows))
    assert all(part.stop - part.start <= chunk_size for part in parts)


def test_blocks_are_bounded(monkeypatch):
    monkeypatch.setattr(directions, "BLOCK_ELEMENTS", 100)
    assert [part.stop - part.start for part in blocks(7, 30, 1024)] == [3, 3, 1]
    assert [part.stop - part.start for part in blocks(2, 1000, 1024)] == [1, 1]


@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 5), (7, 20), (20, 20)])
def test_exactly_orthogonal_where_the_space_allows(n, d):
    start = torch.randn(n, d)
    vectors = orthogonalize_embeddings(start)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(n), atol=1e-6, rtol=0)
    assert float((vectors * start).sum(1).min()) > 0  # each on its side
    torch.testing.assert_close(vectors[0], unit_rows(start)[0])


def test_equal_rows_become_orthogonal():
    vectors = orthogonalize_embeddings(torch.ones(3, 4))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), atol=1e-6, rtol=0)


def test_more_vectors_than_dimensions_reach_the_least_sum_of_squared_cosines():
    start = torch.randn(60, 16)
    before = start.clone()
    vectors = orthogonalize_embeddings(start)
    assert torch.equal(start, before)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(60))
    squares = float((vectors.double() @ vectors.double().T).square().sum())
    least = 60**2 / 16
    assert least * (1 - 1e-6) < squares < least * (1 + 1e-4)
    assert float((unit_rows(start) @ unit_rows(start).T).square().sum()) > 1.1 * least


def test_the_steps_are_adams_on_the_loss():
    """Against autograd and torch's Adam, in float64, where rounding hides nothing."""
    start = torch.randn(30, 6, dtype=torch.float64)
    parameter = unit_rows(start).requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.02)
    for _ in range(25):
        adam.zero_grad()
        loss(parameter).backward()
        adam.step()
    expected = unit_rows(parameter.detach())
    for chunk_size in (7, 1024):
        ours = orthogonalize_embeddings(start, num_steps=25, lr=0.02, chunk_size=chunk_size)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


def test_a_tight_frame_stays():
    """The three vectors at 120 degrees are as orthogonal as three vectors in a plane get."""
    angles = torch.arange(3) * (2 * math.pi / 3)
    mercedes = torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(orthogonalize_embeddings(5 * mercedes), mercedes)


@pytest.mark.parametrize(("n", "d", "bound"), [(40, 16, 0.35), (300, 64, 0.25), (10, 20, 0.1), (10, 20, 0.0)])
def test_cosines_are_bounded(n, d, bound):
    start = torch.randn(n, d)
    assert largest_cosine(unit_rows(start)) > bound
    vectors = bound_cosines(start, bound, chunk_size=32)
    assert largest_cosine(vectors) <= bound + 1e-6
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(n))


def test_vectors_within_the_bound_do_not_move():
    start = unit_rows(torch.randn(30, 8))
    assert torch.equal(bound_cosines(start, 1.0), unit_rows(start))


def test_vectors_that_coincide_are_told_apart_or_refused():
    """Two equal vectors have no side to be pushed to: nothing is claimed that is not so."""
    with pytest.raises(UnweaveError, match=r"max_cosine=0\.5 was not reached in num_steps=20 .* largest is 1\.0000"):
        bound_cosines(torch.ones(2, 4), 0.5, num_steps=20)


@pytest.mark.parametrize("function", [orthogonalize_embeddings, lambda e: bound_cosines(e, 0.5)])
@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.ones(3), r"embeddings must be a matrix with rows, got the shape \(3,\)"),
        (torch.ones(0, 3), r"got the shape \(0, 3\)"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "embeddings must be finite and not 0 in every row, and row 1 is not"),
        (torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), "row 0 is not"),
        (torch.tensor([[1.0, 0.0], [1.0, math.inf]]), "row 1 is not"),
    ],
)
def test_bad_embeddings(function, embeddings, message):
    with pytest.raises(UnweaveError, match=message):
        function(embeddings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: orthogonalize_embeddings(x, num_steps=0), "num_steps must be a whole number of at least 1, got 0"),
        (lambda x: orthogonalize_embeddings(x, lr=-1.0), "lr must be a finite number above 0, got -1"),
        (lambda x: orthogonalize_embeddings(x, chunk_size=0), "chunk_size must be a whole number"),
        (lambda x: bound_cosines(x, 1.5), "max_cosine must be a finite number at least 0 and at most 1, got 1.5"),
        (lambda x: bound_cosines(x, 0.1), r"max_cosine=0\.1 is impossible: among 30 vectors in 4 .* at least 0\.4734"),
        (lambda x: bound_cosines(x, 0.5, num_steps=3), r"max_cosine=0\.5 was not reached in num_steps=3 for 30"),
        (lambda x: cosine_similarities(x, x[:, :3]), r"mat1 of shape \(30, 4\) and mat2 of shape \(30, 3\)"),
        (lambda x: directions_of("decoder", x[0]), "decoder must be a matrix"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UnweaveError, match=message):
        make(torch.randn(30, 4))
