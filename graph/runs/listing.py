"""Lists the runs of a directory: what each was asked for, how far it came and what it cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from tools.base.errors import UserError
from tools.base.rundir import read_config_values, read_result, refuse_lost_result
from tools.base.words import clean, show_compact, show_percent, show_seconds

MARKS = ("summary.json", "config.yaml", "events.jsonl", "run.json")
STYLES = {"finished": "green", "unfinished": "yellow", "damaged": "red"}


def list_runs(runs_dir: Path) -> Table:
    """Past runs as a table, the one begun last at the bottom; a damaged file is named in its run's row."""
    heads = ("status", "sparsity", "perplexity", "KL", "plans")
    columns = [Column(head, no_wrap=True, justify="left" if head == "status" else "right") for head in heads]
    table = Table(Column("run", overflow="fold"), *columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    runs = find_runs(runs_dir)
    for run in runs:
        status, what, *cells = describe_run(run)
        # Two lines a run fit 80 columns; the first column folds and hides nothing, for --resume wants the name.
        name = Text(clean(run.name), style="bold").append(f"\n{what}" if what else "", "not bold")
        table.add_row(name, Text(status, style=STYLES.get(status.split("\n")[0], "")), *map(Text, cells))
    table.caption = None if runs else Text(f"no runs in {clean(runs_dir, 1000)}")
    return table


def find_runs(runs_dir: Path) -> list[Path]:
    """Directories that hold a run, in the order in which they were begun."""
    try:
        found = [path for path in runs_dir.iterdir() if any((path / mark).is_file() for mark in MARKS)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: (begun(path), path.name))


def begun(run: Path) -> float:
    """When a run's first file was written; its directory's time changes with every file."""
    return min((run / mark).stat().st_mtime for mark in MARKS if (run / mark).is_file())


def describe_run(run: Path) -> list[str]:
    """Status and time, model, sparsity, perplexity, KL and plans of a run, from what it left behind."""
    try:
        if (summary := read_result(run)) is not None:
            return describe_summary(summary)
        refuse_lost_result(run)
        config = read_config_values(run)
        size = config.get("target_size")
        parts = f"size {float(size):g}" if size else ""
        return [
            "unfinished",
            clean(config["model"]),
            f"\n{parts or 'of ' + show_percent(config['target_sparsity'], 1)}",
        ]
    except UserError as problem:
        return ["damaged", clean(problem, 300)]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        name = "summary.json" if (run / "summary.json").is_file() else "config.yaml"
        return ["damaged", f"{name}: {type(problem).__name__}: {clean(problem, 100)}"]


def describe_summary(summary: Mapping[str, Any]) -> list[str]:
    """The cells of a run that left a summary."""
    perplexity = summary["perplexity"]
    dense, pruned, uniform = (perplexity[key] for key in ("dense", "pruned", "uniform_wanda"))
    return [
        f"{clean(summary['status'], 20)}\n{show_seconds(summary['seconds'])}",
        clean(summary["model"]),
        f"{show_percent(summary['achieved_sparsity'], 1)}\nof {show_percent(summary['target_sparsity'], 1)}",
        f"{show_compact(dense)} → {show_compact(pruned)}\nWanda {show_compact(uniform)}",
        show_compact(summary["kl"], 4),
        f"{summary['iterations']:d}\n{summary['rollbacks']:d} undone",
    ]
