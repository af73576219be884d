import pytest
import torch

from unweave import SparseCodes, UnweaveError
from unweave.synthetic.dictionary import FeatureDictionary, bounded_cosine_initializer, orthogonal_initializer
from unweave.synthetic.directions import orthogonalize_embeddings


def test_random_unit_vectors_of_a_seed():
    a = FeatureDictionary(50, 8, initializer=None, seed=1)
    torch.testing.assert_close(a.feature_vectors.norm(dim=1), torch.ones(50))
    assert torch.equal(a.feature_vectors, FeatureDictionary(50, 8, initializer=None, seed=1).feature_vectors)
    assert not torch.equal(a.feature_vectors, FeatureDictionary(50, 8, initializer=None, seed=2).feature_vectors)
    assert not torch.equal(
        FeatureDictionary(50, 8, initializer=None).feature_vectors,
        FeatureDictionary(50, 8, initializer=None).feature_vectors,
    )


def test_directions_are_uniform():
    """Of v uniform on the sphere, E[v v^T] = I / d. Over 20 000 rows an entry has a standard error of at most
    sqrt(2 / 20 000) / d; 5 of them on 21 entries: 1.2e-5."""
    v = FeatureDictionary(20_000, 6, initializer=None, seed=0).feature_vectors.detach().double()
    assert float((v.T @ v / len(v) * 6 - torch.eye(6)).abs().max()) < 5 * (2 / 20_000) ** 0.5
    assert float(v.mean(0).abs().max()) < 5 * (1 / 6 / 20_000) ** 0.5


def test_orthogonal_by_default():
    v = FeatureDictionary(8, 8, seed=0).feature_vectors
    torch.testing.assert_close(v @ v.T, torch.eye(8), atol=1e-6, rtol=0)


def test_initializers_arrange_the_vectors_in_place():
    start = FeatureDictionary(30, 8, initializer=None, seed=0)
    parameter = start.feature_vectors
    orthogonal_initializer(num_steps=7, lr=0.02)(start)
    assert start.feature_vectors is parameter
    fresh = FeatureDictionary(30, 8, initializer=None, seed=0).feature_vectors
    assert torch.equal(parameter, orthogonalize_embeddings(fresh, num_steps=7, lr=0.02))
    bounded = FeatureDictionary(30, 8, initializer=bounded_cosine_initializer(0.5), seed=0).feature_vectors.detach()
    assert float((bounded @ bounded.T).fill_diagonal_(0).abs().max()) <= 0.5 + 1e-6


@pytest.mark.parametrize(("bias", "norm"), [(False, 0.0), (True, 1.0), (2.5, 2.5), (0.0, 0.0)])
def test_bias(bias, norm):
    dictionary = FeatureDictionary(4, 8, bias=bias, seed=0)
    assert float(dictionary.bias.detach().norm()) == pytest.approx(norm)
    assert dictionary.bias.requires_grad == (norm > 0)
    assert torch.equal(dictionary.feature_vectors, FeatureDictionary(4, 8, seed=0).feature_vectors)
    assert set(dictionary.state_dict()) == {"feature_vectors", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_coo_and_codes_give_the_same(dtype):
    dictionary = FeatureDictionary(6, 4, bias=True, seed=0).to(dtype)
    dense = torch.randn(5, 6).relu() * (torch.rand(5, 6) < 0.5)
    dense[2] = 0
    expected = dense.to(dtype) @ dictionary.feature_vectors + dictionary.bias
    torch.testing.assert_close(dictionary(dense.to(dtype)), expected)
    torch.testing.assert_close(dictionary(dense.to_sparse()), expected)
    torch.testing.assert_close(dictionary(SparseCodes.from_dense(dense)), expected)
    torch.testing.assert_close(dictionary(dense[2].to(dtype)), dictionary.bias)


def test_a_coo_tensor_out_of_order_and_with_an_entry_twice():
    dictionary = FeatureDictionary(3, 3, seed=0)
    coo = torch.sparse_coo_tensor([[1, 0, 1], [2, 0, 2]], [1.0, 2.0, 0.5], (2, 3), check_invariants=True)
    torch.testing.assert_close(dictionary(coo), dictionary(coo.to_dense()))


def test_gradients_reach_the_vectors_and_the_activations():
    dictionary = FeatureDictionary(6, 4, bias=True, seed=0)
    dense = (torch.rand(5, 6) < 0.5).float().requires_grad_()
    codes = SparseCodes.from_dense(dense.detach())
    weight = torch.randn(5, 4)
    expected = torch.autograd.grad((dictionary(dense) * weight).sum(), [*dictionary.parameters()])
    found = torch.autograd.grad((dictionary(codes) * weight).sum(), [*dictionary.parameters()])
    torch.testing.assert_close(found, expected)
    by_coo = torch.autograd.grad((dictionary(dense.to_sparse()) * weight).sum(), dense)[0]
    torch.testing.assert_close(by_coo, (weight @ dictionary.feature_vectors.detach().T) * (dense != 0))


def test_from_vectors():
    vectors, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(3)
    dictionary = FeatureDictionary.from_vectors(vectors, bias)
    assert torch.equal(dictionary.feature_vectors, vectors)
    torch.testing.assert_close(dictionary.bias, bias.double())
    assert (dictionary.num_features, dictionary.hidden_dim) == (5, 3)
    assert torch.equal(dictionary(torch.eye(5, dtype=torch.float64)), vectors + bias)
    plain = FeatureDictionary.from_vectors(vectors)
    assert not plain.bias.any()
    assert not plain.bias.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureDictionary(0, 3), "num_features must be a whole number of at least 1, got 0"),
        (lambda: FeatureDictionary(3, 0), "hidden_dim must be a whole number of at least 1, got 0"),
        (lambda: FeatureDictionary(3, 3, bias=-1.0), "bias must be a finite number at least 0, got -1"),
        (lambda: FeatureDictionary(3, 3, seed="x"), "seed must be a whole number of at most 64 bits, or None, got 'x'"),
        (
            lambda: FeatureDictionary(3, 3)(torch.zeros(2, 4)),
            "feature_activations has 4 features, and the dictionary 3",
        ),
        (lambda: FeatureDictionary(3, 3)(torch.zeros(2, 4).to_sparse()), "has 4 features"),
        (lambda: FeatureDictionary(3, 3)(SparseCodes.from_dense(torch.zeros(2, 4))), "has 4 features"),
        (
            lambda: FeatureDictionary(3, 3)(torch.zeros(1, 2, 3).to_sparse()),
            "COO tensor of two dimensions, got .* of 3",
        ),
        (lambda: FeatureDictionary.from_vectors(torch.zeros(3)), r"feature_vectors must be a real matrix .*\(3,\)"),
        (
            lambda: FeatureDictionary.from_vectors(torch.ones(2, 3, dtype=torch.int64)),
            "real matrix with rows, got .*int",
        ),
        (lambda: FeatureDictionary.from_vectors(torch.ones(2, 3), torch.ones(2)), r"bias must have the shape \(3,\)"),
        (
            lambda: FeatureDictionary.from_vectors(torch.full((2, 3), torch.nan)),
            "must be finite, and 6 entries are not",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_another_sparse_layout():
    with pytest.raises(UnweaveError, match=r"must be a COO tensor of two dimensions, got torch\.sparse_csc of 2"):
        FeatureDictionary(3, 3)(torch.eye(3).to_sparse_csc())
