"""The rows of `architectures.py`: which combinations there are, how each is trained, on what, and what is measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unweave as uw
from unweave import UnweaveError
from unweave.activations import TokenRows
from unweave.models import capture, resolve_hooks
from unweave.objectives import (
    PENALTIES,
    AuxK,
    EndToEnd,
    GhostGradients,
    Matryoshka,
    MultiTopK,
    Penalty,
    PreActivation,
    RandomMatryoshka,
    Reanimation,
)
from unweave.sae import ACTIVATIONS, SAE, Activation, ArchetypalDictionary, Temporal, TiedDictionary
from unweave.synthetic import (
    SyntheticActivationIterator,
    SyntheticModel,
    cosine_similarities,
    eval_sae_on_synthetic_data,
    load_world,
)
from unweave.training import L0Controller, Resampling, SAEConfig, TrainConfig, train, train_on
from unweave.training.train import prepare

HOOK = "resid_post.1"
LR, PENALISED_LR, FINE_LR = 5e-3, 1e-2, 1e-3
"""The better of the first two for TopK, and for ReLU, Gated and JumpReLU; the last is that of end-to-end fine-tuning.

At 3e-3 so short a run leaves a ReLU SAE untrained: with a fixed coefficient, too, it explains 0.35 at this L0.
"""
LRS = {"tanhrelu": 3e-2}
"""Those of other activation functions: decoder rows of TanhReLU have to grow as long as its features are strong."""
ARCHETYPAL_DELTA = 4.0
"""For points of norm 11 to 15; chosen for ReLU after seeing its rows, and compared with 1 on other zipfian draws."""
FINE_TOKENS = 8192
SEEDS = (0, 1, 2)
FAIR_L0 = 4
BESIDE = ("frequency", "contrastive")
"""Penalties that are meant beside another one: the activation function's default, if it has one."""
OTHERS: dict[str, dict[str, Any]] = {
    "error per variance": {"error": "variance"},
    "error per token": {"error": "token"},
    "Matryoshka": {"matryoshka": Matryoshka()},
    "Matryoshka, sqrt": {"matryoshka": RandomMatryoshka()},
    "Matryoshka, inverse_sqrt": {"matryoshka": RandomMatryoshka(law="inverse_sqrt")},
    "Multi-TopK": {"multi_topk": MultiTopK()},
    "no AuxK": {"auxk": AuxK(coefficient=0)},
    "ghost gradients": {"ghost": GhostGradients()},
    "pre-activation": {"pre_act": PreActivation()},
    "reanimation": {"reanimation": Reanimation()},
    "resampling": {"resampling": Resampling()},
    "tied dictionary": {"dictionary": TiedDictionary()},
    "archetypal dictionary": {"dictionary": ArchetypalDictionary(delta=ARCHETYPAL_DELTA)},
    "temporal": {"temporal": Temporal(context=128, n_heads=4, bottleneck=64)},
}
"""Objectives that are no penalties, and dictionaries; they stand beside the activation function's default."""
LAST = "resid_post.3"
END_TO_END = {
    "then balanced KL": EndToEnd(),
    "then KL": EndToEnd(beta=None, kl=1.0),
    "then cross-entropy": EndToEnd(beta=None, ce=1.0),
    "then downstream error": EndToEnd(beta=None, downstream=1.0, hooks=(LAST,)),
}
"""Losses of the spliced model, on the tokens after those of an ordinary training."""
LONG = tuple(END_TO_END)[1:]
"""Of TopK alone."""
PURSUED = ("squared error", "contrastive", "Matryoshka")
"""Objectives of pursuits: they take ten times as long, and have no dead latents that the others could revive."""


class Problem(NamedTuple):
    """What SAEs are trained on.

    Attributes:
        name: "model", or the name of a world.
        d_sae: Latents.
        l0: Active latents a token.
        batch: Tokens in a step.
        tokens: Tokens to train on.
        eval_tokens: Tokens, or samples, to evaluate on.
    """

    name: str
    d_sae: int
    l0: int
    batch: int
    tokens: int
    eval_tokens: int


