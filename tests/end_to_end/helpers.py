"""Run the command in this process, in a forked one or as a person would, and read what a run left behind."""

import asyncio
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from graph import persistence
from graph.build import builder
from graph.config import RunConfig
from graph.persistence import open_saver, open_store
from graph.run import main
from graph.runs import permits
from graph.runs.directory import read_run
from graph.state import State
from tests.paths import IMPORTS
from tests.tiny import make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools.base import rundir
from tools.base.progress import Stopped, heed_stop
from tools.base.rundir import RUNS_DIR_VARIABLE, unlock_run
from tools.measure import continuations
from tools.results.page import page
from tools.texts.windows import cut_windows
from tools.workbench import open as workbench

TINY = (
    *("--device", "cpu", "--window", "64", "--text-spread", "1", "--calibration-windows", "4"),
    *("--gradient-windows", "2", "--validation-windows", "3", "--test-windows", "2", "--patience", "1"),
)
"""Flags that make a run of a tiny model take about a second."""

SECRETS = re.compile(r"^BILLHOOK_|_(API_KEY|TOKEN)$")


# The command, in this process


@dataclass
class Outcome:
    """What a command did and said."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def at_home(directory: Path) -> Iterator[None]:
    """Work in `directory` as a fresh process would: no keys, no settings of Billhook, one thread; all put back."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    for name in [name for name in os.environ if SECRETS.search(name)]:
        del os.environ[name]
    torch.set_num_threads(1)  # on work this small a second thread only costs
    try:
        with contextlib.chdir(directory):
            yield
    finally:
        let_go()
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


def run_here(*arguments: str) -> int:
    """`python -m graph.run` in this process; its exit code."""
    before = {name: os.environ.get(name) for name in ("BILLHOOK_RUNS_DIR", "BILLHOOK_STATE")}  # what options set
    try:
        return main(list(arguments))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_apart(home: Path, *arguments: str) -> Path:
    """As `run_here`, in a directory of its own, of a run that is named run and that nothing happens to; where it is."""
    with at_home(home):
        assert run_here(*arguments) == 0
    return home / "runs" / "run"


def decode_briefly(patch: Callable[[Any, str, Any], None]) -> None:
    """Have fewer tokens decoded to continue a report's prompts and to time a cut, a sixth and a third of a tiny run."""
    patch(continuations, "CONTINUED", continuations.CONTINUED_STREAMED)
    patch(continuations, "REPEATS", 1)
    patch(continuations, "DECODED", 4)


def leave_out_figures(patch: Callable[[Any, str, Any], None]) -> None:
    """Have reports drawn as those of runs without a trial are."""
    patch(page, "draw_figures", lambda *_: page.Figures(None, None, None, None, None))


def let_go() -> None:
    """Give back what a process may hold until it ends: the model, and the locks of its run directories."""
    if workbench._open:
        workbench.close_workbench()
    for directory in list(rundir._locks):
        unlock_run(directory)


# The command, as a person runs it


def python_environment(**more: str) -> dict[str, str]:
    """The environment of a new process: this one's without keys, with the repository to import from."""
    kept = {name: value for name, value in os.environ.items() if not SECRETS.search(name)}
    return kept | {"PYTHONPATH": IMPORTS, "OMP_NUM_THREADS": "1"} | more


