import dataclasses
import json

import pytest

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, TargetL0
from unweave.sae import AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TanhReLU, TopK
from unweave.training import SAEConfig, TrainConfig
from unweave.training.config import from_dict, to_dict

CONFIGS = [
    SAEConfig(),
    SAEConfig(d_sae=64, activation=BatchTopK(3), auxk=AuxK(0.5, 8), lr=1e-3, grad_clip=None, betas=(0.0, 0.99)),
    SAEConfig(activation=ReLU(), sparsity=L1(2.5), unit_norm=False, b_dec_init="zeros"),
    SAEConfig(activation=JumpReLU(0.2, 0.3), sparsity=TargetL0(20), dead_after=1000),
    SAEConfig(activation=Gated(), sparsity=L1(2.5), pre_act=PreActivation(1e-3)),
    SAEConfig(activation=BatchTopK(3), matryoshka=Matryoshka((0.25, 0.5)), multi_topk=MultiTopK(7, 0.5)),
    SAEConfig(activation=TopK(3), matryoshka=Matryoshka((128, 1024)), ghost=GhostGradients(0.5)),
    SAEConfig(activation=AbsTopK(3), multi_topk=MultiTopK(7), normalize="whiten"),
    SAEConfig(activation=GroupMax(64), normalize="layer_norm"),
    SAEConfig(activation=TanhReLU(), sparsity=L1(1.5), normalize="center"),
    SAEConfig(activation=BatchTopK(2.5)),
    SAEConfig(activation=JumpReLU(0.2, 0.3, kernel="cosine", ste_to_input=True, shared=True, log_threshold=True)),
]


@pytest.mark.parametrize("sae", CONFIGS, ids=str)
def test_round_trip_through_json(sae):
    config = TrainConfig(saes=(sae, SAEConfig()), hooks=("a", "b"), out="x", checkpoint_every=100)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def leaves(value, path=""):
    """The names of all settings, down to the last."""
    if isinstance(value, dict):
        return {leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves(value[0], path)
    return {path}


def test_a_saved_config_keeps_its_meaning_when_defaults_change():
    """pitfall_278: every setting is written, whether it was given or not, and one that is no more is an error."""
    saved = to_dict(TrainConfig(saes=(SAEConfig(activation=JumpReLU()),)))
    assert leaves(saved).issuperset({f".{field.name}" for field in dataclasses.fields(TrainConfig)} - NESTED)
    assert leaves(saved).issuperset({f".saes.{field.name}" for field in dataclasses.fields(SAEConfig)} - NESTED)
    for part in (saved["text"], saved["masks"], saved["saes"][0]["auxk"], saved["saes"][0]["activation"]):
        assert len(part) >= 3
    assert saved["saes"][0]["activation"].keys() == {f.name for f in dataclasses.fields(JumpReLU)} | {"type"}
    for name, value in (("warm_up", 0.1), ("train_batch_size_tokens", 4096)):
        with pytest.raises(UnweaveError, match=name):
            from_dict(SAEConfig, saved["saes"][0] | {name: value})


NESTED = {".saes", ".text", ".images", ".masks", ".saes.activation", ".saes.auxk"}


def test_defaults_by_activation():
    assert SAEConfig(activation=ReLU()).sparsity_term == L1()
    assert SAEConfig(activation=JumpReLU()).sparsity_term == TargetL0()
    assert SAEConfig(activation=TopK()).sparsity_term is None
    assert not SAEConfig(activation=ReLU()).decoder_is_unit
    assert SAEConfig(activation=TopK()).decoder_is_unit
    assert SAEConfig(d_sae=2**16).learning_rate == pytest.approx(1e-4)
    assert SAEConfig(activation=Gated()).sparsity_term == L1()
    assert SAEConfig(activation=Gated()).decoder_is_unit
    assert SAEConfig(activation=TanhReLU()).sparsity_term == L1()
    assert not SAEConfig(activation=TanhReLU()).decoder_is_unit
    for activation in (AbsTopK(), GroupMax()):
        assert SAEConfig(activation=activation).sparsity_term is None
        assert SAEConfig(activation=activation).decoder_is_unit


def test_ghost_gradients_take_the_place_of_auxk():
    config = SAEConfig(ghost=GhostGradients())
    assert config.auxk.coefficient == 0
    assert SAEConfig(ghost=GhostGradients(), auxk=AuxK(0.0, 64)).auxk.k == 64
    with pytest.raises(UnweaveError, match="give one of them"):
        SAEConfig(ghost=GhostGradients(), auxk=AuxK(0.5))


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
        ({"saes": [{"matryoshka": {"prefixes": 0.5}}]}, "prefixes must be a list"),
        ({"saes": [{"matryoshka": {"widths": [1]}}]}, r"matryoshka.widths'.*'prefixes'|matryoshka.widths.*prefixes"),
        ({"saes": [{"multi_topk": 128}]}, "multi_topk must be a table"),
        ({"saes": [{"activation": {"k": 8}}]}, "no type None; it is one of"),
        ({"saes": [{"activation": {"type": "jumprelu", "kernel": "box"}}]}, "kernel is one of 'rectangle'"),
        ({"saes": [{"activation": {"type": "groupmax", "k": 2.5}}]}, "k must be int"),
        ({"saes": [{"normalize": "whitening"}]}, "normalize is one of 'scalar'"),
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": TopK(32), "matryoshka": Matryoshka((128,)), "d_sae": 64}, "128 latents is wider"),
        ({"matryoshka": Matryoshka((0.5, 0.25))}, "ascend"),
        ({"activation": ReLU(), "multi_topk": MultiTopK()}, "ReLU has none"),
        ({"activation": Gated(), "multi_topk": MultiTopK(64)}, "Gated has none"),
        ({"activation": TopK(8), "multi_topk": MultiTopK(8)}, "above the first, 8"),
        ({"activation": TopK(8), "d_sae": 16, "multi_topk": MultiTopK(17)}, "d_sae=16, got 17"),
        ({"activation": TopK(8), "d_sae": 8, "multi_topk": MultiTopK()}, "above the first, 8"),
        ({"activation": TopK(8), "pre_act": PreActivation()}, "TopK ranks"),
        ({"activation": BatchTopK(8), "pre_act": PreActivation()}, "BatchTopK ranks"),
        ({"activation": Gated(), "sparsity": TargetL0()}, "Gated SAE has none"),
        ({"activation": GroupMax(5)}, "k=5 groups divide"),
        ({"activation": AbsTopK(64), "d_sae": 32}, "d_sae=32"),
        ({"activation": GroupMax(8), "multi_topk": MultiTopK(64)}, "GroupMax has none"),
        ({"activation": AbsTopK(8), "pre_act": PreActivation()}, "AbsTopK ranks"),
        ({"activation": GroupMax(8), "unit_norm": False}, "GroupMax ranks latents against each other"),
        ({"activation": JumpReLU(shared=True), "unit_norm": False}, "JumpReLU shares one threshold"),
        ({"coder": "crosscoder", "normalize": "whiten"}, r"normalize='whiten'.*crosscoder"),
    ],
)
def test_objectives_that_make_no_sense_together(settings, message):
    with pytest.raises(UnweaveError, match=message):
        SAEConfig(**settings)


def test_the_ring_holds_at_least_a_batch():
    """pitfall_163: by default, too."""
    assert TrainConfig().ring_size >= TrainConfig().batch_size
    assert TrainConfig(batch_size=4096, buffer=10).ring_size == 4096


def test_a_single_hook_may_be_a_string():
    assert TrainConfig(hooks="resid_post.1").hooks == ("resid_post.1",)
