"""What a run does, step by step: what is done how often, priced in operations of products and in measured seconds.

Where workers share the work, a step takes as long as its busiest worker.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, Field

from tools.base.settings import WorkbenchSettings
from tools.estimate.block import Counts
from tools.estimate.memory import ASKED_FOR, WEIGH, Part
from tools.estimate.pruning import count_flops
from tools.estimate.timing import Times
from tools.measure.continuations import count_continued
from tools.measure.recall import BATCH as ASKED_AT_ONCE
from tools.models.layers import Layer, list_readers
from tools.plans.costs import count_texts
from tools.plans.layer_profile import LEVELS
from tools.plans.methods import STAGES
from tools.plans.polish import schedule_polish
from tools.plans.recipe import Recipe
from tools.texts.written import BATCH, list_written

POLISH = "polish"
"""The name of its step, and of its phase of memory."""

QUESTION_TOKENS = 30
"""Tokens of a question with its answer: FreebaseQA's have 28 with SmolLM2's tokenizer."""

OPENING = 11
"""How often the blocks of a streamed model come from disk to be read, laid out, checked forward and backward against
the whole model, and exported; counted on small models (`tests/tools/estimate/test_passes.py`)."""

Prices = Mapping[str, float]
"""What one of each thing costs that is done: a `forward` of one window through all blocks, its `moments`, ..."""


class Work(BaseModel):
    """A step of a run."""

    name: str
    how: str
    times: int = Field(description="How often, as foreseen; 0 for what only some plans ask for.")
    flops: float = Field(description="Floating-point operations of the products of one time.")
    seconds: float | None = Field(description="Of one time, all of it by one process; null where nothing was timed.")
    share: float = Field(1.0, description="How much of it the busiest worker does; all of it where there are none.")
    passes: int = Field(
        1, description="How often all blocks of a streamed model come from disk in one time, for each who has a share."
    )


class Course(NamedTuple):
    """What a run is expected to do."""

    rounds: Sequence[Recipe]
    """What the plan of each round asks for."""
    baselines: Sequence[Recipe] = ()
    """By what the model is pruned besides, to be measured on the test text alone."""
    reweighted: Sequence[Recipe] = ()
    """What the kept plan asks for, each time that it is carried out again by other weights of texts."""
    profiles: int = 1
    tests: int = 0
    """Models that are measured on the test text."""
    finalists: int = 0
    """Models that are compared once more on validation text at the end, at most."""
    prompts: int = 0
    """That a model goes on with."""
    continuing: int = 0
    """Models that go on with them."""
    polishes: Sequence[int] = ()
    """Tokens of each polish."""
    polished_at: float = 0.0
    """The least sparsity that is polished."""
    standing: Sequence[Recipe] = ()
    """Those of the rounds that find their pruned model there, to be polished."""

    @property
    def pruned(self) -> list[tuple[Recipe, int]]:
        """What is done inside the layers, and how often."""
        asked = [*self.rounds, *self.reweighted, *self.baselines]
        times = Counter(_name(recipe.exact_label, recipe) for recipe in asked)
        times.subtract(_name(recipe.exact_label, recipe) for recipe in self.standing)
        by_label = {_name(recipe.exact_label, recipe): recipe for recipe in asked}
        return [(recipe, times[label]) for label, recipe in by_label.items()]

    @property
    def weighs(self) -> bool:
        """Whether tokens are weighed."""
        return any(recipe.weighs_tokens for recipe in self.rounds)

    @property
    def weighs_moments(self) -> bool:
        """Whether there are weighted second moments of the dense model's inputs."""
        return any(x.weighs_tokens and (x.needs_curves or not x.in_order) for x in self.rounds)

    @property
    def curves(self) -> list[Recipe]:
        """The recipes whose own KL curves are measured; those of `refit` where none of them are."""
        plain = {"statistics": "dense"}  # curves are the dense model's whatever comes of the weights
        asked = {x.model_copy(update=plain).exact_label: x for x in self.rounds if x.needs_curves}
        return list(asked.values()) or [Recipe()]

    def count_texts(self, settings: WorkbenchSettings) -> int:
        """Calibration texts that are profiled apart: the run's, and questions where a plan mixes these in."""
        return 1 + any(recipe.mix and settings.mixes_questions for recipe in self.rounds)

    def count_fitted(self, settings: WorkbenchSettings) -> int:
        """Calibration windows that a polish may be on, at most."""
        return settings.count_fitted() * self.count_texts(settings)


def price_flops(settings: WorkbenchSettings, layers: Sequence[Layer], counts: Counts, course: Course) -> Prices:
    """In floating-point operations of products; what has none costs nothing."""
    forms = [tuple(layer.weight_OI.shape) for layer in layers]
    squares = sum(_count_tokens(layer, counts) * layer.weight_OI.shape[1] ** 2 for layer in list_readers(layers))
    weights = sum(_count_tokens(layer, counts) * layer.weight_OI.numel() for layer in layers)
    often = {(o, i): forms.count((o, i)) for o, i in forms}
    prices = {
        "forward": counts.forward,
        "moments": 2.0 * settings.window * squares,
        "gradients": counts.forward + counts.head + 2 * (counts.backward + counts.head),
        "stages": STAGES * counts.forward + 2.0 * settings.window * squares,  # passes end with their stage
        "weigh": counts.forward + counts.head + counts.backward + counts.head,
        "curves": 2.0 * settings.window * weights * (1 + len(LEVELS)),
        "loss": counts.head,
        "divergence": 2 * counts.head,
        "write": counts.forward + counts.head,
    }
    for recipe, _ in course.pruned:
        prices[f"prune {name_recipe(recipe)}"] = sum(n * count_flops(recipe, form) for form, n in often.items())
    for recipe in course.curves:
        prices[f"cut {name_recipe(recipe)}"] = sum(
            n * count_flops(recipe, form, levels=True) for form, n in often.items()
        )
    return prices


