from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import unweave
from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig, TokenRows
from unweave.evaluation import ReconstructionSums, evaluate
from unweave.evaluation import metrics as m
from unweave.models import Hook, LoadedModel, capture, resolve_hooks
from unweave.sae import SAE, BatchTopK, JumpReLU, ReLU, Temporal, TemporalSAE, TopK, fold_input_scale

BOS, PAD = 0, 1
HOOK = "transformer.h.0"
CONFIG = DataConfig(context=16, held_out=0.3)


@pytest.fixture(scope="module")
def documents():
    numbers = torch.randint(2, 64, (120, 40), generator=torch.Generator().manual_seed(3))
    return [" ".join(f"w{i}" for i in row) for row in numbers.tolist()]


def numbers_of(report):
    """All that should be the same in a repeated evaluation."""
    provenance = {k: v for k, v in report.provenance.items() if k not in ("eval_id", "datetime_epoch_millis")}
    return report.metrics, report.sums, {k: v.tolist() for k, v in report.per_feature.items()}, provenance


def test_two_evaluations_are_equal(gpt2, sae, documents):
    """pitfall_009, 37, 38: nothing is random; other held-out documents come first under another seed.

    pitfall_336: but each evaluation has an id of its own, which no seed, counter or process number decides.
    """
    runs = [evaluate(sae, model=gpt2, data=documents, tokens=200, data_config=CONFIG, seed=s) for s in (0, 0, 1)]
    assert json.dumps(numbers_of(runs[0])) == json.dumps(numbers_of(runs[1]))
    assert runs[0].provenance["data"]["token_sha256"] != runs[2].provenance["data"]["token_sha256"]
    assert [run.provenance["seed"] for run in runs] == [0, 0, 1]
    assert len({run.provenance["eval_id"] for run in runs}) == 3


def test_every_token_is_encoded_once(gpt2, sae, batches, monkeypatch):
    """pitfall_254: the codes that are counted are those that the model goes on with."""
    rows, training = [], []
    encode = SAE.encode_sparse

    def counting(self, x):
        rows.append(x.flatten(0, -2).shape[0])
        return encode(self, x)

    monkeypatch.setattr(SAE, "encode_sparse", counting)
    monkeypatch.setattr(SAE, "training_codes", lambda *_: training.append(1))
    report = evaluate(sae, model=gpt2, data=batches, tokens=500, masks=MaskConfig(norm_multiple=None))
    assert report.metrics["behaviour/kl_div_score"] is not None
    assert (sum(rows), training) == (report.provenance["tokens"]["kept"], [])


def test_the_number_of_prompts_in_a_pass_changes_nothing(gpt2, sae, batches):
    """pitfall_007: three batchings of the same tokens, with sinks and positions masked."""
    masks = MaskConfig(positions="2:", norm_multiple=1.2)
    reports = [evaluate(sae, model=gpt2, data=batches, tokens=900, batch_prompts=n, masks=masks) for n in (1, 7, 64)]
    first = reports[0]
    assert first.provenance["tokens"]["by_norm"] > 0
    for other in reports[1:]:
        a, b = ({k: v for k, v in r.metrics.items() if not k.endswith("legacy")} for r in (first, other))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        assert first.per_feature["n_fired"].equal(other.per_feature["n_fired"])
        assert all(first.provenance["tokens"][n] == other.provenance["tokens"][n] for n in ("seen", "kept", "by_norm"))
        assert first.provenance["data"] == other.provenance["data"]


def test_counts_are_those_of_the_mask(gpt2, sae, batches):
    """pitfall_012: a padded batch; 64 rows of 16, half of the last one padding, one BOS in each."""
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6, masks=MaskConfig(positions="3:", norm_multiple=None))
    tokens = report.provenance["tokens"]
    assert (tokens["seen"], tokens["padding"]) == (64 * 16 - 8, 8)
    assert (tokens["by_id"], tokens["by_position"], tokens["by_norm"]) == (64, 128, 0)
    assert tokens["kept"] == 64 * 13 - 8
    assert {report.sums[part]["n_tokens"] for part in ("reconstruction", "codes")} == {64 * 13 - 8}
    core = report.to_json()["eval_result_metrics"]["token_stats"]
    assert core == {"total_tokens_eval_reconstruction": 64 * 13 - 8, "total_tokens_eval_sparsity_variance": 64 * 13 - 8}


