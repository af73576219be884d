"""What a whole run on a synthetic world is: which world, which SAEs, how long, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from unweave._errors import UnweaveError, nearest
from unweave.synthetic.arguments import require_count
from unweave.synthetic.model_config import SyntheticModelConfig
from unweave.synthetic.training import with_schedule
from unweave.training.config import SAEConfig, from_dict, to_dict


@dataclass(frozen=True)
class SyntheticSAERunnerConfig:
    """What to train, on which world, and what to keep.

    How an SAE is trained (Adam's betas, schedules, dead latents, precision) is said by its `SAEConfig`.

    Attributes:
        synthetic_model: The world: a config, a folder of one that was saved, or a name that
            `SyntheticModel.load_from_source` takes.
        sae: One SAE or several; all see the same batches.
        training_samples: Samples to train on.
        batch_size: Samples in a step.
        lr: Learning rate of every SAE. None: what each config says.
        lr_warm_up_steps: Steps over which the rate rises linearly. None: each config's share of the run.
        lr_decay_steps: Steps, at the end, over which it falls linearly to 0. None: each config's share of the run.
        device: Where to train.
        n_checkpoints: Checkpoints during the run, evenly spaced, besides the one at an interruption. Only the newest
            is kept, and none when the run is finished.
        output_path: Folder for everything; None writes nothing.
        save_synthetic_model: Whether the world is saved as well, in the folder `synthetic_model`.
        eval_frequency: Steps between evaluations during the run, kept in `eval_history.json`; 0: none.
        eval_samples: Samples of an evaluation.
        run_final_eval: Whether to evaluate at the end.
        seed: Gives the initial weights (`seed + i` for SAE i) and the stream that is trained on.

    Raises:
        UnweaveError: If a number is out of range, or there is no SAE.
    """

    synthetic_model: SyntheticModelConfig | str
    sae: SAEConfig | Sequence[SAEConfig]
    training_samples: int = 100_000_000
    batch_size: int = 1024
    lr: float | None = None
    lr_warm_up_steps: int | None = None
    lr_decay_steps: int | None = None
    device: str = field(default="cpu", kw_only=True)
    n_checkpoints: int = field(default=0, kw_only=True)
    output_path: str | None = field(default="output", kw_only=True)
    save_synthetic_model: bool = field(default=False, kw_only=True)
    eval_frequency: int = field(default=0, kw_only=True)
    eval_samples: int = field(default=500_000, kw_only=True)
    run_final_eval: bool = field(default=True, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("training_samples", "batch_size", "eval_samples"):
            require_count(name, getattr(self, name))
        for name in ("n_checkpoints", "eval_frequency"):
            require_count(name, getattr(self, name), least=0)
        if not self.saes:
            raise UnweaveError("there is no SAE to train: pass at least one SAEConfig.")
        self.saes_with_schedule()

    @property
    def saes(self) -> list[SAEConfig]:
        return [self.sae] if isinstance(self.sae, SAEConfig) else list(self.sae)

    def saes_with_schedule(self) -> list[SAEConfig]:
        """The SAEs with the learning rate and schedule that are given for all of them."""
        steps = -(-self.training_samples // self.batch_size)
        return [with_schedule(s, steps, self.lr, self.lr_warm_up_steps, self.lr_decay_steps) for s in self.saes]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.synthetic_model, SyntheticModelConfig):
            values["synthetic_model"] = self.synthetic_model.to_dict()
        values["sae"] = to_dict(self.sae) if isinstance(self.sae, SAEConfig) else [to_dict(s) for s in self.saes]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SyntheticSAERunnerConfig:
        """The inverse of `to_dict`; keys left out take their defaults.

        Raises:
            UnweaveError: If a key does not exist; the message names the nearest that does.
        """
        keys = [f.name for f in fields(cls)]
        for key in values:
            if key not in keys:
                raise UnweaveError(f"there is no setting {key!r} of a synthetic run{nearest(key, keys)}")
        values = dict(values)
        if isinstance(values.get("synthetic_model"), dict):
            values["synthetic_model"] = SyntheticModelConfig.from_dict(values["synthetic_model"])
        sae = values.get("sae")
        if isinstance(sae, dict):
            values["sae"] = from_dict(SAEConfig, sae, "sae.")
        elif isinstance(sae, list):
            values["sae"] = [from_dict(SAEConfig, s, f"sae[{i}].") for i, s in enumerate(sae)]
        return cls(**values)
