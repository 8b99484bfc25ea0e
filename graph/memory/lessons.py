"""Lessons in the LangGraph store: what one run taught, for the next ones.

Every observation is an item of its own (`graph.memory.lessons`). They become lessons, with counts and means, when they
are read (`graph.reflecting.posterior`). `python -m graph.memory` looks into them.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from langgraph.store.base import BaseStore, SearchItem

from graph.config import PRICES, RunConfig
from graph.reflecting.posterior import merge_lessons, name_subject, weigh_evidence
from graph.reflecting.schema import Lesson
from tools.base.errors import UserError, in_one_line
from tools.base.settings import TEAM, TaskSettings
from tools.texts.written import is_written

LESSONS = "lessons"
EXPERIENCE = "experience"
NOTES = "notes"
ROOMS = (LESSONS, EXPERIENCE, NOTES)

EXPORTED = "model"
"""The directory of a run that its model lies in."""

ALL = 100_000
"""More items than a namespace ever holds; the store's own limit is 10."""


def namespace(model: str, room: str = LESSONS) -> tuple[str, str]:
    """Where items of a target model lie; labels of the store may not hold a period."""
    return room, re.sub(r"[^A-Za-z0-9_-]+", "_", model)


def family(model: str) -> str:
    """The last part of a model's name up to its first digit: `smollm` of HuggingFaceTB/SmolLM2-135M; may be empty, as
    that of what a run exported is, for all of these are called model.

    Models of one family are relatives: what is known of them is told, and nothing is computed with it.
    """
    name = re.split(r"[/\\:]", model.rstrip("/\\"))[-1].lower()
    return "" if name == EXPORTED else re.split(r"\d", name)[0].strip("-_. ")


def is_relative(model: str, other: str) -> bool:
    """Whether two models are of one family, or the same."""
    return model == other or bool(family(model) and family(model) == family(other))


def keep_item(store: BaseStore, room: str, model: str, key: str, value: dict[str, Any]) -> None:
    """Write an item, which has its run and iteration."""
    store.put(namespace(model, room), key, value | {"model": model})


def keep_latest(store: BaseStore, room: str, model: str, key: str, value: dict[str, Any], most: int) -> None:
    """Write an item; of those of the model in this room the latest `most` stay."""
    keep_item(store, room, model, key, value)
    delete_items(store, find_items(store, room, model)[:-most])


def order_item(item: SearchItem) -> tuple[object, ...]:
    """By what items are sorted, oldest first."""
    return item.updated_at, item.value["run"], item.value["iteration"], item.key


def find_items(store: BaseStore, room: str, model: str) -> list[SearchItem]:
    """Every item of a room about a model, oldest first. Raises UserError where one is damaged."""
    found = _search(store, namespace(model, room))
    return sorted((item for item in found if item.value["model"] == model), key=order_item)


def find_models(store: BaseStore, *rooms: str) -> dict[str, list[SearchItem]]:
    """Every item of these rooms, oldest first, by model in the order of names. Raises UserError as `find_items`."""
    models: dict[str, list[SearchItem]] = defaultdict(list)
    for item in sorted((item for room in rooms for item in _search(store, (room,))), key=order_item):
        models[item.value["model"]].append(item)
    return dict(sorted(models.items()))


def delete_items(store: BaseStore, items: Iterable[SearchItem]) -> None:
    """Forget them for good."""
    for item in items:
        store.delete(item.namespace, item.key)


def runs_of(items: Iterable[SearchItem]) -> set[str]:
    """Names of the runs that they come from."""
    return {item.value["run"] for item in items}


def _search(store: BaseStore, place: tuple[str, ...]) -> list[SearchItem]:
    """Every item in a place. Raises UserError where one is not what was written."""
    try:
        items = store.search(place, limit=ALL)
        if all({"model", "run", "iteration"} <= item.value.keys() for item in items):
            return items
        problem = "an item is not of this version"
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # the store reads JSON, and times
        problem = in_one_line(error, 100)
    raise UserError(
        f"the agents' memory is damaged ({problem}); runs begin, and go on, without it with --no-memory; or put the "
        "state's database back as it was"
    )


LIMIT = 30
"""Lessons from earlier runs that a new run starts with, those of most evidence."""

KEPT = 60
"""Lessons that are kept of one model; beyond that, those of least evidence go."""

OBSERVATIONS = 20
"""Observations that are kept of one lesson, the latest."""

FOUND = 10
"""Lessons that a search finds at most."""

IDLE = (
    *(*TEAM, "device", "trust_remote_code", "memory"),
    *("test", "test_windows", *TaskSettings.model_fields),  # asked once, at the end
    *(
        "max_iterations",
        "patience",
        "max_evaluated_tokens",
        "max_seconds",
        "max_agent_tokens",
        "max_agent_cost",
        "approve",
    ),
    *("planner_calls", "planner_seconds", "agent_timeout", "agent_retries", "agent_answer_tokens", *PRICES),
)
"""Fields of the config that change no trial: where and how long the work is done, and how many rounds there are."""


