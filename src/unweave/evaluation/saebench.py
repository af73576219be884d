"""A report in the shape of SAEBench's `core` results (version 0.6), which its tools and leaderboards read.

SAEBench writes -1 for what was not computed, and so does this export, alone in unweave; its `note` lists where. Our own
definitions are kept: `explained_variance` is exact where SAEBench 0.6 has a faulty form, and `mse` is not divided by a
batch's size. What SAEBench's shape has no place for is in `eval_result_unstructured`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unweave.evaluation.report import plain

if TYPE_CHECKING:
    from unweave.evaluation.report import Report

CORE_METRICS = {
    "model_behavior_preservation": {
        "kl_div_score": "behaviour/kl_div_score",
        "kl_div_with_ablation": "behaviour/kl_div_with_ablation",
        "kl_div_with_sae": "behaviour/kl_div_with_sae",
    },
    "model_performance_preservation": {
        "ce_loss_score": "behaviour/ce_loss_score",
        "ce_loss_with_ablation": "behaviour/ce_loss_with_ablation",
        "ce_loss_with_sae": "behaviour/ce_loss_with_sae",
        "ce_loss_without_sae": "behaviour/ce_loss_without_sae",
    },
    "reconstruction_quality": {
        "explained_variance": "reconstruction/explained_variance",
        "explained_variance_legacy": "reconstruction/explained_variance_legacy",
        "mse": "reconstruction/mse",
        "cossim": "reconstruction/cosine",
    },
    "shrinkage": {
        "l2_norm_in": "shrinkage/l2_norm_in",
        "l2_norm_out": "shrinkage/l2_norm_out",
        "l2_ratio": "shrinkage/l2_ratio",
        "relative_reconstruction_bias": "shrinkage/relative_reconstruction_bias",
    },
    "sparsity": {"l0": "sparsity/l0", "l1": "sparsity/l1"},
    "misc_metrics": {
        "freq_over_1_percent": "sparsity/freq_over_1_percent",
        "freq_over_10_percent": "sparsity/freq_over_10_percent",
        "normalized_freq_over_1_percent": "sparsity/normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent": "sparsity/normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim": "weights/average_max_encoder_cosine",
        "average_max_decoder_cosine_sim": "weights/average_max_decoder_cosine",
        "frac_alive": "sparsity/frac_alive",
    },
}
"""SAEBench's categories and names, and our metric behind each."""

CORE_DETAILS = {
    "feature_density": "feature_density",
    "consistent_activation_heuristic": "consistent_activation_heuristic",
    "encoder_bias": "encoder_bias",
    "encoder_norm": "encoder_norm",
    "encoder_decoder_cosine_sim": "encoder_decoder_cosine",
    "max_decoder_cosine_sim": "max_decoder_cosine",
    "max_encoder_cosine_sim": "max_encoder_cosine",
}
"""SAEBench's numbers of a latent, and ours behind each."""


def core_result(report: Report) -> dict[str, Any]:
    """One object of SAEBench's `core` evaluation."""
    provenance, sae = report.provenance, report.provenance["sae"]
    metrics: dict[str, dict[str, float | int]] = {
        category: {theirs: _or_minus_one(report.metrics[ours]) for theirs, ours in names.items()}
        for category, names in CORE_METRICS.items()
    }
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": report.sums["behaviour"]["n_predictions"],
        "total_tokens_eval_sparsity_variance": provenance["tokens"]["kept"],
    }
    missing = sorted(ours for names in CORE_METRICS.values() for ours in names.values() if report.metrics[ours] is None)
    note = (
        "explained_variance is exact (one mean over all tokens), mse is summed over d_in and a mean over tokens, token "
        "counts are those after masking, a latent fires where its code is not 0. "
        + (f"-1 stands for not computed: {', '.join(missing)}. " if missing else "")
        + "In eval_result_details -1 stands for undefined (a latent that never fired, a zero vector)."
    )
    return {
        "eval_type_id": "core",
        "eval_config": _config(report),
        "eval_id": provenance["eval_id"],
        "datetime_epoch_millis": provenance["datetime_epoch_millis"],
        "eval_result_metrics": metrics,
        "eval_result_details": _details(report),
        "sae_bench_commit_hash": f"unweave {provenance['unweave_version']}",
        "sae_lens_id": sae["metadata"].get("sae_lens_id"),
        "sae_lens_release_id": sae["metadata"].get("sae_lens_release_id"),
        "sae_lens_version": sae["metadata"].get("sae_lens_version"),
        "sae_cfg_dict": plain({k: v for k, v in sae.items() if k != "metadata"} | sae["metadata"]),
        "eval_result_unstructured": plain(
            {
                "note": note,
                "notes": report.notes,
                "baseline": report.baseline,
                "metrics": report.metrics,
                "definitions": report.definitions,
                "sums": report.sums,
                "density_histogram": report.density_histogram,
                "provenance": provenance,
            }
        ),
    }


def _config(report: Report) -> dict[str, Any]:
    provenance = report.provenance
    has_behaviour = report.metrics["behaviour/ce_loss_without_sae"] is not None
    return {
        "model_name": provenance["model"]["name"],
        "llm_dtype": provenance["model"]["dtype"],
        "batch_size_prompts": provenance["batch_prompts"],
        "n_eval_reconstruction_batches": provenance["passes"],
        "n_eval_sparsity_variance_batches": provenance["passes"],
        "dataset": provenance["data"]["name"],
        "context_size": provenance["data"]["context"],
        "compute_kl": has_behaviour,
        "compute_ce_loss": has_behaviour,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": provenance["tokens"]["masks"]["special_tokens"],
        "verbose": False,
    }


def _details(report: Report) -> list[dict[str, Any]]:
    """One object for each latent, numbers to 10 decimals."""
    columns = {theirs: plain(report.per_feature[ours]) for theirs, ours in CORE_DETAILS.items()}
    return [
        {"index": i} | {name: round(_or_minus_one(value), 10) for name, value in zip(columns, values, strict=True)}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _or_minus_one(value: float | None) -> float:
    return -1 if value is None else value
