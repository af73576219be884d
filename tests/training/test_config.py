import json

import pytest

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, TargetL0
from unweave.sae import BatchTopK, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, TrainConfig
from unweave.training.config import from_dict, to_dict

CONFIGS = [
    SAEConfig(),
    SAEConfig(d_sae=64, activation=BatchTopK(3), auxk=AuxK(0.5, 8), lr=1e-3, grad_clip=None, betas=(0.0, 0.99)),
    SAEConfig(activation=ReLU(), sparsity=L1(2.5), unit_norm=False, b_dec_init="zeros"),
    SAEConfig(activation=JumpReLU(0.2, 0.3), sparsity=TargetL0(20), dead_after=1000),
]


@pytest.mark.parametrize("sae", CONFIGS, ids=str)
def test_round_trip_through_json(sae):
    config = TrainConfig(saes=(sae, SAEConfig()), hooks=("a", "b"), out="x", checkpoint_every=100)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_defaults_by_activation():
    assert SAEConfig(activation=ReLU()).sparsity_term == L1()
    assert SAEConfig(activation=JumpReLU()).sparsity_term == TargetL0()
    assert SAEConfig(activation=TopK()).sparsity_term is None
    assert not SAEConfig(activation=ReLU()).decoder_is_unit
    assert SAEConfig(activation=TopK()).decoder_is_unit
    assert SAEConfig(d_sae=2**16).learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenz": 3}, "did you mean 'tokens'"),  # pitfall_271
        ({"saes": [{"dsae": 3}]}, r"saes\[0\].*did you mean 'd_sae'"),
        ({"saes": [{"activation": {"type": "topkk"}}]}, "'topkk'.*topk"),
        ({"saes": [{"activation": {"type": "topk", "kk": 3}}]}, "'k'"),
        ({"tokens": "many"}, "tokens must be int"),
        ({"tokens": True}, "tokens must be int"),
        ({"saes": [{"b_dec_init": "median"}]}, "'mean', 'zeros'"),
        ({"text": {"contxt": 64}}, "did you mean 'context'"),
        ({"saes": {"d_sae": 3}}, r"\[\[saes\]\]"),
        ({"saes": 3}, "saes must be a list"),
        ({"saes": [{"activation": "topk"}]}, r"activation must be a table"),
        ({"text": "x"}, "text must be a table"),
        ({"saes": [{"betas": [0.9]}]}, "betas"),
        ({"saes": [{"betas": [1.0, 0.9]}]}, "betas"),
    ],
)
def test_misspelt_settings(values, message):
    with pytest.raises(UnweaveError, match=message):
        from_dict(TrainConfig, values)


def test_whole_floats_and_integers_are_accepted():
    """pitfall_356: `lr = 1` is a float, and `tokens = 1e6` is a number of tokens."""
    config = from_dict(TrainConfig, {"tokens": 1e6, "saes": [{"lr": 1}]})
    assert (config.tokens, config.saes[0].lr) == (1_000_000, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SAEConfig(d_sae=0),
        lambda: SAEConfig(d_sae=-5),
        lambda: SAEConfig(d_sae=16, activation=TopK(17)),
        lambda: SAEConfig(activation=TopK(), sparsity=TargetL0()),
        lambda: SAEConfig(d_sae=16, activation=JumpReLU(), sparsity=TargetL0(17)),
        lambda: SAEConfig(warmup=1.5),
        lambda: SAEConfig(lr=0.0),
        lambda: TrainConfig(tokens=0),
        lambda: TrainConfig(batch_size=-1),
        lambda: TrainConfig(hooks=()),
        lambda: TrainConfig(saes=()),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(UnweaveError):
        make()


def test_the_ring_holds_at_least_a_batch():
    assert TrainConfig(batch_size=4096, buffer=10).ring_size == 4096


def test_a_single_hook_may_be_a_string():
    assert TrainConfig(hooks="resid_post.1").hooks == ("resid_post.1",)
