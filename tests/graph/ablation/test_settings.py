"""Arms and seeds as they are asked for."""

import pytest
from pydantic import ValidationError

from graph.ablation.settings import FIXED, POLISHED, ROWS, TOLD, AblateSettings, list_arms, list_seeds
from tools.base.errors import UserError


def test_arms_with_chat_need_a_planner() -> None:
    assert list_arms(AblateSettings()) == ["heuristic", "kappa", *FIXED[1:], "grid", "random", "search"]
    every = [row for row in ROWS if row != TOLD]
    assert list_arms(AblateSettings(planner="openai:x", polish_tokens=4096)) == every
    assert list_arms(AblateSettings(arms="search, kappa")) == ["kappa", "search"]
    assert list_arms(AblateSettings(arms="fixed,grid")) == [*FIXED[1:], "grid"] and FIXED[0] == POLISHED
    assert list_arms(AblateSettings(arms="fixed,grid", polish_tokens=4096)) == [*FIXED, "grid"]
    with pytest.raises(UserError, match=r"^the arm chat-alone needs a chat model: give --planner, such as openai:NAME"):
        list_arms(AblateSettings(arms="kappa,chat-alone"))
    of_a_run = AblateSettings(planner="heuristic", reflector="heuristic")
    assert list_arms(of_a_run) == list_arms(AblateSettings()), "every run's config names the rule"
    with pytest.raises(UserError, match=r"^there is no arm 'kapa'; choose among chat, chat-alone, chat-bare, "):
        list_arms(AblateSettings(arms="kapa"))


def test_a_goal_comes_with_figures_for_every_text() -> None:
    texts = {"code": "pydoc", "prose": "file:prose.txt"}
    settings = AblateSettings.model_validate({"text": texts, "goal": "Code must stay.", "judge": "code=9,prose=1"})
    assert settings.judge == {"code": 9, "prose": 1}
    assert list_arms(settings)[:2] == ["heuristic", TOLD]
    for change, said in (
        ({"judge": ""}, "a goal needs a judge"),
        ({"goal": ""}, "a judge needs a goal"),
        ({"judge": "code=9"}, "judge must weigh every named text, and no other: code, prose"),
        ({"text": {}}, "judge must weigh every named text, and no other: none"),
        ({"judge": "code=0,prose=0"}, "judge weighs all texts 0"),
        ({"unseen": {"sql": "pydoc"}}, "judge must weigh every named text, and no other: code, prose, sql"),
        ({"unseen": {"code": "pydoc"}}, "'code' cannot be unseen: it is a text that every arm is given"),
        ({"unseen": {"sql": "pydoc"}, "goal": "", "judge": ""}, "unseen texts are of what a goal names"),
    ):
        with pytest.raises(ValidationError, match=said):
            AblateSettings.model_validate({"text": texts, "goal": "x", "judge": "code=9,prose=1"} | change)
    unseen = {"text": texts, "goal": "x", "unseen": {"sql": "pydoc"}, "judge": "code=0,prose=0,sql=1"}
    assert TOLD not in list_arms(AblateSettings.model_validate(unseen)), "nothing can be told of texts at hand"
    for told in (AblateSettings(arms="told"), AblateSettings.model_validate(unseen | {"arms": "told"})):
        with pytest.raises(
            UserError, match=r"^the arm told is told what texts at hand count for a goal; give --goal, "
        ):
            list_arms(told)


def test_seeds_are_whole_numbers() -> None:
    assert list_seeds(AblateSettings.model_validate({"seeds": [0, 3, 0]})) == [0, 3]
    for wrong in ("", "one", "-1", "0.5"):
        with pytest.raises(UserError, match=r"^seeds '.*' must "):
            list_seeds(AblateSettings(seeds=wrong))
