from __future__ import annotations

import dataclasses
import json
import math

import pytest

from unweave._errors import UnweaveError
from unweave.evaluation import evaluate
from unweave.evaluation.saebench import CORE_METRICS

# SAEBench 0.6: categories and metrics of `core`, the keys of its configuration, and those of a latent.
SCHEMA = {
    "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
    "model_performance_preservation": {
        "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae",
    },
    "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
    "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
    "sparsity": {"l0", "l1"},
    "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
    "misc_metrics": {
        "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
        "frac_alive",
    },
}  # fmt: skip
CONFIG = {
    "model_name", "llm_dtype", "batch_size_prompts", "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches", "dataset", "context_size", "compute_kl", "compute_ce_loss", "compute_l2_norms",
    "compute_sparsity_metrics", "compute_variance_metrics", "compute_featurewise_density_statistics",
    "compute_featurewise_weight_based_metrics", "exclude_special_tokens_from_reconstruction", "verbose",
}  # fmt: skip
TOP = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details",
    "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict",
    "eval_result_unstructured",
}  # fmt: skip
LATENT = {
    "index", "feature_density", "consistent_activation_heuristic", "encoder_bias", "encoder_norm",
    "encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim",
}  # fmt: skip


@pytest.fixture
def report(gpt2, sae, batches):
    """Of an SAE whose latent 0 never fires and has no decoder."""
    sae.b_enc.data[0], sae.W_dec.data[0] = -1e6, 0
    return evaluate(sae, model=gpt2, data=batches, tokens=10**6)


@pytest.fixture
def without_behaviour(gpt2, sae, batches):
    return evaluate(sae, model=gpt2, hook="lm_head:in", data=batches, tokens=100)


def test_the_shape_of_saebench(report):
    """pitfall_021: every key is there, and no other one."""
    result = report.to_json()
    assert set(result) == TOP
    assert {category: set(metrics) for category, metrics in result["eval_result_metrics"].items()} == SCHEMA
    assert set(result["eval_config"]) == CONFIG
    assert all(set(latent) == LATENT for latent in result["eval_result_details"])
    assert [latent["index"] for latent in result["eval_result_details"]] == list(range(48))
    assert result["eval_type_id"] == "core"
    assert isinstance(result["datetime_epoch_millis"], int)
    for metrics in result["eval_result_metrics"].values():
        assert all(isinstance(value, int | float) for value in metrics.values())


def test_every_exported_number_is_ours(report):
    metrics = report.to_json()["eval_result_metrics"]
    for category, names in CORE_METRICS.items():
        for theirs, ours in names.items():
            assert metrics[category][theirs] == report.metrics[ours]


def test_a_dead_latent_is_null_here_and_minus_1_there(report):
    """pitfall_011: never -1 or 0 for what is undefined, but in SAEBench's shape."""
    assert math.isnan(report.per_feature["consistent_activation_heuristic"][0])
    assert math.isnan(report.per_feature["max_decoder_cosine"][0])
    assert report.per_feature["feature_density"][0] == 0
    latent = report.to_json()["eval_result_details"][0]
    assert (latent["consistent_activation_heuristic"], latent["max_decoder_cosine_sim"]) == (-1, -1)


def test_what_was_not_computed_is_null_here_and_minus_1_there(without_behaviour):
    """pitfall_011: and the note says which are."""
    result = without_behaviour.to_json()
    assert without_behaviour["ce_loss_score"] is None
    assert result["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] == -1
    assert result["eval_result_unstructured"]["metrics"]["behaviour/ce_loss_score"] is None
    assert "behaviour/ce_loss_score" in result["eval_result_unstructured"]["note"]
    assert result["eval_config"]["compute_ce_loss"] is False


def test_saved_as_json(report, tmp_path):
    path = report.save(tmp_path / "new" / "eval.json")
    text = path.read_text()
    assert json.loads(text) == report.to_json()
    assert "NaN" not in text
    assert [p.name for p in path.parent.iterdir()] == ["eval.json"]
    ours = json.loads(text)["eval_result_unstructured"]
    assert ours["baseline"] == "zero ablation"
    assert ours["metrics"] == report.metrics
    assert ours["definitions"]["reconstruction/explained_variance"]["id"] == "explained_variance@exact-1"
    assert set(ours["definitions"]) == set(ours["metrics"])


def test_metrics_by_name(report):
    assert report["l0"] == report["sparsity/l0"] == report.metrics["sparsity/l0"]
    with pytest.raises(UnweaveError, match="did you mean 'explained_variance'"):
        report["explaned_variance"]


def test_the_table_fits_a_terminal(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("explained variance" in line and f"{report['explained_variance']:.3f}" in line for line in lines)
    assert any("zero ablation" in line for line in lines)
    assert "\x1b" not in str(report)


def test_the_table_shows_every_bin_of_density(report):
    counts = [0, 0, 0, 1, 40, 80, 160, 320, 160, 80, 40, 20, 10, 5, 1, 0]  # of 1e8 tokens
    edges = [-8 + i / 2 for i in range(len(counts) + 1)]
    histogram = {"log10_edges": edges, "counts": counts, "dead": 0}
    lines = str(dataclasses.replace(report, density_histogram=histogram)).splitlines()
    assert max(map(len, lines)) <= 80
    (density,) = [line for line in lines if line.startswith("  density")]
    assert density.split(maxsplit=2)[1:] == ["···▁▁▂▄█▄▂▁▁▁▁▁·", "latents firing on 1e-8 to 1 of tokens"]


def test_the_table_of_what_is_unknown(without_behaviour):
    lines = str(without_behaviour).splitlines()
    assert not any("loss recovered" in line for line in lines)
    assert any("Note: no metrics of behaviour" in line for line in lines)
