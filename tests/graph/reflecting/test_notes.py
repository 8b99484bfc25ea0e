"""Notes of strategy: held to their evidence, kept the latest ones, whatever a model makes of them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.store.memory import InMemoryStore
from pydantic import ValidationError

from graph.config import RunConfig
from graph.llm.models import open_model
from graph.memory import notes as memory
from graph.memory.lessons import NOTES, namespace
from graph.memory.notes import read_notes, write_note
from graph.reflecting.brief import add_note, check_evidence, reflect_with_chat, reflector_messages, take_note
from graph.reflecting.schema import MAX_NOTES, Note, Reflection
from tests.evidence import make_evidence
from tests.openai_server import OpenAIServer

CONFIG = RunConfig(model="Qwen/Qwen3-4B")


def write(run: str, iteration: int = 1, text: str = "Clip less.", pattern: str = "") -> Note:
    return Note(run=run, iteration=iteration, sparsity=0.45, pattern=pattern, text=text, trials=[iteration])


def test_a_note_without_measured_evidence_is_handed_back_in_one_line() -> None:
    wrong, right = (
        {"lessons": [], "note": {"text": "Clip\nless.", "trials": trials}} for trials in ([1, 7], [2, 1, 2])
    )
    problems: list[str] = []
    evidence = make_evidence()
    with OpenAIServer([wrong, right]) as server:
        model = open_model(server.planner("model"), RunConfig(agent_retries=0))
        reflection = reflect_with_chat(evidence, model, lambda call: problems.append(call.problem))
    assert problems == ["note.trials: round 7 of this run measured nothing; its measured rounds: 1, 2", ""]
    note = take_note(evidence, reflection)
    assert note == Note(run="run", iteration=2, sparsity=0.45, pattern="", text="Clip less.", trials=[1, 2])
    told = reflector_messages(make_evidence(notes=[note]))[1].text
    assert "<data notes>\nrun run at 45%, by rounds 1, 2: Clip less.\n</data>" in told


def test_a_trial_that_broke_is_no_evidence() -> None:
    broken = make_evidence().trials[0].model_copy(update={"broken": True, "verdict": "rollback"})
    reflection = Reflection.model_validate({"note": {"text": "x", "trials": [1]}})
    assert reflection.note is not None
    with pytest.raises(
        ValueError, match=r"^note.trials: round 1 of this run measured nothing; its measured rounds: 2$"
    ):
        check_evidence(reflection.note, make_evidence(trials=[broken]))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "trials", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROUNDS = st.lists(st.integers(-1, 4) | st.just(10**30) | JUNK, max_size=10)


@settings(max_examples=300, deadline=None)
@given(JUNK | st.fixed_dictionaries({"text": st.text(max_size=400) | JUNK, "trials": ROUNDS | JUNK}))
def test_whatever_a_model_says_is_a_short_note_of_measured_rounds_or_none(said: Any) -> None:
    evidence = make_evidence()
    try:
        reflection = Reflection.model_validate({"lessons": [], "note": said})
    except ValidationError:
        return
    if reflection.note is not None and not set(reflection.note.trials) <= {1, 2}:
        with pytest.raises(ValueError, match=r"^note\.trials: round -?\d+ of this run .*: 1, 2$"):
            check_evidence(reflection.note, evidence)
        return
    note = take_note(evidence, reflection)
    assert (note is None) == (said is None)
    if note is not None:
        assert len(note.text) <= 300 and "\n" not in note.text
        assert set(note.trials) <= {1, 2}


def test_reflections_without_a_note_are_recorded_as_ever() -> None:
    assert "note" not in Reflection().model_dump()
    assert take_note(make_evidence(), Reflection()) is None


def test_old_notes_drop_out_and_what_is_said_again_is_kept_once() -> None:
    notes: list[Note] = []
    for iteration in range(1, MAX_NOTES + 3):
        notes = add_note(notes, write("r", iteration, f"note {iteration}"))
    assert [note.iteration for note in notes] == [*range(3, MAX_NOTES + 3)]
    again = add_note(notes, write("r", 9, "note 4"))
    assert [note.iteration for note in again] == [3, 5, 6, 7, 8, 9]


def test_the_latest_notes_of_earlier_runs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = InMemoryStore()
    monkeypatch.setattr(memory, "KEPT", 5)
    for run in "abcde":
        for _ in range(2):  # after a crash
            write_note(store, CONFIG, write(run))
    write_note(store, RunConfig(model="gpt2"), write("other"))
    assert [note.run for note in read_notes(store, CONFIG, "e")] == ["b", "c", "d"]
    write_note(store, CONFIG, write("f", pattern="2:4"))
    assert [note.run for note in read_notes(store, CONFIG, "new")] == ["c", "d", "e"]
    assert [note.run for note in read_notes(store, CONFIG.model_copy(update={"pattern": "2:4"}), "new")] == ["f"]
    assert len(store.search(namespace(CONFIG.model, NOTES), limit=100)) == 5


def test_notes_of_cuts_are_for_runs_that_cut() -> None:
    store = InMemoryStore()
    cutting = CONFIG.model_copy(update={"target_size": 0.8})
    of_zeros, of_cuts = write("one"), write("two").model_copy(update={"cuts": True})
    write_note(store, CONFIG, of_zeros)
    write_note(store, cutting, of_cuts)
    assert read_notes(store, CONFIG, "new") == [of_zeros]
    assert read_notes(store, cutting, "new") == [of_cuts]
    assert "cuts" not in of_zeros.model_dump(), "as earlier versions wrote it"
