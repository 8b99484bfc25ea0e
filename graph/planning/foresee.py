"""What a run will most likely do, before there is a model: for what it will need."""

from graph.config import RunConfig
from graph.planning.finalists import FINALISTS
from graph.planning.orders import UNIFORM_WANDA
from graph.planning.refinements import MASKS, STRONG, change_recipe, list_question_mixes
from tools.estimate.course import Course, CutCourse
from tools.measure.continuations import PROMPTS
from tools.plans.recipe import Recipe

TESTED_MODELS = 3
"""On the test text, at the end of a run: dense, uniform Wanda, and what the run has made."""

REWEIGHTED = 2
"""Other weights that the kept plan is carried out by, at most, where that is asked for."""


def foresee_course(config: RunConfig) -> Course:
    """All rounds as the rule plans them, and the end of the run: a chat planner's rounds are told likewise."""
    cuts = config.takes_parts
    rounds = [] if cuts else foresee_recipes(config)
    return Course(
        rounds=rounds,
        polishes=[config.polish_tokens for recipe in rounds if recipe.polish],
        polished_at=config.target_sparsity,
        reweighted=rounds[-1:] * REWEIGHTED if config.check_weights else [],
        baselines=[UNIFORM_WANDA.model_copy(update={"pattern": config.pattern})],
        profiles=0 if cuts else config.max_iterations if config.reprofile else 1,
        tests=TESTED_MODELS,
        finalists=FINALISTS if config.further_windows else 0,
        prompts=len(PROMPTS),
        continuing=2,
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