def test_sums_match_a_plain_computation(gpt2, sae, batches):
    """pitfall_032: no logger is on."""
    (batch,) = batches
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6, masks=MaskConfig(norm_multiple=None))
    (x,) = capture(gpt2.module, [Hook("transformer.h.0")], input_ids=batch.ids).values()
    x = x[batch.real & (batch.ids != BOS)].double()
    dense = sae.encode(x.float())
    x_hat = sae.decode(dense).double()
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert report["explained_variance"] == pytest.approx(expected.item(), rel=1e-5)
    assert report["l0"] == pytest.approx((dense != 0).sum(1).double().mean().item())
    assert report["l1"] == pytest.approx(dense.abs().sum(1).double().mean().item(), rel=1e-5)
    assert report.per_feature["n_fired"].equal((dense != 0).sum(0))


def test_sinks_are_masked(gpt2, sae, batches):
    """A token whose activation is far longer than the median does not count."""
    long_word = int(batches[0].ids[0, 5])
    module = copy.deepcopy(gpt2.module)
    module.transformer.wte.weight.data[long_word] *= 1000
    report = evaluate(sae, model=LoadedModel(module, gpt2.tokenizer, "tiny"), data=batches, tokens=10**6)
    assert report.provenance["tokens"]["by_norm"] == int((batches[0].ids == long_word).sum())
    everything = MaskConfig(norm_multiple=None)
    unmasked = evaluate(
        sae, model=LoadedModel(module, gpt2.tokenizer, "tiny"), data=batches, tokens=10**6, masks=everything
    )
    assert unmasked["l2_norm_in"] > 2 * report["l2_norm_in"]


def test_excluded_positions_have_no_influence(gpt2, sae, batches):
    """pitfall_019: the SAE's own slice of positions is the default, and what stands elsewhere does not count."""
    (batch,) = batches
    sae.metadata["seqpos_slice"] = [4, None]
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6)
    assert report.provenance["tokens"]["masks"]["positions"] == "4:"
    assert report.provenance["tokens"]["by_position"] == 64 * 3

    def change(module, args, output):
        output[:, :4] += 5

    reports = []
    encoder = LoadedModel(copy.deepcopy(gpt2.module.transformer), gpt2.tokenizer, "tiny")
    for _ in range(2):
        reports.append(evaluate(sae, model=encoder, hook="ln_f", data=[batch], tokens=10**6))
        encoder.module.ln_f.register_forward_hook(change)
    assert reports[0].metrics == reports[1].metrics
    assert evaluate(sae, model=encoder, hook="ln_f", data=[batch], masks=MaskConfig()).metrics != reports[0].metrics


def test_reads_held_out_documents_only(gpt2, sae, documents):
    """pitfall_017"""
    report = evaluate(sae, model=gpt2, data=documents, tokens=10**6, data_config=CONFIG)
    rows = TokenRows(documents, gpt2.tokenizer, CONFIG, held_out=True)
    held_out = sum(int(batch.real.sum()) for batch in rows.batches(8))
    assert report.provenance["tokens"]["seen"] == held_out
    assert report.provenance["data"]["split"] == "held-out"
    assert any(f"there are {held_out:,}" in note for note in report.notes)

    everything = evaluate(sae, model=gpt2, data=documents, tokens=10**6, data_config=replace(CONFIG, held_out=0))
    assert everything.provenance["data"]["split"] == "all"
    assert everything.provenance["tokens"]["seen"] > 2 * held_out


def test_the_training_cursor_stays(gpt2, sae, documents):
    """pitfall_017: rows that training reads give the same rows after an evaluation."""
    rows = TokenRows(documents, gpt2.tokenizer, CONFIG, held_out=False)
    rows.next_rows(5)
    expected = rows.peek(7).ids
    report = evaluate(sae, model=gpt2, data=rows, tokens=300)
    assert rows.next_rows(7).ids.equal(expected)
    assert report.provenance["data"]["split"] == "training"
    assert "measured on training tokens" in report.notes


def test_rows_are_laid_out_as_in_training(gpt2, sae, documents):
    sae.metadata |= {"context_size": 8, "prepend_bos": False}
    config = evaluate(sae, model=gpt2, data=documents, tokens=50).provenance["data"]["config"]
    assert (config["context"], config["bos"]) == (8, False)


def test_as_many_tokens_as_asked_for(gpt2, sae, batches):
    """Whole rows, until they hold the tokens."""
    for asked, prompts in ((1, 1), (16, 1), (17, 2), (160, 10)):
        for n in (1, 3, 32):
            report = evaluate(sae, model=gpt2, data=batches, tokens=asked, batch_prompts=n)
            assert report.provenance["data"]["prompts"] == prompts


