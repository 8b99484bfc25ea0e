"""What every node needs: the run's workbench, and a way to tell what happens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.runs.directory import directory_of
from graph.runs.replay import compare
from graph.state import State
from tools.base.progress import heed_stop
from tools.base.rundir import append_event
from tools.workbench.open import use_workbench

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


class Session:
    """One node at work: emits events to the run's log and to whoever streams the graph."""

    def __init__(self, directory: Path, write: Any, spent: float, replay: str = "") -> None:
        self.directory, self._write, self._replay = directory, write, replay
        self._spent, self._began = spent, time.monotonic()

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
        append_event(self.directory, event)
        self._write(event)
        if self._replay and (found := compare(self._replay, event, self.directory)):
            self.emit(found[0], text=found[1])

    def record(self, type_: str, **data: Any) -> None:
        """Record an event in `events.jsonl` only: what is too long to show."""
        append_event(self.directory, {"type": type_, **data})

    def progress(self, label: str, done: int, total: int) -> None:
        """Show how far a step is; not recorded. Raises Stopped where the run is to end."""
        heed_stop()
        self._write({"type": "progress", "label": label, "done": done, "total": total})

    def warn(self, text: str) -> None:
        """Record and show a warning."""
        self.emit("warning", text=text)


def enter(node: str, state: State, runtime: Runtime[RunConfig]) -> Session:
    """Announce a node; its session."""
    session = Session(directory_of(state), runtime.stream_writer, state.seconds, state.replay)
    session.emit(
        "node",
        node=node,
        iteration=state.iteration,
        checkpoint=runtime.execution_info.checkpoint_id if runtime.execution_info else "",
        came_from=state.came_from,
    )
    return session


@contextmanager
def open_bench(state: State, session: Session) -> Iterator["Workbench"]:
    """The run's workbench, holding the weights that the state says are in it."""
    with use_workbench(state.config, session.directory, session.warn, session.progress) as bench:
        bench.restore(state.current)
        yield bench


def tell_layers(session: Session, bench: "Workbench", checkpoint: str) -> None:
    """Show the sparsity of every layer of the model as it is now."""
    session.emit(
        "layers",
        checkpoint=checkpoint,
        names=list(bench.by_name),
        blocks=[layer.block for layer in bench.layers],
        kinds=[layer.kind for layer in bench.layers],
        sparsity=[round(s, 6) for s in bench.sparsities()],
    )
