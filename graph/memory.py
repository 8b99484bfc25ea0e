"""Lessons in the LangGraph store: what one iteration or run taught, for the next ones."""

import hashlib
import json
import re

from langgraph.store.base import BaseStore

from graph.config import RunConfig
from graph.state import Lesson

LIMIT = 30
"""Lessons from earlier runs that a new run starts with."""


def namespace(model: str) -> tuple[str, str]:
    """Where the lessons of a target model lie; labels of the store may not hold a period."""
    return "lessons", re.sub(r"[^A-Za-z0-9_-]+", "_", model)


def fingerprint(config: RunConfig) -> str:
    """A hash of everything that decides a run's masks."""
    return hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode()).hexdigest()[:16]


def write_lesson(store: BaseStore, config: RunConfig, lesson: Lesson) -> None:
    """Keep a lesson; writing it again (after a crash) changes nothing."""
    value = lesson.model_dump(exclude={"same_config"}) | {"config": fingerprint(config)}
    store.put(namespace(config.model), f"{lesson.run}-{lesson.iteration}", value)


def read_lessons(store: BaseStore, config: RunConfig, run: str) -> list[Lesson]:
    """Lessons of earlier runs on the same model, newest first.

    One from a run with this very config is marked: it is shown, but a rule that computes with lessons must leave it
    out, so that the same config gives the same masks however often it is run.
    """
    items = store.search(namespace(config.model), limit=1000)
    items = sorted((i for i in items if i.value["run"] != run), key=lambda i: i.updated_at, reverse=True)
    mine = fingerprint(config)
    return [
        Lesson.model_validate(
            {k: v for k, v in item.value.items() if k != "config"} | {"same_config": item.value["config"] == mine}
        )
        for item in items[:LIMIT]
    ]
