"""What is written of an ablation: ablate.json, ablate.csv, ablate.md and the plot; and a row in one line."""

from functools import partial
from pathlib import Path

from graph.ablation.rows import Ablation, Row, conclude, list_differences, rank_arms
from graph.ablation.settings import ARMS
from tools.base.files import write_json, write_text, write_whole
from tools.base.rows import as_csv, save_figure
from tools.base.words import escape, show


def _tell_trials(row: Row) -> str:
    return f"{row.trials} ({row.by_rule} by rule)" if row.by_rule else str(row.trials)


def describe_row(row: Row) -> str:
    return (
        f"{row.arm}, seed {row.seed}: {row.sparsity:.2%} zeros, perplexity {show(row.perplexity)}, "
        f"KL {show(row.kl, 4)}, trials {_tell_trials(row)}, {row.evaluated_tokens:,} tokens evaluated, "
        f"{row.agent_tokens:,} by agents: {row.plan}"
    )


def write_tables(directory: Path, known: Ablation) -> None:
    write_json(directory / "ablate.json", known.model_dump(mode="json"))
    write_text(directory / "ablate.md", describe(known))
    write_text(directory / "ablate.csv", as_csv(Row, known.rows))
    for kind in ("png", "svg"):
        write_whole(directory / f"ablate.{kind}", partial(_plot, known, kind))


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def describe(known: Ablation) -> str:
    """`ablate.md`."""
    settings, protocol = known.settings, known.protocol
    dense = "not measured" if known.dense_perplexity is None else show(known.dense_perplexity)
    lines = [
        f"# {escape(settings['model'])} at {settings['target_sparsity']:.0%}: was the agent worth its tokens?",
        "",
        f"Perplexity on {protocol.tokens:,} tokens of `{protocol.text}` (test text, {protocol.windows}, "
        f"{protocol.dtype}; dense: {dense}) of what each arm chose by the validation text. Each arm may put "
        f"{settings['evaluated_tokens']:,} tokens through pruned models; ± is the standard error over seeds.",
        "",
        *(f"- **{arm}**: {ARMS[arm]}" for arm in ARMS if any(row.arm == arm for row in known.rows)),
        "",
        *(f"{line}\n" for line in conclude(known.rows)),
        "![Perplexity of each arm](ablate.svg)",
        "",
        "| arm | seeds | perplexity | gain over kappa | KL | evaluated tokens | agent tokens | cost "
        "| agent tokens per point | cost per point | seconds |",
        "|---|" + "---:|" * 10,
    ]
    for s in rank_arms(known.rows):
        gained = s.gain if s.gain is not None and s.gain > 0 and s.agent_tokens else None
        cells = [
            s.arm,
            f"{s.seeds}",
            _with_error(s.perplexity, s.perplexity_error, 2),
            _with_error(s.gain, s.gain_error, 3),
            f"{s.kl:.4f}",
            f"{s.evaluated_tokens:,.0f}",
            f"{s.agent_tokens:,.0f}",
            f"${s.cost:.4f}",
            f"{s.agent_tokens / gained:,.0f}" if gained else "",
            f"${s.cost / gained:.4f}" if gained else "",
            f"{s.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Differences, paired by seed", "", "| arm | less | seeds | perplexity |", "|---|---|---:|---:|"]
    for arm, other, seeds, mean, error in list_differences(known.rows):
        lines.append(f"| {arm} | {other} | {seeds} | {_with_error(mean, error, 3)} |")
    lines += ["", "## Rows", "", "| arm | seed | perplexity | KL | trials | plan |", "|---|---:|---:|---:|---:|---|"]
    for row in known.rows:
        cells = [row.arm, str(row.seed), show(row.perplexity), show(row.kl, 4), _tell_trials(row), escape(row.plan)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(known: Ablation, kind: str, path: Path) -> None:
    """A dot for each row, a bar for each arm's mean and its standard error."""
    from matplotlib.figure import Figure

    standings = rank_arms(known.rows)
    figure = Figure(figsize=(8, 0.6 * len(standings) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for place, standing in enumerate(standings):
        dots = [row.perplexity for row in known.rows if row.arm == standing.arm and row.perplexity is not None]
        axes.plot(dots, [place] * len(dots), "o", color="0.6", markersize=4)
        axes.errorbar(standing.perplexity, place, xerr=standing.perplexity_error or 0, fmt="D", color="C0", capsize=4)
    axes.set_yticks(range(len(standings)), [standing.arm for standing in standings])
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel("perplexity on the test text; bars: standard error over seeds")
    save_figure(figure, kind, path)
