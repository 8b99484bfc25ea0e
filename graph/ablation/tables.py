"""What is written of an ablation: ablate.json, ablate.csv, ablate.md and the plot; and a row in one line."""

from functools import partial
from pathlib import Path
from typing import Any

from graph.ablation.rows import Ablation, Mean, Row, average, conclude, list_differences, rank_arms, show_p
from graph.ablation.settings import ROWS, TOLD, describe_arm
from tools.base.files import write_text, write_whole
from tools.base.rows import as_csv, save_figure, write_kept
from tools.base.student import CONFIDENCE
from tools.base.words import escape, show

WHAT_MARGINS_ARE = (
    f"± is the {CONFIDENCE:.0%} interval of Student's t over the seeds, of gains and differences paired by seed; p is "
    "that of the paired two-sided t test."
)


def _tell_seconds(settings: dict[str, Any]) -> str:
    seconds = settings["seconds"]
    return f", and begin no plan after {seconds:g} seconds, the profile's included" if seconds else ""


def _tell_trials(row: Row) -> str:
    told = {"by rule": row.by_rule, "more failed": row.failed, "more too dear": row.dear}
    notes = ", ".join(f"{number} {what}" for what, number in told.items() if number)
    return f"{row.trials} ({notes})" if notes else str(row.trials)


def describe_row(row: Row) -> str:
    """A row in one line, for the terminal."""
    return (
        f"{row.arm}, seed {row.seed}: {row.sparsity:.2%} zeros, perplexity {show(row.perplexity)}, "
        f"KL {show(row.kl, 4)}, trials {_tell_trials(row)}, {row.evaluated_tokens:,} tokens evaluated, "
        f"{row.agent_tokens:,} by agents, {row.seconds:.0f} s: {row.plan}"
    )


def write_tables(directory: Path, known: Ablation) -> None:
    """Write all that is known so far: as JSON, which goes on from there, Markdown, CSV, and a plot in two formats."""
    write_kept(directory / "ablate.json", known)
    write_text(directory / "ablate.md", describe(known))
    write_text(directory / "ablate.csv", as_csv(Row, known.rows, ["texts", "kls"], _list_text_columns))
    for kind in ("png", "svg"):
        write_whole(directory / f"ablate.{kind}", partial(_plot, known, kind))


def _list_text_columns(row: Row) -> dict[str, float | None]:
    """A row's figures on each of the named texts, by column."""
    columns = {f"perplexity {name}": value for name, value in row.texts.items()}
    return columns | {f"KL {name}": value for name, value in row.kls.items()}


