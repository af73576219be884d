"""Training from a cache: no pass of a model, only reading. The model is loaded once something asks for it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ImageConfig, MaskConfig, StreamCost
from unweave.activations.cache import Cache, Selection, Store, StoreBatches, is_cache, open_cache, select
from unweave.activations.cache.store import chosen_hooks
from unweave.activations.masks import kept_positions
from unweave.models import LoadedModel, load_model
from unweave.models.model_identity import model_fingerprint
from unweave.training.buffers import Buffer
from unweave.training.config import TrainConfig, to_dict
from unweave.training.plan import CALIBRATION_TOKENS, Plan, with_steps
from unweave.training.progress import say
from unweave.training.sites import Site, sites_of, where
from unweave.training.trainees import MakeTrainee, new_trainee

LAYOUT = ("context", "pack", "bos", "separator", "chat", "held_out")
"""Settings of text that its rows are the outcome of."""
RUNNING = ("max_bad", "workers", "seed")
"""Settings of images that they are not."""


def cached_data(data: Any) -> Cache | Store | None:
    """The cache that data are, if they are one: a folder, an opened cache, or any `Store`."""
    if isinstance(data, str | Path) and is_cache(data):
        return open_cache(data)
    return data if isinstance(data, Cache | Store) else None


@dataclass
class CachedSession:
    """A prepared run on a cache: everything is checked, nothing is trained. See `Session`."""

    config: TrainConfig
    source: Cache | Store
    given: Any
    """The model, if one was given."""
    sites: list[list[Site]]
    make: MakeTrainee = new_trainee
    """Makes the coders."""

    @classmethod
    def of(cls, config: TrainConfig, source: Cache | Store, model: Any) -> CachedSession:
        """Resolve the hooks.

        Raises:
            UnweaveError: The cache does not have them, or was made by another model or in another way than the config
                says.
        """
        if isinstance(source, Cache):
            _check_layout(config, source)
            config = replace(config, masks=_masks(config.masks, source))
        elif config.masks.special_tokens and source.special_ids is None and "kinds" not in source.records:
            say(
                f"{source.name} does not say which tokens are special, so they are trained on: name them in "
                "masks.token_ids, or open it with special_ids."
            )
            config = replace(config, masks=replace(config.masks, special_tokens=False))
        session = cls(config, source, model, [])
        if session.named is not None:
            assert session.model is not None  # which checks it, before anything is trained
        hooks, targets = hooks_of(source, config.hooks), hooks_of(source, config.targets)
        session.sites = [sites_of(sae, hooks, targets) for sae in config.saes]
        return session

    @property
    def hooks(self) -> list[str]:
        """All hooks that the run reads."""
        sites = [site for group in self.sites for site in group]
        return list(dict.fromkeys(hook for site in sites for hook in (*site.inputs, *site.targets)))

    @property
    def store(self) -> Store:
        """The rows to train on."""
        return self.source.train if isinstance(self.source, Cache) else self.source

    @property
    def device(self) -> torch.device:
        """Where the SAEs are trained."""
        return torch.device(self.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def named(self) -> Any:
        """The model that was asked for, if it is not just that of the cache."""
        if not isinstance(self.source, Cache):
            return self.given if isinstance(self.given, LoadedModel) else None
        made_with = self.source.manifest["made_from"]["model"]["name"]
        return self.given or (None if self.config.model in (TrainConfig.model, made_with) else self.config.model)

    @cached_property
    def model(self) -> LoadedModel | None:
        """The model that the cache was made with; None if it cannot be loaded here.

        Raises:
            UnweaveError: The model that was named is another one.
        """
        if not isinstance(self.source, Cache):
            return self.named
        try:
            name = self.named or self.source.manifest["made_from"]["model"]["name"]
            loaded = name if isinstance(name, LoadedModel) else load_model(name, device=self.config.device)
            self.source.check_model(model_fingerprint(loaded.module), loaded.name)
        except UnweaveError as error:
            if self.named is not None:
                raise
            say(f"the model of the cache is not here, so nothing is evaluated: {error}")
            return None
        return loaded

    def plan(self, seconds: float = 0.0) -> Plan:
        """Shapes, steps, bytes and time, measured on some batches and steps."""
        with self.batches() as batches:
            return plan_cached(self.config, batches, self.sites, seconds, make=self.make)

    @contextmanager
    def batches(self) -> Iterator[StoreBatches]:
        """Shuffled batches without end, read ahead by a thread."""
        selection = Selection.of_masks(self.config.masks, self.store)
        batches = StoreBatches(
            self.store, self.config.batch_size, _capacity(self.config), self.config.seed, selection=selection,
            hooks=self.hooks, epochs=None, device=self.device,
        )  # fmt: skip
        try:
            yield batches
        finally:
            batches.close()

    def held_out(self) -> dict[str, Tensor]:
        """Activations of held-out documents, spread evenly over them; of training ones if none are held out."""
        held_out = self.source.held_out if isinstance(self.source, Cache) else None
        store = held_out or self.store
        chosen = select(store, Selection.of_masks(self.config.masks, store), self.hooks)
        at = torch.linspace(0, chosen.n_rows - 1, min(CALIBRATION_TOKENS, chosen.n_rows), dtype=torch.float64)
        rows = at.round().long()
        if chosen.keep is not None:
            rows = torch.from_numpy(chosen.keep).nonzero().squeeze(1)[rows]
        return {hook: x.to(self.device) for hook, x in store.gather(rows, self.hooks).items()}

    def metadata(self, site: Site) -> dict[str, Any]:
        """Where an SAE comes from, as far as the cache says."""
        config, store = self.config, self.store
        data: dict[str, Any] = {"dataset_path": config.data} if cached_data(config.data) is not None else {}
        if isinstance(self.source, Cache) and self.source.images is not None:  # it holds their names alone
            data = {"dataset_path": self.source.images.get("source")}
        epochs = -(-config.tokens // select(store, Selection.of_masks(config.masks, store), self.hooks).n_rows)
        common = {
            "seqpos_slice": [None],
            "exclude_special_tokens": config.masks.special_tokens,
            "masks": to_dict(config.masks),
            "training_tokens": config.tokens,
            "training_epochs": epochs,
            "seed": config.seed,
        }
        if not isinstance(self.source, Cache):
            names = dict(zip(self.hooks, self.hooks, strict=True))
            model = {} if self.model is None else {"model_name": self.model.name}
            return model | where(site, names) | data | common
        made_from, text = self.source.manifest["made_from"], self.source.config
        rows: dict[str, Any] = {"prepend_bos": False, "images": made_from["config"]}
        if text is not None:
            rows = {"prepend_bos": text.bos, "text": to_dict(text)}
            rows["tokenizer_fingerprint"] = (made_from.get("tokenizer") or {}).get("fingerprint")
        return {
            "model_name": made_from["model"]["name"],
            "model_class_name": made_from["model"]["class"],
            **where(site, self.source.tl_names),
            "hook_head_index": self.source.head(site.inputs[0]),
            "context_size": made_from["config"]["context"],
            **data,
            **rows,
            **common,
            "model_precision": made_from["model_precision"],
            "cache": {"hash": self.source.hash, "dtype": self.source.dtype, "tokens": store.n_rows},
        }


def plan_cached(
    config: TrainConfig,
    batches: StoreBatches,
    sites: Sequence[Sequence[Site]],
    seconds: float = 0.0,
    make: MakeTrainee = new_trainee,
) -> Plan:
    """Measure reading and a training step of each SAE; the batches are not moved on.

    Args:
        config: The run.
        batches: What is read.
        sites: Where each SAE of the config is trained.
        seconds: How long to measure reading, at least.
        make: Makes an SAE.

    Raises:
        UnweaveError: What is known without trying already does not fit.
    """
    position = batches.state_dict()
    first = next(batches)
    started, made = time.perf_counter(), 0
    while made < 4 or time.perf_counter() - started < seconds:
        made += len(next(batches)[batches.hooks[0]]) > 0
    rate = made * config.batch_size / (time.perf_counter() - started)
    batches.load_state_dict(position)
    per_token = sum(x.shape[1] * x.element_size() for x in first.values())
    cost = StreamCost(
        tokens_per_second=rate,
        kept=batches.selected.n_rows / batches.store.n_rows,
        bytes_per_token={name: x.shape[1] * x.element_size() for name, x in first.items()},
        widths={name: x.shape[1] for name, x in first.items()},
        dtypes={name: x.dtype for name, x in first.items()},
        precision=", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in first.values())),
        prompts_per_pass=0,
        pass_bytes=0,
        copy_bytes=0,
    )
    buffers = [
        Buffer("row numbers", 8 * _capacity(config), "cpu", lower="buffer"),
        Buffer("batches ahead", (batches.ahead + 1) * config.batch_size * per_token, "cpu", lower="batch_size"),
    ]
    return with_steps(
        config, sites, cost, batches.device, buffers, background=True, rows=batches.selected.n_rows,
        ring_bytes=8 * _capacity(config), make=make,
    )  # fmt: skip


def hooks_of(source: Cache | Store, names: Sequence[str]) -> list[str]:
    """The stored hooks that names stand for.

    Raises:
        UnweaveError: A name that stands for none.
    """
    return source.resolve(names) if isinstance(source, Cache) else list(chosen_hooks(source, names))


def widths_of(source: Cache | Store, names: Sequence[str]) -> set[int]:
    """Widths of the activations that names stand for."""
    widths = (source.train if isinstance(source, Cache) else source).widths
    return {widths[hook] for hook in hooks_of(source, names)}


def _capacity(config: TrainConfig) -> int:
    """Rows in the ring, which holds their numbers alone, and so costs little."""
    return config.ring_size if config.buffer else 4 * config.ring_size


def check_made(asked: Mapping[str, Any], made: Mapping[str, Any], name: str, parts: Iterable[str]) -> None:
    """Refuse settings that were asked for and are not those that something was made with.

    Raises:
        UnweaveError: One of `parts` is in both, and differs.
    """
    for part in parts:
        if part in asked and part in made and _plain(asked[part]) != _plain(made[part]):
            raise UnweaveError(f"{part}={asked[part]!r} was asked for, and {name} was made with {made[part]!r}.")


def _check_layout(config: TrainConfig, cache: Cache) -> None:
    """Refuse settings that are not the defaults and not those of the cache; the others are taken from it."""
    given: DataConfig | ImageConfig = config.images if cache.config is None else config.text
    asked = {
        part.name: getattr(given, part.name) for part in fields(given) if getattr(given, part.name) != part.default
    }
    parts = LAYOUT if cache.config is not None else [name for name in asked if name not in RUNNING]
    check_made(asked, cache.manifest["made_from"]["config"], cache.train.name, parts)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _masks(masks: MaskConfig, cache: Cache) -> MaskConfig:
    """The masks, with the positions that the cache holds at most."""
    if cache.positions is None:
        return masks
    if masks.positions is None:
        return replace(masks, positions=cache.positions)
    context = cache.manifest["made_from"]["config"]["context"]
    both = kept_positions(cache.positions, context) & kept_positions(masks.positions, context)
    if not both.any():
        raise UnweaveError(f"positions={masks.positions!r} keeps none of those in {cache.train.name}.")
    return replace(masks, positions=tuple(both.nonzero().squeeze(1).tolist()))
