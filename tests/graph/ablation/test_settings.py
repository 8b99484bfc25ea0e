"""Arms and seeds as they are asked for."""

import pytest

from graph.ablation.settings import FIXED, POLISHED, ROWS, AblateSettings, list_arms, list_seeds
from tools.base.errors import UserError


def test_arms_with_chat_need_a_planner() -> None:
    assert list_arms(AblateSettings()) == ["heuristic", "kappa", *FIXED[1:], "grid", "random", "search"]
    assert list_arms(AblateSettings(planner="openai:x", polish_tokens=4096)) == list(ROWS)
    assert list_arms(AblateSettings(arms="search, kappa")) == ["kappa", "search"]
    assert list_arms(AblateSettings(arms="fixed,grid")) == [*FIXED[1:], "grid"] and FIXED[0] == POLISHED
    assert list_arms(AblateSettings(arms="fixed,grid", polish_tokens=4096)) == [*FIXED, "grid"]
    with pytest.raises(UserError, match=r"^the arm chat-alone needs a chat model: give --planner, such as openai:NAME"):
        list_arms(AblateSettings(arms="kappa,chat-alone"))
    with pytest.raises(UserError, match=r"^there is no arm 'kapa'; choose among chat, chat-alone, chat-bare, "):
        list_arms(AblateSettings(arms="kapa"))


def test_seeds_are_whole_numbers() -> None:
    assert list_seeds(AblateSettings.model_validate({"seeds": [0, 3, 0]})) == [0, 3]
    for wrong in ("", "one", "-1", "0.5"):
        with pytest.raises(UserError, match=r"^seeds '.*' must "):
            list_seeds(AblateSettings(seeds=wrong))
