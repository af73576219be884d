"""Training: configs, one step of one SAE, the loop over batches, checkpoints, and what is printed meanwhile."""

from unweave.training import recipes
from unweave.training.config import SAEConfig, Start, TrainConfig
from unweave.training.controller import L0Controller
from unweave.training.finetune import finetune
from unweave.training.finish import calibrate_threshold
from unweave.training.plan import Plan, plan
from unweave.training.resampling import Resampling
from unweave.training.train import TrainResult, train
from unweave.training.train_on import train_on
from unweave.training.trainer import TrainingInterrupted

__all__ = [
    "L0Controller",
    "Plan",
    "Resampling",
    "SAEConfig",
    "Start",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "calibrate_threshold",
    "finetune",
    "plan",
    "recipes",
    "train",
    "train_on",
]
