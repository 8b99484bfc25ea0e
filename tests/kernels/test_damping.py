"""How damping escalates."""

import pytest

from billhook_kernels.guard import DAMPING, ESCALATIONS, escalate


def test_it_begins_with_what_is_given_and_grows_tenfold_a_few_times() -> None:
    assert list(escalate(DAMPING)) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert len(list(escalate(3.0))) == ESCALATIONS + 1
    assert next(escalate(3.0)) == 3.0
