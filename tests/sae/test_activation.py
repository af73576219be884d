"""What every activation function has in common, and how a new one becomes known."""

from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels import Above
from unweave.sae import (
    ACTIVATIONS,
    SAE,
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TanhReLU,
    TopK,
    fold_decoder_norms,
    fold_normalization,
    register_activation,
)
from unweave.sae.normalization import Normalization


@pytest.fixture
def registry():
    with mock.patch.dict(ACTIVATIONS):
        yield


def test_names():
    built_in = {"relu", "tanhrelu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated"}
    assert built_in <= ACTIVATIONS.keys()
    assert all(cls.name == name for name, cls in ACTIVATIONS.items())


def test_attributes():
    """What configurations, folds and training ask instead of the class."""
    ranked = {TopK, AbsTopK, GroupMax, BatchTopK}
    for cls in (ReLU, TanhReLU, TopK, AbsTopK, GroupMax, BatchTopK, JumpReLU, Gated):
        activation = cls()
        assert activation.ranked == (cls in ranked)
        assert activation.signed == (cls is AbsTopK)
        assert activation.free_norms == (cls in (ReLU, TanhReLU))
        assert activation.calibrated == (cls is BatchTopK)
        assert activation.needs_unit_norm == (cls in ranked)
    assert JumpReLU(shared=True).needs_unit_norm
    assert (BatchTopK().threshold_shape, JumpReLU().threshold_shape) == ("scalar", "vector")
    assert (JumpReLU(shared=True).threshold_shape, ReLU().threshold_shape) == ("scalar", None)


def test_a_registered_one_is_an_sae_like_any_other(registry, tmp_path):
    @register_activation
    @dataclass(frozen=True)
    class Shifted(Activation):
        bound: float = 0.5
        name: ClassVar[str] = "test_shifted"

        def selection(self, threshold, n_rows):
            return Above(self.bound)

        def apply(self, pre, threshold):
            return pre.with_values((pre.values - self.bound).relu())

    sae, x = SAE(5, 16, Shifted(0.25)).requires_grad_(False), torch.randn(30, 5)
    expected = (x @ sae.W_enc - 0.25).relu()
    assert 0 < (expected > 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae.training_codes(x).codes.to_dense(), expected)
    loaded = SAE.load(sae.save(tmp_path))
    assert loaded.activation == Shifted(0.25)
    torch.testing.assert_close(loaded(x), sae(x))


def test_parameters_that_no_fold_knows_are_not_folded(registry):
    @register_activation
    @dataclass(frozen=True)
    class Biased(Activation):
        name: ClassVar[str] = "test_biased"

        def parameters(self, d_sae):
            return {"after": torch.ones(d_sae)}

        def selection(self, threshold, n_rows):
            return Above(0.0)

        def codes(self, pre, sae):
            return pre.with_values(pre.values.relu() * pre.at(sae.after))

    sae = SAE(5, 16, Biased(), apply_b_dec_to_input=False).double()
    assert "after" in dict(sae.named_parameters())
    with pytest.raises(UnweaveError, match="how its parameters scale"):
        fold_decoder_norms(sae)
    with pytest.raises(UnweaveError, match="follow a shift"):
        fold_normalization(sae, Normalization.fit("center", torch.randn(30, 5)))