def _count_tokens(layer: Layer, counts: Counts) -> float:
    """How many of a text's tokens a layer sees, as a share."""
    return counts.routed if layer.pool else 1


def price_seconds(times: Times) -> Prices:
    """In seconds of one process."""
    steps = times.steps
    return {
        "forward": steps.forward,
        "moments": max(steps.statistics - steps.forward, 0.0),
        "gradients": steps.gradients,
        "stages": steps.stages,
        "weigh": steps.gradients,  # with one backward less, which was not timed
        "curves": steps.curves.each,
        "cut masks": steps.curves.fixed,
        "describe": steps.describe,
        "loss": steps.loss,
        "divergence": steps.divergence,
        "word": steps.word,
        "write": steps.write,
        "write moments": times.write * times.moments,
        "read moments": times.read * times.moments,
        **{f"prune {label}": seconds for label, seconds in times.prune.items()},
        **{f"cut {label}": seconds for label, seconds in times.cut.items()},
    }


def name_recipe(recipe: Recipe) -> str:
    """What is done inside a layer, whatever text and order its statistics come from."""
    asked = {"mix": (), "statistics": "dense", "gamma": "plain", "tokens": "even"}
    plain = recipe.model_copy(update=asked)
    return _name(plain.exact_label, recipe)


def _name(label: str, recipe: Recipe) -> str:
    return f"{label} to {recipe.pattern}" if recipe.pattern else label


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
    flops: Prices,
    seconds: Prices | None,
    *,
    streamed: bool = False,
    setting_out: float = 0.0,
) -> list[Work]:
    """The plan of a run, whose model may be `streamed`; without a price in `seconds` no step has any.

    Second moments are kept, or `setting_out` is how many passes of the blocks it takes to collect them anew for one
    block after another on the way down.
    """
    calibration, validation = settings.count_all("calibration"), settings.count_all("validation")
    further, tests = settings.count_all("further"), settings.count_all("test")
    gradient, texts = settings.back_propagated, max(len(settings.text), 1)
    profiled = course.profiles + course.count_texts(settings) - 1

    def text(split: str, windows: int) -> str:
        return f"{windows} windows of {settings.window} tokens of {split} text"

    def step(name: str, how: str, times: int, share: float, done: Mapping[str, float], passes: int = 1) -> Work:
        """`done` is how often each thing is done that has a price, `passes` as in `Work`."""
        operations = sum(often * flops.get(thing, 0.0) for thing, often in done.items())
        took = None if seconds is None else sum(often * seconds[thing] for thing, often in done.items())
        return Work(name=name, how=how, times=times, flops=operations, seconds=took, share=share, passes=passes)

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
    if course.weighs:
        steps += [
            step(
                WEIGH,
                f"two forwards and a backward of {text('calibration', calibration)}",
                1,
                shares.calibration,
                {"forward": calibration, "weigh": calibration},
                2,
            ),
            step(
                "weighted second moments",
                f"of what {layers} layers read, each for itself, in another forward",
                0 if setting_out else int(course.weighs_moments),
                shares.calibration,
                {"forward": calibration, "moments": calibration, "write moments": 1},
            ),
        ]
    held = {"write moments": float(texts), "read moments": float(texts)}  # of a block, until the next one
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
    for recipe, times in course.pruned:
        done = {f"prune {name_recipe(recipe)}": 1.0}
        how = f"{layers} layers by {_name(recipe.mask_label, recipe)}"
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
        if recipe.statistics == "stages":
            done |= {"forward": read, "stages": read}
            how += ", with a pass of every block for each of its stages and one more of the calibration text"
        # dense weights are read, too
        passes = {"dense": 1 + anew, "sequential": 3, "stages": STAGES + 3}[recipe.statistics]
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
    steps.append(
        step(
            "validate",
            f"forward of {text('validation', validation)}, the output head twice",
            len(course.rounds) + len(course.reweighted),
            shares.validation,
            {"forward": validation, "divergence": validation},
        )
    )
    if further:
        steps.append(
            step(
                "compare at the target, at most",
                f"forward of {text('validation', further)} beyond those, the output head twice; finalists too",
                len(course.rounds) + course.finalists,
                shares.validation,
                {"forward": further, "divergence": further},
            )
        )
    if settings.questions:
        steps.append(
            step(
                "ask questions",
                f"forward of {settings.question_pairs} questions of about {QUESTION_TOKENS} tokens with their answers",
                1 + len(course.rounds) + course.tests,
                shares.questions,
                {"forward": settings.question_pairs * QUESTION_TOKENS / settings.window},
                math.ceil(shares.questions * math.ceil(settings.question_pairs / ASKED_AT_ONCE)),
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
    if course.prompts:
        words = course.continuing * count_continued(streamed=streamed)
        how = f"{words} forwards of a token of each of {course.prompts} prompts"
        steps.append(step("go on with prompts", how, 1, 1.0, {"word": words}, words))
    return steps
