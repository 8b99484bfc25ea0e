"""Arms that are runs of the graph, each in a process of its own, begun or gone on with."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph.ablation.rows import Row, judge_perplexity, judge_row, measure_exported
from graph.ablation.settings import CHAT, GRAPH, TOLD, AblateSettings
from graph.config import HEURISTIC
from tools.base.errors import UserError
from tools.base.options import REFUSED
from tools.base.rundir import read_result, scan_events
from tools.base.settings import SPLITS, TeamSettings
from tools.workbench.open import close_workbench

if TYPE_CHECKING:
    from tools.base.progress import Progress

TOLD_LAST = {
    "chat-bare": ("--planner-fallback=none", "--planner-unaided"),
    **{arm: ("--goal-tokens=0",) for arm in GRAPH if arm not in CHAT},  # they have no goal to write texts for
}
"""What an arm is told behind all other flags."""


def run_graph(
    arm: str, settings: AblateSettings, graph_flags: Sequence[str], progress: "Progress"
) -> tuple[Row, float | None, bool]:
    """(the row; the dense model's test perplexity; whether windows began with a beginning-of-sequence token).

    Of a run of the graph by the settings of a seed, begun or gone on with in another process. Raises UserError with
    the run's last words.
    """
    run = Path(settings.out) / "runs" / f"{arm}-{settings.seed}"
    progress("run of the graph", 0, 1)
    # settings are checked of one, too, that was finished and has no row yet
    _carry_out(arm, settings, graph_flags, run)
    progress("run of the graph", 1, 1)
    return _read_row(arm, settings, run, progress)


def _carry_out(arm: str, settings: AblateSettings, graph_flags: Sequence[str], run: Path) -> None:
    """Raises UserError with the run's last words."""
    if settings.workers:
        close_workbench()  # its workers would hold the processors, or GPUs, that those of the run need
    command = [sys.executable, "-m", "graph.run", "--runs-dir", str(run.parent)]
    command += ["--resume" if (run / "run.json").is_file() else "--name", run.name]  # which refuses other settings
    command += [*_flags_of(arm, settings), *graph_flags, *TOLD_LAST.get(arm, ())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (run / "summary.json").is_file():
        said = [line.strip() for line in f"{result.stdout}\n{result.stderr}".splitlines() if line.strip()]
        last = " ".join(said[-2:]).removeprefix("error: ")[:400]
        advice = "or choose another --out" if result.returncode == REFUSED else "the same command goes on from there"
        raise UserError(f"{arm}, seed {settings.seed}: {last}; {advice}")


def _read_row(arm: str, settings: AblateSettings, run: Path, progress: "Progress") -> tuple[Row, float | None, bool]:
    """As `run_graph`, of a run that has finished."""
    summary = read_result(run) or {}
    agents = summary["agents"]
    named = {text["name"]: text for text in summary.get("texts", []) if text["name"] in settings.text}  # no goal's own
    unseen, dense = measure_exported(settings, run / "model", progress), summary["perplexity"]["dense"]
    if settings.judge:
        denses = {name: text["dense"] for name, text in named.items()} | unseen.dense
        dense = judge_perplexity(denses, settings.judge)
    row = Row(
        arm=arm,
        seed=settings.seed,
        sparsity=summary["achieved_sparsity"],
        reached=summary["status"] == "finished",
        perplexity=summary["perplexity"]["pruned"],
        kl=summary["kl"],
        texts={name: text["pruned"] for name, text in named.items()} | unseen.pruned,
        kls={name: text["kl"] for name, text in named.items()} | unseen.kls,
        plan=summary["plan"],
        trials=summary["iterations"],
        by_rule=_count_by_rule(run) if arm in CHAT else 0,
        evaluated_tokens=summary["evaluated_tokens"],
        agent_tokens=agents["input_tokens"] + agents["output_tokens"],
        cost=agents["cost"],
        seconds=round(summary["seconds"], 1),
    )
    return judge_row(row, settings.judge), dense, summary["protocol"].get("bos", False)


def _count_by_rule(run: Path) -> int:
    """Rounds of a run that were planned by rule; a round that was begun again after a kill counts once."""
    planners = {event["iteration"]: event["planner"] for _, event in scan_events(run, "plan")}
    return list(planners.values()).count("heuristic")


LEFT_OPEN = {"max_iterations": 200, "patience": 200}
"""What flags behind the lone -- may change, for the budget ends a run."""


def list_shared_flags(settings: AblateSettings) -> set[str]:
    """Options that a run of the graph has as all other arms do, or by the arm that it is."""
    fields = {*TeamSettings.model_fields, *_list_fields("heuristic", settings)} - LEFT_OPEN.keys()
    return {f"--{name.replace('_', '-')}" for name in fields}


def _flags_of(arm: str, settings: AblateSettings) -> list[str]:
    """The options of a run of the graph that is this arm."""
    if arm == TOLD:
        settings = settings.model_copy(update={"text_weights": settings.told})
    return [*_write_flags(_list_fields(arm, settings)), *_write_texts(settings), "--no-memory"]


def _list_fields(arm: str, settings: AblateSettings) -> dict[str, Any]:
    """Those options, but for named texts, by the names of their fields."""
    planner = settings.planner if arm in CHAT else HEURISTIC
    reflector = settings.reflector or planner if arm in CHAT and arm != "chat-alone" else HEURISTIC
    named = ("text", "text_weights", *(SPLITS if settings.text else ()))  # texts with names take the place of three
    return {name: getattr(settings, name) for name in TeamSettings.model_fields if name not in named} | {
        "target_sparsity": settings.target_sparsity,
        "max_layer_sparsity": settings.max_layer_sparsity,
        "polish_tokens": settings.polish_tokens,
        "max_evaluated_tokens": settings.evaluated_tokens,
        "max_seconds": settings.seconds,
        **LEFT_OPEN,
        "planner": planner,
        "reflector": reflector,
        "goal": settings.goal if arm in CHAT else "",
    }


def _write_flags(fields: Mapping[str, Any]) -> list[str]:
    """Fields as options of a command."""
    names = {name: name.replace("_", "-") for name in fields}
    flags = [f"--{names[name]}={value}" for name, value in fields.items() if not isinstance(value, bool)]
    switches = {names[name]: value for name, value in fields.items() if isinstance(value, bool)}
    return [*flags, *(f"--{'' if value else 'no-'}{name}" for name, value in switches.items())]


def _write_texts(settings: AblateSettings) -> list[str]:
    """The named texts as options of a command, and what each counts."""
    weights = ",".join(f"{name}={weight}" for name, weight in settings.text_weights.items())
    texts = [f"--text={name}={source}" for name, source in settings.text.items()]
    return [*texts, f"--text-weights={weights}"] if weights else texts
