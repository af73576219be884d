"""Training cross-layer transcoders: losses and gradients by hand, sites, whole runs, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, standard_library_text
from unweave.cli.train import TrainArgs
from unweave.evaluation import evaluate
from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, Reanimation, Tanh
from unweave.sae import SAE, BatchTopK, CrossLayerTranscoder, JumpReLU, ReLU, TopK, by_target
from unweave.training import SAEConfig, TrainConfig, recipes, train, train_on
from unweave.training.checkpoint import load_checkpoint, save_checkpoint
from unweave.training.config import from_dict, to_dict
from unweave.training.finish import finished_sae
from unweave.training.sites import Site, sites_of
from unweave.training.trainee import Trainee

N, M, L = 30, 8, 3
READS, WRITES = dict.fromkeys("abc", 4), {"ya": 3, "yb": 5, "yc": 2}
D_IN, D_OUT = 12, 10
DEAD = [2, 3, 17, 20, 21]


def make(config):
    """A trainee in float64 whose weights matter, and a batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(N, D_OUT, generator=generator, dtype=torch.float64)
    trainee = Trainee(config, x, steps=100, tokens=100 * N, seed=0, target=y, widths=READS, target_widths=WRITES)
    sae = trainee.sae.double()
    for name, parameter in sae.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        parameter.data.copy_(drawn.abs() if name == "threshold" else drawn)
    trainee.tokens_since_fired[DEAD] = trainee.dead_after
    return trainee, x, y


def blocks(sae):
    """Dense pre-activations of all layers, and the decoder as its separate blocks with gradients of their own."""
    decoders = {
        (i, j): sae.decoder(i, target).detach().clone().requires_grad_()
        for j, target in enumerate(WRITES)
        for i in range(j + 1)
    }

    def pre(x):
        return [
            x[:, 4 * i : 4 * i + 4] @ sae.W_enc[:, M * i : M * i + M] + sae.b_enc[M * i : M * i + M] for i in range(L)
        ]

    def decode(codes):
        bias = sae.b_dec.split(list(WRITES.values()))
        return [bias[j] + sum(codes[i] @ decoders[i, j] for i in range(j + 1)) for j in range(L)]

    def norms():
        squares = [sum(decoders[i, j].square().sum(1) for j in range(i, L)) for i in range(L)]
        return torch.cat(squares).sqrt()

    return pre, decode, norms, decoders


def assert_same(trainee, x, y, expected, decoders):
    """Equal losses and gradients."""
    sae = trainee.sae
    loss, y_hat, _ = trainee.loss(x, 0.6, y)
    loss.backward()
    got = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in sae.named_parameters():
        if not name.startswith("W_dec"):
            torch.testing.assert_close(got[name], parameter.grad, msg=name)
    for (i, j), block in decoders.items():
        of_layer = got[f"W_dec.{i}"].split(list(WRITES.values())[i:], 1)
        torch.testing.assert_close(of_layer[j - i], block.grad)
    return y_hat


def aux_share(pre, decode_dead, y, y_hat, k):
    """AuxK by hand: in each layer the strongest k of its dead latents."""
    codes = []
    for i, p in enumerate(pre):
        own = [j - M * i for j in DEAD if M * i <= j < M * i + M]
        made = torch.zeros_like(p)
        if own:
            best = p[:, own].topk(min(k, len(own)), dim=1)
            made = made.scatter(1, torch.tensor(own)[best.indices], best.values.relu())
        codes.append(made)
    e = (y - y_hat).detach()
    return (decode_dead(codes) - e).square().sum() / (e - e.mean(0)).square().sum()


def test_the_loss_with_relu_l1_auxk_and_reanimation():
    config = SAEConfig(
        d_sae=M, activation=ReLU(), sparsity=L1(0.7), auxk=AuxK(0.3, k=6), reanimation=Reanimation(0.2), coder="clt"
    )
    trainee, x, y = make(config)
    pre, decode, norms, decoders = blocks(trainee.sae)
    trainee.sae.b_enc.data[[5, 12]] = -50.0  # never fire
    p = pre(x)
    codes = [each.relu() for each in p]
    y_hat, fired = torch.cat(decode(codes), 1), torch.cat(codes, 1).gt(0).any(0)
    expected = (y_hat - y).square().sum(1).mean() + 0.7 * 0.6 * (torch.cat(codes, 1) * norms()).sum(1).mean()
    share = aux_share(p, lambda c: torch.cat(decode(c), 1) - trainee.sae.b_dec, y, y_hat, 2)
    expected = expected + 0.3 * D_OUT * share * 5 / 6 - 0.2 * torch.cat(p, 1)[:, ~fired].mean()
    assert fired.sum() < L * M
    made = assert_same(trainee, x, y, expected, decoders)
    torch.testing.assert_close(made, trainee.sae(x))


