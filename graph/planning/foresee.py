"""What a run will most likely do, before there is a model: for what it will need."""

from graph.config import RunConfig
from graph.planning.orders import UNIFORM_WANDA
from graph.planning.refinements import MASKS, STRONG, change_recipe, list_question_mixes
from tools.estimate.memory import Course, CutCourse
from tools.plans.recipe import Recipe

TESTED_MODELS = 3
"""On the test text, at the end of a run: dense, uniform Wanda, and what the run has made."""

REWEIGHTED = 2
"""Other weights that the kept plan is carried out by, at most, where that is asked for."""


def foresee_course(config: RunConfig) -> Course:
    """All rounds as the rule plans them, and the end of the run: a chat planner's rounds are told likewise."""
    cuts = config.takes_parts
    rounds = [] if cuts else foresee_recipes(config)
    baseline = UNIFORM_WANDA.model_copy(update={"pattern": config.pattern})
    again = rounds[-1:] * REWEIGHTED if config.check_weights else []
    return Course(
        recipes=[*rounds, *again, baseline],
        trials=config.max_iterations + len(again),
        tests=TESTED_MODELS,
        polish_tokens=config.polish_tokens,
        polished_at=config.target_sparsity,
        cut=CutCourse(config.max_iterations, config.target_size, config.align) if cuts else None,
        checkpoints=config.checkpoints,
    )


def foresee_recipes(config: RunConfig) -> list[Recipe]:
    """The recipe of every round where the rule's first ones are kept: then it pulls levers, small ones together first.

    Rounds beyond the levers that change what is done inside layers prune by the strong recipe.
    """
    strong = STRONG.model_copy(update={"pattern": config.pattern})
    first = [strong] if config.pattern else [MASKS, strong]
    if config.polish_tokens:
        strong = strong.model_copy(update={"polish": True})
        first.append(strong)
    levers = change_recipe(strong, config, lambda: next(iter(list_question_mixes(config)), ()))
    course = [*first, *(recipe for recipe, _ in levers)]
    return [*course, *[strong] * config.max_iterations][: config.max_iterations]
