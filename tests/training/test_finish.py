"""From the trained state to the SAE that is saved."""

import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, TopK
from unweave.training import SAEConfig
from unweave.training.checkpoint import save_checkpoint
from unweave.training.finish import calibrate_threshold, finished_sae
from unweave.training.plan import CALIBRATION_TOKENS
from unweave.training.trainee import Trainee

D, M = 8, 24


def sample(n, seed):
    """Activations whose sizes differ from token to token, as those of models do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) * (1 + torch.rand(n, 1, generator=generator))


def test_a_calibrated_threshold_hardly_depends_on_which_tokens_are_held_out():
    """pitfall_052: ten draws of a quarter of what a run takes agree within 1 %; and the number of tokens is said."""
    n = CALIBRATION_TOKENS // 4
    sae = SAE(D, M, BatchTopK(3), generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    found = []
    for seed in range(10):
        sae.threshold.fill_(float("nan"))
        assert calibrate_threshold(sae, [sample(n, seed)]) == n
        found.append(sae.threshold.item())
    thresholds = torch.tensor(found)
    assert len(thresholds.unique()) == 10
    assert thresholds.std() < 0.01 * thresholds.mean()
    trainee = Trainee(SAEConfig(d_sae=M, activation=BatchTopK(3)), sample(64, 0), steps=1, tokens=64, seed=0)
    finished = finished_sae(trainee, [sample(300, 1), sample(200, 2)], {})
    assert finished.metadata["threshold_calibration_tokens"] == 500


@pytest.mark.parametrize("normalize", ["scalar", "center", "whiten"])
def test_a_run_that_stops_leaves_no_sae_in_units_of_training(normalize, tmp_path):
    """pitfall_136: a checkpoint is not an SAE; what is saved as one takes raw activations, before and after a stop."""
    x = 20 * sample(300, 0) + 7
    config = SAEConfig(d_sae=M, activation=TopK(3), normalize=normalize)
    trainee, resumed = (Trainee(config, x * factor, steps=4, tokens=1200, seed=0) for factor in (1, 3))
    trainee.step(x)
    path = save_checkpoint(tmp_path, 1, {"run": trainee.state_dict()})
    with pytest.raises(UnweaveError):
        SAE.load(path)
    resumed.load_state_dict(trainee.state_dict())
    saved = [SAE.load(finished_sae(t, [], {}).save(tmp_path / str(i))) for i, t in enumerate((trainee, resumed))]
    assert torch.equal(saved[0](x), saved[1](x))
    assert ((saved[0](x) - x).square().sum() / (x - x.mean(0)).square().sum()) < 1.5  # it would be hundreds
    assert json.loads((tmp_path / "0" / "cfg.json").read_text())["normalize_activations"] == "none"