def test_the_loss_with_jumprelu_tanh_and_the_pre_activation_loss():
    config = SAEConfig(
        d_sae=M, activation=JumpReLU(bandwidth=0.3, ste_to_input=True), sparsity=Tanh(0.7), auxk=AuxK(0),
        pre_act=PreActivation(0.4), coder="clt",
    )  # fmt: skip
    trainee, x, y = make(config)
    sae = trainee.sae
    pre, decode, norms, decoders = blocks(sae)
    p = torch.cat(pre(x), 1)
    theta = sae.threshold

    # A straight-through form with the published gradients: H' is the window.
    window = ((p - theta).abs() < 0.15).double() / 0.3
    codes = p * (p > theta).double().detach() + theta.detach() * window.detach() * ((p - theta) - (p - theta).detach())
    y_hat = torch.cat(decode(codes.split(M, 1)), 1)
    n = norms()
    expected = (y_hat - y).square().sum(1).mean() + 0.7 * 0.6 * (4 * codes * n).tanh().sum(1).mean()
    expected = expected + 0.4 * ((theta - p)[:, DEAD].relu() * n[DEAD].detach()).sum(1).mean()
    assert_same(trainee, x, y, expected, decoders)


def test_the_loss_with_batchtopk_selects_among_all_layers():
    config = SAEConfig(d_sae=M, activation=BatchTopK(1.5), auxk=AuxK(0), coder="clt")
    trainee, x, y = make(config)
    pre, decode, _, decoders = blocks(trainee.sae)
    p = torch.cat(pre(x), 1)
    codes = torch.where(p >= p.flatten().topk(int(1.5 * N) * L).values[-1], p, 0.0)
    expected = (torch.cat(decode(codes.split(M, 1)), 1) - y).square().sum(1).mean()
    assert_same(trainee, x, y, expected, decoders)


