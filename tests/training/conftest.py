"""A tiny model and some text, enough for a whole run in seconds; its interruption; and the loss as dense formulas."""

import contextlib
import os
import signal

import pytest
import torch

from unweave.models import LoadedModel
from unweave.objectives import L1, TargetL0
from unweave.sae import Gated, JumpReLU, ReLU, TopK
from unweave.training import TrainingInterrupted, trainer


@pytest.fixture(scope="session")
def tiny_model():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<eos>", "[UNK]", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="[UNK]")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return LoadedModel(module, fast, "tiny")


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(60, (40,), generator=generator)) for _ in range(200)]


@pytest.fixture
def interrupted(monkeypatch):
    """`with interrupted(7): train(...)`: a real signal before the 7th batch is checked, and the run ends by it."""

    @contextlib.contextmanager
    def run(batches, match="--resume", number=signal.SIGINT):
        check, seen = trainer._check_batch, []

        def counted(*args):
            seen.append(1)
            if len(seen) == batches:
                os.kill(os.getpid(), number)
            check(*args)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_check_batch", counted)
            with pytest.raises(TrainingInterrupted, match=match):
                yield

    return run


@pytest.fixture(scope="session")
def dense_loss():
    """The loss of a trainee on a batch as dense formulas: differentiable, in the dtype of its SAE."""
    return _dense_loss


def _chosen(activation, pre, k):
    """1 where a latent is chosen."""
    if isinstance(activation, TopK):
        return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    return torch.zeros_like(pre).flatten().index_fill(0, pre.flatten().topk(k * len(pre)).indices, 1.0).view_as(pre)


def _dense_loss(trainee, x, sparsity_scale):
    config, sae, d = trainee.config, trainee.sae, x.shape[1]
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    norms = sae.W_dec.norm(dim=1)

    def error(codes, last=sae.d_sae):
        return (codes[:, :last] @ sae.W_dec[:last] + sae.b_dec - x).square().sum(1).mean()

    loss, penalised = 0.0, None
    match config.activation:
        case Gated():
            codes = (pre > 0) * ((pre - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
            penalised = pre.relu()
            through_gate = penalised @ sae.W_dec.detach() + sae.b_dec.detach()
            loss = loss + (through_gate - x).square().sum(1).mean()
        case ReLU():
            codes = pre.relu()
        case JumpReLU(_, bandwidth):
            active = (pre > sae.threshold).to(pre.dtype)
            codes = pre * active
            # The window of area 1: zero in value, and the gradient that the threshold is to have.
            window = ((pre - sae.threshold).abs() < bandwidth / 2) / bandwidth
            slope = -window.detach() * (sae.threshold - sae.threshold.detach())
            codes = codes + sae.threshold.detach() * slope
            if isinstance(config.sparsity_term, TargetL0):
                l0 = (active + slope).sum() / len(x)
                target = config.sparsity_term
                off = l0 / target.l0 - 1
                value = off**2 if off < 1 else 2 * off - 1
                loss = loss + sparsity_scale * target.coefficient * d * value
        case _:
            codes = pre.relu() * _chosen(config.activation, pre, config.activation.k)
    if config.multi_topk:
        k = config.multi_topk.k or 4 * config.activation.k
        loss = loss + config.multi_topk.coefficient * error(pre.relu() * _chosen(config.activation, pre, k))
    loss = loss + torch.stack([error(codes, w) for w in trainee.widths or [sae.d_sae]]).mean()
    if isinstance(config.sparsity_term, L1):
        penalty = ((codes if penalised is None else penalised) * norms).sum(1).mean()
        loss = loss + sparsity_scale * config.sparsity_term.coefficient_for(d) * penalty

    e = (x - codes @ sae.W_dec - sae.b_dec).detach()
    latents = trainee.dead.nonzero().flatten()
    if len(latents) == 0:
        return loss
    dead, W_dead = pre[:, latents], sae.W_dec[latents]
    if config.auxk.coefficient:
        k_aux = config.auxk.k_for(d)
        chosen = _chosen(TopK(), dead, min(k_aux, len(latents)))
        share = ((dead.relu() * chosen) @ W_dead - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + config.auxk.coefficient * d * min(1, len(latents) / k_aux) * share
    if config.pre_act:
        bound = sae.threshold[latents] if isinstance(config.activation, JumpReLU) else 0
        short = (bound - dead).relu() * norms[latents].detach()
        loss = loss + config.pre_act.coefficient * short.sum(1).mean()
    if config.ghost:
        g = dead.exp() @ W_dead
        g = g * (e.norm(dim=1) / (2 * g.norm(dim=1) + 1e-6 * dead.exp().amax(1))).detach()[:, None]
        distance = (g - e).square()
        ghost = ((e.square() / (distance + 1e-6)).detach() * distance).sum(1).mean()
        loss = loss + config.ghost.coefficient * ghost
    return loss