def fingerprint(config: RunConfig) -> str:
    """A hash of all that determines what a run's trials come to: runs that share it are repeats of one another.

    Of a run with a goal it is the goal, and not what was made of it: as the run began and once it follows its brief.
    """
    if config.goal:
        read = {name: source for name, source in config.text.items() if not is_written(source)}
        config = config.model_copy(update={"text": read, "text_weights": {}, "text_bounds": {}})
        return _hash(config, *IDLE, "min_fact_retention")
    return _hash(config, *IDLE)


def _hash(config: RunConfig, *left_out: str) -> str:
    values = config.model_dump(exclude=set(left_out))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_lesson(store: BaseStore, config: RunConfig, lesson: Lesson, number: int = 0) -> None:
    """Keep a lesson, the `number`th of its iteration; writing it again (after a crash) changes nothing.

    Mere words are not kept. What no longer fits into memory is deleted.
    """
    if not lesson.confidence:
        return
    value = lesson.model_dump(exclude={"same_config"}) | {"config": fingerprint(config)}
    keep_item(store, LESSONS, config.model, f"{lesson.run}/{lesson.iteration}/{number}", value)
    _trim(store, config.model)


def read_lessons(store: BaseStore, config: RunConfig, run: str) -> tuple[list[Lesson], int]:
    """The lessons of earlier runs on the same model, oldest first, and the number of runs that taught them.

    One from a run of the same trials is marked: it is shown, but a rule that computes with lessons must leave it out,
    so that the same config gives the same masks however often it is run. Where they are too many, those that were
    learnt on this text and pattern go first.
    """
    items = [item for item in find_items(store, LESSONS, config.model) if item.value["run"] != run]

    def rank(group: tuple[Lesson, list[SearchItem]]) -> tuple[bool, float]:
        return not group[0].knows(config.calibration_text, config.pattern), -weigh_evidence(group[0])

    groups = sorted(group_items(items, fingerprint(config)), key=rank)[:LIMIT]
    groups.sort(key=lambda group: order_item(group[1][-1]))
    return [lesson for lesson, _ in groups], len(runs_of(item for _, seen in groups for item in seen))


def search_lessons(store: BaseStore, config: RunConfig, query: str) -> list[Lesson]:
    """Lessons of this model and its family that share words with the query, most words first, then most evidence.

    All of them where the query has no words; none where the config does without memory. Lessons about another model
    name it.
    """
    if not config.memory:
        return []
    wanted, found = _words(query), []
    for model, items in find_models(store, LESSONS).items():
        if not is_relative(model, config.model):
            continue
        for lesson, _ in group_items(items, fingerprint(config)):
            lesson = lesson if model == config.model else lesson.model_copy(update={"model": model})
            shared = len(wanted & _words(f"{lesson.selector} {lesson.recipe} {lesson.text} {lesson.model}"))
            if shared or not wanted:
                found.append((-shared, -weigh_evidence(lesson), lesson))
    return [lesson for *_, lesson in sorted(found, key=lambda x: x[:2])[:FOUND]]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


# Items as lessons


def group_items(items: Iterable[SearchItem], mine: str = "") -> list[tuple[Lesson, list[SearchItem]]]:
    """The lessons that items make, each with its items; lessons that were contradicted too often are left out.

    `mine` is the fingerprint of the config whose own lessons are marked.
    """
    return [(lesson, seen) for lesson, seen in _merge_items(items, mine) if lesson]


def _merge_items(items: Iterable[SearchItem], mine: str = "") -> list[tuple[Lesson | None, list[SearchItem]]]:
    """Items about the same, and the lesson that they make; None where it was contradicted too often."""
    groups: dict[tuple[object, ...], list[tuple[Lesson, SearchItem]]] = defaultdict(list)
    for item in items:
        lesson = Lesson.model_validate(item.value | {"model": "", "same_config": item.value["config"] == mine})
        groups[name_subject(lesson)].append((lesson, item))
    return [
        (next(iter(merge_lessons(lesson for lesson, _ in group)), None), [item for _, item in group])
        for group in groups.values()
    ]


def _trim(store: BaseStore, model: str) -> None:
    """Delete what is beyond `KEPT` lessons, or beyond `OBSERVATIONS` of one.

    Observations that contradict each other stay until then: without them the next one would count as undisputed.
    """
    items = find_items(store, LESSONS, model)
    groups = _merge_items(items)
    groups.sort(key=lambda group: (weigh_evidence(group[0]) if group[0] else 0.0, order_item(group[1][-1])))
    kept = {item.key for _, seen in groups[-KEPT:] for item in seen[-OBSERVATIONS:]}
    delete_items(store, (item for item in items if item.key not in kept))
