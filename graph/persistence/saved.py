"""Whether what a task gave has been saved: LangGraph leaves that to a thread of its own, and goes on meanwhile.

A node that pays for its tasks waits here between two of them, so that a kill finds the first one saved.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

LOOK_SECONDS = 1.0
"""How often one that waits looks whether it is still to wait."""

_changed = threading.Condition()
_threads: set[str] = set()
"""Threads of checkpoints that a saver below has been asked for."""
_expected: dict[str, BaseException | None] = {}
"""Ids of tasks that somebody will wait for, and what went wrong when they were saved."""
_saved: set[str] = set()
"""Those that a saver is done with."""


class TellingSaver(BaseCheckpointSaver[str]):
    """A saver that tells when it has saved what a task gave, or could not."""

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        _threads.add(config["configurable"]["thread_id"])
        return super().get_tuple(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        _threads.add(config["configurable"]["thread_id"])
        return await super().aget_tuple(config)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        try:
            super().put_writes(config, writes, task_id, task_path)
        except BaseException as error:
            _tell(task_id, error)
            raise
        _tell(task_id)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        try:
            await super().aput_writes(config, writes, task_id, task_path)
        except BaseException as error:
            _tell(task_id, error)
            raise
        _tell(task_id)


def _tell(task: str, error: BaseException | None = None) -> None:
    with _changed:
        if task in _expected:
            _expected[task] = error
            _saved.add(task)
            _changed.notify_all()


def expect(thread: str | None, task: str) -> bool:
    """Say, before a task ends, that somebody will wait for it; whether one of these savers keeps its thread."""
    if thread not in _threads:
        return False
    with _changed:
        _expected[task] = None
        _saved.discard(task)
    return True


def wait_saved(task: str, check: Callable[[], None]) -> None:
    """Wait until an expected task is saved, and raise what kept it from being so; `check` may raise meanwhile."""
    with _changed:
        try:
            while not _changed.wait_for(lambda: task in _saved, LOOK_SECONDS):
                check()
            if error := _expected[task]:
                raise error
        finally:
            del _expected[task]
            _saved.discard(task)