def test_what_cannot_be_registered(registry):
    @dataclass(frozen=True)
    class Taken(ReLU):
        name: ClassVar[str] = "topk"

    @dataclass(frozen=True)
    class Nameless(Activation):
        def selection(self, threshold, n_rows):
            return Above(0.0)

    class Plain(ReLU):
        name: ClassVar[str] = "test_plain"

    for cls, message in ((Taken, "'topk' already"), (Nameless, "no name"), (Plain, "dataclass"), (int, "dataclass")):
        with pytest.raises(UnweaveError, match=message):
            register_activation(cls)
    assert "test_plain" not in ACTIVATIONS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k=0"),
        (lambda: TopK(2.5), "whole k"),
        (lambda: AbsTopK(-1), "AbsTopK needs a whole k"),
        (lambda: GroupMax(0), "k=0"),
        (lambda: BatchTopK(0.0), "above 0"),
        (lambda: BatchTopK(float("nan")), "above 0"),
        (lambda: JumpReLU(init_threshold=-0.1), "init_threshold"),
        (lambda: JumpReLU(bandwidth=0), "bandwidth"),
        (lambda: JumpReLU(kernel="rectangel"), "did you mean 'rectangle'"),
        (lambda: JumpReLU(0.0, log_threshold=True), "logarithm"),
        (lambda: SAE(4, 8, TopK(9)), "d_sae=8"),
        (lambda: SAE(4, 8, BatchTopK(8.5)), "k=8.5"),
        (lambda: SAE(4, 8, GroupMax(3)), "k=3 groups divide"),
        (lambda: GroupMax(4).with_k(2), "number of groups"),
        (lambda: ReLU().with_k(2), "ReLU has no k"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


@pytest.mark.parametrize("activation", [TopK(2), AbsTopK(2), BatchTopK(2)], ids=str)
def test_k_of_a_step(activation):
    """A schedule's k takes the place of the activation function's for one step, and leaves no trace."""
    sae, x = SAE(5, 16, activation), torch.randn(40, 5)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    wanted = SAE(5, 16, type(activation)(7))
    wanted.load_state_dict(sae.state_dict())
    assert torch.equal(sae.training_codes(x, k=7).codes.to_dense(), wanted.training_codes(x).codes.to_dense())
    assert sae.activation == activation
    torch.testing.assert_close(dict(sae.state_dict()), before, equal_nan=True)
    assert sae.training_codes(x).codes.l0().mean() <= 2


@settings(deadline=None, max_examples=60)
@given(k=st.floats(0.01, 12), n=st.integers(1, 40))
def test_a_k_that_is_not_whole(k, n):
    """pitfall_045: on average k a token: the budget of the batch is the nearest whole number, and never 0."""
    sae = SAE(5, 16, BatchTopK(k))
    sae.b_enc.data.fill_(100.0)  # everything is positive
    codes = sae.training_codes(torch.randn(n, 5)).codes
    assert codes.l0().sum() == max(1, round(k * n))


@pytest.mark.parametrize("activation", [AbsTopK(2), BatchTopK(1.5)], ids=str)
def test_a_larger_k_beside_the_own(activation):
    """Multi-TopK: one selection, the same codes as without, and the next ones by rank."""
    sae, x = SAE(5, 16, activation).double(), torch.randn(40, 5, dtype=torch.float64)
    both, alone = sae.training_codes(x, k_multi=6), sae.training_codes(x)
    torch.testing.assert_close(both.codes.to_dense(), alone.codes.to_dense())
    wider = SAE(5, 16, activation.with_k(6)).double()
    wider.load_state_dict(sae.state_dict())
    chosen = both.pre.to_dense() + both.extra.to_dense()
    torch.testing.assert_close(chosen, wider.training_codes(x).pre.to_dense())


def test_abs_topk_by_hand():
    """pitfall_010: signs stay, and L0 and firing count what is not 0."""
    sae = SAE(3, 3, AbsTopK(2))
    sae.W_enc.data.copy_(torch.eye(3)), sae.W_dec.data.copy_(torch.eye(3))
    codes = sae.encode_sparse(torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, -1.0]]))
    assert codes.to_dense().tolist() == [[0.0, -3.0, 2.0], [0.0, 0.0, -1.0]]
    assert codes.l0().tolist() == [2, 1]
    assert codes.firing_counts().tolist() == [0, 1, 2]


def test_dead_latents_of_signed_codes_are_ranked_by_magnitude():
    sae = SAE(3, 3, AbsTopK(1))
    sae.W_enc.data.copy_(torch.eye(3))
    aux = sae.training_codes(torch.tensor([[5.0, -3.0, 2.0]]), torch.tensor([1, 2]), k_aux=1).aux
    assert (aux.indices.tolist(), aux.values.tolist()) == ([1], [-3.0])


def test_group_max_by_hand():
    """One latent of each group, if it is positive; ties go to the lower latent."""
    sae = SAE(4, 4, GroupMax(2))
    sae.W_enc.data.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 3.0, -1.0, -2.0], [2.0, 2.0, 0.5, 4.0]])
    assert sae.encode(x).tolist() == [[0, 3, 0, 0], [2, 0, 0, 4]]


def test_tanh_relu_by_hand():
    sae = SAE(2, 2, TanhReLU())
    sae.W_enc.data.copy_(torch.eye(2))
    expected = [[0.7615942, 0.0], [0.9999092, 0.4621172]]
    torch.testing.assert_close(sae.encode(torch.tensor([[1.0, -1.0], [5.0, 0.5]])), torch.tensor(expected))
