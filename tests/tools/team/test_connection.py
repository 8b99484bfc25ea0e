"""The way to Ray: what workers may be, and what is said where there is none."""

import builtins
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.fake_ray import make_connection
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.progress import Stopped, stop_at
from tools.team.connection import import_ray


def test_a_cluster_that_is_gone_leaves_the_run_to_go_on() -> None:
    made = make_connection()
    with pytest.raises(UserError) as caught, made.explained():
        raise made.ray.exceptions.RayError("head node\nis dead")
    assert str(caught.value) == (
        "the Ray cluster is gone (RayError: head node is dead); when it is there again, go on: a run with --resume, "
        "any other command as before"
    )


def test_who_waits_for_workers_hears_that_the_work_is_to_end() -> None:
    made, asked, waits = make_connection(), Event(), 0

    def wait(answers: list[str], **_: Any) -> tuple[list[str], list[str]]:
        nonlocal waits
        waits += 1
        if waits == 3:
            asked.set()
        return [], answers

    made.ray.wait = wait
    with stop_at(asked), pytest.raises(Stopped):
        made.wait(["an answer that never comes"])
    assert waits == 3


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"workers need Ray, which is not installed; try: pip install -e '.\[ray\]'"):
        import_ray()


@pytest.mark.parametrize("value", ["0", "-1", "many", "100", "ray://host", "http://host:1", " 2"])
def test_who_is_no_worker(tiny_llama: Path, value: str) -> None:
    with pytest.raises(ValueError, match="workers"):
        tiny_settings(tiny_llama, workers=value)


@pytest.mark.parametrize("value", ["", "auto", "1", "16", "ray://head.example:10001"])
def test_who_is(tiny_llama: Path, value: str) -> None:
    assert tiny_settings(tiny_llama, workers=value).workers == value
