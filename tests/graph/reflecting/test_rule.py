"""What a trial teaches, in figures, and what a reflector's model may add."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from graph.planning.orders import group_kl
from graph.planning.rule import MASKS
from graph.reflecting.rule import WORD, Evidence, combine_lessons, draw_lesson
from graph.reflecting.schema import MOST, Lesson, Reflection
from tests.evidence import EVEN, GROUP, LAYERS, find_multipliers, learnt, make_evidence, tilt
from tests.situations import make_lesson, make_trial
from tools.plans.recipe import Recipe


def test_a_climb_teaches_how_far_the_curves_are_off() -> None:
    trial = make_trial(1, "accept", 0.3, Recipe())
    lesson = draw_lesson("run", LAYERS, trial, EVEN, None, dict.fromkeys(EVEN, 0.0))
    assert lesson is not None
    assert (lesson.selector, lesson.factor, lesson.recipe, lesson.curves) == ("*", 2.0, "refit", "mask")
    assert lesson.confidence == pytest.approx(1 / (1 + 0.1**2), abs=1e-4), "KL 0.1 ± 0.01"
    assert "2.00 times the 0.0500 of the profile" in lesson.text


@pytest.mark.parametrize(("amount", "surprise", "above"), [(0.1, 0.05, True), (0.1, -0.05, False), (-0.1, 0.05, False)])
def test_a_surprise_goes_to_the_group_that_all_but_moved_alone(amount: float, surprise: float, above: bool) -> None:
    before = make_trial(1, "accept", 0.45, Recipe())
    after = tilt(amount)
    scale = before.kl / group_kl(LAYERS, EVEN)  # type: ignore[operator]
    expected = before.kl + scale * (group_kl(LAYERS, after) - group_kl(LAYERS, EVEN))  # type: ignore[operator]
    trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": expected + surprise})
    lesson = draw_lesson("run", LAYERS, trial, after, before, EVEN)
    assert lesson is not None
    assert lesson.selector == GROUP
    assert (lesson.factor > 1) is above
    assert 1 / MOST <= lesson.factor <= MOST
    assert lesson.predicted == pytest.approx(expected - before.kl)  # type: ignore[operator]
    assert sum(lesson.moved.values()) == pytest.approx(lesson.predicted, rel=1e-2) and len(lesson.moved) == 9
    exact = trial.model_copy(update={"kl": expected})
    unsurprised = draw_lesson("run", LAYERS, exact, after, before, EVEN)
    assert unsurprised is not None
    assert unsurprised.factor == pytest.approx(1, abs=1e-3)


def test_a_surprise_inside_the_noise_teaches_nothing() -> None:
    before, after = make_trial(1, "accept", 0.45, Recipe()), tilt(0.1)
    for error, factor in ((1.0, 1.0), (1e-6, MOST)):
        trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": 0.5, "change_error": error})
        lesson = draw_lesson("run", LAYERS, trial, after, before, EVEN)
        assert lesson is not None
        assert lesson.factor == factor
        assert ("within the noise" in lesson.text) is (factor == 1.0)
        assert lesson.error == error
        assert lesson.confidence == pytest.approx(1 / (1 + (error / lesson.moved[GROUP]) ** 2), abs=1e-3)


def test_a_trial_in_which_all_groups_moved_blames_none() -> None:
    before = make_trial(1, "accept", 0.45, Recipe())
    after = {name: s + (0.05 if "q_proj" in name or "down" in name else -0.1) for name, s in EVEN.items()}
    trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": 0.5, "change_error": 1e-3})
    lesson = draw_lesson("run", LAYERS, trial, after, before, EVEN)
    assert lesson is not None
    assert (lesson.selector, lesson.factor, len(lesson.moved)) == ("*", 1.0, 9)
    assert lesson.text.startswith("Moving 9 groups at once changed KL by +0.4000 where ")
    assert lesson.text.endswith(" was predicted: none of them is to blame alone.")
    assert find_multipliers([lesson], LAYERS, Recipe(curves="mask"), 0.45, "pydoc") == {}


def test_the_same_weights_again_teach_nothing() -> None:
    before = make_trial(1, "accept", 0.45, Recipe())
    assert draw_lesson("run", LAYERS, make_trial(2, "rollback", 0.45, Recipe()), EVEN, before, EVEN) is None


def test_a_veto_takes_the_trial_out_of_all_allocations() -> None:
    kept, vetoed = (
        combine_lessons(make_evidence(), Reflection(veto=veto, reason="q_proj moved,\ntoo")) for veto in (False, True)
    )
    assert list(multiply(kept)) == [GROUP] and multiply(vetoed) == {}
    assert (vetoed[0].factor, vetoed[0].confidence, vetoed[0].moved) == (1.0, 0.0, {})
    assert vetoed[0].text == f"{kept[0].text} The reflector vetoes this: q_proj moved, too"
    assert "veto" not in Reflection().model_dump()


def test_what_a_reflector_says_beside_its_veto_counts_on_the_same_layers() -> None:
    said = Reflection(veto=True, reason="q_proj moved, too", lessons=[learnt(selector=GROUP, direction="dearer")])
    measured, own = combine_lessons(make_evidence(), said)
    assert (measured.selector, measured.confidence) == (own.selector, 0.0) and own.confidence > 0 and own.factor > 1
    assert list(multiply([measured, own])) == [GROUP] and "The reflector (" not in measured.text


def multiply(lessons: list[Lesson]) -> dict[str, float]:
    return find_multipliers(lessons, LAYERS, Recipe(curves="mask"), 0.45, "pydoc")


def test_a_change_of_method_is_about_the_whole_model() -> None:
    before = make_trial(1, "accept", 0.45, MASKS)
    lesson = draw_lesson("run", LAYERS, make_trial(2, "accept", 0.45, Recipe()), EVEN, before, EVEN)
    assert lesson is not None
    assert lesson.selector == "*"


def test_nothing_is_learnt_from_a_loss_that_is_not_finite() -> None:
    trial = make_trial(1, "rollback", 0.3, Recipe()).model_copy(update={"kl": None})
    assert draw_lesson("run", LAYERS, trial, EVEN, None, EVEN) is None


def combine(evidence: Evidence, *lessons: dict[str, Any]) -> list[Lesson]:
    return combine_lessons(evidence, Reflection.model_validate({"lessons": lessons}))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (learnt("*.v_proj", MOST * 1.01), "less than or equal to 2"),
        (learnt("*.v_proj", 0.49), "greater than or equal to 0.5"),
        (learnt("*.v_proj", confidence=1.1), "less than or equal to 1"),
        (learnt("*.v_proj", evidence=""), "at least 1 character"),
        (learnt("*.v_proj", protect=True), "Extra inputs are not permitted"),
    ],
)
def test_an_answer_is_held_to_its_bounds(answer: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Reflection.model_validate({"lessons": [answer]})


def test_the_measured_lesson_stands_and_the_models_are_added_with_their_confidence() -> None:
    measured, own, cheap = combine(
        make_evidence(), learnt("blocks 0-5 · *v_proj", confidence=0.3), learnt("blocks 0-1", 0.8, confidence=0.9)
    )
    assert (measured.selector, measured.factor, measured.source) == (GROUP, MOST, "measured")
    assert (own.selector, own.factor, own.confidence, own.source) == ("self_attn.v_proj", 1.5, 0.3, "reflector")
    assert own.text == (
        "The reflector finds self_attn.v_proj dearer: KL rose more than predicted. (count it 1.50 times)"
    )
    assert (cheap.factor, cheap.confidence) == (0.8, WORD), "a word is never as good as a measurement"
    multipliers = find_multipliers([measured, own, cheap], LAYERS, Recipe(), 0.45, "pydoc")
    assert multipliers[GROUP] > multipliers["self_attn.v_proj"] > 1 > multipliers["blocks 0-1"]


def test_every_lesson_says_where_it_was_learnt() -> None:
    evidence = make_evidence()
    asked = evidence.config.model_copy(update={"questions": "hub:qa:train", "calibration_mix": 0.25})
    for config, text in ((evidence.config, "pydoc"), (asked, "pydoc with 25% hub:qa:train")):
        for lesson in combine(replace(evidence, config=config), learnt("blocks 0-1", 0.8)):
            assert (lesson.calibration, lesson.pattern) == (text, "")
            assert lesson.sparsity == evidence.trial.sparsity
    assert lesson.ground == "at 45.0% on pydoc with 25% hub:qa:train"
    assert lesson.model_copy(update={"sparsity": 0.5, "pattern": "2:4"}).ground.startswith("at 50.0% as 2:4 on pydoc")
    assert make_lesson("*", 1.0).ground == ""


def test_about_layers_that_were_measured_a_model_only_adds_words() -> None:
    measured, own = combine(
        make_evidence(), learnt("model.layers.[45].mlp.down_proj", 0.5), learnt("*.v_proj"), learnt("v_proj", 2.0)
    )
    assert (measured.factor, measured.confidence) == (MOST, make_evidence().measured.confidence)  # type: ignore[union-attr]
    assert measured.text.endswith(" The reflector (cheaper): KL rose more than predicted.")
    assert (own.selector, own.factor) == ("self_attn.v_proj", 1.5), "of two the first counts"


@pytest.mark.parametrize(
    "evidence",
    [
        make_evidence(error=1.0),
        make_evidence(measured=None, trial=make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": None})),
    ],
    ids=["noise", "not finite"],
)
def test_without_a_surprise_a_model_only_adds_words(evidence: Evidence) -> None:
    own = combine(evidence, learnt("*.v_proj", 2.0, 1.0))[-1]
    assert (own.factor, own.confidence) == (1.0, 0.0)
    assert own.text.endswith("(words only, as the trial held no surprise beyond the noise)")
    assert find_multipliers([own], LAYERS, Recipe(), 0.45, "pydoc") == {}


def test_what_a_model_says_of_the_whole_is_words() -> None:
    own = combine(make_evidence(), learnt("*", 2.0, 1.0))[-1]
    assert (own.selector, own.factor, own.confidence) == ("*", 1.0, 0.0)
