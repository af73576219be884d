import pytest

from unweave.training.schedules import learning_rate_factor, warmup_factor


def test_learning_rate_table():
    """pitfall_156, pitfall_157: the first step moves, the peak is reached, the last step still moves."""
    factors = [learning_rate_factor(s, 10, warmup=0.3, decay=0.4) for s in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    assert [learning_rate_factor(s, 4, 0, 0) for s in range(4)] == [1, 1, 1, 1]
    assert learning_rate_factor(0, 1, 1.0, 1.0) == 1


def test_sparsity_warmup_table():
    """pitfall_088"""
    assert [warmup_factor(s, 10, 0.4) for s in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert warmup_factor(0, 10, 0) == 1
