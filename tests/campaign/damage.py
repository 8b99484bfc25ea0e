"""Random edits of files under `runs/`: a line that says what is wrong, or the same result; never a wrong figure.

The scene is made once: runs of a tiny model that were killed in each node, finished ones (one of which asks questions),
and a comparison. Each edit is made in a copy of it (a byte flipped, the end cut off, the file deleted, emptied, changed
for another one, bytes put behind it), then one command is run on the copy. Kinds of files are drawn first, then the
file: artifacts are many.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph.build import builder
from graph.memory.__main__ import main as remember
from graph.persistence import explain_damaged_state, open_saver, open_store
from graph.planning.plan import Plan
from graph.runs.directory import read_run
from graph.runs.listing import describe_run, find_runs
from graph.state import UnreadableState
from tests.end_to_end.helpers import TINY, Halt, at_home, fork, let_go, run_here, train_tiny_model
from tools.base.errors import DamagedArtifact, UserError
from tools.compare import main as compare
from tools.generate import main as generate
from tools.report import main as report
from tools.results.page import record

CHANGING = ("seconds", "allocation_seconds", "profile_seconds", "peak_memory_bytes", "workers")
"""What may be otherwise in the same result."""

KILLED = {
    "plan": Halt("plan", "graph.nodes.plan:choose_plan", 2),
    "prune": Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 5),
    "validate": Halt("validate", "tools.workbench.losses:evaluate_windows", 2),
    "reflect": Halt("reflect", "langgraph.checkpoint.sqlite:SqliteSaver.put", 1),
    "finish": Halt("finish", "graph.nodes.finish:export_model", after=True),
}
"""Where runs of the scene end, by their names."""

FINISHED, ASKED, TABLE = "done", "asked", "table"
QUESTIONS = "".join(
    json.dumps({"question": f"What comes after {n}?", "answer": str(n + 1)}) + "\n" for n in range(20, 120)
)
KINDS = (
    *("events.jsonl", "summary.json", "run.json", "config.yaml", "evaluations", "index.jsonl", "billhook.sqlite"),
    *("compare.json", "model", ".json", ".safetensors", ""),
)
"""Files by a part of their path, the first that fits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--times", type=int, default=1000, metavar="N", help="edits; each is followed by one command")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(work=lambda options: run_campaign(options.times, options.seed))


# The scene


@dataclass
class Scene:
    """The runs directory before any edit, the model and the flags of its runs."""

    home: Path
    model: Path
    nodes: tuple[str, ...]
    compared: bool
    expected: dict[tuple[str, str], "Seen"] = field(default_factory=dict)
    """What a command comes to where nothing was edited, as far as it was needed."""

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--model", str(self.model), *TINY)

    @property
    def table_flags(self) -> list[str]:
        recipes = ["--recipes", "wanda:uniform,refit:kappa", "--sparsity", "0.4"]
        texts = TINY[: TINY.index("--patience")]
        return ["--model", str(self.model), *texts, *recipes, "--out", f"runs/{TABLE}"]

    def make(self) -> None:
        """Run everything once."""
        for node in self.nodes:
            halted = fork(self.home, "--name", node, *self.flags, halt=KILLED[node]).finish()
            assert halted.code == -9, f"{node}: {halted.out}{halted.err}"
        (self.home / "questions.jsonl").write_text(QUESTIONS, encoding="utf-8")
        asking = ("--questions", f"file:{self.home / 'questions.jsonl'}", "--question-pairs", "8")
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_here("--name", FINISHED, *self.flags) == 0
            if self.compared:
                assert run_here("--name", ASKED, *self.flags, *asking, "--max-iterations", "2") == 0
                assert compare(self.table_flags) == 0
        let_go()

    def copy(self, place: Path) -> None:
        """The runs directory once more: what is written in place is copied, all else linked."""

        def put(source: str, target: str) -> str:
            grows = re.search(r"\.jsonl$|\.sqlite|\.lock$|\.last$", source)
            if grows:
                return shutil.copy2(source, target)
            os.link(source, target)
            return target

        shutil.copytree(self.home / "runs", place / "runs", copy_function=put)

    def list_actions(self, run: str) -> list[tuple[str, str]]:
        """(command, run) of what may be done after a file of a run was edited; "" where it is of no run."""
        killed, done = list(self.nodes), [FINISHED, *([ASKED] if self.compared else [])]
        found = [("list", "")] if run else [("list", ""), ("memory", ""), ("memory", "")]
        for name in [run] if run in (*killed, *done) else [*killed, *done]:
            found += [("report", name), ("resume", name), ("resume", name) if name in killed else ("generate", name)]
            found += [("fork", name), ("replay", name)] if name == FINISHED else []
        if self.compared and run in ("", TABLE):
            found += [("compare", TABLE)] * 3
        return found


# The edits