def problems(tokens: int | None) -> list[Problem]:
    """The model, a world with more features than dimensions, and one whose features depend on each other.

    In the last one fewer latents may fire than features do, 3.6: only then is there anything to gain by absorption.
    """
    made = [
        Problem("model", 1024, 16, 256, 120_000, 4096),
        Problem("zipfian", 256, 4, 256, 200_000, 20_000),
        Problem("hierarchical", 81, 3, 256, 200_000, 20_000),
    ]
    return made if tokens is None else [p._replace(tokens=tokens) for p in made]


class Case(NamedTuple):
    """One row: an activation function, an objective, and where."""

    activation: str
    objective: str
    problem: Problem
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.problem.name}/{self.activation}/{self.objective}" + (f"/{self.seed}" if self.seed else "")

    @property
    def plain(self) -> bool:
        return self.objective == plain_objective(self.activation)


def plain_objective(activation: str) -> str:
    """The objective that an activation function is trained with by default."""
    return ACTIVATIONS[activation].default_sparsity or "squared error"


def objectives(activation: str) -> list[str]:
    """All of them, the default first, whether or not they go together."""
    first = plain_objective(activation)
    return [first, *(name for name in (*PENALTIES, *OTHERS, *END_TO_END) if name != first)]


def with_l0(cls: type[Any], field: str, l0: int) -> Any:
    """A part with the L0 that is asked for, if it has such a field."""
    return cls(**{field: l0} if field in {f.name for f in dataclasses.fields(cls)} else {})


def config_of(case: Case) -> SAEConfig:
    """The configuration of a row.

    Raises:
        UnweaveError: If the two do not go together, with the reason.
    """
    p, objective = case.problem, case.objective
    activation: Activation = with_l0(ACTIVATIONS[case.activation], "k", p.l0)
    names = [activation.default_sparsity] if activation.default_sparsity else []
    if objective in PENALTIES:
        names = [*names, objective] if objective in BESIDE else [objective]
    terms: list[Penalty] = [with_l0(PENALTIES[name], "l0", p.l0) for name in names]
    changes = dict(OTHERS.get(objective, {}), sparsity=tuple(terms) or None)
    l0 = p.l0
    if p.name == "hierarchical" and activation.free_norms:
        # Penalised below what fires in truth, latents die, and there is nothing left to absorb.
        l0, changes["unit_norm"] = FAIR_L0, activation.scales
    if any(term.decides_l0 for term in terms) and not activation.ranked and not any(hasattr(t, "l0") for t in terms):
        changes["l0_controller"] = L0Controller(target=l0)
    lr = LRS.get(case.activation, LR if activation.ranked else PENALISED_LR)
    return SAEConfig(d_sae=p.d_sae, activation=activation, lr=lr, **changes)


def batch_of(case: Case) -> int:
    """Tokens in a step: archetypal dictionaries take a point for each latent from the first."""
    return max(case.problem.batch, case.problem.d_sae if case.objective == "archetypal dictionary" else 0)


def trained(case: Case, made: Tensor) -> SAE:
    """Train a row.

    Args:
        case: The row.
        made: What `activations` gave for it.
    """
    config, batch, tokens = config_of(case), batch_of(case), case.problem.tokens
    if batch > case.problem.batch or case.objective == "temporal":  # as many steps as the others, all of them whole
        tokens = tokens // case.problem.batch * batch
    batches = itertools.chain.from_iterable(itertools.repeat(made.split(batch)))
    (sae,) = train_on(batches, [config], tokens=tokens, seed=case.seed, progress=False)
    if case.objective not in END_TO_END:
        return sae
    run, fine = session(), dataclasses.replace(config, lr=FINE_LR)
    settings = TrainConfig(
        hooks=(HOOK,), saes=(fine,), end_to_end=END_TO_END[case.objective], tokens=FINE_TOKENS,
        batch_size=case.problem.batch, text=run.config.text, seed=case.seed,
    )  # fmt: skip
    (tuned,) = train(settings, model=run.model, data=run.data, start=sae, progress=False).saes
    return tuned


@cache
def world(name: str) -> SyntheticModel:
    """A world that ships with unweave."""
    return SyntheticModel(load_world(name).model)


@cache
def session() -> Any:
    """The model that ships, with the text that every Python carries, at one layer."""
    return prepare(TrainConfig(model="demo", data="stdlib", hooks=(HOOK,)))


