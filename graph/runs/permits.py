"""What a run may name where a server works on it, as Studio's does.

At the command line a person says what is read and who is asked. What speaks to a server is a page in a browser: it may
name models and data sets of the hub, packages, and files beneath the runs directory or the one that the server was
started in. Anything else, and every address, must have been named by a person before: in a file of configs/, in a
`BILLHOOK_…` variable of the server, or in the config.yaml of a run, which no page can write without having passed here.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from graph.checks import refuse_prompt_files
from graph.config import RunConfig
from graph.state import State
from tools.base.errors import UserError
from tools.base.named import is_hub_id, parse_hub
from tools.base.options import CONFIGS, read_environment, read_yaml
from tools.base.rundir import runs_directory
from tools.base.secrets import redact
from tools.base.words import one_line

AGENTS = ("planner", "reflector")
TEXTS = ("calibration", "validation", "test", "questions", "freebaseqa", "mmlu")
GUARDED = ("model", *TEXTS, *AGENTS, "workers")
"""Fields that name what is read, or who is asked."""

UNREAD = ("", "hub", "pydoc", "self")
"""Kinds of sources of which no file of this machine is read by its name, none among them."""


def check_permitted(state: State) -> None:
    """Refuse a state that names what a server may not read, run or ask. Raises UserError in one line."""
    config = state.config
    if config.trust_remote_code:
        raise UserError(
            "trust_remote_code is refused on a server: what runs code of a hub is started with python -m graph.run"
        )
    refuse_prompt_files(config)
    asked = _list_asked(config.model_dump(include={*GUARDED, "text"}))
    if unknown := [(field, value) for field, value in asked if _must_be_named(field, value)]:
        named = set(_list_named())
        for field, value in unknown:
            if _find_target(field, value) not in named:
                raise UserError(_explain(field, value))
    trials = [*([state.dense] if state.dense else []), *state.trials]
    for mark in (state.profile, state.order, state.current, state.accepted, *(trial.checkpoint for trial in trials)):
        if not re.fullmatch(r"\w*", mark):
            raise UserError(f"the state names {_quote(mark)}, which is the id of no file of a run")


def _must_be_named(field: str, value: str) -> bool:
    """Whether only a person may say this: it is an address, or lies elsewhere on this machine."""
    if field == "workers":
        return "://" in value
    if field in AGENTS:
        target = _find_target(field, value)
        return "://" in value or (_is_far if value.startswith("exchange:") else _is_far_model)(target)
    if field == "model":
        return _is_far_model(value)
    if value.startswith("hub:"):
        name = parse_hub(value).name  # a directory of that name would be read in the data set's place
        return os.path.exists(name) and _is_far(name)
    kind, _, place = value.partition(":")
    return kind not in UNREAD and _is_far(place)


def _find_target(field: str, value: str) -> str:
    """What the value of a field names: of an agent the address, or the model."""
    if field not in AGENTS:
        return value
    return value.partition("@" if "://" in value and value.startswith("openai:") else ":")[2]


def _is_far_model(source: str) -> bool:
    return not source.startswith("package:") and not is_hub_id(source) and _is_far(source)


def _is_far(path: str) -> bool:
    """Whether a path leads out of the runs directory and the present one."""
    try:
        place = Path(os.path.expanduser(path)).resolve()
    except (ValueError, OSError, RuntimeError):  # no path at all, or one that goes in circles
        return True
    return not any(place.is_relative_to(near.resolve()) for near in (runs_directory(), Path.cwd()))


def _list_named() -> Iterator[str]:
    """All that people have named: addresses, models and texts."""
    yield from _find_targets(RunConfig().model_dump())
    yield from _find_targets(read_environment(RunConfig))
    for file in (*CONFIGS.glob("*.yaml"), *runs_directory().glob("*/config.yaml")):
        with suppress(UserError, OSError):
            yield from _find_targets(read_yaml(file))


def _find_targets(values: Mapping[str, Any]) -> Iterator[str]:
    for field, value in _list_asked(values):
        if value:
            yield _find_target(field, value)


def _list_asked(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, what it names) of all guarded fields that are there, and of every named text."""
    texts = values.get("text")
    named = list(texts.values()) if isinstance(texts, dict) else []
    pairs = [*((field, values.get(field)) for field in GUARDED), *(("text", source) for source in named)]
    return [(field, value) for field, value in pairs if isinstance(value, str)]


def _explain(field: str, value: str) -> str:
    what = "an address that no config names" if "://" in value else "outside of the runs directory and the present one"
    return (
        f"{field} {_quote(value)} is refused on a server: it is {what}; name it in a file of configs/ or in "
        f"BILLHOOK_{field.upper()}, or start the run with python -m graph.run"
    )


def _quote(text: str) -> str:
    return repr(one_line(redact(text), 100))
