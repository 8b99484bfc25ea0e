"""Work inside a node that is done once, whatever becomes of the process: a task of LangGraph's.

A node that holds a conversation with a chat model pays for every reply and waits for every tool. Each of these is a
task: what it gave is saved before the next one begins, and a node that runs again after a kill is handed what its
finished tasks gave. So such a node must come to the same tasks in the same order, whenever it runs: by its state and
by what earlier tasks gave, and by nothing else that may have changed meanwhile.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from contextvars import copy_context
from typing import Any, TypeVar

from langgraph.config import get_config
from langgraph.func import task
from langgraph.runtime import get_runtime
from pydantic import BaseModel

from graph.persistence.saved import LOOK_SECONDS, expect, wait_saved
from graph.runs.session import AT_WORK
from tools.base.progress import Stopped, heed_stop

Result = TypeVar("Result", bound=BaseModel)


def do_once(name: str, work: Callable[[], Result], kind: type[Result]) -> Result:
    """What `work` gives, or gave when the node ran before; it is saved when this returns.

    `name` is the task's, for people, and `kind` the class of the result, which goes through JSON. What `work` raises
    comes out here and is not kept. Outside of a graph the work is simply done. Raises Stopped where the run is to end
    before work that is not done yet: what has begun is waited for, as it may have been paid for.
    """
    if not _is_in_node():
        return work()
    turn = _Turn(work)

    def take() -> dict[str, Any]:
        return turn.take()

    take.__name__ = name
    future = task(take)()
    try:
        while not wait([future], LOOK_SECONDS).done:
            if not turn.is_at_work:  # a server that cancels a run may never begin the task, nor tell of its end
                heed_stop()
        given = future.result()
    except CancelledError:
        raise Stopped("the run was cancelled") from None
    finally:
        turn.end()
    if turn.awaited:
        wait_saved(turn.awaited, heed_stop)
    return kind.model_validate(given)


def _is_in_node() -> bool:
    try:
        get_config()
    except RuntimeError:
        return False
    return True


def _is_saved_at_exit() -> bool:
    """Whether whoever runs the graph has asked for nothing to be saved before it ends (`durability="exit"`)."""
    return bool(get_config()["configurable"].get("__pregel_durability") == "exit")


class _Turn:
    """One task at work, in a thread that LangGraph picks, for a node that must not leave before it."""

    def __init__(self, work: Callable[[], BaseModel]) -> None:
        self.awaited = ""
        """Id of the task, where it was done now and a saver tells when it is saved."""
        self._work, self._context = work, copy_context()
        self._lock, self._is_over = threading.Lock(), False

    @property
    def is_at_work(self) -> bool:
        """Whether the work has begun and not ended."""
        return self._lock.locked()

    def take(self) -> dict[str, Any]:
        """Do the work, as if in the node's own thread."""
        with self._lock:
            if self._is_over:
                raise Stopped("the run was cancelled")
            given = self._context.run(self._do)
            info = get_runtime().execution_info
            if info is not None and not _is_saved_at_exit() and expect(info.thread_id, info.task_id):
                self.awaited = info.task_id
            return given

    def _do(self) -> dict[str, Any]:
        heed_stop()
        AT_WORK.set(True)  # in the context of this task alone
        return self._work().model_dump(mode="json")

    def end(self) -> None:
        """Wait for the work if it is going on, and keep it from beginning."""
        self._is_over = True
        with self._lock:
            pass
