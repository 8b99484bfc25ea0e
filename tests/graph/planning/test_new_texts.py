"""Texts that a plan has the model write: what is refused in words, what the plan is then fitted to, what it costs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graph.config import RunConfig
from graph.goals.schema import Aim, Brief, NewText, follow_new_texts
from graph.planning.approval import examine_edit
from graph.planning.budget import TokenBudget
from graph.planning.orders import resolve
from graph.planning.past import describe_shares
from graph.planning.plan import Plan, drop_schema, find_schema
from graph.planning.prices import describe_costs
from graph.planning.recipes import check_new_texts, count_left, count_new_tokens, fit_to_new_texts, list_unwritten
from graph.runs.session import Session
from graph.state import State
from tests.situations import make_layers

CONFIG = RunConfig(
    text={"code": "file:code.txt", "prose": "file:prose.txt"},
    text_weights={"code": 3, "prose": 1},
    goal="Code, and tales for children.",
    window=32,
    calibration_windows=8,
    gradient_windows=4,
    validation_windows=4,
    test_windows=2,
    goal_tokens=1000,
)
TALES: dict[str, Any] = {"name": "tales", "prompts": ["Once", "There was", "A fox"], "weight": 0.5}
EACH = 32 * (8 + 4 + 2)


def make_plan(*new: dict[str, Any], **changes: Any) -> Plan:
    return Plan.model_validate({"sparsity": 0.4, "new_texts": list(new), **changes})


def test_a_new_text_counts_in_the_mix_of_its_plan_and_nothing_in_what_is_judged() -> None:
    plan = make_plan(TALES)
    (new,) = list_unwritten(plan, CONFIG)
    config = follow_new_texts(CONFIG, [new])
    assert config.text["tales"] == "self:Once | There was | A fox"
    assert config.text_weights == {"code": 3, "prose": 1, "tales": 0} and config.text_shares["code"] == 0.75
    assert list_unwritten(plan, config) == []
    assert fit_to_new_texts(plan, config).recipe.mix == (("code", 0.5), ("prose", 0.1667), ("tales", 0.3333))
    mixed = make_plan({**TALES, "weight": 3}, recipe={"mix": {"prose": 1}})
    assert fit_to_new_texts(mixed, config).recipe.mix == (("prose", 0.25), ("tales", 0.75))
    assert fit_to_new_texts(make_plan(), CONFIG) == make_plan()
    alike = follow_new_texts(CONFIG.model_copy(update={"text_weights": {}}), [new])
    assert alike.text_weights == {"code": 1, "prose": 1, "tales": 0}, "those that nobody weighed stay alike"


def test_a_new_text_costs_walks_and_validation_of_what_is_compared() -> None:
    walks = 32 * 8 + 3 * 32 * 6 * 4  # up with its own text, up and down with the gradient windows of all three
    assert count_new_tokens(CONFIG, 1, accepted=False) == walks + 3 * 32 * 4
    assert count_new_tokens(CONFIG, 1, accepted=True) == walks + 2 * 3 * 32 * 4
    assert count_new_tokens(CONFIG, 0, accepted=True) == 0
    budget = TokenBudget(CONFIG.model_copy(update={"max_evaluated_tokens": 9000}), 0, 384)
    told = describe_costs(budget.config, budget)
    assert "reprofile, 2,048; each of new_texts 3,328. Plans beyond it are refused; " in told


def test_the_budget_is_that_of_the_goal_for_brief_and_plans_together() -> None:
    config = CONFIG.model_copy(update={"goal_tokens": 3 * EACH})
    new = NewText(name="tales", prompts=TALES["prompts"])
    brief = Brief(aims=[Aim(name="code", weight=1)], new_texts=[new])
    assert count_left(State(config=config)) == 3
    assert count_left(State(config=config, brief=brief)) == 2
    assert count_left(State(config=config, brief=brief, written=[new])) == 1
    assert count_left(State(config=CONFIG.model_copy(update={"goal_tokens": 0}))) == 0
    assert describe_shares(config, 2).endswith(" `new_texts`: 2 more.")
    assert describe_shares(CONFIG.model_copy(update={"goal_tokens": 0})).endswith("by weight.")


@pytest.mark.parametrize(
    ("plan", "left", "message"),
    [
        (
            make_plan(TALES),
            0,
            "new_texts are 1 text of 448 tokens each, and the model may write 0 more (goal_tokens)",
        ),
        (
            make_plan({**TALES, "name": "code"}),
            2,
            "new_texts name 'code', and there is such a text already; choose another name",
        ),
        (
            make_plan(TALES, {**TALES, "prompts": ["a", "b", "c"]}),
            2,
            "new_texts name 'tales', and there is such a text already; choose another name",
        ),
        (
            make_plan(TALES, groups=[{"selector": "*.v_proj", "recipe": {"mix": {"code": 1}}}]),
            2,
            "new_texts count in the plan's own mix; leave mix out of groups",
        ),
        (make_plan({**TALES, "prompts": ["a", "b|c", "d"]}), 2, "a prompt cannot hold '|'"),
        (
            make_plan({**TALES, "prompts": ["a", "b", "a "]}),
            2,
            "the prompt 'a' is there twice; no prompt serves two texts",
        ),
        (make_plan({**TALES, "prompts": ["a", "b", "x" * 201]}), 2, "prompts and probes have 1 to 200 characters each"),
    ],
)
def test_what_cannot_be_written_is_handed_back_in_words(plan: Plan, left: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_new_texts(plan, CONFIG, left)
    check_new_texts(make_plan(TALES), CONFIG, 1)


def test_a_person_leaves_the_texts_of_a_plan_as_they_were_written() -> None:
    said = "new_texts were written when the plan was made; leave them as they are, and change recipe.mix"
    state, session = State(config=CONFIG, plan=make_plan(TALES)), Session(Path(), None, 0.0)
    with pytest.raises(ValueError, match=f"^{said}$"):
        examine_edit(make_plan({**TALES, "weight": 2}), state, session)


def test_planners_are_told_of_new_texts_where_a_goal_allows_any() -> None:
    assert "new_texts" not in find_schema(0, CONFIG.text).model_json_schema()["properties"]
    told = find_schema(0, CONFIG.text, writes=True)
    assert "never in what is judged" in told.model_json_schema()["properties"]["new_texts"]["description"]
    answer = told.model_validate({"sparsity": 0.4, "new_texts": [TALES], "recipe": {"mix": {"code": 1}}})
    assert drop_schema(answer) == make_plan(TALES, recipe={"mix": {"code": 1}})
    assert "new_texts" not in make_plan().model_dump(), "plans without are written as they were"


def test_a_plan_with_a_new_text_is_refused_by_what_it_then_takes() -> None:
    """Its curves are of another mix, and its walks and its trial of one text more."""
    plan, layers = make_plan(TALES, recipe={"statistics": "sequential"}), make_layers(1.0)
    order = resolve(plan, layers, CONFIG)
    before = TokenBudget(CONFIG, 0, CONFIG.validation_tokens)
    before.pay(before.list_costs(plan, None))
    assert before.tokens, "curves of the mix so far"
    config = follow_new_texts(CONFIG, list_unwritten(plan, CONFIG))
    fitted, begun = fit_to_new_texts(plan, config), before.tokens + count_new_tokens(CONFIG, 1, accepted=True)
    after = replace(before, config=config, tokens=begun, counted=list(before.counted))
    after.pay(after.list_costs(fitted, resolve(fitted, layers, config)))
    spent = after.tokens + config.validation_tokens
    for limit, refused in ((spent, False), (spent - 1, True)):
        limited = replace(before, config=CONFIG.model_copy(update={"max_evaluated_tokens": limit}))
        said = limited.refuse(plan, order)
        assert bool(said) == refused and (not refused or "new_texts, or reprofile" in said)
