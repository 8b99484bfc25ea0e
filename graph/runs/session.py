"""What every node needs: the run's workbench, and a way to tell what happens."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.runs.directory import directory_of
from graph.runs.replay import compare
from graph.state import State
from tools.base.progress import heed_stop
from tools.base.rundir import append_event, read_log, write_event
from tools.workbench.open import use_workbench

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench
import threading
from concurrent.futures import CancelledError, wait
from contextvars import copy_context
from typing import TypeVar

from langgraph.config import get_config
from langgraph.func import task
from langgraph.runtime import get_runtime
from pydantic import BaseModel

from graph.persistence.serializer import LOOK_SECONDS, expect, wait_saved
from tools.base.progress import Stopped

AT_WORK: ContextVar[bool] = ContextVar("AT_WORK", default=False)
"""Set in a task that is done now, whose events are new; see `graph.runs.session`."""

OpenBench = Callable[[], AbstractContextManager["Workbench"]]
"""Opens the run's workbench for as long as it is worked on, which is not while a chat model thinks."""


class Session:
    """One node at work: emits events to the run's log and to whoever streams the graph.

    What the node has `logged` before a kill it does not log again: a task that is not done again tells what it told.
    """

    def __init__(
        self, directory: Path, write: Any, spent: float, replay: str = "", logged: Counter[str] | None = None
    ) -> None:
        self.directory, self._write, self._replay = directory, write, replay
        self._spent, self._began = spent, time.monotonic()
        self._logged = logged or Counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the node was entered."""
        return time.monotonic() - self._began

    @property
    def seconds(self) -> float:
        """Seconds spent in the run's nodes so far, this one's among them."""
        return self._spent + self.elapsed

    def emit(self, type_: str, **data: Any) -> None:
        """Record an event in `events.jsonl` and show it; in a replay, say where it parts from the record."""
        event = {"type": type_, **data}
        self._log(event)
        self._write(event)
        if self._replay and (found := compare(self._replay, event, self.directory)):
            self.emit(found[0], text=found[1])

    def record(self, type_: str, **data: Any) -> None:
        """Record an event in `events.jsonl` only: what is too long to show."""
        self._log({"type": type_, **data})

    def _log(self, event: dict[str, Any]) -> None:
        if self._logged and not AT_WORK.get() and self._logged[line := write_event(event)]:
            self._logged[line] -= 1
        else:
            append_event(self.directory, event)

    def progress(self, label: str, done: int, total: int) -> None:
        """Show how far a step is; not recorded. Raises Stopped where the run is to end."""
        heed_stop()
        self._write({"type": "progress", "label": label, "done": done, "total": total})

    def warn(self, text: str) -> None:
        """Record and show a warning."""
        self.emit("warning", text=text)


def enter(node: str, state: State, runtime: Runtime[RunConfig]) -> Session:
    """Announce a node; its session."""
    directory = directory_of(state)
    checkpoint = runtime.execution_info.checkpoint_id if runtime.execution_info else ""
    logged = read_logged(directory, node, checkpoint)
    session = Session(directory, runtime.stream_writer, state.seconds, state.replay, logged)
    session.emit("node", node=node, iteration=state.iteration, checkpoint=checkpoint, came_from=state.came_from)
    return session


def read_logged(directory: Path, node: str, checkpoint: str) -> Counter[str]:
    """What a node logged from this checkpoint before it was interrupted, if it was; each as `write_event` gives it."""
    logged: Counter[str] = Counter()
    again = False
    for line in read_log(directory):
        if b'"type": "node"' in line[:100]:
            with suppress(ValueError):
                event = json.loads(line)
                again = checkpoint != "" and (event["node"], event["checkpoint"]) == (node, checkpoint)
                logged = logged if again else Counter()
        elif again:
            logged["{" + line.decode(errors="replace").partition(", ")[2]] += 1
    return logged


@contextmanager
def open_bench(state: State, session: Session) -> Iterator["Workbench"]:
    """The run's workbench, holding the weights that the state says are in it."""
    # It imports torch, which the workbench needs and a list of runs does not.
    from graph.planning.foresee import foresee_course

    config = state.config
    with use_workbench(config, session.directory, session.warn, session.progress, foresee_course(config)) as bench:
        bench.pruner.restore(state.current)
        yield bench


def tell_layers(session: Session, bench: "Workbench", checkpoint: str) -> None:
    """Show the sparsity of every layer of the model as it is now."""
    session.emit(
        "layers",
        checkpoint=checkpoint,
        names=list(bench.weights.by_name),
        blocks=[layer.block for layer in bench.weights.layers],
        kinds=[layer.kind for layer in bench.weights.layers],
        sparsity=[round(s, 6) for s in bench.weights.sparsities()],
    )


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