def draw_file(dice: random.Random, runs: Path) -> Path:
    """A random file of a random kind."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(runs.rglob("*")):
        if path.is_file():
            place = f"/{path.relative_to(runs)}"
            kind = "evaluations" if "/evaluations/" in place else next(kind for kind in KINDS if kind in place)
            kind = "model" if "/model/" in place else kind
            kinds.setdefault(kind, []).append(path)
    return dice.choice(kinds[dice.choice(sorted(kinds))])


def edit(dice: random.Random, path: Path, other: Path) -> str:
    """Damage a file; what was done."""
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)

    def write(target: Path, new: bytes) -> None:
        target.unlink()  # what is linked stays as it is in the scene
        target.write_bytes(new)
        os.utime(target, ns=times)

    kind = dice.choice(["flip", "flip", "flip", "cut", "delete", "empty", "swap", "append"])
    if kind in ("flip", "cut") and not content:
        kind = "append"
    match kind:
        case "flip":
            at, bit = dice.randrange(len(content)), dice.randrange(8)
            write(path, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            return f"bit {bit} of byte {at} flipped"
        case "cut":
            at = dice.randrange(len(content))
            write(path, content[:at])
            return f"cut at {at} of {len(content)}"
        case "delete":
            path.unlink()
        case "empty":
            write(path, b"")
        case "swap":
            theirs = other.read_bytes()
            write(other, content)
            write(path, theirs)
            return f"swapped with {other}"
        case "append":
            more = dice.randbytes(dice.randint(1, 40))
            write(path, content + more)
            return f"{more!r} appended"
    return {"delete": "deleted", "empty": "emptied"}[kind]


# The commands


@dataclass
class Seen:
    """What a command did, said, and shows of the runs."""

    code: int
    out: str
    err: str
    figures: Any = None
    broke: str = ""
    """Its traceback."""


def act(scene: Scene, action: str, run: str) -> Seen:
    """Do one thing in the present directory."""
    said, told = io.StringIO(), io.StringIO()
    code, figures, broke = 1, None, ""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            code, show = ACTIONS[action](scene, run)
        except SystemExit as error:
            code, show = int(error.code or 0), lambda: None
        except Exception:
            show, broke = (lambda: None), traceback.format_exc()
        finally:
            let_go()
        out, err = said.getvalue(), told.getvalue()
        if code == 0 and not broke:
            try:
                figures = strip_times(show() if action not in FROM_OUTPUT else FROM_OUTPUT[action](out))
            except Exception:
                broke = f"what it left cannot be read: {traceback.format_exc()}"
    return Seen(code, out, err, figures, broke)


def strip_times(value: Any) -> Any:
    """A value without what may be otherwise in the same result."""
    if isinstance(value, dict):
        return {name: strip_times(x) for name, x in value.items() if name not in CHANGING}
    return [strip_times(x) for x in value] if isinstance(value, list) else value


def read_figures(run: str) -> Any:
    """All that a page or a listing shows of a run, but for its name: a fork's comes of the moment of the edit."""
    found = record.read_run(Path("runs") / run)
    shown = found.model_dump(exclude={"warnings", "stopped", "name", "config", "node"})
    return shown | {"summary": found.summary and found.summary.model_dump(exclude={"run"})}


Done = tuple[int, Callable[[], Any]]


def do_list(scene: Scene, run: str) -> Done:
    return run_here("--list"), lambda: {path.name: describe_run(path) for path in find_runs(Path("runs"))}


def do_remember(scene: Scene, run: str) -> Done:
    first = remember(["list"])
    return first or remember(["show", str(scene.model)]), lambda: None


def do_report(scene: Scene, run: str) -> Done:
    return report([run]), lambda: (Path("runs") / run / "report.html").read_text(encoding="utf-8")


def do_resume(scene: Scene, run: str) -> Done:
    finished = run in (FINISHED, ASKED)
    return run_here("--resume", run), (lambda: "finished") if finished else (lambda: read_figures(run))


def do_replay(scene: Scene, run: str) -> Done:
    return run_here("--replay", run, "--name", "again"), lambda: read_figures("again")


def do_generate(scene: Scene, run: str) -> Done:
    return generate([run, "--tokens", "6", "--device", "cpu"]), lambda: None


def do_compare(scene: Scene, run: str) -> Done:
    def show() -> Any:
        return json.loads((Path("runs") / TABLE / "compare.json").read_text(encoding="utf-8"))["rows"]

    return compare(scene.table_flags), show


def do_fork(scene: Scene, run: str) -> Done:
    """Go on from an older checkpoint with another plan, as in Studio; it refuses by errors of one line."""
    try:
        with explain_damaged_state(Path("runs")):
            thread, config = read_run(Path("runs"), run)
            settings: Any = {"configurable": {"thread_id": thread}, "recursion_limit": 100}
            with open_saver(Path("runs")) as saver, open_store(Path("runs")) as store:
                app = builder().compile(checkpointer=saver, store=store)
                history = app.get_state_history(settings)
                old = next((s for s in history if s.next == ("prune",) and s.values["iteration"] == 2), None)
                if old is None:
                    raise UserError("there is no such checkpoint")
                plan = Plan(sparsity=0.4, reason="mine")
                edited: Any = app.update_state(old.config, {"plan": plan}, as_node="plan")
                app.invoke(None, {**edited, "recursion_limit": 100}, context=config, durability="sync")
    except (UserError, DamagedArtifact, UnreadableState) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2, lambda: None
    return 0, lambda: [read_figures(path.name) for path in Path("runs").glob(f"{run}-fork-*")]


