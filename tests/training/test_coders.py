"""Training transcoders and crosscoders: losses by hand, sites, whole runs, refusals."""

import dataclasses
import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig
from unweave.cli.train import TrainArgs
from unweave.objectives import L1, AuxK, Matryoshka
from unweave.sae import SAE, BatchTopK, Crosscoder, JumpReLU, ReLU, TopK, Transcoder
from unweave.training import SAEConfig, TrainConfig, recipes, train, train_on
from unweave.training.checkpoint import load_checkpoint, save_checkpoint
from unweave.training.config import from_dict, to_dict
from unweave.training.finish import finished_sae
from unweave.training.fused import supports
from unweave.training.sites import Site, sites_of
from unweave.training.trainee import Trainee

N, D_IN, D_OUT, M = 40, 6, 5, 24
DEAD = [2, 3, 11]


def make(config, widths=None):
    """A trainee in float64 whose weights matter, and a batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D_IN, generator=generator, dtype=torch.float64)
    y = torch.randn(N, D_OUT, generator=generator, dtype=torch.float64) if config.coder == "transcoder" else None
    trainee = Trainee(config, x, steps=100, tokens=100 * N, seed=0, target=y, widths=widths)
    trainee.sae.double()
    for parameter in trainee.sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    trainee.tokens_since_fired[DEAD] = trainee.dead_after
    return trainee, x, y


def dense(trainee, x, y, penalty_norms):
    """The loss of ReLU with L1, AuxK and two prefixes, as dense formulas."""
    config, sae = trainee.config, trainee.sae
    pre = x @ sae.W_enc + sae.b_enc
    codes, skip = pre.relu(), 0 if getattr(sae, "W_skip", None) is None else x @ sae.W_skip.T
    errors = [
        (codes[:, :m] @ sae.W_dec[:m] + sae.b_dec + skip - y).square().sum(1).mean() for m in trainee.widths or [M]
    ]
    loss = torch.stack(errors).mean() + 0.7 * 0.6 * (codes * penalty_norms).sum(1).mean()
    e = (y - codes @ sae.W_dec - sae.b_dec - skip).detach()
    chosen = pre[:, DEAD].topk(2, dim=1)
    aux = torch.zeros(len(x), 3, dtype=torch.float64).scatter(1, chosen.indices, chosen.values.relu())
    share = (aux @ sae.W_dec[DEAD] - e).square().sum() / (e - e.mean(0)).square().sum()
    return loss + config.auxk.coefficient * y.shape[1] * share


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("matryoshka", [None, Matryoshka((8,))])
def test_the_loss_of_a_transcoder(skip, matryoshka):
    config = SAEConfig(
        d_sae=M, activation=ReLU(), sparsity=L1(0.7), auxk=AuxK(0.3, k=2), coder="transcoder", skip=skip,
        matryoshka=matryoshka,
    )  # fmt: skip
    trainee, x, y = make(config)
    assert_same_loss(trainee, x, y, lambda: trainee.sae.W_dec.norm(dim=1))


def test_the_loss_of_a_crosscoder_weighs_codes_by_the_sum_of_norms():
    config = SAEConfig(d_sae=M, activation=ReLU(), sparsity=L1(0.7), auxk=AuxK(0.3, k=2), coder="crosscoder")
    trainee, x, _ = make(config, {"a": 4, "b": 2})
    W_dec = trainee.sae.W_dec
    assert_same_loss(trainee, x, None, lambda: W_dec[:, :4].norm(dim=1) + W_dec[:, 4:].norm(dim=1))


def assert_same_loss(trainee, x, y, norms):
    loss, y_hat, _ = trainee.loss(x, 0.6) if y is None else trainee.loss(x, 0.6, y)
    loss.backward()
    got = {name: p.grad.clone() for name, p in trainee.sae.named_parameters()}
    trainee.sae.zero_grad()
    expected = dense(trainee, x, x if y is None else y, norms())
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in trainee.sae.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    torch.testing.assert_close(y_hat, trainee.sae(x))


def world(n_batches=150, n=256):
    """A rectified map of 16 features, whose activations are off centre and off scale, plus a linear map."""
    generator = torch.Generator().manual_seed(0)
    reads, writes = torch.randn(12, 16, generator=generator), torch.randn(16, 10, generator=generator)
    linear = torch.randn(12, 10, generator=generator)
    for _ in range(n_batches):
        x = torch.randn(n, 12, generator=generator) + 0.5
        yield 5 * x, 40 * ((x @ reads - 5).relu() @ writes + 0.5 * x @ linear + 3)


def explained(y_hat, y):
    return float(1 - (y_hat - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(4), ReLU(), JumpReLU()], ids=lambda a: a.name)
def test_a_transcoder_learns_and_a_skip_helps(activation):
    batches = list(world())
    configs = [
        SAEConfig(d_sae=48, activation=activation, lr=1e-2, sparsity=L1(0.1) if activation == ReLU() else None,
                  coder="transcoder", skip=skip, threshold_lr=2e-2)
        for skip in (False, True)
    ]  # fmt: skip
    plain, skipping = train_on(batches, configs, progress=False)
    x, y = (torch.cat(parts) for parts in zip(*batches[:4], strict=True))
    assert isinstance(plain, Transcoder)
    assert explained(plain(x), y) > 0.6
    assert explained(skipping(x), y) > max(0.8, explained(plain(x), y))
    assert skipping.metadata["input_scale"] != skipping.metadata["target_scale"]


@pytest.mark.parametrize("activation", [BatchTopK(3), ReLU()], ids=lambda a: a.name)
def test_a_crosscoder_learns_at_hooks_of_different_scales(activation):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 20, generator=generator), dim=1)

    def batch():
        codes = (torch.rand(256, 24, generator=generator) < 0.1) * (1 + torch.rand(256, 24, generator=generator))
        x = codes @ directions
        return {"first": x[:, :12], "second": 100 * x[:, 12:] + 30}

    batches = [batch() for _ in range(150)]
    config = SAEConfig(d_sae=48, activation=activation, lr=5e-3, coder="crosscoder", sparsity=None)
    (coder,) = train_on(batches, [config], progress=False)
    assert isinstance(coder, Crosscoder)
    assert coder.widths == {"first": 12, "second": 8}
    assert coder.metadata["hf_hook_names"] == ["first", "second"]
    for hook, x_hat in coder.split(coder(coder.join(batches[0]))).items():
        assert explained(x_hat, batches[0][hook]) > 0.7


def test_a_transcoder_first_predicts_the_mean():
    x, y = next(world())
    for activation in (TopK(4), ReLU()):
        config = SAEConfig(d_sae=48, activation=activation, coder="transcoder", skip=True)
        trainee = Trainee(config, x, steps=10, tokens=100, seed=0, target=y)
        assert not supports(config, trainee.sae)  # the fused step knows autoencoders
        _, y_hat, _ = trainee.loss(x * trainee.scale, 0.0, y * trainee.target_scale)
        torch.testing.assert_close(y_hat / trainee.target_scale, y.mean(0).expand_as(y), rtol=1e-4, atol=1e-3)
        # The encoder's bias centres the inputs, so that latents are not on or off for ever.
        pre = x * trainee.scale @ trainee.sae.W_enc + trainee.sae.b_enc
        torch.testing.assert_close(pre.mean(0), torch.zeros(48), atol=1e-4, rtol=0)


def test_sites():
    sae, transcoder, crosscoder = (SAEConfig(coder=c) for c in ("sae", "transcoder", "crosscoder"))
    assert sites_of(sae, ["a", "b"], []) == [Site(("a",)), Site(("b",))]
    assert sites_of(transcoder, ["a:in", "b"], ["c", "d"]) == [Site(("a:in",), ("c",)), Site(("b",), ("d",))]
    assert sites_of(crosscoder, ["a", "b"], []) == [Site(("a", "b"))]
    site = Site(("a:in",), ("c",))
    assert (str(site), site.folder) == ("a:in->c", "a_in_to_c")
    batch = {"a": torch.ones(2, 3), "b": torch.zeros(2, 1)}
    assert Site(("b", "a")).rows(batch).x.tolist() == [[0, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(saes=(SAEConfig(coder="transcoder"),)), "needs the hook whose activations it predicts"),
        (lambda: TrainConfig(targets="mlp_out.1"), "'mlp_out.1' is predicted by nothing"),
        (lambda: SAEConfig(skip=True), "a skip is a transcoder's"),
        (lambda: SAEConfig(coder="crosscoder", skip=True), "a skip is a transcoder's"),
        (lambda: SAEConfig(coder="transcoder", normalize="whiten"), "an autoencoder's"),
        (lambda: sites_of(SAEConfig(coder="transcoder"), ["a", "b"], ["c"]), "hooks are a, b, and the targets c"),
        (lambda: sites_of(SAEConfig(coder="crosscoder"), ["a"], []), "two or more hooks"),
        (lambda: train_on([torch.ones(4, 3)], [SAEConfig(d_sae=8, activation=TopK(2), coder="transcoder")]), "needs"),
        (lambda: train_on([(torch.ones(4, 3), torch.ones(5, 3))], [SAEConfig(coder="transcoder")]), "not the same tok"),
        (lambda: train_on([(torch.ones(4, 3),) * 3], [SAEConfig(coder="transcoder")]), "has 3 parts"),
        (lambda: train_on([{"a": torch.ones(4, 3)}], [SAEConfig()], hooks=["b"]), "no activations 'b'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


def test_configs_survive_a_file():
    config = TrainConfig(
        hooks=("h.0.mlp:in",), targets="h.0.mlp", saes=(SAEConfig(coder="transcoder", skip=True), SAEConfig())
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.fixture
def config(tmp_path, texts):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return TrainConfig(
        data=str(tmp_path / "text"), hooks=("h.*.mlp:in",), targets=("h.*.mlp",), tokens=2000, batch_size=128,
        buffer=512, out=str(tmp_path / "run"), text=DataConfig(context=16, held_out=0.2),
        saes=(
            SAEConfig(d_sae=32, activation=BatchTopK(4), coder="transcoder", skip=True),
            SAEConfig(d_sae=32, activation=TopK(4), coder="crosscoder"),
            SAEConfig(d_sae=32, activation=TopK(4)),
        ),
    )  # fmt: skip


def test_a_run_with_every_kind(config, tiny_model, tmp_path):
    result = train(config, model=tiny_model, progress=False)
    kinds = {
        str(folder.relative_to(config.out)): (type(sae), sae.metadata.get("hf_hook_name_out"))
        for sae, folder in zip(result.saes, result.folders, strict=True)
    }
    mlp = "transformer.h.{}.mlp"
    assert kinds == {
        **{f"saes/{mlp}_in_to_{mlp}/00_batchtopk".format(i, i): (Transcoder, mlp.format(i)) for i in (0, 1)},
        "saes/transformer.h.0.mlp_in+transformer.h.1.mlp_in/00_topk": (Crosscoder, None),
        **{f"saes/{mlp}_in/00_topk".format(i): (SAE, None) for i in (0, 1)},
    }
    for sae, folder in zip(result.saes, result.folders, strict=True):
        x = torch.randn(5, sae.d_in)
        torch.testing.assert_close(SAE.load(folder)(x), sae(x))
        torch.testing.assert_close(SAE.load(folder / "training")(x), sae(x))
    again = train(dataclasses.replace(config, out=None), model=tiny_model, progress=False)
    for one, other in zip(result.saes, again.saes, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("coder", ["transcoder", "crosscoder"])
def test_a_checkpoint_goes_on_where_it_was(coder, tmp_path):
    batches = [batch if coder == "transcoder" else (batch[0], None) for batch in world(6, 64)]
    config = SAEConfig(d_sae=48, activation=TopK(4), coder=coder, skip=coder == "transcoder")

    def fresh(x, y):
        widths = None if coder == "transcoder" else {"a": 4, "b": 8}
        return Trainee(config, x, steps=6, tokens=600, seed=0, target=y, widths=widths)

    whole, start, resumed = fresh(*batches[0]), fresh(*batches[0]), fresh(*batches[5])
    for batch in batches:
        whole.step(*batch)
    for batch in batches[:3]:
        start.step(*batch)
    resumed.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 3, start.state_dict())))
    for batch in batches[3:]:
        resumed.step(*batch)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    finished = [finished_sae(trainee, [], {}) for trainee in (whole, resumed)]
    assert finished[0].metadata["input_scale"] == finished[1].metadata["input_scale"]
    assert torch.equal(*(sae(batches[0][0]) for sae in finished))


def test_training_starts_from_a_finished_coder():
    x, y = next(world())
    for coder, target, widths in (("transcoder", y, None), ("crosscoder", None, {"a": 4, "b": 8})):
        config = SAEConfig(d_sae=48, activation=TopK(4), coder=coder)
        trainee = Trainee(config, x, steps=10, tokens=100, seed=0, target=target, widths=widths)
        for _ in range(3):
            trainee.step(x, target)
        finished = finished_sae(trainee, [], {})
        other = Trainee(
            config, 2 * x + 1, steps=10, tokens=100, seed=1, widths=widths, start=finished,
            target=None if target is None else 3 * target,
        )  # fmt: skip
        torch.testing.assert_close(finished_sae(other, [], {})(x), finished(x), rtol=1e-4, atol=1e-3)


def test_a_head_by_itself(config, tiny_model):
    hooks, saes = ("blocks.0.attn.hook_z#1", "blocks.1.attn.hook_z"), (SAEConfig(d_sae=32, activation=TopK(4)),)
    config = dataclasses.replace(config, hooks=hooks, targets=(), saes=saes)
    head, whole = train(config, model=tiny_model, progress=False).saes
    assert (head.d_in, head.metadata["hook_head_index"], head.metadata["hook_name"]) == (8, 1, "blocks.0.attn.hook_z")
    assert head.metadata["hf_hook_name"] == "transformer.h.0.attn.c_proj:in#8:16"
    assert (whole.d_in, whole.metadata["hook_head_index"]) == (16, None)


def test_recipes():
    """Conversions are the identity: both are stated at norms of sqrt(d_in), or where no scale matters."""
    transcoder, crosscoder = recipes.transcoder(48, k=4), recipes.crosscoder(48)
    assert (transcoder.skip, transcoder.decoder_is_unit, transcoder.activation) == (True, False, TopK(4))
    assert (crosscoder.sparsity, crosscoder.sparsity_warmup, crosscoder.decay) == (L1(2.0), 0.05, 0.2)
    x, y = next(world())
    first = Trainee(crosscoder, x, steps=10, tokens=100, seed=0, widths={"a": 8, "b": 4})
    for norms in first.sae.hook_norms().values():
        torch.testing.assert_close(norms, torch.full((48,), 0.1))
    (coder,) = train_on([(x, y)] * 3, [transcoder], progress=False)
    assert coder(x).shape == y.shape


def test_the_command_line():
    config = TrainArgs(hooks=("h.1.mlp:in",), target=("h.1.mlp",), skip=True, d_sae=64).to_config()
    assert (config.targets, config.saes) == (("h.1.mlp",), (SAEConfig(d_sae=64, coder="transcoder", skip=True),))
    assert TrainArgs(glu=True, d_sae=64).to_config().saes == (SAEConfig(d_sae=64, glu=True),)
    with pytest.raises(UnweaveError, match="a crosscoder has none"):
        TrainArgs(glu=True, coder="crosscoder").to_config()
    config = TrainArgs(hooks=("resid_post.*",), coder="crosscoder", d_sae=64, k=4).to_config()
    assert config.saes == (SAEConfig(d_sae=64, coder="crosscoder", activation=TopK(4)),)
    assert TrainArgs(recipe="transcoder", target=("mlp_out.1",)).to_config().saes == (recipes.transcoder(),)
    with pytest.raises(UnweaveError, match="needs the hook whose activations"):
        TrainArgs(coder="transcoder").to_config()
