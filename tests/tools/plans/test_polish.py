"""Which windows of the calibration text a polish goes through, and what it costs."""

import pytest

from tools.base.errors import ImpossiblePlan
from tools.plans.costs import schedule_polish


def test_a_tenth_is_held_out_and_fewer_tokens_are_the_first_windows() -> None:
    schedule = schedule_polish(30, 128, 12 * 128 + 100, 0)
    assert schedule.held_out == [5, 15, 25]
    assert sorted(window for step in schedule.steps for window in step) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert [len(step) for step in schedule.steps] == [4, 4, 4]
    assert (schedule.measured, schedule.passes) == ([1, 2, 3], [3])
    assert schedule.trained == 12 and schedule.windows == [*range(13), 15, 25]


def test_more_tokens_than_the_text_has_are_several_passes_each_in_an_order_of_its_own() -> None:
    schedule = schedule_polish(10, 32, 32 * 23, 7)
    assert schedule.held_out == [5] and schedule.passes == [1, 2, 3]
    training = [window for window in range(10) if window != 5]
    orders = [list(step) for step in schedule.steps]
    assert [sorted(order) for order in orders] == [training, training, training[:5]]
    assert orders[0] != orders[1] and schedule_polish(10, 32, 32 * 23, 7) == schedule
    assert schedule_polish(10, 32, 32 * 23, 8).steps != schedule.steps


def test_a_window_longer_than_a_step_is_a_step_and_steps_of_a_pass_are_even() -> None:
    assert [len(step) for step in schedule_polish(7, 4096, 6 * 4096, 0).steps] == [1] * 6
    schedule = schedule_polish(32, 128, 29 * 128, 0)
    assert [len(step) for step in schedule.steps] == [3, 4, 3, 4, 4, 3, 4, 4]
    assert schedule.measured == [2, 4, 6, 8]


def test_tokens_are_counted_a_backward_pass_as_two_forwards() -> None:
    schedule = schedule_polish(30, 128, 12 * 128, 0)
    assert schedule.count_tokens(128) == 128 * (4 * 12 + 3 * (1 + 3) + 15)


@pytest.mark.parametrize(
    ("windows", "tokens", "line"),
    [
        (1, 5000, "polish holds calibration windows out, and there is one; give --calibration-windows 2"),
        (8, 1023, "polish on 1,023 tokens is less than one window of 1,024; give it more"),
    ],
)
def test_too_little_text_or_too_few_tokens_are_refused_in_one_line(windows: int, tokens: int, line: str) -> None:
    with pytest.raises(ImpossiblePlan) as refused:
        schedule_polish(windows, 1024, tokens, 0)
    assert str(refused.value) == line
