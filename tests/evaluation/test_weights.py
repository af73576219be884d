from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from unweave.evaluation import encoder_decoder_cosine, max_cosine


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
def test_tiles_give_what_the_full_matrix_gives(tile):
    vectors = torch.randn(23, 6) * torch.rand(23, 1)
    cosines = normalize(vectors, dim=1) @ normalize(vectors, dim=1).T
    expected = cosines.fill_diagonal_(-1).amax(1)
    assert torch.allclose(max_cosine(vectors, tile), expected, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that anything returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_similarities_of_all_pairs_are_never_in_memory():
    """pitfall_171: of 3,000 latents they would be nine million numbers."""
    with Largest() as largest:
        max_cosine(torch.randn(3000, 4), 100)
    assert largest.numel <= 3000 * 4


def test_a_copy_is_found_and_an_opposite_is_not():
    vectors = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, -1]])
    assert max_cosine(vectors).tolist() == pytest.approx([1, 1, 0, 0])


def test_zero_and_lonely_vectors_have_none():
    """pitfall_011: NaN, which reports write as null."""
    cosines = max_cosine(torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    assert cosines.isnan().tolist() == [False, True, False]
    assert max_cosine(torch.tensor([[1.0, 0], [0, 0]])).isnan().all()


def test_encoder_and_decoder():
    W_dec = torch.tensor([[1.0, 0], [0, 2], [1, 1], [0, 0]])
    W_enc = torch.tensor([[3.0, 0], [0, -1], [1, 0], [1, 1]]).T
    cosines = encoder_decoder_cosine(W_enc, W_dec).tolist()
    assert cosines[:3] == pytest.approx([1, -1, 0.5**0.5])
    assert cosines[3] != cosines[3]
