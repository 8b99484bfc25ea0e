"""Factors on groups of layers, searched for by probes: the least measured KL, a row for each, and no token too many."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.situations import ignore
from tests.tiny import tiny_settings
from tests.tools.instruments.conftest import resolver
from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft, Round, probe
from tools.instruments.moves import LeverName, Point, describe_point, go_to, move
from tools.instruments.probed import Probed, count_rest
from tools.instruments.search import search
from tools.plans.graft import Graft
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import WorkOrder
from tools.results.losses import Evaluation, compare_kl
from tools.workbench.open import use_workbench

DRAFT = Draft(sparsity=0.4, recipe={"method": "two-sided", "refit": False})  # type: ignore[arg-type]
REFIT = Draft(sparsity=0.4, recipe=Recipe())
GROUPS = ["*.down_proj", "*.o_proj"]
HALF = 128
"""Tokens of half of the validation text."""


def test_a_search_goes_on_from_what_measured_less_and_tells_every_probe(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    before = {name: layer.weight_OI.clone() for name, layer in round_.bench.by_name.items()}
    found = search(round_, DRAFT, [*GROUPS, GROUPS[0]], 100 * HALF)
    rows = found["rows"]
    assert found["tokens"] == HALF and "ended" not in found
    assert rows[0][0] == {} and rows[0][2:] == [0, 0, HALF, 1], "the plan as it was, first"
    assert [row[5] for row in rows] == list(range(1, len(rows) + 1)), "each is a probe of the round"
    assert len({str(sorted(row[0].items())) for row in rows}) == len(rows), "none twice"
    assert {name for row in rows for name in row[0]} == set(GROUPS)
    best = next(row for row in rows if row[0] == found["best"])
    assert best[2] <= 0 and found["adjustments"] == [
        {"selector": name, "action": "factor", "factor": factor, "reason": ""} for name, factor in best[0].items()
    ]
    own, start = (Evaluation.model_validate(round_.probed[row[5] - 1].losses) for row in (best, rows[0]))
    assert best[2:4] == [pytest.approx(figure, rel=1e-3) for figure in compare_kl(own, start)]
    adjusted = Draft.model_validate(DRAFT.model_dump() | {"adjustments": found["adjustments"]})
    (again,) = probe(round_, [adjusted])
    assert again["kl"] == best[1] and again["probe"] == best[5], "what it ends at is what a plan comes to"
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


def test_curves_are_priced_before_they_are_measured_and_paid_for_with_its_tokens(
    make_round: Callable[..., Round],
) -> None:
    plain, resolved = make_round(), list[Draft]()

    def resolve(draft: Draft) -> WorkOrder:
        resolved.append(draft)
        return plain.resolve(draft)

    def count(_draft: Draft, tokens: int) -> int:
        return tokens + (0 if resolved else 3 * HALF)

    def refuse(*_: Any) -> None:
        raise ValueError("not begun: this call takes 512 tokens; 9 are left")

    with pytest.raises(ValueError, match="not begun: this call takes 512 tokens"):
        search(replace(make_round(count_tokens=count, admit=refuse), resolve=resolve), DRAFT, GROUPS, 9 * HALF)
    assert not resolved
    found = search(replace(make_round(count_tokens=count), resolve=resolve), DRAFT, GROUPS, 5 * HALF)
    assert len(found["rows"]) == 2 and found["ended"] == "0 of its tokens are left, and a probe takes 128"


def test_of_many_probes_the_first_the_best_and_the_latest_are_told(
    make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(make_round(), DRAFT, GROUPS, 6 * HALF)
    best = next(row for row in whole["rows"] if row[0] == whole["best"])
    rows = whole["rows"]
    monkeypatch.setattr("tools.instruments.search.MOST_ROWS", 3)
    few = search(make_round(), DRAFT, GROUPS, 6 * HALF)
    kept = [row for row in rows if row in (rows[0], best)]
    latest = [row for row in rows if row not in kept][len(kept) - 3 :]
    assert few["rows"] == [row for row in rows if row in kept or row in latest] and len(few["rows"]) == 3
    assert few["rows_left_out"] == len(rows) - 3 and few["best"] == whole["best"]
    assert "rows_left_out" not in whole


def test_levers_are_searched_over_too_and_what_is_hopeless_is_measured_on_less(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    settings = tiny_settings(tiny_llama, validation_windows=8)
    booked: list[int] = []
    with use_workbench(settings, tmp_path / "run", pytest.fail, ignore) as bench:
        profile = bench.profile(ignore)
        resolve, probed = resolver(bench, profile), list[Probed]()

        def count(draft: Draft, tokens: int) -> int:
            return count_rest(probed, resolve(draft).id, tokens)

        round_ = Round(
            *(bench, profile, resolve, ignore),
            book=lambda tokens, _: booked.append(tokens),
            count_tokens=count,
            probed=probed,
        )
        levers: list[LeverName] = ["strength", "damping", "refit_steps"]
        found = search(round_, REFIT, GROUPS[:1], 20 * 256, levers)
        rows = found["rows"]
        assert {name for row in rows for name in row[0]} == {GROUPS[0], *levers}
        assert {row[4] for row in rows} == {128, 256}, "half of the half, or all of it"
        assert sum(booked) == sum(row[4] for row in rows), "no token twice"
        best = next(row for row in rows if row[0] == found["best"])
        assert best[4] == 256 and all(row[2] > 0 for row in rows if row[4] == 128), "what is kept was measured on all"
        again, started = Round(bench, profile, resolve, ignore), len(booked)
        (whole,) = probe(again, [go_to(REFIT, found["best"])])
        assert whole["kl"] == best[1]
        assert search(round_, REFIT, GROUPS[:1], 20 * 256, levers)["rows"] == rows and not any(booked[started:])


def test_where_a_search_may_go() -> None:
    def walk(draft: Draft, name: str, by: float, point: Point | None = None) -> Any:
        moved = move(draft, point or {}, name, by)
        return moved if moved is None else moved.get(name, "as it was")

    assert [walk(REFIT, "refit_steps", by) for by in (2, 0.5, 1.2, 1 / 1.2)] == [10, 2, 6, 4]
    assert walk(REFIT, "refit_steps", 2, {"refit_steps": 10}) is None, "no more than there may be"
    assert [walk(REFIT, "strength", by) for by in (2, 0.5)] == [None, 0.5]
    assert [walk(REFIT, "damping", by) for by in (2, 0.5)] == [0.1, None], "no multiple of nothing leads anywhere"
    assert walk(REFIT, "damping", 2, {"damping": 0.1}) == 0.2
    assert [walk(REFIT, GROUPS[0], by, {GROUPS[0]: 16}) for by in (1.2, 1.4, 1 / 16)] == [19.2, None, "as it was"]
    there = go_to(REFIT, {GROUPS[0]: 1.4, "refit_steps": 8, "damping": 0.1})
    assert there.recipe == Recipe(refit_steps=8, damping=0.1) and there.recipe.label == "refit8~damped0.1:kappa"
    assert [x.factor for x in there.adjustments] == [1.4] and go_to(REFIT, {}) == REFIT
    assert describe_point({"*.q_proj": 1.4, "damping": 0.2}) == "*.q_proj x 1.4, damping 0.2"
    assert describe_point({}) == "as it was"


@pytest.mark.parametrize(
    ("label", "lever", "why"),
    [
        ("wanda:uniform", "strength", "the allocation shares nothing out"),
        ("wanda:owl", "damping", "its survivors are not fitted"),
        ("wanda+refit:owl", "refit_steps", "no mask grows in steps but refit's"),
    ],
)
def test_a_lever_that_changes_nothing_is_refused_before_anything_is_probed(
    make_round: Callable[..., Round], label: str, lever: LeverName, why: str
) -> None:
    round_ = make_round()
    with pytest.raises(ImpossiblePlan, match=f"{lever} changes nothing of .*: {re.escape(why)}; search without it"):
        search(round_, Draft(sparsity=0.4, recipe=parse_recipe(label)), [], 1000, [lever])
    stuck = Draft(sparsity=0.4, recipe=Recipe(method="two-sided", refit=False, strength=0.0))
    with pytest.raises(ImpossiblePlan, match=r"^strength of two-sided:.* cannot be moved from where it is; give it"):
        search(round_, stuck, [], 1000, ["strength"])
    with pytest.raises(ValueError, match="nothing to search over; give selectors of groups, or levers"):
        search(round_, DRAFT, [], 1000)
    assert round_.probed == []


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
        (
            DRAFT.model_copy(update={"alone": GROUPS[0]}),
            1000,
            ValueError,
            "with alone, factors and strength move zeros",
        ),
    ],
)
def test_what_cannot_be_searched_from(
    make_round: Callable[..., Round], draft: Draft, tokens: int, kind: type[ValueError], message: str
) -> None:
    round_ = make_round()
    with pytest.raises(kind, match=message):
        search(round_, draft, GROUPS, tokens)
    assert round_.probed == []


@pytest.mark.parametrize(("group", "strength"), [("*", 1.0), ("*.down_proj", 0.0)])
def test_a_factor_that_moves_no_zero_is_refused_before_anything_is_probed(
    make_round: Callable[..., Round], group: str, strength: float
) -> None:
    round_ = make_round()
    draft = Draft(sparsity=0.4, recipe=Recipe(method="two-sided", refit=False, strength=strength))
    with pytest.raises(ImpossiblePlan, match=re.escape(f"no factor on '{group}' moves a zero")):
        search(round_, draft, [group], 100 * HALF)
    assert round_.probed == []


def test_a_group_of_no_layer_costs_nothing(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        search(round_, DRAFT, [GROUPS[0], "*.nothing"], 1000)
    assert round_.probed == []
