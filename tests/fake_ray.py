"""What stands for Ray where nothing is begun: values are their own references, and answers are calls."""

from types import SimpleNamespace
from typing import Any

import pytest

import tools.team.frozen
from tools.team.connection import Connection


class RayActorError(Exception):
    """As Ray's."""


def make_connection() -> Connection:
    """A connection to it."""
    errors = SimpleNamespace(
        RayActorError=RayActorError,
        RayTaskError=type("RayTaskError", (Exception,), {}),
        RayError=type("RayError", (Exception,), {}),
    )
    ray = SimpleNamespace(
        exceptions=errors,
        put=lambda value: value,
        get=lambda answer, **_: answer(),
        wait=lambda answers, num_returns, **_: (answers[-num_returns:], answers[:-num_returns]),
    )
    return Connection(ray)


def read_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a kept value is its own reference."""
    monkeypatch.setattr(tools.team.frozen, "import_ray", lambda: SimpleNamespace(get=_give))


def _give(value: Any) -> Any:
    return value
