"""What a run does, step by step: what is done how often, priced in operations of products and in measured seconds.

Where workers share the work, a step takes as long as its busiest worker.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from tools.base.settings import WorkbenchSettings
from tools.estimate.course import Course, name_exactly, name_recipe
from tools.estimate.phases import ASKED_FOR, Part
from tools.estimate.prices import Prices, Pricing, Work
from tools.measure.continuations import count_continued
from tools.measure.recall import ANSWER_TOKENS
from tools.measure.recall import BATCH as ASKED_AT_ONCE
from tools.models.layers import Layer
from tools.plans.costs import count_texts
from tools.plans.layer_profile import LEVELS
from tools.plans.polish import schedule_polish
from tools.texts.written import BATCH, list_written

POLISH = "polish"
"""The name of its step, and of its phase of memory."""

QUESTION_TOKENS = 30
"""Tokens of a question with its answer: FreebaseQA's have 28 with SmolLM2's tokenizer."""

OPENING = 11
"""How often the blocks of a streamed model come from disk to be read, laid out, checked forward and backward against
the whole model, and exported; counted on small models (`tests/tools/estimate/test_passes.py`)."""


# --- shares --------------------------------------------------------------------------------------------------------


class Shares(NamedTuple):
    """How much the busiest process does of the work on each text, and on the layers."""

    calibration: float
    gradient: float
    validation: float
    test: float
    layers: float
    questions: float
    workers: int = 1

    def polish(self, windows: int) -> float:
        """Of the windows of a step."""
        return math.ceil(windows / self.workers) / windows


def find_shares(settings: WorkbenchSettings, layers: Sequence[Layer], part: Part) -> Shares:
    """Layers are taken one by one by whoever is free, so that nobody has more than an even share and one layer."""
    gradient, workers = settings.back_propagated, max(part.workers, 1)
    costs = [math.prod(layer.weight_OI.shape) * layer.weight_OI.shape[1] for layer in layers]
    return Shares(
        calibration=part.calibration / settings.count_all("calibration"),
        gradient=part.gradient / gradient,
        validation=part.validation / settings.count_all("validation"),
        test=math.ceil(settings.count_all("test") / workers) / settings.count_all("test"),
        layers=1 / workers + (1 - 1 / workers) * max(costs) / sum(costs),
        questions=1 / workers,
        workers=workers,
    )


# --- steps ---------------------------------------------------------------------------------------------------------


def list_work(
    settings: WorkbenchSettings,
    layers: int,
    shares: Shares,
    course: Course,
    pricing: Pricing,
    *,
    streamed: bool = False,
    setting_out: float = 0.0,
    cut: Sequence[Work] = (),
) -> list[Work]:
    """The plan of a run, whose model may be `streamed`.

    Second moments are kept, or `setting_out` is how many passes of the blocks it takes to collect them anew for one
    block after another on the way down. A run that takes parts away does `cut` in place of a profile.
    """
    return [
        *_list_opening(settings, shares, pricing, streamed=streamed),
        *(cut if course.cut else _list_profile(settings, layers, shares, course, pricing, setting_out)),
        *_list_pruning(settings, layers, shares, course, pricing, setting_out),
        *_list_measuring(settings, shares, course, pricing, streamed=streamed),
    ]


def _describe_text(settings: WorkbenchSettings, split: str, windows: int) -> str:
    return f"{windows} windows of {settings.window} tokens of {split} text"


def _list_opening(settings: WorkbenchSettings, shares: Shares, pricing: Pricing, *, streamed: bool) -> list[Work]:
    """Up to the losses of the dense model."""
    step, text = pricing.step, partial(_describe_text, settings)
    validation, further = settings.count_all("validation"), settings.count_all("further")
    steps = [step("load, check and export the model", "block by block", 1, 1.0, {}, OPENING)] if streamed else []
    steps += [
        step(
            f"write {split} text",
            f"{windows * settings.window:,} tokens one by one, {BATCH} documents at once; more where some end early",
            1,
            1.0,
            {"write": windows},
            math.ceil(windows / BATCH) * settings.window,
        )
        for split, windows in list_written(settings).items()
    ]
    steps += [
        step(
            "validate the dense model",
            f"forward of {text('validation', validation + 2 * further)}",
            1,
            shares.validation,
            {"forward": validation + 2 * further, "loss": validation + 2 * further},
            2 if further else 1,
        ),
    ]
    return steps


def _list_profile(
    settings: WorkbenchSettings, layers: int, shares: Shares, course: Course, pricing: Pricing, setting_out: float
) -> list[Work]:
    """What is measured of single weights."""
    step, text = pricing.step, partial(_describe_text, settings)
    calibration, gradient = settings.count_all("calibration"), settings.back_propagated
    texts, profiled = max(len(settings.text), 1), course.profiles + course.count_texts(settings) - 1
    steps = [
        step(
            "profile, statistics",
            f"forward of {text('calibration', calibration)}",
            profiled,
            shares.calibration,
            {"forward": calibration},
        ),
        step(
            "profile, second moments",
            f"of what {layers} layers read",
            course.count_texts(settings),
            shares.calibration,
            {"moments": calibration} | ({} if setting_out else {"write moments": texts}),
        ),
        step(
            "profile, gradients",
            f"forward again{', twice,' if settings.text else ''} and two backwards of {gradient} of the windows",
            profiled,
            shares.gradient,
            {"gradients": gradient, "forward": gradient if settings.text else 0},
        ),
        step(
            "profile, scores and KL curves",
            f"1 + {len(LEVELS)} products for each layer and window",
            profiled,
            shares.gradient,
            {"curves": gradient, "cut masks": 1, "describe": 1},
            0,
        ),
    ]
    held = _list_held(texts)
    asked = [recipe for recipe in course.rounds if recipe.needs_curves]
    for recipe in course.curves:
        read, whole = (count_texts(recipe, settings) * windows for windows in (gradient, calibration))
        anew = setting_out if recipe.changes_survivors else 0.0
        again: dict[str, float] = {"forward": read + anew * whole}
        if anew:
            again |= {"moments": whole, **held}
        steps.append(
            step(
                ASKED_FOR,
                f"two forwards and backwards of {read} windows, and every layer pruned by {recipe.mask_label} to "
                f"{len(LEVELS)} levels{f', with {anew:.3g} forwards of the calibration text' if anew else ''}",
                1 if asked else 0,
                max(shares.gradient, shares.layers),
                dict.fromkeys(("gradients", "curves"), read) | again | {f"cut {name_recipe(recipe)}": 1},
                2 + math.ceil(anew),
            )
        )
    return steps


def _list_held(texts: int) -> Prices:
    """What second moments of a block cost that are held until those of the next one."""
    return {"write moments": float(texts), "read moments": float(texts)}


def _list_pruning(
    settings: WorkbenchSettings, layers: int, shares: Shares, course: Course, pricing: Pricing, setting_out: float
) -> list[Work]:
    """Rounds of single weights, and baselines."""
    step, steps = pricing.step, list[Work]()
    calibration, texts = settings.count_all("calibration"), max(len(settings.text), 1)
    held = _list_held(texts)
    for recipe, times in course.pruned:
        done = {f"prune {name_recipe(recipe)}": 1.0}
        how = f"{layers} layers by {name_exactly(recipe.mask_label, recipe)}"
        read = count_texts(recipe, settings) * calibration
        anew = setting_out > 0 and recipe.changes_survivors and not recipe.in_order
        if anew:
            done |= {"forward": read, "moments": read, **held}
            how += ", with one more forward of the calibration text"
        elif recipe.changes_survivors:
            done["read moments"] = float(texts)
        if recipe.statistics == "sequential":
            done |= {"forward": 2.0 * read} | ({"moments": read} if recipe.changes_survivors else {})
            how += ", with two more forwards of the calibration text"
        # dense weights are read, too
        passes = {"dense": 1 + anew, "sequential": 3}[recipe.statistics]
        steps.append(step("prune", how, times, shares.layers, done, passes))
    for tokens in course.polishes:
        plan = schedule_polish(course.count_fitted(settings), settings.window, tokens, settings.seed)
        steps.append(
            step(
                POLISH,
                f"two forwards and a backward of {plan.trained} windows, {len(plan.held_out)} others measured "
                f"{1 + len(plan.measured)} times",
                1,
                shares.polish(max(map(len, plan.steps))),
                {
                    "forward": plan.trained + plan.evaluated + len(plan.windows),
                    "gradients": plan.trained,
                    "divergence": plan.trained + plan.evaluated,
                },
            )
        )
    return steps


def _list_measuring(
    settings: WorkbenchSettings, shares: Shares, course: Course, pricing: Pricing, *, streamed: bool
) -> list[Work]:
    """What is measured of every trial, and at the end of the run."""
    step, text = pricing.step, partial(_describe_text, settings)
    validation = settings.count_all("validation")
    further, tests = settings.count_all("further"), settings.count_all("test")
    steps = [
        step(
            "validate",
            f"forward of {text('validation', validation)}, the output head twice",
            course.trials + len(course.reweighted),
            shares.validation,
            {"forward": validation, "divergence": validation},
        )
    ]
    if further:
        steps.append(
            step(
                "compare at the target, at most",
                f"forward of {text('validation', further)} beyond those, the output head twice; finalists too",
                course.trials + course.finalists,
                shares.validation,
                {"forward": further, "divergence": further},
            )
        )
    batches = math.ceil(settings.question_pairs / ASKED_AT_ONCE)
    if settings.questions:
        steps.append(
            step(
                "ask questions",
                f"forward of {settings.question_pairs} questions of about {QUESTION_TOKENS} tokens with their answers",
                1 + course.trials + course.tests,
                shares.questions,
                {"forward": settings.question_pairs * QUESTION_TOKENS / settings.window},
                math.ceil(shares.questions * batches),
            )
        )
    steps.append(
        step(
            "test",
            f"forward of {text('test', tests)}",
            course.tests,
            shares.test,
            {"forward": tests, "loss": tests},
        )
    )
    if settings.questions and course.tests:
        models = 2
        steps.append(
            step(
                "own answers, at most",
                f"{settings.question_pairs} questions, and {ANSWER_TOKENS} tokens after each, one by one",
                models,
                1.0,
                {"forward": settings.question_pairs * (QUESTION_TOKENS + ANSWER_TOKENS) / settings.window},
                batches * ANSWER_TOKENS,
            )
        )
    if course.prompts:
        words = course.continuing * count_continued(streamed=streamed)
        how = f"{words} forwards of a token of each of {course.prompts} prompts"
        steps.append(step("go on with prompts", how, 1, 1.0, {"word": words}, words))
    return steps
