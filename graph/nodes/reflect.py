"""reflect: what the trial taught goes to the store; then on to the next round, or to the end."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.memory.experience import write_tried
from graph.memory.lessons import write_lesson
from graph.memory.notes import write_note
from graph.planning.budget import can_profile, find_lateness
from graph.planning.past import count_rounds
from graph.planning.verdict import decide_stop, find_early
from graph.reflecting.brief import add_note, choose_reflection, gather_evidence, take_note
from graph.reflecting.posterior import CARRIED, merge_lessons
from graph.reflecting.rule import combine_lessons, note_tried
from graph.reflecting.schema import Reflection
from graph.runs.replay import find_reflection, read_record
from graph.runs.session import enter
from graph.state import State


def reflect(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Compare the trial's prediction with its measurement, and decide whether the loop goes on.

    A trial without figures teaches nothing, and nobody is asked about it; of a cut there are notes, and no lessons,
    which are factors on KL curves of weights. Raises AgentError (resumable) when the reflector fails and there is no
    fallback.
    """
    session = enter("reflect", state, runtime)
    evidence = gather_evidence(state, session) if state.trials[-1].measured else None
    if evidence is None:
        reflection, usage = Reflection(), state.usage
    elif state.replay:
        reflection, usage = find_reflection(state.replay, state.iteration), state.usage
        session.record("reflection", iteration=state.iteration, details=reflection.model_dump())
    else:
        reflection, usage = choose_reflection(evidence, state.usage, session, runtime.context or state.config)
    lessons = combine_lessons(evidence, reflection) if evidence else []
    store = runtime.store if state.config.memory and not state.replay else None  # it was learnt there already
    for number, lesson in enumerate(lessons):
        if store is not None:
            write_lesson(store, state.config, lesson, number)
        session.emit("lesson", **lesson.model_dump())
    if store is not None and evidence:
        tried = note_tried(state.run, evidence.trial, evidence.before, state.config.pattern)
        if tried is not None:
            write_tried(store, state.config, tried)
    notes, note = state.notes, take_note(evidence, reflection) if evidence else None
    if note is not None:
        if store is not None:
            write_note(store, state.config, note)
        notes = add_note(notes, note)
        session.emit("note", text=f"strategy, by {count_rounds(note)}: {note.text}")
    stop = decide_stop(state) or find_lateness(state, session.seconds)
    said = " ".join(reflection.reason.split())
    reason = said or "no reason given"
    if reflection.stop and not stop:
        if early := find_early(state):
            session.emit("note", text=f"the reflector would stop, but {early}: {reason}")
        else:
            stop = f"at the target, the reflector stops: {reason}"
    if reflection.reprofile and not stop and state.trials[-1].verdict == "accept":
        session.emit("note", text=f"the reflector asks for a new profile: {reason}")
    if stop:
        session.emit("note", text=stop)
    return {
        "lessons": merge_lessons([*state.lessons, *lessons])[-CARRIED:],
        "notes": notes,
        "judged": state.judged | ({state.iteration: said} if said else {}),
        "reprofile": reflection.reprofile,
        "usage": usage,
        "stop": stop,
        "seconds": session.seconds,
    }


def after_reflect(state: State) -> Literal["plan", "profile", "finish"]:
    """Another round, with a new profile first where config, accepted plan or reflector ask for one, or the end.

    A profile that would leave no tokens for a trial is not made, and in a replay the one that the record has.
    """
    if state.stop:
        return "finish"
    if state.replay:
        return "profile" if state.iteration in read_record(state.replay).profiled else "plan"
    asked = state.config.reprofile or state.reprofile or (state.plan is not None and state.plan.reprofile)
    return "profile" if asked and state.trials[-1].verdict == "accept" and can_profile(state) else "plan"
