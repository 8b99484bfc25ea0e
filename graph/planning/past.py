"""What a planner is told of earlier runs, in short tables."""

from collections.abc import Sequence

from graph.llm.quoting import data_block, quote_data
from graph.reflecting.schema import Experience
from tools.base.names import hide_directories


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
