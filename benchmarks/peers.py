"""One training step of other libraries, each through its own trainer at that trainer's defaults.

    sae-lens             `SAETrainer.step`: dense forward and backward, gradient clipping, Adam; counts firings.
                         "sae-lens, autocast" is the same with `autocast=True` (bf16 on the CPU).
    dictionary_learning  `<Architecture>Trainer.update`: dense forward and backward, removal of the gradient parallel
                         to the decoder, gradient clipping (not ReLU and Gated), Adam, decoder renormalisation.
    sparsify             `Trainer.fit` on a model that emits the batch: dense encoder product, sparse decode and
                         backward, removal of the parallel gradient, schedule-free SignSGD, decoder renormalisation.
    overcomplete         `train_sae` on one batch: dense forward and backward, gradient clipping, Adam (lr 5e-4, as in
                         its README; it has no default), decoder normalisation in the forward pass, R² and L0 for its
                         log.
    saev                 The statements of the loop in `saev.training.train`, which cannot be called for a single step:
                         decoder renormalisation, dense forward and backward, removal of the parallel gradient, fused
                         Adam, warm-up.

What a library does on its first step alone (initial biases) falls into the warm-up. Learning rates are the defaults,
except where a case must keep its density (`Case.frozen`): there they are tiny, which costs the same.
`benchmarks/requirements.txt` has the versions.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cases import TINY_LR, Contestant, Problem

MANY_STEPS = 100_000


def sae_lens(problem: Problem, autocast: bool = False, compiled: bool = False) -> Contestant | None:
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    case = problem.case
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": case.k}),
        "batchtopk": ("BatchTopK", {"k": case.k}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": case.k, "matryoshka_widths": case.prefixes}),
        "relu": ("Standard", {}),
        "jumprelu": ("JumpReLU", {}),
        "gated": ("Gated", {}),
    }
    prefix, options = kinds[case.kind]
    device = str(problem.W.device)
    config = getattr(library, f"{prefix}TrainingSAEConfig")(d_in=case.d_in, d_sae=case.d_sae, device=device, **options)
    sae = getattr(library, f"{prefix}TrainingSAE")(config)
    bias = problem.bias + (config.jumprelu_init_threshold if case.kind == "jumprelu" else 0.0)
    biases = (sae.b_gate, sae.b_mag) if case.kind == "gated" else (sae.b_enc,)
    _load(sae.W_enc, problem.encoder.T, sae.W_dec, problem.W, biases, bias)
    lr = TINY_LR if case.frozen else 3e-4  # the default
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=MANY_STEPS * case.batch,
            train_batch_size_samples=case.batch,
            lr=lr,
            lr_end=lr,
            autocast=autocast,
            device=device,
        ),
        sae=sae,
        data_provider=iter(()),
    )
    if compiled:  # as its runner does with `compile_sae=True`
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    trainer.n_forward_passes_since_fired[problem.dead] = 10 * trainer.cfg.dead_feature_window

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Contestant(step, lambda x: _mean_l0(sae.encode, x), lambda: int(trainer.dead_neurons.sum()))


def dictionary_learning(problem: Problem) -> Contestant | None:
    _skip_init("dictionary_learning")
    module, name = {
        "topk": ("top_k", "TopKTrainer"),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
        "relu": ("standard", "StandardTrainer"),
        "jumprelu": ("jumprelu", "JumpReluTrainer"),
        "gated": ("gdm", "GatedSAETrainer"),
    }[problem.case.kind]
    case = problem.case
    arguments: dict[str, Any] = {
        "steps": MANY_STEPS, "activation_dim": case.d_in, "dict_size": case.d_sae, "layer": 0, "lm_name": "none",
        "device": "cpu",
    }  # fmt: skip
    if case.kind in ("topk", "batchtopk", "matryoshka"):
        arguments["k"] = case.k
    if case.kind == "matryoshka":
        widths = [0, *case.prefixes]
        arguments["group_fractions"] = [(b - a) / case.d_sae for a, b in pairwise(widths)]
    if case.frozen:
        arguments["lr"] = TINY_LR
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(**arguments)
    ae = trainer.ae
    if case.kind in ("jumprelu", "matryoshka"):
        bias = problem.bias + (float(ae.threshold[0]) if case.kind == "jumprelu" else 0.0)
        _load(ae.W_enc, problem.encoder.T, ae.W_dec, problem.W, (ae.b_enc,), bias)
    else:
        biases = (ae.gate_bias, ae.mag_bias) if case.kind == "gated" else (ae.encoder.bias,)
        _load(ae.encoder.weight, problem.encoder, ae.decoder.weight, problem.W.T, biases, problem.bias)
    encode = partial(ae.encode, use_threshold=False) if "k" in arguments else ae.encode
    steps = iter(range(MANY_STEPS))
    n_dead: Callable[[], int] = int
    if problem.dead.any():
        if "k" not in arguments:  # the others have no AuxK
            return None
        since, after = trainer.num_tokens_since_fired, trainer.dead_feature_threshold
        since[problem.dead] = after
        n_dead = lambda: int((since >= after).sum())  # noqa: E731
    return Contestant(lambda x: trainer.update(next(steps), x), lambda x: _mean_l0(encode, x), n_dead)


class _Emitter(nn.Module):
    """What sparsify's trainer takes for a language model: its module `here` puts out a given batch."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.here, self.x = nn.Identity(), torch.zeros(1, d_in)
        self.device, self.dummy_inputs = torch.device("cpu"), {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.here(self.x[None])
        return out


class _OneBatch:
    """A data set of one text of `n` tokens, however often a trainer that resumes skips over it."""

    def __init__(self, n: int) -> None:
        self.tokens = torch.zeros(n, dtype=torch.long)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens}

    def select(self, indices: object) -> _OneBatch:
        return self