@cache
def held_out(tokens: int) -> list[Any]:
    """Rows of held-out text."""
    run = session()
    rows = TokenRows(run.data, run.model.tokenizer, run.config.text, held_out=True)
    return list(itertools.islice(rows.batches(32), -(-tokens // (32 * run.config.text.context))))


def sequences(p: Problem) -> Tensor:
    """Whole rows of text, in order, for what reads tokens in order."""
    run = session()
    (hook,) = resolve_hooks(run.model.module, [HOOK])
    rows = TokenRows(run.data, run.model.tokenizer, run.config.text, held_out=False)
    batches = itertools.islice(rows.batches(32), -(-p.tokens // (32 * run.config.text.context)))
    with torch.no_grad():
        made = [capture(run.model.module, [hook], input_ids=batch.ids)[str(hook)] for batch in batches]
    return torch.cat(made).flatten(0, 1)[: p.tokens // p.batch * p.batch]


def neighbours(made: SyntheticModel, n: int) -> Tensor:
    """Samples of a world, of which 2i and 2i + 1 have the features with even numbers in common; the others are free."""
    fired = made.activation_generator.sample(n).view(n // 2, 2, -1)
    fired[:, 1, ::2] = fired[:, 0, ::2]
    return made.feature_dict(fired.flatten(0, 1)).detach()


def activations(p: Problem) -> Tensor:
    """What all SAEs of a problem are trained on, in one order; rows 2i and 2i + 1 are neighbours, if any are."""
    if p.name != "model":
        made = world(p.name)
        if p.name == "zipfian":
            return torch.cat([neighbours(made, p.batch) for _ in range(-(-p.tokens // p.batch))])[: p.tokens]
        batches = SyntheticActivationIterator(made.feature_dict, made.activation_generator, p.batch)
        return torch.cat([batches.next_batch() for _ in range(-(-p.tokens // p.batch))])[: p.tokens]
    parts: list[Tensor] = []
    for part in session().stream:
        parts.append(part[HOOK] if HOOK in part else next(iter(part.values())))
        if sum(map(len, parts)) > p.tokens:
            break
    pairs = torch.cat(parts)[: p.tokens // 2 * 2].unflatten(0, (-1, 2))
    return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))].flatten(0, 1)


def score(p: Problem, sae: SAE) -> dict[str, float | None]:
    """What the tables show of an SAE."""
    found: dict[str, float | None] = {"dead": sae.metadata["num_dead_features"] / sae.d_sae}
    if p.name == "model":
        run = session()
        report = uw.evaluate(sae, model=run.model, data=held_out(p.eval_tokens), hook=HOOK, tokens=p.eval_tokens)
        return found | {"l0": report["l0"], "ev": report["explained_variance"], "recovered": report["ce_loss_score"]}
    made = world(p.name)
    scores = eval_sae_on_synthetic_data(
        sae, made.feature_dict, made.activation_generator, p.eval_tokens, hierarchy=made.hierarchy
    )
    cosines = cosine_similarities(sae.W_dec, made.feature_dict.feature_vectors.detach()).abs()
    found |= {"l0": scores.sae_l0, "ev": scores.explained_variance, "mmcs": float(cosines.amax(0).mean())}
    found |= {"f1": scores.classification.f1_score}
    if scores.hierarchy is not None:
        found |= {"absorption": scores.hierarchy.absorption, "spread": scores.hierarchy.firing_spread}
    return found


def goes(case: Case) -> str:
    """Why a row is refused; empty if it is not."""
    try:
        config_of(case)
    except UnweaveError as error:
        return str(error)
    return ""


def all_cases(problems: Sequence[Problem]) -> Iterator[Case]:
    """All rows but those that are refused; of a hierarchical world the plain ones and Matryoshka's.

    Those that are compared with each other have several seeds.
    """
    for p in problems:
        for activation in ACTIVATIONS:
            for objective in objectives(activation):
                case = Case(activation, objective, p)
                if p.name == "hierarchical" and not case.plain and objective != "Matryoshka":
                    continue
                if p.name != "model" and (objective in END_TO_END or objective == "temporal"):
                    continue  # a world has neither predictions nor sequences
                pursuit = ACTIVATIONS[activation].tied
                if pursuit and objective not in PURSUED:
                    continue
                if objective in LONG and activation != "topk":
                    continue
                compared = (case.plain or p.name == "hierarchical") and not (pursuit and p.name == "model")
                if not goes(case):
                    yield from (case._replace(seed=seed) for seed in (SEEDS if compared else (0,)))
