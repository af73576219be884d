"""Training: configs, one step of one SAE, the loop over batches, checkpoints, and what is printed meanwhile."""

from unweave.training.config import SAEConfig, TrainConfig
from unweave.training.finish import calibrate_threshold
from unweave.training.train import TrainResult, train
from unweave.training.train_on import train_on
from unweave.training.trainer import TrainingInterrupted

__all__ = ["SAEConfig", "TrainConfig", "TrainResult", "TrainingInterrupted", "calibrate_threshold", "train", "train_on"]
