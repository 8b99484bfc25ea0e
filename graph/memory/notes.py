"""A reflector's notes of strategy in the store: those of earlier runs on the same model, for the next ones."""

from langgraph.store.base import BaseStore

from graph.config import RunConfig
from graph.memory.lessons import NOTES, find_items, keep_latest
from graph.reflecting.schema import Note

KEPT = 12
"""Notes that are kept of one model, the latest."""

READ = 3
"""Notes of earlier runs that a new run starts with."""


def write_note(store: BaseStore, config: RunConfig, note: Note) -> None:
    """Keep a note; writing it again (after a crash) changes nothing, and older ones drop out."""
    keep_latest(store, NOTES, config.model, f"{note.run}/{note.iteration}", note.model_dump(), KEPT)


def read_notes(store: BaseStore, config: RunConfig, run: str) -> list[Note]:
    """The latest notes of earlier runs with the same pattern, of cuts for a run that cuts, oldest first."""
    notes = [Note.model_validate(item.value) for item in find_items(store, NOTES, config.model)]
    others = [note for note in notes if note.run != run and note.cuts == config.takes_parts]
    return [note for note in others if note.pattern == config.pattern][-READ:]