def test_a_result_that_is_there_is_never_taken_for_another(gpt2, sae, documents, tmp_path):
    """pitfall_034: a file of other settings is computed anew and replaced, and says what it was computed from."""
    path, found = tmp_path / "eval.json", []
    for seed in (0, 1):
        evaluate(sae, model=gpt2, data=documents, tokens=200, data_config=CONFIG, seed=seed).save(path)
        ours = json.loads(path.read_text())["eval_result_unstructured"]
        found.append((ours["provenance"]["seed"], ours["provenance"]["data"]["token_sha256"], ours["metrics"]))
    assert [seed for seed, _, _ in found] == [0, 1]
    assert found[0][1] != found[1][1]
    assert found[0][2] != found[1][2]


def test_sums_stay_on_the_device(gpt2, sae, batches):
    """pitfall_039: ten passes take no more numbers off it than one does, beyond those that their shapes ask for."""

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    sums, x = ReconstructionSums(), torch.randn(40, 16)
    with Waits() as waits:
        for part in x.split(4):
            sums.update(part, sae(part))
    alone = waits.count
    with Waits() as waits:
        for part in x.split(4):
            sae(part)
    assert alone == waits.count  # the SAE's own; the twelve sums add none
    assert m.explained_variance(sums) is not None


def test_progress_is_told(gpt2, sae, batches):
    told = []
    evaluate(sae, model=gpt2, data=batches, tokens=100, batch_prompts=4, progress=lambda *a: told.append(a))
    assert told == [(64, 100), (112, 100)]


def test_raw_space(gpt2, sae, batches):
    """pitfall_026: an SAE that ran on scaled inputs, its scale folded in, scores what it scored there."""
    (batch,) = batches
    (x,) = capture(gpt2.module, [Hook("transformer.h.0")], input_ids=batch.ids).values()
    x = x[batch.real & (batch.ids != BOS)]
    scaled = ReconstructionSums()
    scaled.update(0.2 * x, sae(0.2 * x))
    fold_input_scale(sae, 0.2)
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6, masks=MaskConfig(norm_multiple=None))
    assert report["explained_variance"] == pytest.approx(m.explained_variance(scaled), rel=1e-5)
    assert report["mse"] == pytest.approx(m.mse(scaled) / 0.2**2, rel=1e-5)
    assert report["l2_norm_in"] == pytest.approx(x.double().norm(dim=1).mean().item(), rel=1e-5)


def test_nothing_is_changed(gpt2, sae, batches):
    """pitfall_031: weights, modes and metadata are as before; a token's code does not depend on its neighbours."""
    sae = SAE(16, 48, BatchTopK(4), metadata=sae.metadata)
    sae.threshold.fill_(0.5)
    sae.train()
    gpt2.module.transformer.h[1].train()
    before, metadata = copy.deepcopy(sae.state_dict()), dict(sae.metadata)
    try:
        whole = evaluate(sae, model=gpt2, data=batches, tokens=10**6)
        alone = evaluate(sae, model=gpt2, data=batches, tokens=10**6, batch_prompts=1)
        assert gpt2.module.transformer.h[1].training
    finally:
        gpt2.module.eval()
    assert sae.training
    assert all(before[name].equal(value) for name, value in sae.state_dict().items())
    assert sae.metadata == metadata
    assert whole["l0"] == pytest.approx(alone["l0"], abs=2e-3)  # a sum in another order may cross the threshold
    assert not any(module._forward_hooks for module in gpt2.module.modules())


def test_provenance_knows_the_weights_not_the_folder(gpt2, sae, batches, tmp_path, monkeypatch):
    """pitfall_036: the version of this library, whatever repository the user is in; and a hash of the weights."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("0123456789abcdef0123456789abcdef01234567\n")
    monkeypatch.chdir(tmp_path)
    report = evaluate(sae, model=gpt2, data=batches, tokens=100)
    assert report.to_json()["sae_bench_commit_hash"] == f"unweave {unweave.__version__}"
    sae.b_enc.data[0] += 1
    other = evaluate(sae, model=gpt2, data=batches, tokens=100)
    hashes = [r.provenance["sae"]["weights_sha256"] for r in (report, other)]
    assert len(hashes[0]) == 64
    assert hashes[0] != hashes[1]


class Plain(nn.Module):
    """No Hugging Face model, no tokenizer."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(64, 16), nn.Linear(16, 4)

    def forward(self, input_ids):
        return self.out(self.embed(input_ids))


def test_any_module(sae, batches):
    report = evaluate(sae, model=Plain(), hook="embed", data=[batches[0]], tokens=100)
    assert report["ce_loss_score"] is None
    assert report["l0"] == pytest.approx(4, abs=0.5)
    assert "without a tokenizer special tokens are not known, so none were masked" in report.notes
    assert any("no metrics of behaviour: Plain is no causal language model" in note for note in report.notes)


