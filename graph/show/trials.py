"""The table of a run's trials."""

from collections.abc import Sequence

from rich.table import Column, Table
from rich.text import Text

from graph.show.loop import fit
from graph.show.words import Event, tell_kl
from tools.base.words import clean, show_compact, show_percent
from tools.results.sentences import name_verdict

WIDE = 100
"""Columns from which the plan and the reason of a trial have a column each."""
VERDICTS = {"accept": "green", "rollback": "red", "refuse": "yellow"}


def trial_cells(trial: Event) -> list[str]:
    """The figures of a trial, as strings, one per column of TRIAL_COLUMNS."""
    number = trial["iteration"]
    cells = [str(number), show_percent(trial["sparsity"], 1), show_compact(trial["perplexity"])]
    if number == 0:
        return [*cells, "", "", "", "dense"]
    if (verdict := name_verdict(trial)) in ("refuse", "broke"):  # nothing was measured
        return [*cells[:2], "", "", show_compact(trial["predicted_kl"], 4), "", verdict]
    facts = "" if trial.get("fact_retention") is None else show_percent(trial["fact_retention"], 1)
    kl = tell_kl(trial).replace("± ", "±")
    return [*cells, kl, show_compact(trial["predicted_kl"], 4), facts, clean(verdict, 8)]


ANSWERS = "answer p kept"
TRIAL_COLUMNS = ("#", "sparsity", "ppl", "KL ± error", "pred.", ANSWERS, "verdict")


def _text_cells(trial: Event, texts: int) -> list[str]:
    """The KL of a trial on each of so many named texts; empty where it has none."""
    told = [show_compact(text["kl"], 4) for text in trial.get("texts", [])][:texts] if trial["iteration"] else []
    return told + [""] * (texts - len(told))


def _put_texts(cells: list[str], texts: list[str]) -> list[str]:
    """The cells of texts behind the KL of all."""
    return [*cells[:4], *texts, *cells[4:]] if texts else cells


def draw_trials(trials: Sequence[Event], width: int, shown: int, lines: int) -> Table:
    """The last `shown` trials, with the dense model first; plan and reason have `lines` lines each."""
    rest = trials[len(trials) - shown + 1 :] if len(trials) > shown else trials[1:]
    skipped = len(trials) - 1 - len(rest)
    asked = any(trial.get("fact_retention") is not None for trial in trials)
    keep = [i for i, head in enumerate(TRIAL_COLUMNS) if head != ANSWERS or asked] if width >= 70 else [0, 1, 2, 6]
    names = [clean(text["name"], 16) for text in trials[0].get("texts", [])] if width >= WIDE else []
    heads = _put_texts([TRIAL_COLUMNS[i] for i in keep], [f"KL {name}" for name in names])
    rows = []
    for trial in (trials[0], *rest):
        cells = trial_cells(trial)
        rows.append(_put_texts([cells[i] for i in keep], _text_cells(trial, len(names))))
    used, columns = 0, []
    for place, head in enumerate(heads):
        columns.append(Column(head, justify="left" if head == "verdict" else "right", no_wrap=True, overflow="crop"))
        used += max(len(head), *(len(row[place]) for row in rows)) + 1
    left = max(width - used, 8)
    widths, heads = [left], ["plan, reason"]
    if width >= WIDE:
        plan = min(max(len("plan"), *(len(clean(trial.get("plan", ""))) for trial in trials)), left // 2)
        widths, heads = [plan, left - plan - 1], ["plan", "reason"]
    heads[-1] += f" ({skipped} earlier hidden)" if skipped else ""
    columns += [Column(head, width=w, no_wrap=True) for head, w in zip(heads, widths, strict=True)]
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for trial, cells in zip((trials[0], *rest), rows, strict=True):
        words = [clean(trial.get("plan", "")), clean(trial.get("reason", ""))]
        if len(widths) == 2:
            texts = [fit(word, w, lines) for word, w in zip(words, widths, strict=True)]
        elif lines > 1:
            both = zip(words, (1, lines - 1), strict=True)
            texts = [[line for word, most in both if word for line in fit(word, left, most)]]
        else:
            texts = [fit(" · ".join(word for word in words if word), left, 1)]
        style = "" if trial["iteration"] == 0 else VERDICTS.get(trial["verdict"], "")
        table.add_row(*cells, *(Text("\n").join(text) for text in texts), style=style)
    return table
