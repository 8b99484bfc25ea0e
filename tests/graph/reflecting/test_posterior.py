"""Lessons as figures: what several say together, and the factors that come of it."""

import math

import numpy as np
import pytest

from graph.reflecting.posterior import (
    FORGET,
    LEAST,
    PRIOR,
    TRANSFER,
    merge_lessons,
    tidy_selector,
    weigh_evidence,
    weigh_layers,
)
from graph.reflecting.schema import MOST, Lesson
from tests.evidence import find_multipliers
from tests.situations import make_layers, make_lesson
from tools.base.errors import ImpossiblePlan
from tools.plans.recipe import Recipe

LAYERS = make_layers()
GROUP, OTHER = "blocks 4-5 · mlp.down_proj", "blocks 0-1 · mlp.down_proj"
REFIT = Recipe(method="refit", curves="mask")


def multiply(*lessons: Lesson, recipe: Recipe = REFIT) -> dict[str, float]:
    return find_multipliers(lessons, LAYERS, recipe, 0.45, "pydoc")


def shrink(factor: float, evidence: float) -> float:
    return round(math.exp(math.log(factor) * evidence / (evidence + PRIOR)), 3)


# Merging


def test_lessons_about_the_same_become_one_with_their_evidence() -> None:
    first = make_lesson(GROUP, 2.0, confidence=0.5)
    last = make_lesson(GROUP, 1.2, confidence=1.0).model_copy(update={"run": "later", "text": "newest"})
    (lesson,) = merge_lessons([first, last])
    mean = math.exp((0.5 * math.log(2) + math.log(1.2)) / 1.5)
    assert lesson.factor == pytest.approx(mean, abs=1e-4)
    assert (lesson.count, lesson.confidence, weigh_evidence(lesson)) == (2, 0.75, 1.5)
    assert (lesson.run, lesson.text) == ("later", "newest")


def test_merging_step_by_step_comes_to_the_same() -> None:
    lessons = [make_lesson(GROUP, factor) for factor in (1.5, 1.2, 1.9)]
    at_once = merge_lessons(lessons)
    by_steps = merge_lessons([*merge_lessons(lessons[:2]), lessons[2]])
    assert at_once == by_steps


@pytest.mark.parametrize(
    "change",
    [
        *({"selector": OTHER}, {"recipe": "wanda"}, {"curves": "method"}, {"same_config": True}, {"confidence": 0}),
        *({"calibration": "pydoc"}, {"pattern": "2:4"}, {"sparsity": 0.45}),
    ],
)
def test_lessons_about_something_else_stay_apart(change: dict[str, object]) -> None:
    lesson = make_lesson(GROUP, 2.0)
    assert len(merge_lessons([lesson, lesson.model_copy(update=change)])) == 2


def test_a_contradicted_lesson_loses_half_of_its_confidence_and_is_dropped_in_the_end() -> None:
    confidences = []
    seen = []
    for i in range(12):
        seen.append(make_lesson(GROUP, 2.0 if i % 2 == 0 else 0.5))
        merged = merge_lessons(seen)
        if not merged:
            break
        confidences.append(merged[0].confidence)
    assert confidences[:4] == [1.0, 0.5, pytest.approx(2 / 3, abs=1e-4), pytest.approx(0.375, abs=1e-4)]
    assert min(confidences) >= FORGET and len(confidences) == 7


@pytest.mark.parametrize("weak", [1.0, 1 / LEAST + 1e-3])
def test_what_is_inside_the_noise_contradicts_nothing(weak: float) -> None:
    (lesson,) = merge_lessons([make_lesson(GROUP, 2.0), make_lesson(GROUP, weak)])
    assert lesson.confidence == 1.0


def test_calibrations_of_the_whole_model_do_not_contradict_each_other() -> None:
    (lesson,) = merge_lessons([make_lesson("*", 2.0), make_lesson("*", 0.5)])
    assert (lesson.factor, lesson.confidence, lesson.count) == (1.0, 1.0, 2)


def test_mere_words_are_replaced_by_newer_ones() -> None:
    words = [make_lesson(GROUP, 1.0, confidence=0).model_copy(update={"text": text}) for text in ("old", "new")]
    (lesson,) = merge_lessons(words)
    assert (lesson.text, lesson.count) == ("new", 1)


# Multipliers


def test_a_multiplier_is_shrunk_by_how_little_evidence_there_is() -> None:
    assert multiply(make_lesson(GROUP, 2.0)) == {GROUP: shrink(2.0, 1.0)}
    assert multiply(*[make_lesson(GROUP, 2.0)] * 3) == {GROUP: shrink(2.0, 3.0)}
    assert multiply(make_lesson(GROUP, 2.0, confidence=0.5)) == {GROUP: shrink(2.0, 0.5)}