def test_heads_side_by_side(batches):
    """An activation of several dimensions per token is one vector, and is put back in its shape."""

    class Heads(Plain):
        def forward(self, input_ids):
            return self.out(self.split(self.embed(input_ids)).flatten(2))

        def __init__(self):
            super().__init__()
            self.split = nn.Unflatten(2, (4, 4))

    sae = SAE(16, 32, ReLU())
    assert evaluate(sae, model=Heads(), hook="split", data=batches, tokens=100)["l0"] > 0


def test_another_model_is_noticed(gpt2, sae, batches):
    sae.metadata["model_name"] = "EleutherAI/pythia-70m"
    with pytest.warns(UserWarning, match="trained on the model 'EleutherAI/pythia-70m' and is used on 'tiny'"):
        report = evaluate(sae, model=gpt2, data=batches, tokens=50)
    assert any("pythia" in note for note in report.notes)
    sae.metadata["model_name"] = "org/Tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(sae, model=gpt2, data=batches, tokens=50).notes == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook": "transformer.h.7"}, "transformer.h.0' to 'transformer.h.1"),
        ({"hook": "h.*"}, "an SAE belongs to one hook, but 'h.*' matches 2"),
        ({"hook": "transformer.h.0.mlp.c_fc"}, "takes activations of width 16, but .* gives 64"),
        ({"tokens": 0}, "must be at least 1"),
        ({"data": ["w2 w3"]}, "held-out part of the list of documents holds no text"),
        ({"data": []}, "the list of documents holds no text"),
    ],
)
def test_bad_input(change, message, gpt2, sae, batches):
    with pytest.raises(UnweaveError, match=message):
        evaluate(sae, **({"model": gpt2, "data": batches, "tokens": 50} | change))


def test_no_hook_is_known(gpt2, sae, batches):
    sae.metadata.clear()
    with pytest.raises(UnweaveError, match="metadata name no hook"):
        evaluate(sae, model=gpt2, data=batches)


def test_tokens_of_another_model(gpt2, sae, token_batch):
    with pytest.raises(UnweaveError, match="token id 64, but 'tiny' knows the ids from 0 to 63"):
        evaluate(sae, model=gpt2, data=[token_batch([[0, 5, 64]])])
    with pytest.raises(UnweaveError, match="rows of 33 tokens are longer than the 32 positions"):
        evaluate(sae, model=gpt2, data=[token_batch([[5] * 33])])
    with pytest.raises(UnweaveError, match="different lengths"):
        evaluate(sae, model=gpt2, data=[token_batch([[5] * 3]), token_batch([[5] * 4])])


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_broken_sae_is_an_error(name, gpt2, batches):
    """pitfall_033: of two SAEs the broken one stops the script that measures both, and is not a row of nulls in it."""
    whole, broken = (SAE(16, 48, JumpReLU(0.1), metadata={"hf_hook_name": HOOK}).requires_grad_(False) for _ in "ab")
    getattr(broken, name)[..., 0] = torch.nan
    assert evaluate(whole, model=gpt2, data=batches, tokens=50)["l0"] is not None
    with pytest.raises(UnweaveError, match=f"{name} of the SAE holds values that are NaN or infinite"):
        evaluate(broken, model=gpt2, data=batches, tokens=50)


def test_activations_that_are_not_finite(gpt2, sae, batches):
    module = copy.deepcopy(gpt2.module)
    module.transformer.h[0].mlp.c_proj.bias.data[3] = torch.nan
    with pytest.raises(UnweaveError, match=r"'transformer.h.0' are NaN or infinite in pass 1"):
        evaluate(sae, model=LoadedModel(module, gpt2.tokenizer, "tiny"), data=batches)


def test_a_temporal_sae_reads_whole_rows(gpt2, batches):
    """Masked tokens and padding are read, as they are in training, but do not count."""
    (batch,) = batches
    settings = Temporal(context=batch.ids.shape[1], n_heads=2, bottleneck=4)
    sae = TemporalSAE(
        16, 48, TopK(4), settings, metadata={"hf_hook_name": HOOK, "model_name": "tiny"},
        generator=torch.Generator().manual_seed(3),
    ).requires_grad_(False)  # fmt: skip
    report = evaluate(sae, model=gpt2, data=batches, batch_prompts=7)
    hook = resolve_hooks(gpt2.module, [HOOK])
    x = capture(gpt2.module, hook, input_ids=batch.ids, attention_mask=batch.real.long())[str(hook[0])]
    mask = batch.real.clone()
    mask[:, 0] = False  # BOS
    y, y_hat = x[mask].double(), sae(x)[mask].double()
    expected = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert report.metrics["reconstruction/explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    l0 = sae.encode_sparse(x).l0()[mask.flatten()].float().mean()
    assert report.metrics["sparsity/l0"] == pytest.approx(l0.item())
