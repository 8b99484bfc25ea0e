"""What a planner is told of earlier rounds and runs beside their trials and lessons, in short tables."""

from collections.abc import Sequence

from graph.llm.quoting import data_block, quote_data
from graph.reflecting.schema import Experience, Note
from tools.base.names import hide_directories
from tools.base.words import show_short
from tools.instruments.probed import PastProbe


def describe_experience(experience: Sequence[Experience]) -> str:
    """A table of what levers did, by model and sparsity; empty without any."""
    title = "Levers in earlier runs: change of KL in % beside the run's last kept plan, paired (trials, runs):"
    return f"{title}\n{data_block('experience', list_rows(experience))}" if experience else ""


def list_rows(experience: Sequence[Experience]) -> list[str]:
    """`refit: gamma clipped for plain -1.2 +- 0.3 (3, 2)` for each row, under a line that names model and sparsity."""
    lines, last = list[str](), ""
    for row in experience:
        model = f"relative {quote_data(hide_directories(row.model), 60)}" if row.model else "this model"
        if (place := f"{model}, {row.sparsity:.0%}") != last:
            lines.append(place)
            last = place
        figures = f"{100 * row.change:+.1f} +- {100 * row.error:.1f} ({row.trials}, {row.runs})"
        lines.append(f"{quote_data(row.levers, 100)} {figures}")
    return lines


def describe_notes(notes: Sequence[Note]) -> str:
    """A line for each note of strategy; empty without any."""
    lines = [
        f"run {quote_data(note.run, 40)} at {note.sparsity:.0%}, by {count_rounds(note)}: {quote_data(note.text, 300)}"
        for note in notes
    ]
    return f"Notes of the reflector, oldest first:\n{data_block('notes', lines)}" if lines else ""


def count_rounds(note: Note) -> str:
    """`rounds 2, 3`: the evidence of a note."""
    return f"round{'s' if len(note.trials) > 1 else ''} {', '.join(map(str, note.trials))}"


def describe_hope(measured: float | None, predicted: float | None) -> str:
    """` (x1.56)`: how many times as much KL was measured as predicted; empty where one is not known."""
    return f" (x{measured / predicted:.3g})" if measured is not None and predicted else ""


MAX_PROBES = 8
"""Probes of earlier rounds that planners are shown, the latest."""


def take_latest(probes: Sequence[PastProbe], count: int = MAX_PROBES) -> list[PastProbe]:
    """So many of the latest, and before them the best ones that these are compared with."""
    earlier, latest = probes[:-count], probes[-count:]
    told = {probe.best for probe in latest} - {0}
    return [*(probe for probe in earlier if probe.number in told), *latest]


def describe_probes(probes: Sequence[PastProbe]) -> str:
    """A line for each probe, this round's among them where it has been planned; empty without any."""
    lines = [_describe_probe(probe) for probe in probes]
    of_texts = ", also of named texts" if any(probe.texts for probe in probes) else ""
    beside = f"change beside the weights kept then{of_texts}, to its round's best"
    title = f"Probes (KL on tokens; paired: {beside}):"
    return f"{title}\n{data_block('probes', lines)}" if lines else ""


def _describe_probe(probe: PastProbe) -> str:
    error = "" if probe.kl_error is None else f" +- {show_short(probe.kl_error)}"
    change = "" if probe.change is None else f"; {probe.change:+.3g} +- {show_short(probe.change_error)}"
    for name, (of_text, text_error) in probe.texts.items():
        change += f", {quote_data(name, 40)} {of_text:+.3g} +- {show_short(text_error)}"
    behind = f"; {probe.behind:+.3g} +- {show_short(probe.behind_error)} to {probe.best}" if probe.best else ""
    trial = "" if probe.trial is None else f"; its round's trial {probe.trial:+.3g} +- {show_short(probe.trial_error)}"
    plan = quote_data(probe.plan, 120)
    kl = f"{show_short(probe.kl)}{error}{describe_hope(probe.kl, probe.predicted)} on {probe.tokens}"
    return f"probe {probe.number}, round {probe.iteration}: {plan}: {kl}{change}{behind}{trial}"
