"""What choosing units and fitting the rest takes: of a smaller part what a real one does."""

from collections.abc import Callable

import pytest
import torch

from tools.estimate import units as module
from tools.estimate.meter import Meter
from tools.estimate.units import (
    PartForm,
    count_elimination,
    count_fit,
    prepare_elimination,
    prepare_fit,
    time_elimination,
    time_fit,
)

NEURONS = PartForm("neurons", 384, 384, 144, most=100, least=50, biased=False, folds=True)
HEADS = PartForm("heads", 3, 384, 384, most=2, least=1, biased=False, folds=False)
WIDE = PartForm("neurons", 300, 300, 600, most=290, least=8, biased=True, folds=False)


@pytest.mark.parametrize("form", [NEURONS, HEADS, WIDE], ids=lambda form: form.kind)
@pytest.mark.parametrize(
    ("count", "prepare"), [(count_elimination, prepare_elimination), (count_fit, prepare_fit)], ids=["choose", "fit"]
)
def test_bytes_and_operations_are_those_of_the_part_itself(
    form: PartForm, count: Callable[..., module.Needed], prepare: Callable[..., module.Run]
) -> None:
    run, meter = prepare(form, torch.float32), Meter()
    with meter:
        run()
    found = count(form, torch.float32)
    assert found.bytes == pytest.approx(meter.peak, rel=0.05)
    assert found.flops == pytest.approx(meter.flops, rel=0.1)


def test_a_smaller_part_has_the_same_form() -> None:
    assert NEURONS.shrink(96) == NEURONS._replace(units=96, inputs=96, outputs=36, most=25, least=13)
    assert HEADS.shrink(96) == HEADS._replace(inputs=96, outputs=96)
    assert HEADS.shrink(2).inputs == 3 and HEADS.shrink(384) is HEADS
    assert WIDE.shrink(10).most == 9, "some unit stays"
    assert NEURONS._replace(least=0).shrink(96).least == 0, "what stands before dropped blocks keeps all units"


def test_the_time_of_a_wide_part_grows_with_the_cube(monkeypatch: pytest.MonkeyPatch, a_second_each: list[str]) -> None:
    device, dtype = torch.device("cpu"), torch.float32
    assert time_elimination(NEURONS, dtype, device) == time_fit(NEURONS, dtype, device) == 1
    monkeypatch.setattr(module, "FACTORED", 96)
    assert time_elimination(NEURONS, dtype, device) == time_fit(HEADS, dtype, device) == 4**3
    assert len(a_second_each) == 4
