from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unweave.activations import MaskConfig
from unweave.evaluation import BehaviourSums, evaluate
from unweave.evaluation import metrics as m
from unweave.evaluation.causal_lm import kl_divergence, log_probabilities
from unweave.models import LoadedModel
from unweave.sae import SAE, ReLU

BOS, PAD, A, B = range(4)
BIGRAMS = {
    BOS: {BOS: 0.05, PAD: 0.05, A: 0.5, B: 0.4},
    PAD: {BOS: 0.25, PAD: 0.25, A: 0.25, B: 0.25},
    A: {BOS: 0.125, PAD: 0.125, A: 0.5, B: 0.25},
    B: {BOS: 0.1, PAD: 0.1, A: 0.2, B: 0.6},
}
"""Probability of each next token."""


def sums_of(clean, spliced, ablated, targets):
    sums = BehaviourSums()
    sums.update(clean, spliced, ablated, targets)
    return sums


def kl(p_logits, q_logits):
    return kl_divergence(log_probabilities(p_logits), log_probabilities(q_logits))


def test_kl_with_impossible_and_with_certain_tokens():
    """pitfall_013: no 0 · log 0, at logits of -inf and of ±100."""
    p = torch.tensor([[-torch.inf, 0, 0], [-torch.inf, 0, 0], [100, -100, -100], [100, -100, -100]])
    q = torch.tensor([[-torch.inf, 0, 0], [0, 0, -0.0], [100, -100, -100], [-100, -100, 100]])
    assert kl(p, q).tolist() == pytest.approx([0, math.log(3 / 2), 0, 200], abs=1e-5)


def test_kl_of_low_precision_logits():
    """pitfall_014: as exact as the logits themselves."""
    p, q = (3 * torch.randn(50, 1000)).bfloat16(), (3 * torch.randn(50, 1000)).bfloat16()
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    assert torch.allclose(kl(p, q).double(), expected, rtol=1e-5)


def test_direction_of_kl():
    """pitfall_023: the clean model's probabilities weight the logarithms."""
    clean, changed = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    sums = sums_of(clean, changed, changed, torch.tensor([0]))
    assert m.kl_div_with_sae(sums) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_a_model_has_no_divergence_from_itself_and_all_is_recovered():
    """pitfall_022 and pitfall_024: KL of equal models is 0; a perfect splice scores 1, one as bad as the ablation 0."""
    clean, ablated, targets = torch.randn(20, 7), torch.zeros(20, 7), torch.arange(20) % 7
    clean[torch.arange(20), targets] += 3
    perfect, useless = sums_of(clean, clean, ablated, targets), sums_of(clean, ablated, ablated, targets)
    assert (m.kl_div_with_sae(perfect), m.kl_div_score(perfect), m.ce_loss_score(perfect)) == (0, 1, 1)
    assert (m.kl_div_score(useless), m.ce_loss_score(useless)) == (0, 0)
    assert m.delta_lm_loss(perfect) == 0


def test_ratio_of_means():
    """pitfall_007: uneven batches give the same score as one."""
    clean, spliced, ablated = torch.randn(3, 50, 11)
    targets = torch.randint(11, (50,))
    clean[torch.arange(50), targets] += 2
    whole, parts = sums_of(clean, spliced, ablated, targets), BehaviourSums()
    for start, end in ((0, 1), (1, 30), (30, 50)):
        parts += sums_of(clean[start:end], spliced[start:end], ablated[start:end], targets[start:end])
    assert parts.to_dict() == pytest.approx(whole.to_dict(), rel=1e-6)
    assert m.ce_loss_score(parts) == pytest.approx(m.ce_loss_score(whole), rel=1e-6)


def test_nothing_is_recovered_where_nothing_is_lost():
    clean = torch.randn(5, 4)
    assert m.ce_loss_score(sums_of(clean, clean, clean, torch.arange(5) % 4)) is None
    assert {f.function(BehaviourSums()) for f in m.METRICS if f.group == "behaviour"} == {None}


