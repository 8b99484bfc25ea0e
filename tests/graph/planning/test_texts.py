"""What agents are told of named texts."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.planning.brief import planner_messages
from graph.planning.orders import describe_plan, resolve
from graph.planning.past import describe_bounds, describe_dense, describe_goal, describe_shares, describe_texts
from graph.planning.plan import Plan, drop_schema, find_schema
from graph.planning.recipes import find_recipe
from graph.planning.refinements import STRONG
from tests.situations import make_situation, make_trial
from tools.plans.recipe import Recipe
from tools.results.schema import TextFigures

CODE = TextFigures(name="code", weight=0.75, perplexity=4.0, kl=0.21, kl_error=0.004)
PROSE = TextFigures(name="prose", weight=0.25, perplexity=9.0, kl=None, kl_error=None)
NAMED = RunConfig(text={"code": "pydoc", "prose": "self"}, text_weights={"code": 3, "prose": 1})


def test_a_planner_is_shown_weights_and_the_kl_of_each_text() -> None:
    trial = make_trial(1, "accept", 0.3, STRONG).model_copy(update={"texts": [CODE, PROSE]})
    told = planner_messages(replace(make_situation(trial), config=NAMED))[1].content
    assert describe_shares(NAMED) in told and describe_texts(trial) in told
    assert describe_shares(NAMED) == (
        " Texts and their weights: code 0.75, prose 0.25; perplexity and KL are the means by weight."
    )
    assert describe_texts(trial) == (
        "; code KL 0.21 +- 0.004, perplexity 4, prose KL not finite +- not finite, perplexity 9"
    )


def test_a_planner_is_told_of_bounds_in_perplexities_and_of_the_goal_in_its_words() -> None:
    dense = make_trial(0, "accept", 0.0, STRONG).model_copy(update={"texts": [CODE, PROSE]})
    bound = NAMED.model_copy(update={"text_bounds": {"code": 0.25}, "goal": "Code must\nstay."})
    told = str(planner_messages(replace(make_situation(), config=bound, dense=dense))[1].content)
    assert (
        " Whatever that allows, a round is rolled back above a perplexity on code 5 (1.25 times the dense 4)." in told
    )
    assert " The goal that they stand for:\n<data goal>\nCode must stay.\n</data>" in told
    assert "dense: perplexity 11 (code 4, prose 9)\n" in told
    assert describe_bounds(NAMED, dense) == describe_goal(NAMED) == describe_dense(make_situation().dense) == ""


def test_without_named_texts_nothing_is_said_of_them() -> None:
    assert describe_shares(RunConfig()) == describe_texts(make_trial(1, "accept", 0.3, STRONG)) == ""


def test_a_planner_has_the_lever_where_texts_have_names() -> None:
    plain, named, both = find_schema(0), find_schema(0, NAMED.text), find_schema(640, NAMED.text)
    assert plain is Plan and named is find_schema(0, ("code", "prose"))
    properties = [list(schema.model_json_schema()["$defs"]["Recipe"]["properties"]) for schema in (plain, named, both)]
    assert [[lever in told for lever in ("mix", "polish")] for told in properties] == [
        [False, False],
        [True, False],
        [True, True],
    ]
    shares = named.model_json_schema()["$defs"]["Mix"]["properties"]
    assert list(shares) == ["code", "prose"]
    answer = named.model_validate({"sparsity": 0.4, "recipe": {"mix": {"code": 3, "prose": 1}}})
    assert drop_schema(answer) == Plan(
        sparsity=0.4, recipe=Recipe.model_validate({"mix": {"code": 0.75, "prose": 0.25}})
    )
    assert drop_schema(named.model_validate({"sparsity": 0.4})) == Plan(sparsity=0.4)
    with pytest.raises(ValidationError, match="sql"):
        named.model_validate({"sparsity": 0.4, "recipe": {"mix": {"sql": 1}}})
    assert '"mix":{' in str(planner_messages(replace(make_situation(), config=NAMED))[0].content)


def test_a_planner_has_the_lever_where_questions_are_asked() -> None:
    asking = RunConfig(questions="file:qa.jsonl")
    assert (asking.mixable, RunConfig().mixable, NAMED.mixable) == (["questions", "run"], [], ["code", "prose"])
    said = str(planner_messages(replace(make_situation(), config=asking))[0].content)
    assert '"mix":{' in said and '"questions"' in said
    assert '"mix":{' not in str(planner_messages(make_situation())[0].content)


def test_the_runs_own_mixture_is_no_lever_and_another_is_another_plan() -> None:
    own, other = ({"code": 3.0, "prose": 1.0}, {"code": 1.0, "prose": 1.0})
    plans = [Plan(sparsity=0.4, recipe=Recipe.model_validate({"mix": mix})) for mix in ({}, own, other)]
    assert [find_recipe(plan, NAMED).mix for plan in plans] == [(), (), (("code", 0.5), ("prose", 0.5))]
    layers = make_situation().layers
    assert len({resolve(plan, layers, NAMED).id for plan in plans}) == 2
    assert describe_plan(plans[2]) == "40.0% refit~0.5code~0.5prose:kappa"
