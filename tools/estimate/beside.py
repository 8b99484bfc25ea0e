"""What the process holds that workers work for, in each phase of a run, and what lies in their object store."""

from collections.abc import Sequence

from tools.base.settings import WorkbenchSettings
from tools.estimate.phases import (
    ASKED_FOR,
    IN_ORDER,
    Facts,
    Part,
    Phase,
    count_levels,
    count_moments,
    describe_loading,
    describe_writing,
    list_other_moment,
)
from tools.estimate.shape import Shape, multiply
from tools.models.disk import Line
from tools.models.streamed import StreamSizes
from tools.texts.written import list_written


def list_phases_beside(
    facts: Facts,
    settings: WorkbenchSettings,
    parts: Sequence[Part],
    *,
    streamed: StreamSizes | None = None,
    anew: bool = False,
) -> list[Phase]:
    """As `list_phases`, of the process that workers with these `parts` work for, and of their object store."""
    shape, workers, nodes = facts.shape, parts[0].workers, sum(part.nodes for part in parts)
    model, program, read, moved = describe_loading(facts, shape.weights, streamed)

    def hidden(what: str, count: int) -> Line:
        states = (settings.count_all("validation"), "windows"), (settings.window, "tokens")
        copies = ((count, "copies"),) if count > 1 else ()
        return multiply(what, *copies, *states, (shape.hidden, "wide"), (shape.item, "bytes"))

    matrix = (shape.widest, "inputs"), (shape.widest, "inputs"), (4, "bytes")
    given = [
        Line(what="dense weights", how="the prunable layers, each put there once", bytes=shape.prunable),
        multiply("second moments of layers to prune", (2 * workers, "layers"), *matrix),
    ]
    moment, other = multiply("second moment of one layer", *matrix), list_other_moment(shape, settings)
    levels, sums = count_levels(shape), count_moments(shape, nodes, "sums of all workers")
    two = count_moments(shape, 2 * nodes, "sums of all workers for two blocks")
    collected, coming = ([sums], [two]) if anew else ([], [])  # whenever layers are pruned
    results = multiply("pruned layers of one block", (shape.members, "weights"), (shape.item + 1 / 8, "bytes"))
    return [
        Phase(name="load", device=[model], host=[program, *read, *moved]),
        *([describe_writing(facts, settings, model)] if list_written(settings) else []),
        Phase(
            name="validate the dense model",
            device=[model],
            host=[program, hidden("hidden states", 2)],
            store=[hidden("hidden states", 1)],
        ),
        Phase(name="profile, statistics", device=[model], host=[program, sums], store=[two]),
        Phase(name="profile, gradients", device=[model], host=[program]),
        Phase(
            name=ASKED_FOR,
            device=[model, moment, *other],
            host=[program, *collected],
            store=[*given, levels, *coming],
        ),
        Phase(
            name="prune",
            device=[model, moment, *other],
            host=[program, *collected],
            store=[*given, results, *coming],
        ),
        Phase(name=IN_ORDER, device=[model, moment], host=[program, sums], store=[*given, results, two]),
        Phase(
            name="validate",
            device=[model],
            host=[program, hidden("hidden states", 1)],
            store=[given[0], _count_pruned(shape), hidden("hidden states", 1)],
        ),
        Phase(name="export", device=[model], host=[program, *moved], store=[given[0]]),
    ]


def _count_pruned(shape: Shape) -> Line:
    return Line(what="pruned layers", how="all prunable layers, with a bit for each weight's mask", bytes=shape.packed)
