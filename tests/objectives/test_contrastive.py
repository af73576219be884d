"""The contrastive term by hand, against its formula in float64, and in training on pairs of neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.objectives import Contrastive, Matryoshka
from unweave.sae import (
    SAE,
    BatchTopK,
    DenseCodes,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    SparseCodes,
    TopK,
)
from unweave.training import train_on
from unweave.training.config import SAEConfig, TrainConfig, from_dict, to_dict


def test_hand_computed():
    """Two pairs with orthogonal codes: each token picks its neighbour with odds of e^(3 * 4 / 6) to 1."""
    sae = SAE(6, 10, TopK(1))
    codes = torch.zeros(4, 10)
    codes[0, 0], codes[1, 0], codes[2, 1], codes[3, 1] = 3.0, 4.0, 4.0, 3.0
    codes[:, 5] = 7.0  # not among the first fifth
    expected = math.log(1 + math.exp(-2))
    assert Contrastive()(codes, SparseCodes.from_dense(codes), sae).item() == pytest.approx(expected)
    cosine = Contrastive(similarity="cosine")(codes, SparseCodes.from_dense(codes), sae).item()
    assert cosine == pytest.approx(math.log(1 + math.exp(-1)))
    assert Contrastive().coefficient_for(768) == pytest.approx(76.8)


def test_the_similarity_that_is_named_is_the_one_that_is_used():
    """pitfall_094: with codes times 3, dot products grow and cosines stay."""
    sae, dense = SAE(6, 10, TopK(1)), torch.rand(8, 10)

    def value(similarity, scale):
        codes = SparseCodes.from_dense(scale * dense)
        return Contrastive(share=1.0, similarity=similarity)(codes, codes, sae)

    torch.testing.assert_close(value("cosine", 3), value("cosine", 1))
    assert (value("dot", 3) - value("dot", 1)).abs() > 0.01
    assert Contrastive().similarity == "dot"


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.integers(1, 5), m=st.integers(1, 12), share=st.sampled_from([0.1, 0.5, 1.0]), cosine=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradient_are_those_of_the_formula(pairs, m, share, cosine, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2 * pairs, m, dtype=torch.float64, generator=generator)
    dense = (dense * (torch.rand(dense.shape, generator=generator) < 0.6)).requires_grad_()
    sae = SAE(4, m, TopK(1)).double()
    term = Contrastive(share=share, similarity="cosine" if cosine else "dot")
    first = dense[:, : max(1, round(share * m))]
    total = 0.0
    for here, there in ((first[::2], first[1::2]), (first[1::2], first[::2])):
        for i in range(pairs):
            scores = torch.stack([here[i] @ there[j] / 4 for j in range(pairs)])
            if cosine:
                norms = [here[i].norm().clamp(min=1e-12) * there[j].norm().clamp(min=1e-12) for j in range(pairs)]
                scores = torch.stack([here[i] @ there[j] / norms[j] for j in range(pairs)])
            total = total - scores.log_softmax(0)[i] / (2 * pairs)
    sparse = SparseCodes.from_dense(dense.detach())
    sparse = sparse.with_values(dense[sparse.rows, sparse.indices])
    active = dense.detach() != 0
    (expected,) = torch.autograd.grad(total, dense, retain_graph=True, materialize_grads=True)
    for codes in (sparse, DenseCodes(dense)):
        value = term(codes, codes, sae)
        torch.testing.assert_close(value, total)
        (grad,) = torch.autograd.grad(value, dense, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(grad[active].nan_to_num(), expected[active].nan_to_num())


def test_the_first_latents_learn_what_neighbours_share():
    """Half of the directions are shared by neighbours: with the term, they fill more of the first latents' rows."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q

    def batch():
        stays = torch.rand(128, 1, 8, generator=generator).expand(128, 2, 8) < 0.2
        news = torch.rand(128, 2, 8, generator=generator) < 0.2
        return (torch.cat([stays, news], 2).float() @ directions).reshape(256, 16)

    data = [batch() for _ in range(200)]
    terms = (None, Contrastive(coefficient=16.0, share=0.5, similarity="cosine"))
    common = {"d_sae": 16, "activation": BatchTopK(3), "matryoshka": Matryoshka((0.5,)), "lr": 3e-3}
    shares = []
    for term in terms:
        (sae,) = train_on(data, [SAEConfig(sparsity=term, **common)], progress=False)
        shares.append((sae.W_dec[:8] @ directions[:8].T).square().sum().item() / 8)
    assert shares[1] > shares[0] + 0.1


def test_it_moves_a_matching_pursuit():
    """Whose codes have a gradient for the dictionary that they are measured with."""
    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    weights = []
    for sparsity in (None, Contrastive()):
        config = SAEConfig(d_sae=32, activation=MatchingPursuit(k=3), sparsity=sparsity, sparsity_warmup=0, lr=1e-2)
        weights.append(train_on(batches, [config], progress=False)[0].W_dec.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_bad_input():
    with pytest.raises(UnweaveError, match="share of the latents"):
        Contrastive(share=0.0)
    with pytest.raises(UnweaveError, match="'dot' or 'cosine'"):
        Contrastive(similarity="angle")
    with pytest.raises(UnweaveError, match="coefficient of at least 0"):
        Contrastive(coefficient=-1.0)
    codes = SparseCodes.from_dense(torch.rand(3, 8))
    with pytest.raises(UnweaveError, match="3 rows"):
        Contrastive()(codes, codes, SAE(4, 8, TopK(1)))
    with pytest.raises(UnweaveError, match="OrthogonalMatchingPursuit have no gradient"):
        SAEConfig(d_sae=64, activation=OrthogonalMatchingPursuit(k=3), sparsity=Contrastive())
    config = SAEConfig(d_sae=64, activation=MatchingPursuit(k=3), sparsity=Contrastive(similarity="cosine"))
    assert from_dict(SAEConfig, to_dict(config)) == config
    with pytest.raises(UnweaveError, match="pairs of neighbours"):
        TrainConfig(saes=(config,))