@pytest.fixture(scope="session")
def bigram(tokenizer):
    """Predicts `BIGRAMS`. Its activation is one-hot, so that at 0 all tokens are equally likely."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

    class Body(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = nn.Embedding.from_pretrained(torch.eye(4))

        def forward(self, input_ids, **kwargs):
            return BaseModelOutputWithPast(last_hidden_state=self.embed(input_ids))

    class Bigram(PreTrainedModel, GenerationMixin):
        config_class, base_model_prefix = PretrainedConfig, "model"

        def __init__(self, config):
            super().__init__(config)
            self.model = Body(config)
            logits = torch.tensor([[math.log(BIGRAMS[now][then]) for then in range(4)] for now in range(4)])
            self.register_buffer("table", logits)

        def forward(self, input_ids, **kwargs):
            return CausalLMOutputWithPast(logits=self.model(input_ids).last_hidden_state @ self.table)

    return LoadedModel(Bigram(PretrainedConfig()).eval().requires_grad_(False), tokenizer, "bigram")


def nats(pairs):
    """Mean cross-entropy of next tokens, from the table of the bigram model."""
    return sum(-math.log(BIGRAMS[now][then]) for now, then in pairs) / len(pairs)


@pytest.fixture
def halving():
    """An SAE that halves its input, at the bigram model's embedding."""
    sae = SAE(4, 4, ReLU(), metadata={"hf_hook_name": "model.embed"})
    sae.W_enc.data, sae.W_dec.data = torch.eye(4), torch.eye(4) / 2
    return sae.requires_grad_(False)


def test_cross_entropy_by_hand(bigram, token_batch, halving):
    """pitfall_015: the mask belongs to the target; two documents, one of them padded."""
    batch = token_batch([[BOS, A, B, PAD, PAD], [BOS, B, A, A, B]])
    report = evaluate(halving, model=bigram, data=[batch], tokens=100)
    pairs = [(BOS, A), (A, B), (BOS, B), (B, A), (A, A), (A, B)]
    assert report.sums["behaviour"]["n_predictions"] == 6
    assert report["ce_loss_without_sae"] == pytest.approx(nats(pairs), rel=1e-6)


def test_what_follows_the_end_of_a_document_does_not_count(bigram, token_batch, halving):
    """pitfall_015: in a packed row the BOS of the next document is a special target, but what follows BOS counts."""
    report = evaluate(halving, model=bigram, data=[token_batch([[BOS, A, B, BOS, B, A]])], tokens=100)
    pairs = [(BOS, A), (A, B), (BOS, B), (B, A)]
    assert report["ce_loss_without_sae"] == pytest.approx(nats(pairs), rel=1e-6)


def test_spliced_and_ablated_by_hand(bigram, token_batch, halving):
    """pitfall_016: both replace the same positions. BOS is masked, so what it predicts is unchanged in both."""
    report = evaluate(halving, model=bigram, data=[token_batch([[BOS, A, B, B]])], tokens=100)
    from_bos = -math.log(BIGRAMS[BOS][A])

    def halved(now, then):  # half the logits: the square roots of the probabilities, normalised
        roots = {token: math.sqrt(p) for token, p in BIGRAMS[now].items()}
        return -math.log(roots[then] / sum(roots.values()))

    assert report["ce_loss_with_sae"] == pytest.approx((from_bos + halved(A, B) + halved(B, B)) / 3, rel=1e-6)
    assert report["ce_loss_with_ablation"] == pytest.approx((from_bos + 2 * math.log(4)) / 3, rel=1e-6)
    assert report.baseline == "zero ablation"


def test_with_everything_masked_no_score(bigram, token_batch, halving):
    """pitfall_016: null, not 1."""
    masks = MaskConfig(token_ids=(A, B))
    report = evaluate(halving, model=bigram, data=[token_batch([[BOS, A, B, B]])], tokens=100, masks=masks)
    assert report["ce_loss_score"] is None
    assert report["explained_variance"] is None
    assert any("left no token" in note for note in report.notes)


