"""Fine-tuning of what is no plain SAE: gradients by hand, codes that stay, files, and runs on a model."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig
from unweave.models import LoadedModel
from unweave.objectives import EndToEnd
from unweave.sae import (
    SAE,
    BatchTopK,
    Crosscoder,
    CrossLayerTranscoder,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
    Transcoder,
)
from unweave.sae.files import save_training_form
from unweave.training import SAEConfig, Start, TrainConfig, train, train_on
from unweave.training.config import METHODS
from unweave.training.decoder_tuning import DecoderTuning
from unweave.training.finetune import finetune
from unweave.training.session import Session

N, M = 40, 24
WIDTHS = {"a": 4, "b": 3}
READS, WRITES = {"a": 4, "b": 4}, {"ya": 5, "yb": 5}
KINDS = ("tied", "transcoder", "skip_transcoder", "crosscoder", "clt", "skip_clt")


def coder(kind, activation=None, dtype=torch.float64):
    """A coder whose weights matter, with rows of different norms."""
    activation = activation or ReLU()
    made = {
        "tied": lambda: SAE(6, M, activation, tied=True),
        "transcoder": lambda: Transcoder(6, 5, M, activation),
        "skip_transcoder": lambda: Transcoder(6, 5, M, activation, skip=True),
        "crosscoder": lambda: Crosscoder(WIDTHS, M, activation),
        "clt": lambda: CrossLayerTranscoder(READS, WRITES, M // 2, activation),
        "skip_clt": lambda: CrossLayerTranscoder(READS, WRITES, M // 2, activation, skip=True),
    }[kind]().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        parameter.data.copy_(drawn.abs() if name == "threshold" else drawn)
    return made.requires_grad_(False)


def data(start, seed=0, n=N, dtype=torch.float64):
    """Inputs that are not of norm sqrt(d), and targets of a transcoder."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, start.d_in, generator=generator, dtype=dtype) + 1
    maps = torch.randn(start.d_in, start.d_out, generator=torch.Generator().manual_seed(9), dtype=dtype)
    predicts = isinstance(start, Transcoder | CrossLayerTranscoder)
    return (x, (x @ maps).relu() * 0.2) if predicts else x


def pair(batch):
    return batch if isinstance(batch, tuple) else (batch, None)


def widths_of(start):
    if isinstance(start, CrossLayerTranscoder):
        return READS, WRITES
    return (WIDTHS if isinstance(start, Crosscoder) else None), None


def factors(x, widths):
    """One for each column: sqrt(d / mean squared norm) of each hook."""
    parts = x.split(list(widths.values()), 1) if widths else [x]
    found = [(p.shape[1] / p.square().sum(1).mean()).sqrt().expand(p.shape[1]) for p in parts]
    return torch.cat(found).float().double() if widths else found[0]  # several are kept in float32


def dense_codes(start, x):
    if isinstance(start, CrossLayerTranscoder):
        m = M // 2
        return torch.cat(
            [(x[:, 4 * i : 4 * i + 4] @ start.W_enc[:, m * i : m * i + m] + start.b_enc[m * i : m * i + m]).relu()
             for i in range(2)], 1,
        )  # fmt: skip
    if start.tied:
        return ((x - start.b_dec) @ start.W_dec.T + start.b_enc).relu()
    return (x @ start.W_enc + start.b_enc).relu()


