"""What a run will most likely do."""

from graph.config import RunConfig
from graph.planning.foresee import foresee_course
from graph.planning.orders import UNIFORM_WANDA
from tools.estimate.memory import CutCourse


def test_a_run_that_takes_parts_away_prunes_single_weights_for_its_baseline_alone() -> None:
    course = foresee_course(RunConfig(target_size=0.8, max_iterations=3, align=16))
    assert course.cut == CutCourse(rounds=3, size=0.8, align=16) and course.trials == 3
    assert course.recipes == [UNIFORM_WANDA], "beside which its row stands in the report"


def test_a_run_of_zeros_takes_no_parts() -> None:
    course = foresee_course(RunConfig(max_iterations=3))
    assert course.cut is None and course.trials == 3 and len(course.recipes) == 4
