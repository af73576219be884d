"""Published numbers, converted; and the command line's way to them."""

import inspect
import math

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.cli.train import TrainArgs
from unweave.objectives import L0, L1, Lp, PAnneal, QuadraticL0, Tanh, TargetL0
from unweave.sae import SAE, BatchTopK, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, recipes
from unweave.training.config import from_dict, to_dict
from unweave.training.finish import _sae_lens_training_keys
from unweave.training.train_on import train_on

NAMES = ["april_2024", "topk", "batch_topk", "matryoshka", "gemma_scope", "gemma_scope_2", "january_2025", "gated",
         "p_anneal"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_config_with_a_source(name):
    function = recipes.RECIPES[name]
    config = function()
    assert isinstance(config, SAEConfig)
    assert from_dict(SAEConfig, to_dict(config)) == config
    assert any(source in inspect.getdoc(function) for source in ("arXiv", "Circuits Updates", "Gemma Scope 2 (2025)"))
    assert recipes.needs_width(name) == ("d_in" in inspect.signature(function).parameters)
    assert function(d_sae=512).d_sae == 512


def test_conversions():
    """The worked values of the conversion: at a mean squared norm of 1, coefficients and thresholds at a width."""
    scope = recipes.gemma_scope(d_in=2304)
    assert isinstance(scope.sparsity, L0)
    assert scope.sparsity.coefficient == pytest.approx(1.3824)
    assert scope.activation.bandwidth == pytest.approx(0.048)
    assert scope.activation.init_threshold == pytest.approx(0.048)
    assert scope.betas == (0.0, 0.999)
    assert recipes.gated(d_in=2304, l1=0.06).sparsity.coefficient == pytest.approx(2.88)
    assert recipes.gated(d_in=768, l1=0.06).sparsity.coefficient == pytest.approx(1.663, rel=1e-3)
    assert recipes.p_anneal(d_in=400, l1=0.02).sparsity.coefficient == pytest.approx(0.4)
    assert recipes.p_anneal().sparsity.p_end == 0.2
    assert recipes.april_2024().sparsity == L1(5.0)
    assert recipes.topk().activation == TopK(32)
    assert recipes.batch_topk().activation == BatchTopK(32)
    assert recipes.gemma_scope_2(l0=15).sparsity[0] == QuadraticL0(15)
    assert recipes.january_2025().sparsity == Tanh(10.0)
    assert isinstance(recipes.p_anneal().sparsity, PAnneal)


def test_a_converted_coefficient_gives_equal_gradients():
    """pitfall_076: the published objective on inputs of mean squared norm 1, and the converted one at our scale."""
    d, m, published = 9, 12, 0.06
    ours = recipes.gated(m, d_in=d, l1=published).sparsity.coefficient
    x = torch.randn(50, d, dtype=torch.float64)
    x = x * (d / x.square().sum(1).mean()).sqrt()
    sae = SAE(d, m, JumpReLU()).double()
    grads = []
    for s, coefficient in ((1.0, ours), (1 / math.sqrt(d), published)):
        codes = (s * x @ sae.W_enc).relu()
        loss = (codes @ sae.W_dec - s * x).square().sum(1).mean() + coefficient * codes.sum(1).mean()
        grads.append(torch.autograd.grad(loss / s**2, sae.W_enc)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 16, generator=generator) for _ in range(12)]
    arguments = {"d_in": 16} if recipes.needs_width(name) else {}
    small = {"k": 4} if "k" in inspect.signature(recipes.RECIPES[name]).parameters else {}
    config = recipes.RECIPES[name](64, **arguments, **small)
    (sae,) = train_on(batches, [config], progress=False)
    assert sae(batches[0]).isfinite().all()


def test_a_recipe_on_the_command_line():
    """Without reading any data; what else is given on the line wins."""
    config = TrainArgs(recipe="topk", d_sae=64, k=3).to_config()
    assert config.saes == (SAEConfig(**{**vars(recipes.topk()), "d_sae": 64, "activation": TopK(3)}),)


def test_a_recipe_asks_the_model_for_its_width():
    config, model = TrainArgs(recipe="gemma_scope", d_sae=64, hooks=("resid_post.1",)).prepared()
    width = model.module.get_input_embeddings().weight.shape[1]
    assert config.saes == (recipes.gemma_scope(64, d_in=width),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "topkk"}, "no recipe 'topkk'; did you mean 'topk'"),
        ({"recipe": "topk", "activation": "relu"}, "leave out --activation"),
        ({"recipe": "april_2024", "k": 3}, "--k goes with"),
    ],
)
def test_recipes_that_do_not_fit(arguments, message):
    with pytest.raises(UnweaveError, match=message):
        TrainArgs(**arguments).to_config()


def test_a_recipe_beside_the_saes_of_a_file(tmp_path):
    (tmp_path / "run.toml").write_text("[[saes]]\nd_sae = 64\n")
    with pytest.raises(UnweaveError, match="not both"):
        TrainArgs(recipe="topk", config=tmp_path / "run.toml").to_config()


@pytest.mark.parametrize(
    ("sparsity", "keys"),
    [
        (L0(2.0), {"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": 2.0}),
        (QuadraticL0(9.0, 2.0), {"jumprelu_sparsity_loss_mode": "quadratic", "l0_coefficient": 2.0, "target_l0": 9.0}),
        (TargetL0(4.0, 0.5), {"jumprelu_sparsity_loss_mode": "quadratic", "l0_coefficient": 1.0, "target_l0": 4.0}),
        (Tanh(2.0, c=3.0), {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": 2.0, "jumprelu_tanh_scale": 3.0}),
    ],
    ids=str,
)
def test_penalties_under_the_names_of_sae_lens(sparsity, keys):
    config = SAEConfig(d_sae=16, activation=JumpReLU(), sparsity=sparsity)
    written = _sae_lens_training_keys(config, 16)
    assert {key: written.get(key) for key in keys} == keys
    lp = SAEConfig(d_sae=16, activation=ReLU(), sparsity=Lp(0.3, p=0.5, root=True))
    assert _sae_lens_training_keys(lp, 16)["lp_norm"] == 0.5