def run_outside(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -W error -m graph.run` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "graph.run", *arguments],
        cwd=directory,
        env=python_environment(**environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


# The command, in a forked process that dies, hangs or is asked to stop where it is told to


SAVE = "langgraph.checkpoint.sqlite:SqliteSaver.put"
NOTE = "langgraph.checkpoint.sqlite:SqliteSaver.put_writes"
"""A node's update is noted first, and becomes part of a saved state a moment later."""


@dataclass(frozen=True)
class Halt:
    """Where a process is killed, hangs, or gets SIGTERM: at the nth call of `target` while `node` is at work."""

    node: str
    target: str
    """`module:name` or `module:Class.name`."""
    count: int = 1
    after: bool = False
    """After the call has returned, rather than before it begins."""
    kind: Literal["kill", "hang", "stop"] = "kill"

    def arm(self) -> None:
        """Patch the target in this process."""
        module, _, path = self.target.partition(":")
        importlib.import_module(module)
        *owners, name = path.split(".")
        owner = pkgutil.resolve_name(":".join([module, ".".join(owners)]) if owners else module)
        original, calls, present = getattr(owner, name), 0, watch_nodes()

        @functools.wraps(original)
        def patched(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += present() == self.node
            now = present() == self.node and calls == self.count
            if self.kind == "stop" and calls > self.count:
                print("one call too many", file=sys.stderr)
            if now and not self.after:
                self.strike()
            result = original(*arguments, **options)
            if now and self.after:
                self.strike()
            return result

        setattr(owner, name, patched)

    def strike(self) -> None:
        if self.kind == "hang":
            time.sleep(600)
        if self.kind == "stop":  # whoever made the call goes on with a slow layer, until it has heard of it
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(is_asked_to_stop)
            return
        os.kill(os.getpid(), signal.SIGKILL)


def is_asked_to_stop() -> bool:
    try:
        heed_stop()
    except Stopped:
        return True
    return False


def watch_nodes() -> Callable[[], str]:
    """Follow the events of this process; the node at work."""
    from graph.runs.session import Session

    emit, node = Session.emit, ""

    def listen(session: Session, type_: str, **data: Any) -> None:
        nonlocal node
        emit(session, type_, **data)
        node = data["node"] if type_ == "node" else node

    Session.emit = listen  # type: ignore[method-assign]
    return lambda: node


@functools.cache
def _fork_server() -> Any:
    """A clean process that has imported everything; each of its forks starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    imported = [
        "transformers.models.llama.modeling_llama",
        "datasets",
        "langchain_openai",
        "tools.instruments.agent_tools",
    ]
    context.set_forkserver_preload(["tests.end_to_end.helpers", *imported])
    environment = dict(os.environ)
    try:
        os.environ |= python_environment(OPENBLAS_NUM_THREADS="1")
        server = context.Process(target=int)
        server.start()
        server.join()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return context


_forks: list["Fork"] = []


def end_forks() -> None:
    """Kill the forked processes that a test left behind."""
    while _forks:
        _forks.pop().kill()


@dataclass
class Fork:
    """A command at work in a forked process."""

    process: Any
    directory: Path

    def finish(self, timeout: float = 120) -> Outcome:
        """Wait for its end; the code is negative when a signal ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the process hangs"
        return Outcome(self.process.exitcode, self.read("out"), self.read("err"))

    def read(self, stream: str) -> str:
        return (self.directory / f"fork-{self.process.pid}.{stream}").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def fork(directory: Path, *arguments: str, halt: Halt | None = None, **environment: str) -> Fork:
    """Start the command in a forked process."""
    process = _fork_server().Process(target=_work, args=(directory, arguments, halt, environment), daemon=True)
    process.start()
    _forks.append(Fork(process, directory))
    return _forks[-1]


def _work(directory: Path, arguments: tuple[str, ...], halt: Halt | None, environment: dict[str, str]) -> None:
    os.chdir(directory)
    os.environ.update(environment)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(f"fork-{os.getpid()}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    torch.set_num_threads(1)
    gc.freeze()  # as in this process: a run ends with a full collection
    leave_out_figures(setattr)
    decode_briefly(setattr)
    if halt:
        halt.arm()
    sys.exit(main(list(arguments)))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Poll until the condition holds, the less often the longer it takes; its value."""
    begin = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begin
        assert waited < seconds, "waited in vain"
        time.sleep(min(0.005 + waited / 50, 0.05))  # what is waited for has the processor meanwhile
    return value


# The graph as a server runs it, in this process


def serve(runs_dir: Path, work: Callable[[Any], Any]) -> Any:
    """Do something with the graph that `langgraph dev` serves, on the runs directory's own state.

    What `start` starts there is named by a file of configs/, as a person would.
    """

    async def run() -> Any:
        async with persistence.checkpointer() as saver, persistence.store() as store:
            own = asyncio.all_tasks()
            done = await work(builder(server=True).compile(checkpointer=saver, store=store))
            if left := asyncio.all_tasks() - own:  # a server lives on: what a cancelled run still saves is saved
                await asyncio.wait(left)
            return done

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as configs:
        patch.setenv(RUNS_DIR_VARIABLE, str(runs_dir))
        patch.setattr(permits, "CONFIGS", Path(configs))
        return asyncio.run(run())


async def start(app: Any, name: str, config: RunConfig, thread: str) -> State:
    """A new run in the server, to its end."""
    (permits.CONFIGS / f"{name}.yaml").write_text(config.model_dump_json(), encoding="utf-8")  # JSON is YAML
    settings = {"configurable": {"thread_id": thread}, "recursion_limit": 100}
    return State.model_validate(await app.ainvoke({"run": name}, settings, context=config, durability="sync"))


# What a run left behind


def read_events(run: Path, *types: str) -> list[dict[str, Any]]:
    """The events of a run, of all types or of these; a line that is being written is left out."""
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    events = [json.loads(line) for line in lines]
    return [event for event in events if not types or event["type"] in types]


def read_summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary.pop("files", None)
    return summary


def read_state(run: Path) -> State:
    """The last checkpointed state of a run."""
    thread, _ = read_run(run.parent, run.name)
    with open_saver(run.parent) as saver, open_store(run.parent) as store:
        app = builder().compile(checkpointer=saver, store=store)
        return State.model_validate(app.get_state({"configurable": {"thread_id": thread}}).values)


def read_trials(run: Path) -> list[tuple[Any, ...]]:
    """Every trial of a run, without the time it took."""
    return [(t.iteration, t.checkpoint, t.perplexity, t.kl, t.verdict) for t in read_state(run).trials]


def read_run_config(run: Path) -> RunConfig:
    return RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))


def read_weights(model: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, from its safetensors files alone."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def pick_prunable(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices inside the decoder blocks, by layer name: llama-like and OPT's `layers`, GPT-2's `h`."""
    inside = re.compile(r"(?:^|\.)(?:layers|h)\.\d+\.(?P<kind>.+)\.weight$")
    return {
        name.removesuffix(".weight"): weight
        for name, weight in weights.items()
        if inside.search(name) and weight.ndim == 2
    }


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal to the bit: a negative zero is not a zero."""
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )


def assert_same_weights(run: Path, other: Path) -> None:
    """Two runs have left the same model, to the bit."""
    ours, theirs = read_weights(run / "model"), read_weights(other / "model")
    assert ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in ours)


def fingerprint(run: Path) -> dict[str, str]:
    """Every file of a run, by its content."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# A model that can be hurt


def train_tiny_model(directory: Path, steps: int = 120) -> Path:
    """Save a tiny Llama that has learnt a little English; pruning a random model often makes it better."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    settings = tiny_settings(directory, calibration_windows=200, validation_windows=2, test_windows=1)
    windows = cut_windows(settings, tokenizer).calibration
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    picks = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = windows[torch.randint(0, len(windows), (8,), generator=picks)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.eval().requires_grad_(False).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# Whoever answers by files


@contextlib.contextmanager
def answering(place: Path, answer: Callable[[str], str]) -> Iterator[None]:
    """Somebody at the other side of `exchange:PLACE`, who answers prompts in their order."""
    done = threading.Event()

    def answer_all() -> None:
        while not done.wait(0.02):
            for prompt in sorted(place.glob("*.prompt.md")):
                to = prompt.with_name(prompt.name.replace(".prompt.md", ".answer.txt"))
                if not to.exists():
                    aside = place / "aside"
                    aside.write_text(answer(prompt.read_text()))
                    aside.rename(to)

    thread = threading.Thread(target=answer_all)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