def brute_force(model, batch, mask, replacement):
    """Losses and divergences from three full runs with PyTorch's own hooks, in float64."""

    def logits(change):
        def edit(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            x = torch.where(mask[..., None], change(x), x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = model.module.get_submodule("transformer.h.0").register_forward_hook(edit)
        try:
            return model.module(input_ids=batch.ids, attention_mask=batch.real.long()).logits.double().log_softmax(-1)
        finally:
            handle.remove()

    counted, targets = mask[:, 1:], batch.ids[:, 1:, None]
    clean, *changed = [logits(change)[:, :-1] for change in (lambda x: x, replacement, torch.zeros_like)]
    ce = [-log_p.gather(2, targets)[..., 0][counted].mean().item() for log_p in (clean, *changed)]
    return ce, [(clean.exp() * (clean - log_q)).sum(-1)[counted].mean().item() for log_q in changed]


@pytest.mark.parametrize("positions", [None, "4:"])
def test_agrees_with_three_plain_runs(positions, gpt2, sae, batches):
    (batch,) = batches
    masks = MaskConfig(positions=positions, norm_multiple=None)
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6, masks=masks)
    mask = batch.real & (batch.ids != BOS)
    mask[:, : 4 if positions else 0] = False
    ce, divergence = brute_force(gpt2, batch, mask, lambda x: sae(x))
    names = ("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation")
    assert [report[name] for name in names] == pytest.approx(ce, rel=1e-5)
    assert [report["kl_div_with_sae"], report["kl_div_with_ablation"]] == pytest.approx(divergence, rel=1e-5)
    assert report["ce_loss_score"] == pytest.approx((ce[2] - ce[1]) / (ce[2] - ce[0]), rel=1e-4)
    assert report.sums["behaviour"]["n_predictions"] == int(mask[:, 1:].sum())


def test_logits_are_made_a_few_positions_at_a_time(gpt2, sae, batches, monkeypatch):
    """Memory does not grow with vocabulary x batch, and the numbers are the same."""
    expected, rows = evaluate(sae, model=gpt2, data=batches, tokens=10**6), []
    monkeypatch.setattr("unweave.evaluation.behaviour.POSITIONS_AT_ONCE", 100)
    handle = gpt2.module.lm_head.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    report = evaluate(sae, model=gpt2, data=batches, tokens=10**6)
    handle.remove()
    assert max(rows) == 100
    assert report.sums["behaviour"] == pytest.approx(expected.sums["behaviour"], rel=1e-6)


def test_an_identity_leaves_the_model_unchanged(gpt2, identity, batches):
    report = evaluate(identity(16), model=gpt2, data=batches, tokens=10**6)
    assert report["explained_variance"] == 1
    assert report["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert report["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert report["ce_loss_with_ablation"] > report["ce_loss_without_sae"]


def test_an_encoder_has_no_behaviour(gpt2, sae, batches):
    encoder = LoadedModel(gpt2.module.transformer, gpt2.tokenizer, "tiny")
    report = evaluate(sae, model=encoder, hook="h.0", data=batches, tokens=10**6)
    assert {value for name, value in report.metrics.items() if name.startswith("behaviour/")} == {None}
    assert any("GPT2Model is no causal language model" in note for note in report.notes)
    whole = evaluate(sae, model=gpt2, data=batches, tokens=10**6)
    assert report["explained_variance"] == whole["explained_variance"]


def test_a_model_that_looks_ahead_has_no_behaviour(batches, gpt2):
    """A BERT with a language model's head sees the tokens that it is asked to predict."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    model = LoadedModel(BertLMHeadModel(config).eval(), gpt2.tokenizer, "bert")
    sae = SAE(16, 32, ReLU(), metadata={"hf_hook_name": "bert.encoder.layer.0"})
    report = evaluate(sae, model=model, data=batches, tokens=500)
    assert report["ce_loss_score"] is None
    assert any("could not be reproduced" in note for note in report.notes)
    assert report["l0"] is not None