def dense_skip(start, W_skip, x):
    if isinstance(start, CrossLayerTranscoder):
        return torch.cat([x[:, 4 * i : 4 * i + 4] @ W_skip[i] for i in range(2)], 1)
    return x @ W_skip.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_hand(kind, method):
    """The loss of the second step, too, so that what the first one changed counts."""
    start = coder(kind)
    (x, y), (widths, targets) = pair(data(start)), widths_of(start)
    config = SAEConfig(d_sae=M, activation=ReLU(), sparsity=(), lr=0.01, grad_clip=None, warmup=0.0, decay=0.0)
    trainee = DecoderTuning(start, method, config, x, y, steps=9, tokens=9 * N, widths=widths, target_widths=targets)
    update, seen = trainee.optimizer.step, []

    def keep(grads, rates):
        seen.append({name: grad.clone() for name, grad in grads.items()})
        update(grads, rates)

    trainee.optimizer.step = keep
    s = factors(x, widths)
    t, goal = (s, x * s) if y is None else (factors(y, targets), y * factors(y, targets))
    W = start.W_dec.clone() * t
    norms = W.norm(dim=1)
    leaves = {"W": W / norms[:, None], "f": torch.ones(M).double(), "b": start.b_dec * t}
    skip = getattr(start, "W_skip", None)
    if skip is not None:  # x * s goes in, and what comes out is in units of t
        per_layer = kind == "skip_clt"
        leaves["S"] = skip / s.view(2, 4, 1) * t.view(2, 1, 5) if per_layer else skip * t[:, None] / s
    for _ in range(2):
        own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        y_hat = (dense_codes(start, x) * norms * own["f"]) @ own["W"] + own["b"]
        if skip is not None:
            y_hat = y_hat + dense_skip(start, own["S"], x * s)
        loss = (y_hat - goal).square().sum(1).mean()
        loss.backward()
        got = trainee.step(x, y)
        torch.testing.assert_close((got.loss / N).double(), loss.detach(), rtol=1e-5, atol=0)
        expected = {"W_dec": own["W"].grad, "b_dec": own["b"].grad, "factor": own["f"].grad}
        if isinstance(start, CrossLayerTranscoder):
            expected |= {f"W_dec.{i}": own["W"].grad[M // 2 * i : M // 2 * (i + 1), 5 * i :] for i in range(2)}
        if skip is not None:
            expected["W_skip"] = own["S"].grad
        trained = {"scale": {"factor"}, "unrotated_decoder": {"factor", "b_dec"}}.get(method)
        trained = trained or {n for n in expected if n.startswith(("W_skip", "b_dec"))} | (
            {"W_dec.0", "W_dec.1"} if isinstance(start, CrossLayerTranscoder) else {"W_dec"}
        )
        grads = seen.pop()
        assert grads.keys() == trained
        for name, grad in grads.items():
            near = 1e-5 if widths else 1e-9  # factors of several hooks are in float32
            torch.testing.assert_close(grad, expected[name], msg=name, rtol=near, atol=near)
        state = {"W": trainee.sae.W_dec, "f": trainee.factor, "b": trainee.sae.b_dec}
        leaves |= {name: tensor.detach().clone() for name, tensor in state.items()}
        if skip is not None:
            leaves["S"] = trainee.sae.W_skip.detach().clone()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [JumpReLU(), TopK(3)], ids=lambda a: a.name)
def test_codes_stay_the_error_falls_and_files_say_the_same(kind, method, activation, tmp_path):
    """pitfall_177: a coder of a file is fine-tuned, and is a coder of a file again."""
    start = coder(kind, activation, torch.float32)
    if kind != "tied":  # which files have untied already
        start = SAE.load(start.save(tmp_path / "start"))
    before = {name: value.clone() for name, value in start.state_dict().items()}
    tuned = finetune(start, [data(start, seed, 64, torch.float32) for seed in range(30)], method=method, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    x, y = pair(data(start, 77, 256, torch.float32))
    if kind != "tied":
        assert torch.equal(tuned.encode(x), start.encode(x))
    else:
        assert (start.tied, tuned.tied) == (True, False)
        torch.testing.assert_close(tuned.encode(x), start.encode(x), rtol=1e-4, atol=1e-4)
    errors = [(sae(x) - (x if y is None else y)).square().sum(1).mean().item() for sae in (start, tuned)]
    assert errors[1] < 0.99 * errors[0]
    if method == "scale":
        ratios = torch.where(start.W_dec == 0, torch.nan, tuned.W_dec / start.W_dec)
        spread = ratios.nan_to_num(-1).amax(1) - ratios.nan_to_num(1e9).amin(1)
        assert float(spread.max()) < 1e-4  # the same at all hooks
        assert torch.equal(tuned.b_dec, start.b_dec)
    if (skip := getattr(start, "W_skip", None)) is not None:
        assert torch.allclose(skip, tuned.W_skip, rtol=1e-5) == (method != "decoder")
    tuned.save(tmp_path / "tuned")
    loaded = SAE.load(tmp_path / "tuned")
    assert type(loaded) is type(tuned)
    assert torch.equal(loaded.encode(x), tuned.encode(x))
    torch.testing.assert_close(loaded(x), tuned(x))


def test_a_threshold_stays_in_float32_when_a_tied_sae_of_bfloat16_is_untied(tmp_path):
    """Rounded, it would make other codes."""
    save_training_form(coder("tied", JumpReLU(), torch.float32), tmp_path, {})
    start = SAE.load(tmp_path, dtype=torch.bfloat16)
    assert (start.tied, start.dtype, start.threshold.dtype) == (True, torch.bfloat16, torch.float32)
    tuned = finetune(start, [data(start, dtype=torch.float32)], method="scale")
    assert torch.equal(tuned.threshold, start.threshold)
    assert torch.equal(tuned.W_enc, start.W_enc.float())


def test_batches_by_name():
    cross, clt = coder("crosscoder"), coder("clt")
    x, (reads, writes) = data(cross), data(clt)
    torch.testing.assert_close(finetune(cross, [cross.split(x)]).W_dec, finetune(cross, [x]).W_dec)
    named = dict(zip(READS, reads.chunk(2, 1), strict=True)) | clt.split(writes)
    torch.testing.assert_close(finetune(clt, [named]).W_dec, finetune(clt, [(reads, writes)]).W_dec)


@pytest.mark.parametrize(
    ("start", "batch", "message"),
    [
        (SAE(4, 8, ReLU()), torch.ones(4), r"batch 0 must be finite and have the shape \(n, 4\), got \(4,\)"),
        (SAE(4, 8, ReLU()), torch.ones(()), r"got \(\)"),
        (SAE(4, 8, ReLU()), (torch.ones(2, 4), torch.ones(2, 4)), "batch 0 was expected to be one tensor"),
        (Transcoder(4, 3, 8, ReLU()), torch.ones(2, 4), r"a pair \(x, y\) .*, and is Tensor"),
        (Transcoder(4, 3, 8, ReLU()), (torch.ones(2, 4), torch.ones(2, 4)), r"\(n, 3\), got \(2, 4\)"),
        (Transcoder(4, 3, 8, ReLU()), (torch.ones(2, 4), torch.ones(3, 3)), "there are 2 and 3"),
        (Crosscoder(WIDTHS, 8, ReLU()), {"a": torch.ones(2, 4)}, "also reads 'b'"),
        (SAE(4, 8, MatchingPursuit(2)), torch.ones(2, 4), "matching_pursuit SAE chooses each atom .* end to end"),
        (CrossLayerTranscoder(READS, WRITES, 8, ReLU()).at("yb"), torch.ones(2, 8), "fine-tune the whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_one_sentence(start, batch, message):
    with pytest.raises(UnweaveError, match=message):
        finetune(start, [batch])


TEXT = DataConfig(context=16, held_out=0.2)
CODERS = {
    "transcoder": {"hooks": ("transformer.h.1.mlp:in",), "targets": ("transformer.h.1.mlp",)},
    "crosscoder": {"hooks": ("transformer.h.0", "transformer.h.1")},
    "clt": {
        "hooks": ("transformer.h.0.mlp:in", "transformer.h.1.mlp:in"),
        "targets": ("transformer.h.0.mlp", "transformer.h.1.mlp"),
    },
}


@pytest.fixture
def begun(tmp_path, tiny_model, texts):
    """A coder that a run has trained, in a folder, and the settings of a run that trains it further."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    def begin(kind, activation, **start):
        first = TrainConfig(
            model="tiny", data=str(tmp_path / "data.jsonl"), tokens=2000, batch_size=128, text=TEXT,
            saes=(SAEConfig(d_sae=32, activation=activation, lr=5e-3, coder=kind, skip=kind == "transcoder"),),
            out=str(tmp_path / "first"), **CODERS[kind],
        )  # fmt: skip
        (sae,) = train(first, model=tiny_model, progress=False).saes
        end_to_end = None if "method" in start else EndToEnd()
        start = Start(str(tmp_path / "first" / "sae"), **start)
        out = str(tmp_path / "run")
        return sae, dataclasses.replace(
            first, saes=(SAEConfig(),), start=start, end_to_end=end_to_end, tokens=1500, out=out
        )

    return begin


@pytest.mark.parametrize(("kind", "method"), [("transcoder", "decoder"), ("crosscoder", "scale"), ("clt", None)])
def test_interrupted_and_resumed_is_bit_equal(begun, tiny_model, interrupted, kind, method):
    _, config = begun(kind, JumpReLU(), **({} if method is None else {"method": method}))
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)
    with interrupted(11):
        train(config, model=tiny_model, progress=False)
    resumed = train(config, model=tiny_model, resume=True, progress=False)
    assert whole.saes[0].metadata["finetuning"]["method"] == (method or "end_to_end")
    for name, value in whole.saes[0].state_dict().items():
        assert torch.equal(value, resumed.saes[0].state_dict()[name]), name
    assert SAE.load(resumed.folders[0]).metadata["hf_hook_names" if kind != "transcoder" else "hf_hook_name"]


def test_the_hooks_of_a_coder_stay_in_its_own_order(tiny_model, texts):
    """However a run names them; and those of others are refused."""
    hooks = ["transformer.h.1", "transformer.h.0"]
    start = Crosscoder(dict.fromkeys(hooks, 16), 32, ReLU(), metadata={"hf_hook_names": hooks})
    config = TrainConfig(hooks=hooks, tokens=300, batch_size=100, text=TEXT, start=Start(method="scale"))
    result = train(config, model=tiny_model, data=texts, start=start, progress=False)
    assert list(result.saes[0].widths) == hooks
    assert torch.equal(result.saes[0].W_enc, start.W_enc)
    other = dataclasses.replace(config, hooks=("transformer.h.0", "transformer.h.0.mlp"))
    with pytest.raises(UnweaveError, match=r"is of the hooks 'transformer.h.1', 'transformer.h.0', and .* are named"):
        train(other, model=tiny_model, data=texts, start=start)


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        (Transcoder(16, 16, 8, TopK(2)), {}, "give targets"),
        (Transcoder(16, 9, 8, TopK(2)), {"targets": "transformer.h.1"}, "predicts activations of width 9, and .* 16"),
        (SAE(16, 8, TopK(2)), {"targets": "transformer.h.1"}, "predicted by nothing"),
        (SAE(16, 8, MatchingPursuit(2)), {}, "chooses each atom"),
    ],
)  # fmt: skip
def test_what_is_refused_before_any_text_is_read(tiny_model, start, more, message):
    def explode():
        raise AssertionError("text was read")
        yield

    method = None if "end_to_end" in more else "decoder"
    config = TrainConfig(**{"hooks": "transformer.h.0", "start": Start(method=method)} | more)
    with pytest.raises(UnweaveError, match=message):
        train(config, model=tiny_model, data=explode(), start=start)


def test_a_target_that_only_a_start_could_predict(tiny_model):
    """A config alone cannot tell: what predicts it may be passed to `train`."""
    config = TrainConfig(**CODERS["transcoder"], end_to_end=EndToEnd())
    with pytest.raises(UnweaveError, match="predicted by nothing"):
        train(config, model=tiny_model, data=["a"])
    with pytest.raises(UnweaveError, match=r"and those at .* have width 16"):
        train(config, model=tiny_model, data=["a"], start=Transcoder(9, 16, 8, TopK(2)))


def test_a_fresh_sae_has_no_norms_to_keep(tiny_model):
    config = SAEConfig(d_sae=8, activation=TopK(2), unit_norm="keep")
    for run in (lambda: train_on([torch.ones(4, 4)], [config]), lambda: train(TrainConfig(saes=(config,)), data=["a"])):
        with pytest.raises(UnweaveError, match="no norms to keep"):
            run()


def test_nothing_held_out_is_run_where_no_threshold_is_calibrated(tiny_model, texts, monkeypatch):
    """Codes stay, so the threshold of a BatchTopK in its training form stays as well."""
    start = SAE(16, 32, BatchTopK(4))
    start.threshold.fill_(0.7)
    monkeypatch.setattr(Session, "held_out", lambda session: pytest.fail("held-out text was run"))
    config = TrainConfig(hooks="transformer.h.0", tokens=300, batch_size=100, text=TEXT, start=Start(method="decoder"))
    (tuned,) = train(config, model=tiny_model, data=texts, start=start, progress=False).saes
    assert float(tuned.threshold) == pytest.approx(0.7)


@pytest.mark.parametrize("method", ["decoder", None])
def test_a_model_in_float64(tiny_model, texts, method):
    model = LoadedModel(copy.deepcopy(tiny_model.module).double(), tiny_model.tokenizer, "tiny")
    loss = EndToEnd() if method is None else None
    config = TrainConfig(
        hooks="transformer.h.0", tokens=300, batch_size=64, text=TEXT, start=Start(method=method), end_to_end=loss
    )
    start = SAE(16, 32, TopK(4)).double()
    (tuned,) = train(config, model=model, data=texts, start=start, progress=False).saes
    assert not torch.equal(tuned.W_dec.double(), start.W_dec)