ACTIONS: dict[str, Callable[[Scene, str], Done]] = {
    "list": do_list,
    "memory": do_remember,
    "report": do_report,
    "resume": do_resume,
    "replay": do_replay,
    "generate": do_generate,
    "compare": do_compare,
    "fork": do_fork,
}
FROM_OUTPUT: dict[str, Callable[[str], Any]] = {
    "memory": str,
    "generate": lambda out: out.partition("\n┏")[0],
}
"""What is shown is in what the command said."""


# The verdict


def judge(action: str, expected: Seen, seen: Seen) -> tuple[str, str]:
    """(same, warned, refused or wrong; why)."""
    if seen.broke:
        return "wrong", seen.broke
    lines = seen.err.splitlines()
    if seen.code:
        stopped = [line for line in seen.out.splitlines() if line.startswith("stopped: ")]
        if (len(lines) == 1 and lines[0].startswith("error: ")) or (not lines and len(stopped) == 1):
            return "refused", (lines or stopped)[0]
        return "wrong", f"ended with {seen.code} and said {seen.out[-300:]!r} {seen.err[-1000:]!r}"
    if action == "list":
        apart = [cells for name, cells in seen.figures.items() if cells != expected.figures.get(name)]
        if seen.figures.keys() == expected.figures.keys() and all(cells[0] == "damaged" for cells in apart):
            return ("refused", apart[0][1]) if apart else ("same", "")
    if seen.figures != expected.figures:
        return "wrong", f"{_tell_difference(expected.figures, seen.figures)}; it said {seen.err[-300:]!r}"
    warned = [line for line in (*lines, *seen.out.splitlines()) if "warning" in line.lower()]
    return ("warned", warned[0]) if warned and warned[0] not in expected.out else ("same", "")


def _tell_difference(expected: Any, seen: Any) -> str:
    first, second = json.dumps(expected, default=str), json.dumps(seen, default=str)
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    return f"…{first[max(0, at - 80) : at + 120]} became …{second[max(0, at - 80) : at + 120]}"


@contextlib.contextmanager
def prepared(place: Path, scene: Scene) -> Iterator[None]:
    """In a copy of the scene."""
    place.mkdir()
    scene.copy(place)
    with contextlib.chdir(place):
        yield


def expect(scene: Scene, action: str, run: str) -> Seen:
    """What a command comes to where nothing was edited."""
    if (action, run) not in scene.expected:
        place = scene.home / f"expected-{action}-{run}"
        with prepared(place, scene):
            seen = act(scene, action, run)
        assert not seen.broke and seen.code == 0, f"{action} {run}: {seen}"
        scene.expected[action, run] = seen
        shutil.rmtree(place)
    return scene.expected[action, run]


def run_campaign(times: int, seed: int, nodes: tuple[str, ...] = tuple(KILLED), *, compared: bool = True) -> int:
    """Edit a file so many times and run a command after each; 1 when something wrong was shown, else 0."""
    dice, home, began = random.Random(seed), Path(tempfile.mkdtemp(prefix="billhook-damage-")), time.monotonic()
    counts: Counter[str] = Counter()
    wrong: list[Path] = []
    with at_home(home):
        scene = Scene(home, train_tiny_model(home / "model"), nodes, compared)
        scene.make()
        gc.collect()
        gc.freeze()  # each run ends with a full collection, of all that is imported too
        for number in range(1, times + 1):
            place = home / str(number)
            with prepared(place, scene):
                path, other = (draw_file(dice, Path("runs")) for _ in range(2))
                done = edit(dice, path, other)
                actions = scene.list_actions(path.parts[1] if len(path.parts) > 2 else "")
                action, run = dice.choice(actions)
                seen = act(scene, action, run)
            verdict, why = judge(action, expect(scene, action, run), seen)
            counts[verdict] += 1
            print(f"{number}: {path} {done}; {action} {run}: {verdict}{f' ({why})' if why else ''}", flush=True)
            if verdict == "wrong":
                wrong.append(place)
            else:
                shutil.rmtree(place)
    told = f"{counts['same']} the same, {counts['warned']} the same with a warning, {counts['refused']} refused"
    kept = "".join(f" · {place}" for place in wrong)
    print(f"{times} edits in {time.monotonic() - began:.0f} s: {told}, {len(wrong)} wrong{kept}")
    if not wrong:
        shutil.rmtree(home)
    return bool(wrong)
