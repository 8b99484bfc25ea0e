"""How a cut is shared out: exact numbers, blocks that stay, what cannot be."""

import pytest

from tests.parts import SHAPE, make_layers, make_parts
from tools.base.errors import ImpossiblePlan
from tools.plans.cuts import (
    UNITS_HOPE,
    Counts,
    CutOrder,
    Cutting,
    Parts,
    Units,
    count_cut_zeros,
    describe_cut,
    describe_cutting,
    list_counts,
    resolve_cut,
)


def test_all_numbers_are_listed_that_come_to_the_share() -> None:
    assert list_counts(SHAPE, 0.3, 0) == [Counts(0, 24, 0), Counts(1, 8, 0)]
    assert list_counts(SHAPE, 0.3, 1) == [Counts(0, 8, 1)]
    assert list_counts(SHAPE, 0.25, 1) == [Counts(0, 0, 1)]
    assert list_counts(SHAPE, 0.3, 2) == []
    assert list_counts(SHAPE, 0.01, 0) == []


def test_the_cheapest_numbers_are_taken_unless_a_plan_says_other_ones() -> None:
    def resolve(parts: Parts, **levers: object) -> CutOrder:
        return resolve_cut(Cutting.model_validate(levers), parts, 0.3, make_layers())

    assert resolve(make_parts(heads=0.5), blocks=0).counts == Counts(1, 8, 0)  # 4 x 0.5 + 4 x 0.1 beside 4 x 0.7
    assert resolve(make_parts(heads=1.0), blocks=0).counts == Counts(0, 24, 0)
    assert resolve(make_parts(heads=1.0)).counts == Counts(0, 8, 1)  # 0.5 + 2 x 3 x 0.1 beside 2 x 4 x 0.7
    assert resolve(make_parts(heads=0.0)).counts == Counts(1, 8, 0)
    assert resolve(make_parts(), heads=1).counts == Counts(1, 8, 0)
    assert resolve(make_parts(), blocks=1).dropped == (3,)
    assert resolve(make_parts(), blocks=1, keep="blocks 3").dropped == (1,)
    assert make_parts().predict(Counts(0, 8, 1), (3,)) == pytest.approx(0.5 + UNITS_HOPE * 3 * 0.1)
    assert resolve(make_parts(), refit=False).refit is False
    few = make_parts().model_copy(
        update={"shape": SHAPE.model_copy(update={"neurons": Units(units=48, cost=2, options=[0, 8])})}
    )
    assert resolve_cut(Cutting(), few, 0.25, make_layers()).dropped == (3,), "as few blocks as there must go"


def test_zeros_are_what_the_parts_hold() -> None:
    order = CutOrder(parts="parts", heads=1, neurons=8, dropped=(2,), refit=True)
    assert list(count_cut_zeros(order, make_parts(), make_layers()).values()) == [
        *(1536, 768, 1536, 768),
        *(3072, 4608),
        *(1536, 768),
    ]
    assert describe_cut(order, SHAPE) == "1 of 2 groups of heads, 8 of 48 neurons, block 2"
    assert describe_cutting(Cutting(blocks=1, keep="blocks 0")) == "cut · heads by KL curves · 1 block · not blocks 0"


@pytest.mark.parametrize(
    ("levers", "sparsity", "problem"),
    [
        ({"blocks": 3}, 0.3, "3 blocks cannot go: 2 is the most here"),
        ({"blocks": 2}, 0.3, "30.00% of the weights cannot go with 2 whole blocks; with 1 blocks it can"),
        ({}, 0.01, "1.00% of the weights cannot go with 0 whole blocks; other sparsities may"),
        ({"heads": 2}, 0.3, "2 groups of heads cannot go of every block; 0, 1 can"),
        ({"heads": 2, "blocks": 0}, 0.3, "2 groups of heads cannot go of every block; with 0 blocks, 0, 1 can"),
        ({"blocks": 1, "keep": "blocks 9"}, 0.3, "selector 'blocks 9' means no layer; .*"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(levers: dict[str, object], sparsity: float, problem: str) -> None:
    with pytest.raises(ImpossiblePlan, match=f"^{problem}$"):
        resolve_cut(Cutting.model_validate(levers), make_parts(), sparsity, make_layers())


def test_blocks_that_go_in_place_of_others_cost_what_they_added() -> None:
    parts = make_parts()
    assert [parts.predict(Counts(blocks=n), gone) for n, gone in ((1, (3,)), (2, (1, 3)))] == [0.5, 2.0]
    kept = resolve_cut(Cutting(keep="blocks 3", blocks=1), parts, 0.25, make_layers())
    assert kept.dropped == (1,) and parts.predict(kept.counts, kept.dropped) == 1.5, "of block 3 it would be 0.5"


def test_no_cut_takes_more_than_curves_were_measured_of() -> None:
    """As of a step that takes fewer blocks than the target must, and more neurons of every one."""
    parts = make_parts().model_copy(update={"neurons": [[0.0, 0.1, 0.3]] * 4})
    assert resolve_cut(Cutting(blocks=0), parts, 0.3, make_layers()).counts == Counts(1, 8, 0)
    with pytest.raises(ImpossiblePlan, match=r"^0 groups of heads cannot go of every block; with 0 blocks, 1 can$"):
        resolve_cut(Cutting(heads=0, blocks=0), parts, 0.3, make_layers())
    nothing = parts.model_copy(update={"heads": [[0.0]] * 4})
    with pytest.raises(ImpossiblePlan, match=r"^30\.00% of the weights cannot go with 0 whole blocks; with 1 "):
        resolve_cut(Cutting(blocks=0), nothing, 0.3, make_layers())
