"""Harvesting activations live: the bare forward pass, unweave's shuffled stream, and SAELens' ActivationsStore.

    .venv-oracles/bin/pip install --no-deps -r benchmarks/requirements.txt      # the other library, see there
    .venv-oracles/bin/python benchmarks/harvest.py --write                      # about five minutes

A model of GPT-2 small's shape with random weights, context 128, the residual stream in front of the seventh block. The
contestants take turns; each number is the median over the rounds. A turn is a batch of 4096 activations, masked,
checked and drawn at random from a full ring of 131,072; the bare forward pass runs as many rows, in passes of the same
size, and stops at the hook. `--write` puts the table into `benchmarks/results/harvest.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import gpt2_small
import measure
from unweave import DataConfig, MaskConfig
from unweave.activations import ActivationStream, ShuffledBatches, TokenRows
from unweave.models import capture, resolve_hooks

BATCH, CAPACITY = 4096, 131_072
LEAST_SHARE, LEAST_GAIN = 0.95, 4.0


def stream(model: Any, dtype: torch.dtype | None, hooks: tuple[str, ...] = (gpt2_small.HOOK,)) -> ActivationStream:
    """What a training run would make."""
    text = DataConfig(context=gpt2_small.CONTEXT, held_out=0.0)
    rows = TokenRows(gpt2_small.tokens(), model.tokenizer, text, held_out=False, repeat=True)
    return ActivationStream(model, resolve_hooks(model.module, hooks), rows, MaskConfig(), dtype=dtype)


class Repeated:
    """A stream that runs its model for some passes and then serves them again, to fill a ring in no time."""

    def __init__(self, inner: ActivationStream) -> None:
        self.inner, self.kept = inner, [next(inner) for _ in range(2)]
        self.filling = True

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def __next__(self) -> Any:
        return self.kept[0] if self.filling else next(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def harvest(model: Any, dtype: torch.dtype | None, hooks: tuple[str, ...]) -> Callable[[object], object]:
    """The next batch from a full ring."""
    source = Repeated(stream(model, dtype, hooks))
    batches = ShuffledBatches(source, BATCH, CAPACITY)
    batches.peek(1)  # fills the ring
    source.filling = False
    return lambda _: next(batches)


def bare(model: Any, dtype: torch.dtype, hooks: tuple[str, ...]) -> Callable[[object], object]:
    """The forward pass of transformers' own model in that type, with as many tokens as a batch has."""
    import copy

    module = copy.deepcopy(model.module).to(dtype)
    places = resolve_hooks(module, hooks)
    n = stream(model, None if dtype == torch.float32 else dtype, hooks).prepare()
    ids = torch.from_numpy(gpt2_small.tokens(BATCH // gpt2_small.CONTEXT))

    def run(_: object) -> None:
        for part in ids.split(n):
            capture(module, places, part)

    return run


def store(autocast: bool) -> Callable[[object], object]:
    """The next batch of SAELens' store."""
    activations = gpt2_small.runner(10**9, 768, 32, autocast_lm=autocast).activations_store
    return lambda _: next(activations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="leave SAELens out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/harvest.md")
    args = parser.parse_args()
    model, one = gpt2_small.ours(), (gpt2_small.HOOK,)
    three = tuple(f"h.{i}:in" for i in (2, 4, 6))
    low = torch.bfloat16
    contestants = {
        "bare forward, fp32": bare(model, torch.float32, one),
        "unweave, fp32": harvest(model, None, one),
        "bare forward, bf16": bare(model, low, one),
        "unweave, bf16": harvest(model, low, one),
        "unweave, bf16, three hooks": harvest(model, low, three),
    }
    if not args.no_peer:
        contestants["SAELens, defaults"] = store(False)
        contestants["SAELens, autocast_lm"] = store(True)
    times = measure.medians(contestants, [None], args.rounds)
    rates = {name: BATCH / seconds for name, seconds in times.items()}
    shares = {p: rates[f"unweave, {p}"] / rates[f"bare forward, {p}"] for p in ("fp32", "bf16")}
    low_rate = rates["unweave, bf16"]
    lines = [[name, f"{rate:,.0f}"] for name, rate in rates.items()]
    found = [f"Of the bare forward pass in the same type: {shares['fp32']:.1%} in fp32, {shares['bf16']:.1%} in bf16"]
    if not args.no_peer:
        found.append(
            f"unweave in bf16, its default here, against SAELens: {low_rate / rates['SAELens, defaults']:.1f}× at its "
            f"defaults, {low_rate / rates['SAELens, autocast_lm']:.1f}× with its autocast"
        )
    text = "\n\n".join([
        *measure.machine(["transformers", *([] if args.no_peer else ["sae-lens", "transformer-lens"])]),
        f"Batches of {BATCH} tokens, context {gpt2_small.CONTEXT}; medians of {args.rounds} turns.",
        measure.table(["", "tokens/s"], lines),
        *(f"{line}." for line in found),
        "Above 100 %: unweave computes GPT-2's GELU with the product in front of it, where transformers makes eight "
        "passes, and keeps no keys and values; it lets oneDNN multiply, in bf16 with weights in oneDNN's own layout, "
        "and in bf16 attends with a kernel of its own.",
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("harvest.md", text)
    if min(shares.values()) < LEAST_SHARE:
        raise SystemExit(f"harvesting reached less than {LEAST_SHARE:.0%} of the bare forward pass.")
    if not args.no_peer and low_rate < LEAST_GAIN * rates["SAELens, defaults"]:
        raise SystemExit(f"harvesting was less than {LEAST_GAIN:.0f} times as fast as SAELens' store.")


if __name__ == "__main__":
    main()
