"""What a run will most likely do."""

from graph.config import RunConfig
from graph.planning.foresee import foresee_course
from graph.planning.orders import UNIFORM_WANDA
from tools.estimate.course import CutCourse


def test_a_run_that_takes_parts_away_measures_nothing_of_single_weights() -> None:
    course = foresee_course(RunConfig(target_size=0.8, max_iterations=3, align=16))
    assert (course.rounds, course.profiles, course.curves) == ([], 0, [])
    assert course.cut == CutCourse(rounds=3, size=0.8, align=16) and course.trials == 3
    assert course.pruned == [(UNIFORM_WANDA, 1)], "beside which its row stands in the report"
    speed = foresee_course(RunConfig(target_speed=1.25, max_iterations=3))
    assert speed.cut == CutCourse(rounds=3, size=0.0, align=8)


def test_a_run_of_zeros_takes_no_parts() -> None:
    course = foresee_course(RunConfig(max_iterations=3))
    assert course.cut is None and len(course.rounds) == course.trials == 3 and course.profiles == 1
