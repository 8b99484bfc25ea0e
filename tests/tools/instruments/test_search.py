"""Factors on groups of layers, searched for by probes: the least measured KL, a row for each, and no token too many."""

from collections.abc import Callable
from typing import Any

import pytest

from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft, Round, probe
from tools.instruments.search import search
from tools.measure.losses import Evaluation, compare_kl
from tools.plans.graft import Graft
from tools.plans.recipe import parse_recipe

DRAFT = Draft(sparsity=0.4, recipe={"method": "two-sided", "refit": False})  # type: ignore[arg-type]
GROUPS = ["*.down_proj", "*.o_proj"]
HALF = 128
"""Tokens of half of the validation text."""


def test_a_search_goes_on_from_what_measured_less_and_tells_every_probe(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    before = {name: layer.weight_OI.clone() for name, layer in round_.bench.by_name.items()}
    found = search(round_, DRAFT, [*GROUPS, GROUPS[0]], 100 * HALF)
    rows = found["rows"]
    assert found["tokens"] == HALF and "ended" not in found
    assert rows[0][0] == {} and rows[0][2:] == [0, 0, 1], "the plan as it was, first"
    assert [row[4] for row in rows] == list(range(1, len(rows) + 1)), "each is a probe of the round"
    assert len({str(sorted(row[0].items())) for row in rows}) == len(rows), "none twice"
    assert {name for row in rows for name in row[0]} == set(GROUPS)
    best = next(row for row in rows if row[0] == found["best"])
    assert best[2] <= 0 and found["adjustments"] == [
        {"selector": name, "action": "factor", "factor": factor, "reason": ""} for name, factor in best[0].items()
    ]
    own, start = (Evaluation.model_validate(round_.probed[row[4] - 1].losses) for row in (best, rows[0]))
    assert best[2:4] == [pytest.approx(figure, rel=1e-3) for figure in compare_kl(own, start)]
    adjusted = Draft.model_validate(DRAFT.model_dump() | {"adjustments": found["adjustments"]})
    (again,) = probe(round_, [adjusted])
    assert again["kl"] == best[1] and again["probe"] == best[4], "what it ends at is what a plan comes to"
    assert all(layer.weight_OI.equal(before[name]) for name, layer in round_.bench.by_name.items())


def test_a_plan_that_was_probed_on_more_text_is_compared_on_what_all_were(make_round: Callable[..., Round]) -> None:
    plain, probed = search(make_round(), DRAFT, GROUPS, 4 * HALF), make_round()
    probe(probed, [DRAFT], whole=True)
    assert len(probed.probed[0].losses["kl"]) * 64 > HALF
    assert search(probed, DRAFT, GROUPS, 4 * HALF) == plain


def test_a_search_ends_with_its_tokens_or_with_those_of_the_run(make_round: Callable[..., Round]) -> None:
    found = search(make_round(), DRAFT, GROUPS, 3 * HALF + 1)
    assert len(found["rows"]) == 3
    assert found["ended"] == "1 of its tokens are left, and a probe takes 128"

    def book(*_: Any) -> None:
        if len(round_.probed) == 2:
            raise ValueError("a probe of 128 tokens is too much: 7 are left beside the trial")

    round_ = make_round(book=book)
    found = search(round_, DRAFT, GROUPS, 100 * HALF)
    assert len(found["rows"]) == 2 and found["ended"].endswith("7 are left beside the trial")


def test_statistics_and_curves_are_of_its_tokens_and_what_is_known_is_not(make_round: Callable[..., Round]) -> None:
    def count(draft: Draft, tokens: int) -> int:
        known = any(probed.order == round_.resolve(draft).id for probed in round_.probed)
        return 0 if known else tokens + (0 if round_.probed else 5 * HALF)

    round_ = make_round(count_tokens=count)
    found = search(round_, DRAFT, GROUPS, 7 * HALF)
    assert len(found["rows"]) == 2, "the first, and what is left is another"
    again = search(round_, DRAFT, GROUPS, 0)
    assert [row[:4] for row in again["rows"]] == [row[:4] for row in found["rows"]], "all known"
    assert again["ended"] == "0 of its tokens are left, and a probe takes 128"


@pytest.mark.parametrize(
    ("draft", "tokens", "kind", "message"),
    [
        (
            Draft(sparsity=0.4, graft=Graft(selector="*", of=1, rest=2)),
            1000,
            ImpossiblePlan,
            "a graft has no factors to search for; give a plan that prunes",
        ),
        (Draft(sparsity=0.99), 1000, ImpossiblePlan, "allow at most"),
        (DRAFT, HALF - 1, ValueError, "127 tokens are less than one probe of 128; give it more"),
        (Draft(sparsity=0.4, recipe=parse_recipe("wanda:uniform")), 1000, ImpossiblePlan, "uniform"),
    ],
)
def test_what_cannot_be_searched_from(
    make_round: Callable[..., Round], draft: Draft, tokens: int, kind: type[ValueError], message: str
) -> None:
    round_ = make_round()
    with pytest.raises(kind, match=message):
        search(round_, draft, GROUPS, tokens)
    assert round_.probed == []


def test_a_group_of_no_layer_costs_nothing(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        search(round_, DRAFT, [GROUPS[0], "*.nothing"], 1000)
    assert round_.probed == []
