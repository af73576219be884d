import pytest

from unweave._errors import UnweaveError
from unweave.objectives import AuxK, KSchedule, Schedule
from unweave.objectives.schedules import factor_of, scheduled


def test_a_table():
    """pitfall_157: the values at the first steps, at the end of the way, and after it."""
    assert [Schedule(over=0.4)(s, 10) for s in range(6)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert [Schedule(3, 1, 0.5, 0.2)(s, 10) for s in (0, 5, 6, 7, 9)] == pytest.approx([3, 3, 2, 1, 1])
    assert [Schedule(1, 100, over=0.4, shape="exponential")(s, 10) for s in (0, 2, 4)] == pytest.approx([1, 10, 100])
    assert [Schedule(over=0.4, shape="cosine")(s, 10) for s in (0, 1, 2, 4)] == pytest.approx([0, 0.1464466, 0.5, 1])
    assert Schedule(over=0)(0, 10) == 1


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_end_is_reached_at_the_last_step(steps):
    assert Schedule(over=1.0)(steps - 1, steps) == 1
    assert KSchedule(50, over=1.0)(4, steps - 1, steps) == 4


def test_k_goes_down_to_the_activation_functions_own():
    """pitfall_153: k at steps 0, 1 and the end."""
    assert [KSchedule(20, 0.4)(4, s, 10) for s in (0, 1, 3, 4, 9)] == pytest.approx([20, 16, 8, 4, 4])
    assert [KSchedule(16, 0.4, "exponential")(4, s, 10) for s in (0, 2, 4)] == pytest.approx([16, 8, 4])


def test_parts_with_a_schedule():
    part = AuxK(0.5, 3, Schedule(over=0.4))
    assert scheduled(part, 2, 10).coefficient == 0.25
    assert scheduled(part, 2, 10).k == 3
    assert scheduled(AuxK(0.5), 2, 10) == AuxK(0.5)
    assert (factor_of(None, 2, 10), factor_of(part.schedule, 2, 10)) == (1, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(-1), "at least 0"),
        (lambda: Schedule(begin=0.5, over=0.6), "within the run"),
        (lambda: Schedule(shape="exponential"), "cannot start or end at 0"),
        (lambda: Schedule(shape="square"), "'linear'"),
        (lambda: KSchedule(0), "above 0"),
        (lambda: KSchedule(5, over=1.5), "within the run"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()
