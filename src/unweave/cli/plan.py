"""`unweave plan`: what a run or a cache will cost, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from unweave._errors import UnweaveError
from unweave.cli.output import shown
from unweave.cli.train import TrainArgs


@dataclass
class PlanArgs(TrainArgs):
    """Tokens, passes, steps, memory of every buffer, disk and time of a run of `unweave train`, which takes the same.

    The model and the training step are tried for some seconds. The exit status is 2 if the run does not fit.
    """

    cache_tokens: Annotated[int | None, shown("N", "none: plan a training run")] = None
    """Plan a cache of so many tokens at the hooks instead (unweave cache): rows, shards, bytes on disk and time."""
    cache_dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Type of that cache."""
    seconds: float = 5.0
    """How long to measure the model."""

    def run(self) -> None:
        from unweave.training.train import prepare

        config, model = self.prepared()
        if self.cache_tokens is not None:
            self.plan_a_cache(config, model, self.cache_tokens)
            return
        plan = prepare(config, model).plan(self.seconds)
        print(plan)
        plan.check()

    def plan_a_cache(self, config: Any, model: Any, tokens: int) -> None:
        """Print what a cache takes; raises UnweaveError if the disk of --out cannot hold it."""
        from dataclasses import replace

        from unweave.activations.cache.plan import plan_cache
        from unweave.activations.limits import free_disk
        from unweave.models import TOKEN_KINDS
        from unweave.training.buffers import size
        from unweave.training.plan import duration
        from unweave.training.session import Session
        from unweave.training.train import prepare

        masks = replace(config.masks, special_tokens=False, norm_multiple=None, token_kinds=TOKEN_KINDS)
        session = prepare(replace(config, masks=masks), model)
        if not isinstance(session, Session):
            raise UnweaveError(f"{config.data!r} is a cache already.")
        stream = session.stream
        cost = stream.measure(seconds=self.seconds)
        plan = plan_cache(tokens, cost, stream.rows.context, dtype=self.cache_dtype)
        hooks = ", ".join(f"{name} (width {width})" for name, width in cost.widths.items())
        print(
            f"plan: a cache of {plan.tokens:,} tokens and {plan.held_out_tokens:,} held-out ones, at {hooks}\n"
            f"      {plan.rows:,} rows, {plan.shards:,} shards, {size(plan.bytes)} on disk in {self.cache_dtype}\n"
            f"      the model gives {cost.tokens_per_second:,.0f} tokens/s: about {duration(plan.seconds)}"
        )
        if plan.bytes > (free := free_disk(config.out)):
            raise UnweaveError(
                f"the cache needs {size(plan.bytes)}, and the disk of {config.out!r} has {size(free)} free: take fewer "
                "tokens or hooks, or a smaller type."
            )