def sparsify(problem: Problem) -> Contestant | None:
    case = problem.case
    if case.kind != "topk":
        return None
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton wherever that is installed
    with _quiet():
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class NeverSaves(Trainer):
        def save(self) -> None:
            """`fit` would end with a checkpoint."""

    config = TrainConfig(
        SparseCoderConfig(num_latents=case.d_sae, k=case.k),
        batch_size=1,
        hookpoints=["here"],
        log_to_wandb=False,
        auxk_alpha=1 / 32 if case.dead else 0.0,  # off by default
        lr=TINY_LR if case.frozen else None,
    )
    source = _Emitter(case.d_in)
    with _quiet():
        trainer = NeverSaves(config, _OneBatch(case.batch), source)
    sae, since = trainer.saes["here"], trainer.num_tokens_since_fired["here"]
    _load(sae.encoder.weight, problem.encoder, sae.W_dec, problem.W, (sae.encoder.bias,), problem.bias)
    since[problem.dead] = 2 * config.dead_feature_threshold

    def step(x: Tensor) -> None:
        source.x = x
        precision = torch.get_float32_matmul_precision()
        with _quiet():
            trainer.fit()
        torch.set_float32_matmul_precision(precision)  # fit changes it for the whole process

    return Contestant(
        step,
        lambda x: _mean_l0(lambda rows: sae.encode(rows).top_acts, x),
        lambda: int((since > config.dead_feature_threshold).sum()),
    )


def overcomplete(problem: Problem) -> Contestant | None:
    case = problem.case
    if case.kind not in ("topk", "batchtopk", "relu", "jumprelu") or case.dead:  # its AuxK knows no dead latents
        return None
    _skip_init("overcomplete")
    from overcomplete import sae as library

    if case.kind == "topk":
        model = library.TopKSAE(case.d_in, case.d_sae, top_k=case.k)
    elif case.kind == "batchtopk":
        model = library.BatchTopKSAE(case.d_in, case.d_sae, top_k=case.k * case.batch)
    else:
        model = (library.JumpSAE if case.kind == "jumprelu" else library.SAE)(case.d_in, case.d_sae)
    linear, dictionary = model.encoder.final_block[0], model.dictionary._weights
    bias = problem.bias + (float(model.thresholds[0].exp()) if case.kind == "jumprelu" else 0.0)
    _load(linear.weight, problem.encoder, dictionary, problem.W, (linear.bias,), bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=TINY_LR if case.frozen else 5e-4)

    def mse(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    criterion = library.mse_l1 if case.kind == "relu" else mse

    def step(x: Tensor) -> None:
        with _quiet():
            library.train_sae(model, [x], criterion, optimizer, nb_epochs=1)

    return Contestant(step, lambda x: _mean_l0(lambda rows: model.encode(rows)[1], x))


def saev(problem: Problem) -> Contestant | None:
    case = problem.case
    if case.kind != "relu":
        return None
    from saev import config
    from saev.nn import SparseAutoencoder

    defaults = config.Train()
    sae = SparseAutoencoder(config.SparseAutoencoder(d_vit=case.d_in, exp_factor=case.d_sae // case.d_in))
    _load(sae.W_enc, problem.encoder.T, sae.W_dec, problem.W, (sae.b_enc,), problem.bias)
    lr = TINY_LR if case.frozen else defaults.lr
    optimizer = torch.optim.Adam([{"params": sae.parameters(), "lr": 0.0}], fused=True)
    steps = iter(range(1, MANY_STEPS))
    sae.train()

    def step(x: Tensor) -> None:
        sae.normalize_w_dec()
        _, _, losses = sae(x)
        losses.loss.backward()
        sae.remove_parallel_grads()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, next(steps) / defaults.n_lr_warmup)
        optimizer.zero_grad()

    return Contestant(step, lambda x: _mean_l0(lambda rows: sae(rows)[1], x))


@torch.no_grad()
def _load(
    W_enc: Tensor, encoder: Tensor, W_dec: Tensor, decoder: Tensor, biases: tuple[Tensor, ...], bias: float
) -> None:
    """Overwrite a library's weights in place, which keeps its memory layout."""
    W_enc.copy_(encoder)
    W_dec.copy_(decoder)
    for b in biases:
        b.fill_(bias)


@torch.no_grad()
def _mean_l0(encode: Callable[[Tensor], Tensor], x: Tensor) -> float:
    return float((encode(x) != 0).sum() / len(x))


def _skip_init(package: str) -> None:
    """Make a package's modules importable without its `__init__`, which imports much that a step does not need
    (nnsight, torchvision, plotting)."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = bare


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what a library prints at every step: progress and summaries."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Peer(NamedTuple):
    """A library to compare with."""

    distribution: str
    """Its name on PyPI."""
    make: Callable[[Problem], Contestant | None]
    """Gives None for what the library does not have."""


PEERS = {
    "sae-lens": Peer("sae-lens", sae_lens),
    "sae-lens, autocast": Peer("sae-lens", partial(sae_lens, autocast=True)),
    "dictionary_learning": Peer("dictionary-learning", dictionary_learning),
    "sparsify": Peer("eai-sparsify", sparsify),
    "overcomplete": Peer("overcomplete", overcomplete),
    "saev": Peer("saev", saev),
}


def available() -> dict[str, Peer]:
    """The peers that are installed."""
    installed = {name.lower() for d in importlib.metadata.distributions() if (name := d.metadata["Name"])}
    return {name: peer for name, peer in PEERS.items() if peer.distribution in installed}
