"""Notes of strategy: what a reflector's model has to say to planners, with the rounds that bear it out."""

from collections.abc import Sequence

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


def add_note(notes: Sequence[Note], new: Note) -> list[Note]:
    """The latest notes, oldest first; one that says the same again takes its last place."""
    return [*(note for note in notes if note.text != new.text), new][-MAX_NOTES:]
