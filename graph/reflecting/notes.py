"""Notes of strategy: what a reflector's model has to say to planners, with the rounds that bear it out."""

from collections.abc import Mapping, Sequence

from graph.reflecting.rule import Evidence
from graph.reflecting.schema import MAX_NOTES, Advice, Note, Reflection


def check_evidence(advice: Advice, evidence: Evidence) -> None:
    """Raises ValueError in one line where a note names a round that measured nothing, or that never was."""
    measured = [trial.iteration for trial in (*evidence.trials, evidence.trial) if trial.measured]
    if unknown := [number for number in advice.trials if number not in measured]:
        rounds = ", ".join(map(str, measured))
        raise ValueError(f"note.trials: round {unknown[0]} of this run measured nothing; its measured rounds: {rounds}")


def take_note(evidence: Evidence, reflection: Reflection) -> Note | None:
    """The reflector's note as the run keeps it; None without one."""
    if reflection.note is None:
        return None
    return Note(
        run=evidence.run,
        iteration=evidence.trial.iteration,
        sparsity=evidence.trial.sparsity,
        pattern=evidence.config.pattern,
        cuts=evidence.config.takes_parts,
        text=" ".join(reflection.note.text.split()),
        trials=sorted(set(reflection.note.trials)),
    )


MOST_JUDGED = 12
"""Rounds of which is kept what the reflector said: as many as planners are shown."""


def add_judgement(judged: Mapping[int, str], iteration: int, reflection: Reflection) -> dict[int, str]:
    """What the reflector said of the latest rounds, by their numbers, with its reason for this one, if it gave any."""
    reason = " ".join(reflection.reason.split())
    known = {**judged, **({iteration: reason} if reason else {})}
    return {number: known[number] for number in sorted(known)[-MOST_JUDGED:]}


def add_note(notes: Sequence[Note], new: Note) -> list[Note]:
    """The latest notes, oldest first; one that says the same again takes its last place."""
    return [*(note for note in notes if note.text != new.text), new][-MAX_NOTES:]
