"""Texts that a plan has the model write: how many may be, which are refused, and what that plan is then fitted to.

They are named texts as those of a goal are, but for what they count: 0 in all that is judged, so that rounds before and
after stay comparable. Plans fit to them by a mix of their own.
"""

from typing import Any

from graph.config import RunConfig
from graph.goals.schema import (
    NewText,
    check_followed,
    check_prompts,
    count_allowed,
    count_new_text,
    follow_new_texts,
)
from graph.planning.plan import Plan
from graph.state import State
from tools.base.words import count
from tools.plans.costs import count_gradients


def count_left(state: State) -> int:
    """How many texts plans may still have the model write."""
    written = len(state.written) + (len(state.brief.new_texts) if state.brief else 0)
    return max(count_allowed(state.config) - written, 0)


def check_new_texts(plan: Plan, config: RunConfig, left: int) -> None:
    """Raises ValueError, in words for who made the plan, where its new texts cannot be written."""
    new = plan.new_texts
    if not new:
        return
    if len(new) > left:
        raise ValueError(
            f"new_texts are {count(len(new), 'text')} of {count_new_text(config):,} tokens each, and the model may "
            f"write {left} more (goal_tokens)"
        )
    names = [*config.text, *(text.name for text in new)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"new_texts name {twice!r}, and there is such a text already; choose another name")
    if any(group.recipe.mix for group in plan.groups):
        raise ValueError("new_texts count in the plan's own mix; leave mix out of groups")
    check_prompts(new)
    check_followed(follow_new_texts(config, new))


def list_unwritten(plan: Plan, config: RunConfig) -> list[NewText]:
    """Those of a plan's texts that the run has not yet."""
    return [NewText(name=text.name, prompts=text.prompts) for text in plan.new_texts if text.name not in config.text]


def count_new_tokens(config: RunConfig, new: int, *, accepted: bool) -> int:
    """Tokens through the model where so many texts come into a run: what layers read of them, gradients and curves of
    all texts, and on validation text the dense weights and those that were accepted once more."""
    if not new:
        return 0
    texts, known = len(config.text) + new, len(config.text)
    gradients = count_gradients(config) * texts // known
    validation = config.validation_tokens * texts // known
    return new * config.calibration_windows * config.window + 6 * gradients + (1 + accepted) * validation


def fit_to_new_texts(plan: Plan, config: RunConfig) -> Plan:
    """The plan with its new texts in its mix: beside what that says, or what the run's texts count."""
    if not plan.new_texts:
        return plan
    mix = dict(plan.recipe.mix) or {name: share for name, share in config.text_shares.items() if share}
    mix |= {text.name: text.weight for text in plan.new_texts}
    recipe: dict[str, Any] = {**plan.recipe.model_dump(), "mix": mix}
    return plan.model_copy(update={"recipe": type(plan.recipe).model_validate(recipe)})
