"""How damping escalates, and how much of a second moment few tokens leave."""

import pytest

from kernels.damping import DAMPING, ESCALATIONS, NOISE, escalate, find_shrinkage


def test_it_begins_with_what_is_given_and_grows_tenfold_a_few_times() -> None:
    assert list(escalate(DAMPING)) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert len(list(escalate(3.0))) == ESCALATIONS + 1
    assert next(escalate(3.0)) == 3.0


def test_many_tokens_are_believed_and_few_are_not() -> None:
    assert find_shrinkage(100, NOISE * 100) == 0.5
    assert find_shrinkage(100, 3 * NOISE * 100) == pytest.approx(0.25)
    assert find_shrinkage(1, 1e12) < 1e-11 and 0.999 < find_shrinkage(10_000, 1) < 1
