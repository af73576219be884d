"""Warnings appear when something goes wrong, and only then."""

import pytest

from unweave.training.watch import warnings_for


def rows(**columns):
    """Eight logged rows of a healthy run, with some columns replaced (a value, or one for each row)."""
    healthy = {"dead": 0.01, "l0": 32.0, "explained_variance": 0.8, "threshold": [0.1 + 0.01 * i for i in range(8)]}
    return [
        {"tokens": 100 * (i + 1), "total_tokens": 1000}
        | {name: v[i] if isinstance(v, list) else v for name, v in (healthy | columns).items()}
        for i in range(8)
    ]


def test_a_healthy_run_is_left_in_peace():
    assert warnings_for(rows()) == []
    assert warnings_for(rows(target_l0=30.0)) == []
    assert warnings_for(rows(explained_variance=None)) == []
    assert warnings_for(rows(dead=0.9)[:3]) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"dead": [0.1 * i for i in range(8)]}, "70% of the latents are dead and rising"),  # pitfall_118
        ({"dead": 0.37}, "37% of the latents are dead and not falling"),
        ({"l0": 200.0, "target_l0": 32.0}, "L0 is flat at 200, the target is 32: try a higher sparsity coefficient"),
        (
            {"l0": 200.0, "target_l0": 32.0, "coefficient": [1.0 + i for i in range(8)]},
            "L0 is flat at 200, the target is 32: try a higher learning rate",
        ),
        ({"l0": 200.0, "target_l0": 32.0, "threshold": 0.1}, "threshold is not moving"),  # pitfall_059
        ({"l0": 0.1}, "hardly any latent fires"),
        ({"explained_variance": -0.5}, "explained variance is -0.50"),
    ],
)
def test_what_goes_wrong_is_said(columns, message):
    assert any(message in warning for warning in warnings_for(rows(**columns)))


def test_a_controlled_run_without_thresholds():
    history = rows(target_l0=30.0)
    for row in history:
        del row["threshold"]
    assert warnings_for(history) == []