def test_lessons_of_another_recipe_or_other_curves_count_less() -> None:
    assert multiply(make_lesson(GROUP, 2.0, recipe="two-sided")) == {GROUP: shrink(2.0, TRANSFER)}
    own = REFIT.model_copy(update={"curves": "method"})
    assert multiply(make_lesson(GROUP, 2.0), recipe=own) == {GROUP: shrink(2.0, TRANSFER)}
    about_own = make_lesson(GROUP, 2.0).model_copy(update={"curves": "method"})
    assert multiply(about_own, recipe=own) == {GROUP: shrink(2.0, 1.0)}


@pytest.mark.parametrize(
    "lesson",
    [
        make_lesson(GROUP, 2.0, same=True),
        make_lesson(GROUP, 2.0, confidence=0.0),
        make_lesson(GROUP, 1.0),
        make_lesson(GROUP, LEAST),
        make_lesson("*", 2.0),
        make_lesson("*_proj", 2.0),
        make_lesson("lm_head", 2.0),
        make_lesson("blocks 7 · ]", 2.0),
    ],
    ids=["same config", "words", "no factor", "hardly a factor", "whole", "all layers", "no layer", "no selector"],
)
def test_what_lessons_leave_alone(lesson: Lesson) -> None:
    assert multiply(lesson) == {}


HERE = {"calibration": "pydoc", "pattern": "", "sparsity": 0.45}


@pytest.mark.parametrize(
    ("change", "weighs"),
    [
        *(({}, True), ({"sparsity": 0.65}, True), ({"sparsity": 0.2499}, True), ({"sparsity": 0.66}, False)),
        *(({"calibration": "file:/other.txt"}, False), ({"pattern": "2:4"}, False)),
        (dict.fromkeys(HERE), True),
    ],
    ids=["alike", "above", "below", "far", "another text", "another pattern", "of an earlier version"],
)
def test_a_lesson_weighs_where_it_was_learnt(change: dict[str, object], weighs: bool) -> None:
    lesson = make_lesson(GROUP, 2.0).model_copy(update=HERE | change)
    assert multiply(lesson) == ({GROUP: shrink(2.0, 1.0)} if weighs else {})


def test_observations_at_nearly_the_same_sparsity_are_one_lesson() -> None:
    seen = [make_lesson(GROUP, 2.0).model_copy(update=HERE | {"sparsity": s}) for s in (0.4499, 0.4501, 0.46)]
    assert [lesson.count for lesson in merge_lessons(seen)] == [2, 1]


def test_a_contradiction_takes_the_multiplier_back() -> None:
    assert multiply(make_lesson(GROUP, 2.0), make_lesson(GROUP, 0.5)) == {}


def test_multipliers_are_bounded_whatever_a_lesson_says() -> None:
    wild = [make_lesson(GROUP, 1e6).model_copy(update={"count": 50}), make_lesson(OTHER, 1e-6)]
    assert multiply(*wild) == {GROUP: MOST, OTHER: 1 / MOST}


def test_of_two_selectors_the_narrower_counts() -> None:
    weighed = weigh_layers(LAYERS, {GROUP: 1.5, "mlp.down_proj": 0.8, "blocks 5 · mlp.down_proj": 1.2})
    factors = {
        layer.name: weighed[i].kappa[0] / layer.kappa[0] for i, layer in enumerate(LAYERS) if layer.kind != "q_proj"
    }
    down = [factors[f"model.layers.{block}.mlp.down_proj"] for block in range(6)]
    assert down == pytest.approx([0.8, 0.8, 0.8, 0.8, 1.5, 1.2])
    assert [f for name, f in factors.items() if "v_proj" in name] == [1.0] * 6
    assert np.array(weighed[0].kappa) == pytest.approx(np.array(LAYERS[0].kappa))
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        weigh_layers(LAYERS, {"lm_head": 1.5})


# Selectors


@pytest.mark.parametrize(
    ("selector", "tidy"),
    [
        ("*.v_proj", "self_attn.v_proj"),
        ("v_proj", "self_attn.v_proj"),
        ("blocks 0-5 · *.v_proj", "self_attn.v_proj"),
        ("blocks  0-1 ·  *down*", OTHER),
        ("block 3 · mlp.*", "blocks 3-3 · mlp.down_proj"),
        ("model.layers.3.mlp.down_proj", "blocks 3-3 · mlp.down_proj"),
        ("blocks 1-2", "blocks 1-2"),
        ("blocks 0,1,2,3,4,5", "*"),
        ("*_proj", "*"),
        ("blocks 0,5  ·  *.v_proj", "blocks 0,5 · *.v_proj"),
        ("*[qv]_proj", "*[qv]_proj"),
    ],
)
def test_the_same_layers_have_one_name(selector: str, tidy: str) -> None:
    assert tidy_selector(selector, LAYERS) == tidy


def test_a_selector_without_layers_is_refused() -> None:
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        tidy_selector("lm_head", LAYERS)