def _show_mean(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return ""
    return f"{mean.value:.{digits}f}" + ("" if mean.margin is None else f" ± {mean.margin:.{digits}f}")


def _tell_goal(settings: dict[str, Any]) -> list[str]:
    """What was wanted, in the words that chat planners read and in the figures that rows are judged by."""
    if not settings.get("goal"):
        return []
    total = sum(settings["judge"].values())
    unseen = settings.get("unseen", {})
    judged = " and ".join(f"{weight / total:.0%} {escape(name)}" for name, weight in settings["judge"].items())
    at_hand = any(weight for name, weight in settings["judge"].items() if name not in unseen)
    told = f"; no arm was told so but {TOLD}" if at_hand else ""
    return [
        f"Chat planners were given a goal: {escape(settings['goal'])!r}. Perplexity and KL count {judged} in all rows"
        f"{told}.",
        *([f"No arm was given {' or '.join(unseen)}."] if unseen else []),
        "",
    ]


def _name_text(known: Ablation) -> str:
    """What rows are judged by: with a goal each text by what it counts then."""
    settings = known.settings
    if not settings.get("goal"):
        return known.protocol.text
    sources, total = {**settings["text"], **settings.get("unseen", {})}, sum(settings["judge"].values())
    counted = {name: weight / total for name, weight in settings["judge"].items() if weight}
    return " + ".join(f"{share:.0%} {name} {sources[name]}" for name, share in counted.items())


def _show_p(mean: Mean | None) -> str:
    return "" if mean is None or mean.p is None else show_p(mean.p).removeprefix("= ")


def describe(known: Ablation) -> str:
    """`ablate.md`."""
    settings, protocol = known.settings, known.protocol
    finite = [value for value in known.dense.values() if value is not None]
    dense = _show_mean(average(finite), 2) if finite else "not measured"
    tokens = protocol.tokens
    if settings.get("judge"):  # as many of each text, those that are unseen among them
        tokens = tokens // max(len(settings["text"]), 1) * sum(weight > 0 for weight in settings["judge"].values())
    lines = [
        f"# {escape(settings['model'])} at {settings['target_sparsity']:.0%}: was the agent worth its tokens?",
        "",
        f"Perplexity on {tokens:,} tokens of `{_name_text(known)}` (test text, {protocol.windows}, "
        f"{protocol.dtype}; dense: {dense}) of what each arm chose by the validation text. Each arm may put "
        f"{settings['evaluated_tokens']:,} tokens through the model once it is profiled: trials, probes, KL curves of "
        f"methods, sequential statistics, searches (a backward pass as two forwards){_tell_seconds(settings)}. "
        f"{WHAT_MARGINS_ARE}",
        "",
        *_tell_goal(settings),
        "Every seed has labels of its own for the KL curves, and its own windows for calibration, validation and test: "
        f"seed 0 those of --text-cut {settings['text_cut']}, each other one those of the cut behind.",
        "",
        *(f"- **{arm}**: {describe_arm(arm)}" for arm in ROWS if any(row.arm == arm for row in known.rows)),
        "",
        *(f"{line}\n" for line in conclude(known.rows)),
        "![Perplexity of each arm](ablate.svg)",
        "",
        "| arm | seeds | perplexity | gain over kappa | KL | evaluated tokens | agent tokens | cost "
        "| agent tokens per point | cost per point | seconds |",
        "|---|" + "---:|" * 10,
    ]
    for s in rank_arms(known.rows):
        gained = s.gain.value if s.gain is not None and s.gain.value > 0 and s.agent_tokens else None
        cells = [
            s.arm,
            f"{s.seeds}",
            _show_mean(s.perplexity, 2),
            _show_mean(s.gain, 3),
            f"{s.kl:.4f}",
            f"{s.evaluated_tokens:,.0f}",
            f"{s.agent_tokens:,.0f}",
            f"${s.cost:.4f}",
            f"{s.agent_tokens / gained:,.0f}" if gained else "",
            f"${s.cost / gained:.4f}" if gained else "",
            f"{s.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        *_list_each_text(known),
        "",
        "## Differences, paired by seed",
        "",
        "| arm | less | seeds | perplexity | p | KL, % | p |",
        "|---|---|" + "---:|" * 5,
    ]
    for arm, other, seeds, mean, kl in list_differences(known.rows):
        cells = [arm, other, f"{seeds}", _show_mean(mean, 3), _show_p(mean), _show_mean(kl, 1), _show_p(kl)]
        lines.append(f"| {' | '.join(cells)} |")
    texts = _list_names(settings)
    head = ["arm", "seed", "perplexity", *texts, "KL", "trials", "tokens", "seconds", "plan"]
    lines += ["", "## Rows", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in known.rows:
        spent = [f"{row.evaluated_tokens:,}", f"{row.seconds:.0f}"]
        each = [show(row.texts.get(name)) for name in texts]
        figures = [row.arm, str(row.seed), show(row.perplexity), *each, show(row.kl, 4), _tell_trials(row)]
        cells = [*figures, *spent, escape(row.plan)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _list_names(settings: dict[str, Any]) -> list[str]:
    """The named texts, and those that no arm was given."""
    return [*settings.get("text", {}), *settings.get("unseen", {})]


def _list_each_text(known: Ablation) -> list[str]:
    """What the arms kept on each of the named texts; nothing where there are none."""
    names = _list_names(known.settings)
    if not names:
        return []
    lines = ["", "## Each text", "", f"| arm | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for standing in rank_arms(known.rows):
        own = [row.texts for row in known.rows if row.arm == standing.arm]
        values = {name: [value for texts in own if (value := texts.get(name)) is not None] for name in names}
        cells = [_show_mean(average(found), 2) if found else "" for found in values.values()]
        lines.append(f"| {standing.arm} | {' | '.join(cells)} |")
    return lines


def _plot(known: Ablation, kind: str, path: Path) -> None:
    """A dot for each row, a bar for each arm's mean and its t interval."""
    from matplotlib.figure import Figure

    standings = rank_arms(known.rows)
    figure = Figure(figsize=(8, 0.6 * len(standings) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for place, standing in enumerate(standings):
        dots = [row.perplexity for row in known.rows if row.arm == standing.arm and row.perplexity is not None]
        axes.plot(dots, [place] * len(dots), "o", color="0.6", markersize=4)
        mean = standing.perplexity
        axes.errorbar(mean.value, place, xerr=mean.margin or 0, fmt="D", color="C0", capsize=4)
    axes.set_yticks(range(len(standings)), [standing.arm for standing in standings])
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel(f"perplexity on the test text; bars: {CONFIDENCE:.0%} t interval over seeds")
    save_figure(figure, kind, path)
