"""Items of the store: what runs left of a model, in a room for each kind of thing.

Each lies under the run, the iteration and its number there: written again after a crash it lands in the same place, and
two runs never rewrite each other's.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from langgraph.store.base import BaseStore, SearchItem

from tools.base.errors import UserError, in_one_line

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
