"""Two targets: a cut, and zeros in what stays of it, which a second run sets in the smaller model.

The second run's config stands in `run.json` of the first; its name is the first one's with `-zeros` behind it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graph.config import CHANGEABLE, NOT_OF_CUTS, RunConfig, check_config
from graph.goals.schema import Brief, follow_brief
from graph.runs.directory import read_made_run
from tools.base.options import read_environment, read_yaml
from tools.base.settings import CutSettings
from tools.results.page.record import Record

BEHIND = "-zeros"
"""Behind the name of the run that cuts."""
OF_ZEROS = ("target_sparsity", "pattern")
"""Fields of which one beside a size or a speed asks for zeros as well."""
TARGETS = ("target_size", "target_speed")
LEAST_RISE = 1e-6
"""Of a named text's perplexity that zeros may add where the cut took all that it may lose: no bound would be 0."""
OF_CUTS = (*TARGETS, *CutSettings.model_fields)
ONLY_SECOND = frozenset({*OF_ZEROS, *NOT_OF_CUTS, "max_layer_sparsity"})
"""Fields that the first run has no use for."""


def read_configs(flags: dict[str, Any], path: Path | None) -> tuple[RunConfig, RunConfig | None]:
    """(the run's options; those of a second run where zeros are asked for beside a cut). Raises UserError in one line.

    A sparsity in a config file is asked for where the cut is in that file, too: else a file could not be cut by.
    """
    in_file = read_yaml(path) if path else {}
    given = {**read_environment(RunConfig), **flags}
    values = {**in_file, **given}
    first = {name: value for name, value in values.items() if name not in ONLY_SECOND}
    cuts = any(name in values for name in TARGETS) and check_config(first).takes_parts
    asking = in_file if any(in_file.get(name) for name in TARGETS) else {}
    if not cuts or not any({**asking, **given}.get(name) for name in OF_ZEROS):
        return check_config(values), None
    return check_config(first), check_config({name: value for name, value in values.items() if name not in OF_CUTS})


def read_second(directory: Path, changes: Mapping[str, Any] | None = None) -> RunConfig | None:
    """What `run.json` says of a second run, with the changes; None where there is to be none. Raises BrokenSeal,
    UserError.
    """
    kept = read_made_run(directory).get("second")
    return None if kept is None else check_config({**kept, **(changes or {})})


def name_second(name: str) -> str:
    """What the run is called that goes on from the cut of the run `name`."""
    return name + BEHIND


def keep_brief(second: RunConfig, brief: Brief | None) -> RunConfig:
    """The second run's options with what the first one made of the goal, in its place.

    A goal that texts are written for is asked about anew: no text was written for the first run.
    """
    if brief is None or second.goal_tokens:
        return second
    return follow_brief(second, brief).model_copy(update={"goal": ""})


def leave_caps(caps: Mapping[str, Any], cut: Record) -> dict[str, Any]:
    """What caps on the agents of both runs together leave the second one; nothing of those that are not there."""
    assert cut.summary is not None, "the first run has ended"
    spent, left = cut.summary.agents, dict[str, Any]()
    if tokens := caps.get("max_agent_tokens"):
        left["max_agent_tokens"] = max(1, tokens - spent.input_tokens - spent.output_tokens)
    if cost := caps.get("max_agent_cost"):
        left["max_agent_cost"] = max(1e-9, cost - spent.cost)
    return left


def follow_cut(second: RunConfig, first: RunConfig, cut: Record, model: Path) -> RunConfig:
    """The second run's options once the first has ended: its model is the cut one, and what is capped, or must be
    known at the end, holds of both runs together.
    """
    found = {field: getattr(first, field) for field in CHANGEABLE} | {"model": str(model.resolve())}
    found |= leave_caps(found, cut)
    retention = cut.kept.fact_retention if cut.kept else None
    if second.min_fact_retention and retention:
        found["min_fact_retention"] = min(1.0, second.min_fact_retention / retention)
    if second.text_bounds:
        rises = _list_rises(cut)
        found["text_bounds"] = {
            name: max((1 + most) / (1 + rises.get(name, 0.0)) - 1, LEAST_RISE)
            for name, most in second.text_bounds.items()
        }
    return check_config({**second.model_dump(), **found})


def _list_rises(cut: Record) -> dict[str, float]:
    """How far each named text's perplexity has risen above the dense model's, as a share."""
    before = {text.name: text.perplexity for text in cut.dense.texts} if cut.dense else {}
    after = {text.name: text.perplexity for text in cut.kept.texts} if cut.kept else {}
    return {name: now / dense - 1 for name, now in after.items() if now and (dense := before.get(name))}
