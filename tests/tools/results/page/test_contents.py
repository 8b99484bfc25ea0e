"""What is worked out of a record."""

from pathlib import Path

import pytest

from tests.made_runs import write_run
from tools.results.page.contents import find_costs, find_limits
from tools.results.page.record import read_run


def test_the_maps_are_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "demo"))
    assert record.layers is not None and record.layers.checkpoint == f"{1:064x}"
    assert record.layers.sparsity == [0.35, 0.25, 0.35, 0.25]
    costs = find_costs(record)
    assert [cell.block for cell in costs] == [0, 0, 1, 1]
    # log KL is linear between the levels of the curve: a third of the way from 0.3 to 0.45, two thirds from 0.15 to 0.3
    first, second = 1e-3 * 4 ** (1 / 3), 2 * 1e-4 * 10 ** (2 / 3)
    assert [cell.value for cell in costs] == pytest.approx([first, second, 2 * first, 1.5 * second])
    assert find_limits([record]) == pytest.approx((second, 2 * first))
