"""A transcoder is measured where it writes, from what passes where it reads; a crosscoder hook by hook; a cross-layer
transcoder at each output, from the inputs up to its layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import TokenBatch
from unweave.evaluation import evaluate
from unweave.models import LoadedModel, capture, resolve_hooks, splice
from unweave.sae import SAE, Crosscoder, CrossLayerTranscoder, ReLU, TopK, Transcoder

D, READS, WRITES = 16, "transformer.h.1.mlp.c_proj:in", "transformer.h.1.mlp"


@pytest.fixture
def rows(token_batch: Callable[..., TokenBatch]) -> list[TokenBatch]:
    return [token_batch(torch.randint(2, 64, (12, 16), generator=torch.Generator().manual_seed(1)))]


@torch.no_grad()
def copying(model: LoadedModel) -> Transcoder:
    """The MLP's last linear map as the skip of a transcoder whose latents write nothing."""
    coder = Transcoder(4 * D, D, 8, ReLU(), skip=True, metadata={"hf_hook_name": READS, "hf_hook_name_out": WRITES})
    linear = model.module.transformer.h[1].mlp.c_proj
    assert isinstance(coder.W_skip, Tensor)
    coder.W_skip.copy_(linear.weight.T)
    coder.b_dec.copy_(linear.bias)
    coder.W_dec.zero_()
    return coder.requires_grad_(False)


def test_a_transcoder_that_copies_its_target_is_perfect(gpt2: LoadedModel, rows: list[TokenBatch]) -> None:
    """pitfall_018: it is spliced in at its output."""
    report = evaluate(copying(gpt2), model=gpt2, data=rows)
    found = {name.partition("/")[2]: value for name, value in report.metrics.items()}
    for name in ("explained_variance", "kl_div_score", "cosine"):
        assert found[name] == pytest.approx(1, abs=1e-4), name
    assert found["ce_loss_with_sae"] == pytest.approx(found["ce_loss_without_sae"], abs=1e-4)
    assert found["ce_loss_with_ablation"] != pytest.approx(found["ce_loss_without_sae"], abs=1e-3)
    assert (report.provenance["hook"], report.provenance["reads"]) == (WRITES, [READS])


def test_the_model_goes_on_with_the_prediction_at_the_output(gpt2: LoadedModel, rows: list[TokenBatch]) -> None:
    """pitfall_247: the prediction is that of forward, skip included."""
    torch.manual_seed(0)
    coder = Transcoder(4 * D, D, 32, TopK(3), skip=True).requires_grad_(False)
    assert coder.W_skip is not None
    coder.W_skip.normal_()
    report = evaluate(coder, model=gpt2, data=rows, hook=READS, target=WRITES)
    ids = rows[0].ids
    reads, writes = resolve_hooks(gpt2.module, [READS, WRITES])
    x = capture(gpt2.module, [reads], input_ids=ids)[READS]
    y = capture(gpt2.module, [writes], input_ids=ids)[WRITES]
    with splice(gpt2.module, {writes: lambda _: coder(x)}):
        logits = gpt2.module(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = {name.partition("/")[2]: value for name, value in report.metrics.items()}
    assert found["ce_loss_with_sae"] == pytest.approx(float(expected), rel=1e-4)
    error, spread = (coder(x) - y).square().sum(), (y - y.flatten(0, 1).mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(float(1 - error / spread), rel=1e-4)
    assert found["l0"] == pytest.approx(float((coder.encode(x) != 0).sum(-1).float().mean()))


@torch.no_grad()
def test_a_crosscoder_is_measured_at_each_of_its_hooks(gpt2: LoadedModel, rows: list[TokenBatch]) -> None:
    hooks = ["transformer.h.0", "transformer.h.1"]
    coder = Crosscoder(dict.fromkeys(hooks, D), 4 * D, ReLU(), metadata={"hf_hook_names": hooks})
    signs = torch.cat([torch.eye(2 * D), -torch.eye(2 * D)])  # a latent for each sign of each dimension: a copy
    coder.W_enc.copy_(signs.T)
    coder.W_dec.copy_(signs)
    with pytest.raises(UnweaveError, match=r"evaluate crosscoder.at\(hook\)"):
        evaluate(coder, model=gpt2, data=rows)
    for hook in hooks:
        report = evaluate(coder.at(hook), model=gpt2, data=rows)
        found = {name.partition("/")[2]: value for name, value in report.metrics.items()}
        assert (report.provenance["hook"], report.provenance["reads"]) == (hook, hooks)
        assert found["explained_variance"] == pytest.approx(1, abs=1e-5)
        assert found["kl_div_score"] == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_a_cross_layer_transcoder_is_measured_at_each_of_its_outputs(gpt2: LoadedModel, rows: list[TokenBatch]) -> None:
    reads = [f"transformer.h.{i}.mlp.c_proj:in" for i in (0, 1)]
    writes = [f"transformer.h.{i}.mlp" for i in (0, 1)]
    coder = CrossLayerTranscoder(dict.fromkeys(reads, 4 * D), dict.fromkeys(writes, D), 8 * D, ReLU())
    signs = torch.cat([torch.eye(4 * D), -torch.eye(4 * D)])  # a latent for each sign of each dimension
    coder.W_enc.copy_(torch.cat([signs, signs]).T)
    for i, target in enumerate(writes):
        linear = gpt2.module.transformer.h[i].mlp.c_proj
        coder.decoder(i, target).copy_(signs @ linear.weight)
        coder.split(coder.b_dec)[target].copy_(linear.bias)
    coder.decoder(0, writes[1]).zero_()
    with pytest.raises(UnweaveError, match=r"evaluate clt.at\(target\)"):
        evaluate(coder, model=gpt2, data=rows)

    def explained(target: str) -> float:
        report = evaluate(coder.at(target), model=gpt2, data=rows)
        assert (report.provenance["hook"], report.provenance["reads"]) == (target, reads[: writes.index(target) + 1])
        return {name.partition("/")[2]: value for name, value in report.metrics.items()}["explained_variance"]

    assert [explained(target) for target in writes] == pytest.approx([1, 1], abs=1e-5)
    coder.decoder(0, writes[1]).fill_(0.05)  # what the first layer writes to the second counts at the second alone
    assert explained(writes[0]) == pytest.approx(1, abs=1e-5)
    assert explained(writes[1]) < 0.99


def test_places_that_are_missing_or_too_many(gpt2: LoadedModel, rows: list[TokenBatch]) -> None:
    coder = Transcoder(4 * D, D, 8, ReLU())
    with pytest.raises(UnweaveError, match="no hook for its output"):
        evaluate(coder, model=gpt2, data=rows, hook=READS)
    with pytest.raises(UnweaveError, match="name no hook"):
        evaluate(coder, model=gpt2, data=rows, target=WRITES)
    with pytest.raises(UnweaveError, match="predicts activations of width 16"):
        evaluate(coder, model=gpt2, data=rows, hook=READS, target=READS)
    with pytest.raises(UnweaveError, match="only a transcoder has a target"):
        evaluate(SAE(D, 8, ReLU()), model=gpt2, data=rows, hook=WRITES, target=WRITES)