def world(n_batches=40, n=128):
    """Two layers: what the first reads acts on both targets, at very different scales."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    late = torch.randn(8, 5, generator=generator)
    for _ in range(n_batches):
        a, b = (torch.randn(n, 8, generator=generator) for _ in range(2))
        early = (a - 0.8).relu()
        ya, yb = early @ first, early @ late + (b - 0.8).relu() @ second
        yield {"a": 5 * a + 1, "b": b - 2, "ya": 40 * ya + 3, "yb": 0.1 * yb}


def explained(y_hat, y):
    return float(1 - (y_hat - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), ReLU(), JumpReLU()], ids=lambda a: a.name)
def test_it_learns_what_a_transcoder_of_the_last_layer_cannot_see(activation):
    batches, names = list(world(150)), {"hooks": ["a", "b"], "targets": ["ya", "yb"]}
    sparsity = L1(0.1) if activation == ReLU() else None
    clt, *alone = train_on(
        batches,
        [
            SAEConfig(d_sae=24, activation=activation, coder=coder, lr=1e-2, threshold_lr=2e-2, sparsity=sparsity)
            for coder in ("clt", "transcoder")
        ],
        progress=False,
        **names,
    )
    assert isinstance(clt, CrossLayerTranscoder)
    shown = {name: torch.cat([batch[name] for batch in batches[:4]]) for name in batches[0]}
    y_hat = clt.split(clt(clt.join(shown)))
    found = {target: explained(y_hat[target], shown[target]) for target in ("ya", "yb")}
    last = explained(alone[1](shown["b"]), shown["yb"])
    assert found["ya"] > 0.7
    assert found["yb"] > max(0.6, last + 0.2)
    assert clt.W_dec[24:, :6].count_nonzero() == 0
    assert len(clt.metadata["input_scale"]) == len(clt.metadata["target_scale"]) == 2
    assert clt.metadata["hf_hook_names_out"] == ["ya", "yb"]


def test_decoder_rows_can_have_unit_norm():
    config = SAEConfig(d_sae=24, activation=TopK(3), coder="clt", unit_norm=True)
    batches = list(world(5))
    trainee = fresh(config, batches[0])
    for batch in batches:
        trainee.step(*rows(batch))
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.ones(48))
    assert trainee.sae.W_dec[24:, :6].count_nonzero() == 0
    assert fresh(SAEConfig(d_sae=24, activation=TopK(3), coder="clt"), batches[0]).sae.W_dec.count_nonzero() == 0


def rows(batch):
    return torch.cat([batch["a"], batch["b"]], 1), torch.cat([batch["ya"], batch["yb"]], 1)


def fresh(config, batch, start=None):
    x, y = rows(batch)
    return Trainee(
        config, x, steps=6, tokens=600, seed=0, target=y, widths={"a": 8, "b": 8}, target_widths={"ya": 6, "yb": 5},
        start=start,
    )  # fmt: skip


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), JumpReLU()], ids=lambda a: a.name)
def test_a_checkpoint_goes_on_where_it_was(activation, moments, tmp_path):
    batches = list(world(6))
    config = SAEConfig(d_sae=24, activation=activation, coder="clt", moments=moments)
    whole, start, resumed = fresh(config, batches[0]), fresh(config, batches[0]), fresh(config, batches[5])
    for batch in batches:
        whole.step(*rows(batch))
    for batch in batches[:3]:
        start.step(*rows(batch))
    resumed.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 3, start.state_dict())))
    for batch in batches[3:]:
        resumed.step(*rows(batch))
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert whole.sae.W_dec.count_nonzero() > 0
    assert whole.sae.W_dec[24:, :6].count_nonzero() == 0
    x = rows(batches[0])[0]
    finished = [finished_sae(trainee, [x], {}) for trainee in (whole, resumed)]
    assert finished[0].metadata["target_scale"] == finished[1].metadata["target_scale"]
    assert torch.equal(*(sae(x) for sae in finished))


def test_training_starts_from_a_finished_one():
    batches, config = list(world(3)), SAEConfig(d_sae=24, activation=TopK(3), coder="clt")
    trainee = fresh(config, batches[0])
    for batch in batches:
        trainee.step(*rows(batch))
    finished, x = finished_sae(trainee, [], {}), rows(batches[0])[0]
    other = fresh(config, {name: 3 * value + 1 for name, value in batches[1].items()}, start=finished)
    torch.testing.assert_close(finished_sae(other, [], {})(x), finished(x), rtol=1e-4, atol=1e-3)


def test_its_site_is_all_hooks_and_all_targets():
    site = Site(("a", "b"), ("ya", "yb"))
    assert sites_of(SAEConfig(coder="clt"), ["a", "b"], ["ya", "yb"]) == [site]
    assert (str(site), site.folder) == ("a+b->ya+yb", "a+b_to_ya+yb")


CLT = SAEConfig(d_sae=32, activation=TopK(4), coder="clt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sites_of(CLT, ["a", "b"], ["ya"]), "each hook needs a target of its own"),
        (lambda: sites_of(CLT, ["a"], ["ya"]), "a clt needs two or more hooks"),
        (lambda: TrainConfig(hooks=("h.*.mlp:in",), saes=(CLT,)), "a clt needs the hook whose activations"),
        (lambda: SAEConfig(coder="clt", matryoshka=Matryoshka()), "no matryoshka: prefixes"),
        (lambda: SAEConfig(coder="clt", multi_topk=MultiTopK()), "no multi_topk: its second k"),
        (lambda: SAEConfig(coder="clt", ghost=GhostGradients()), "no ghost: ghosts of all layers"),
        (lambda: SAEConfig(coder="crosscoder", skip=True), "a skip is a transcoder's.*this is a crosscoder"),
        (lambda: SAEConfig(coder="clt", normalize="whiten"), "a clt scales each hook"),
        (lambda: SAEConfig(coder="clt", W_dec_init="data"), "a clt writes elsewhere"),
        (lambda: train_on([(torch.ones(4, 3),) * 2], [CLT]), "two or more hooks"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


@pytest.mark.parametrize(
    ("hooks", "targets", "message"),
    [(("h.*.mlp:in",), ("h.1.mlp",), "needs a target of its own"), (("h.0.mlp:in",), ("h.0.mlp",), "two or more")],
)
def test_unequal_numbers_are_refused_before_data_is_read(hooks, targets, message, tiny_model):
    config = TrainConfig(hooks=hooks, targets=targets, saes=(CLT,), data="/there/is/no/such/file.txt")
    with pytest.raises(UnweaveError, match=message):
        train(config, model=tiny_model, progress=False)


def test_inputs_of_different_widths_are_refused(tiny_model):
    batch = {"a": torch.randn(9, 3), "b": torch.randn(9, 4), "c": torch.randn(9, 2), "d": torch.randn(9, 2)}
    with pytest.raises(UnweaveError, match=r"have one width, got \[3, 4\]"):
        train_on([batch], [CLT], hooks=["a", "b"], targets=["c", "d"], progress=False)


def test_a_run(tiny_model, texts, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = TrainConfig(
        data=str(tmp_path / "data.jsonl"), hooks=("h.*.mlp:in",), targets=("h.*.mlp",), tokens=2000, batch_size=128,
        buffer=512, out=str(tmp_path / "run"), text=DataConfig(context=16, held_out=0.2),
        saes=(SAEConfig(d_sae=32, activation=BatchTopK(4), coder="clt"), CLT),
    )  # fmt: skip
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    result = train(config, model=tiny_model, progress=False)
    for sae, folder in zip(result.saes, result.folders, strict=True):
        assert isinstance(sae, CrossLayerTranscoder)
        mlps = [f"transformer.h.{i}.mlp" for i in (0, 1)]
        assert list(sae.writes) == sae.metadata["hf_hook_names_out"] == mlps
        assert list(sae.reads) == sae.metadata["hf_hook_names"] == [f"{mlp}:in" for mlp in mlps]
        x = torch.randn(5, sae.d_in)
        assert torch.equal(SAE.load(folder)(x), sae(x))
        torch.testing.assert_close(SAE.load(folder / "training")(x), sae(x))
        assert sae.at(mlps[0])(x[:, :16]).shape == (5, 16)
    assert result.saes[0].metadata["threshold_calibration_tokens"] > 0


def test_on_the_demo_model_it_predicts_both_layers_at_least_as_well_as_transcoders_do():
    texts = [text[:4000] for text, _ in zip(standard_library_text(), range(100), strict=False)]
    config = TrainConfig(
        hooks=("h.2.mlp:in", "h.3.mlp:in"), targets=("h.2.mlp", "h.3.mlp"), tokens=15_000, batch_size=128, buffer=4096,
        saes=[SAEConfig(d_sae=96, activation=TopK(8), coder=coder, lr=3e-3) for coder in ("clt", "transcoder")],
    )  # fmt: skip
    result = train(config, data=texts, progress=False)

    def explained_at(sae):
        report = evaluate(sae, model=result.model, data=texts, tokens=1000)
        return report.metrics["reconstruction/explained_variance"]

    clt, *alone = result.saes
    found = [explained_at(part) for part in by_target(clt).values()]
    single = [explained_at(sae) for sae in alone]
    assert min(single) > 0.3
    assert found[0] > single[0] - 0.03  # the same codes of the first layer now serve two targets
    assert found[1] > single[1] + 0.02


def test_the_recipe_and_the_command_line():
    recipe = recipes.clt()
    assert (recipe.activation, recipe.lr, recipe.betas, recipe.decay) == (BatchTopK(200 / 12), 1e-4, (0.9, 0.98), 0.2)
    assert (recipe.coder, recipe.auxk, recipe.decoder_is_unit) == ("clt", AuxK(1 / 32), False)
    args = {"hooks": ("h.*.mlp:in",), "target": ("h.*.mlp",)}
    assert TrainArgs(recipe="clt", **args).to_config().saes == (recipe,)
    assert TrainArgs(coder="clt", d_sae=32, k=4, **args).to_config().saes == (CLT,)


def test_a_skip_is_trained():
    """What is linear goes through the skip: the same run without one leaves far more of it."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(4096, 4, generator=generator) for name in "abc"}
    maps = {name: torch.randn(4, 3, generator=generator) for name in "abc"}
    y = {f"y{name}": x[name] @ maps[name] for name in "abc"}
    batches = [{name: v[i : i + 64] for name, v in (x | y).items()} for i in range(0, 4096, 64)] * 2
    left = {}
    for skip in (True, False):
        config = SAEConfig(d_sae=M, activation=TopK(1), coder="clt", skip=skip, lr=3e-2)
        (clt,) = train_on(batches, [config], hooks=list("abc"), targets=list(y), progress=False)
        assert (clt.W_skip is not None) == skip
        left[skip] = (clt(clt.join(x)) - torch.cat(list(y.values()), 1)).square().sum().item()
    assert left[True] < 0.05 * left[False]
    with pytest.raises(UnweaveError, match="outputs of a transcoder with a skip have one width"):
        make(SAEConfig(d_sae=M, activation=TopK(2), coder="clt", skip=True))
