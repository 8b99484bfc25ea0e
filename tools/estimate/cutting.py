"""What a run will need that takes whole parts away: what goes at most, and what its phases hold beside the others.

How much goes of which kind is for plans to say: every figure is the most of all cuts that come to the target. What a
speed comes to is measured when the run begins, so that of one any cut is taken to come to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tools.base.settings import WorkbenchSettings
from tools.estimate.course import CutCourse
from tools.estimate.phases import IN_ORDER, WRITE, Facts, Phase, describe_program, describe_streamed, find_common
from tools.estimate.shape import count_once, list_backward, multiply, name_chunk
from tools.estimate.units import PartForm, count_elimination, count_fit
from tools.models.artifacts import bound_mask, bound_values
from tools.models.disk import CutSizes, Line
from tools.models.layers import Layer
from tools.models.streamed import StreamSizes
from tools.plans.cuts import Counts, Shape, find_most, list_by_blocks
from tools.surgery.moments import count_searched
from tools.surgery.pace import list_lacking
from tools.surgery.parts import KINDS, find_parts
from tools.surgery.share import find_shape, find_target

TIME = "time other shapes"
CURVES = "curves of units, walks"
CHOOSE = "curves of units, which go"
SEARCH = "search of blocks to drop"
CUT = "prune, fold and fit"
WANDA = "uniform Wanda, at most"
BUILD = "build the smaller model"


class Cutting(NamedTuple):
    """What goes of a model, at most, and what is left of it."""

    rounds: int
    shape: Shape
    most: Counts
    forms: list[PartForm]
    """Of the kinds that may go, or be fitted in place of blocks that do."""
    dtype: torch.dtype
    whole: int
    """Bytes of the dense model."""
    sizes: CutSizes
    own: int
    """Bytes of the smaller model's weights that are not the dense model's, at most."""
    fitted: int
    """Bytes of the fitted output projections of one block, at most."""
    timed: list[tuple[int, int]]
    """(all, those that are its own) bytes of the weights of each shape that is timed beside the dense model."""

    @property
    def chosen(self) -> list[PartForm]:
        """Those of which units go."""
        return [form for form in self.forms if form.most]

    def describe(self) -> str:
        """What goes at most, in words."""
        shape, most = self.shape, self.most
        told = f"{most.neurons:,} of {shape.neurons.units:,} neurons"
        told += f" and {most.heads} of {shape.heads.units} groups of heads" if "heads" in shape.kinds else ""
        told += f" of every block, and {most.blocks} of {shape.blocks} blocks, not all at once"
        left = f"{self.sizes.smaller / self.whole:.1%} of the model's bytes stay"
        return f"{'what a speed takes is measured then' if self.timed else left}; at most {told}"


def find_cutting(model: Any, layers: Sequence[Layer], course: CutCourse) -> Cutting:
    """Of a model, which may be on the meta device. Raises UserError as the run itself does where no such cut can be."""
    if course.size:
        target = find_target(model, course.size, course.align)
        shape = target.shape
        listed = [counts for of_number in list_by_blocks(shape, target.share) for counts in of_number]
    else:
        shape = find_shape(model, course.align)
        listed = _list_corners(shape)
    most, item = find_most([listed]), layers[0].weight_OI.element_size()
    whole = sum(parameter.nbytes for parameter in model.parameters())
    forms = _list_forms(model, listed)
    fitted = max(_count_fitted(shape, forms, counts) for counts in listed)
    lacking = [] if course.size else list(list_lacking(shape).values())
    return Cutting(
        rounds=course.rounds,
        shape=shape,
        most=most,
        forms=forms,
        dtype=layers[0].weight_OI.dtype,
        whole=whole,
        sizes=CutSizes(
            checkpoint=_count_checkpoint(layers, fitted),
            units=8 * shape.blocks * sum(form.units for form in forms),
            smaller=max(_count_smaller(shape, counts, whole, item) for counts in listed),
        ),
        own=max(_count_own(shape, counts, item) for counts in listed),
        fitted=item * sum(form.outputs * (form.inputs - form.least * form.width) for form in forms),
        timed=[(_count_smaller(shape, counts, whole, item), _count_own(shape, counts, item)) for counts in lacking],
    )


def _list_forms(model: Any, listed: Sequence[Counts]) -> list[PartForm]:
    """Neurons make up for what is not passed on, those before whole blocks that may go, too."""
    forms = []
    for kind in KINDS:
        fold = kind == "neurons"
        going = [getattr(counts, kind) for counts in listed if getattr(counts, kind) or (fold and counts.blocks)]
        if going:
            part = find_parts(model, kind)[0]
            outputs, inputs = part.output.weight_OI.shape
            biased = part.bias is not None
            forms.append(PartForm(kind, part.units, inputs, outputs, max(going), min(going), biased, fold))
    return forms


def _list_corners(shape: Shape) -> list[Counts]:
    """The least and the largest of all cuts."""
    (_, *heads), (_, *neurons), blocks = shape.heads.options, shape.neurons.options, shape.blocks - 1
    both = Counts(min(heads, default=0), neurons[0])
    most = Counts(max(heads, default=0), neurons[-1], blocks)
    return [both, Counts(neurons=neurons[0]), Counts(blocks=min(1, blocks)), most]


# --- sizes -------------------------------------------------------------------------------------------------------


def _count_smaller(shape: Shape, counts: Counts, whole: int, item: int) -> int:
    """Bytes of the model without what goes, biases counted as if they stayed."""
    units = counts.heads * shape.heads.cost + counts.neurons * shape.neurons.cost
    gone = counts.blocks * shape.block_cost + (shape.blocks - counts.blocks) * units
    return whole - round(item * gone)


def _count_own(shape: Shape, counts: Counts, item: int) -> int:
    """Bytes of the layers that are cut, as they are then: all others are the dense model's."""
    left = sum(
        (units.units - gone) * units.cost
        for units, gone in ((shape.heads, counts.heads), (shape.neurons, counts.neurons))
        if gone
    )
    return round(item * (shape.blocks - counts.blocks) * left)


def _count_fitted(shape: Shape, forms: Sequence[PartForm], counts: Counts) -> int:
    """Weights of the output projections that are fitted: of what is cut, and of what stands before dropped blocks."""
    stay = shape.blocks - counts.blocks
    fitted = 0
    for form in forms:
        gone = getattr(counts, form.kind)
        before = min(counts.blocks, stay) if form.folds else 0
        fitted += (stay if gone else before) * form.outputs * (form.inputs - gone * form.width)
    return fitted


def _count_checkpoint(layers: Sequence[Layer], fitted: int) -> int:
    """Bytes of the artifacts of one cut with so many fitted weights."""
    masks = sum(bound_mask(layer.weight_OI) + bound_values(layer.weight_OI, 0) for layer in layers)
    biases = sum(layer.bias_O.nbytes for layer in layers if layer.bias_O is not None)
    return masks + biases + fitted * layers[0].weight_OI.element_size()


# --- phases ------------------------------------------------------------------------------------------------------


def list_cut_phases(
    phases: Sequence[Phase],
    facts: Facts,
    settings: WorkbenchSettings,
    cutting: Cutting,
    *,
    streamed: StreamSizes | None = None,
    part: int | None = None,
    lead: int = 0,
    works: bool = True,
) -> list[Phase]:
    """The phases of such a run, with those of any run that it has; a worker waits while the model's process `works`.

    The first `lead` tokens of each window are no text. Of a model that is `streamed` so is the smaller one; of one that
    is laid over several devices, of which one holds so large a `part`, too.
    """
    named, common = {phase.name: phase for phase in phases}, find_common(phases, "device")
    program, always = [describe_program(facts)], find_common(phases, "host")

    def add(name: str, found: tuple[list[Line], list[Line]], host: list[Line]) -> Phase:
        device, beside = found if works else ([], [])
        return Phase(name=name, device=[*common, *device], host=[*host, *beside])

    build = _list_build(facts, settings, cutting, streamed, part)
    export = named["export"]
    return [
        *(named[name] for name in ("load", WRITE) if name in named),
        *([add(TIME, _list_timing(facts, cutting), program)] if cutting.timed else []),
        named["validate the dense model"],
        add(CURVES, _list_walks(facts, settings, cutting), program),
        *([add(CHOOSE, _list_choosing(facts, settings, cutting), program)] if cutting.chosen else []),
        *([add(SEARCH, _list_search(facts, settings, cutting, lead), program)] if cutting.most.blocks else []),
        add(CUT, _list_cut(facts, settings, cutting), always),
        named["validate"],
        named[IN_ORDER].model_copy(update={"name": WANDA}),
        add(BUILD, build, always),
        export.model_copy(update={"device": [*export.device, *(build[0][:1] if works else [])]}),
    ]


def _state(facts: Facts, settings: WorkbenchSettings, what: str, *factors: tuple[float, str]) -> Line:
    """What blocks pass on of one window, so many times."""
    one = (settings.window, "tokens"), (facts.shape.hidden, "wide"), (facts.shape.item, "bytes")
    return multiply(what, *factors, *one)


def _count_windows(settings: WorkbenchSettings) -> tuple[float, str]:
    return settings.count_all("calibration"), "windows"


def _list_walks(facts: Facts, settings: WorkbenchSettings, cutting: Cutting) -> tuple[list[Line], list[Line]]:
    """Lines of the device and of the host."""
    parts, windows = (2 * len(cutting.chosen), "outputs and gradients"), _count_windows(settings)
    device = [
        *list_backward(facts.shape, facts.counts),
        _count_sums(cutting),
        _state(facts, settings, "of what parts give, one window", parts),
        _count_doubles(settings, cutting),
    ]
    return device, [_state(facts, settings, "what one block reads and what it gives", (2, "places"), windows)]


def _list_choosing(facts: Facts, settings: WorkbenchSettings, cutting: Cutting) -> tuple[list[Line], list[Line]]:
    """As `_list_walks`, of one block."""
    most = max(count_elimination(form, cutting.dtype).bytes for form in cutting.chosen)
    return [_count_sums(cutting), count_once("units of one part, one after another", most, _SMALLER)], [
        _state(facts, settings, "gradients passed on", _count_windows(settings)),
    ]


_SMALLER = "a smaller part of the same form"


def _count_sums(cutting: Cutting) -> Line:
    size = sum(4 * (form.inputs**2 + form.outputs**2) for form in cutting.chosen)
    return Line(what="sums of one block's parts", how="4 bytes × (inputs² + outputs²), over its parts", bytes=size)


def _count_doubles(settings: WorkbenchSettings, cutting: Cutting) -> Line:
    channels = max((max(form.inputs, form.outputs) for form in cutting.forms), default=0)
    tokens = (settings.window, "tokens"), (channels, "channels of the widest part")
    return multiply("what it reads in fp64", (2, "copies"), *tokens, (8, "bytes"))


def _list_search(
    facts: Facts, settings: WorkbenchSettings, cutting: Cutting, lead: int
) -> tuple[list[Line], list[Line]]:
    """As `_list_walks`; what blocks read without those that are gone is held until it is there without one more."""
    windows = min(count_searched(settings.window - lead), settings.count_all("calibration")), "windows"
    places = facts.shape.blocks + 1, "places"
    device = [
        count_once("forward of one block", facts.counts.forward_bytes),
        count_once("logits of a chunk, beside the dense model's", facts.counts.loss_bytes, name_chunk(facts.shape)),
        _state(facts, settings, "dense hidden states", windows),
    ]
    if facts.device != "cpu":
        device.append(_state(facts, settings, "inputs of all blocks, one window", places))
    sets = (min(2, cutting.most.blocks), "sets")
    return device, [_state(facts, settings, "inputs of all blocks", sets, windows, places)]


def _list_cut(facts: Facts, settings: WorkbenchSettings, cutting: Cutting) -> tuple[list[Line], list[Line]]:
    """As `_list_walks`: of the walk, or of the fit of one part where that holds more."""
    read = sum(form.inputs for form in cutting.forms)
    one = (settings.window, "tokens")
    walk = [
        count_once("forward of one block", facts.counts.forward_bytes),
        multiply("what parts read, one window", one, (read, "channels"), (facts.shape.item, "bytes")),
        multiply("what is not passed on", (3, "copies"), one, (facts.shape.hidden, "wide"), (4, "bytes")),
        _count_doubles(settings, cutting),
    ]
    most = max((count_fit(form, cutting.dtype).bytes for form in cutting.forms), default=0)
    fit = [count_once("the fit of one part", most, _SMALLER)]
    size = sum(8 * form.inputs * (form.inputs + form.folds * form.outputs) for form in cutting.forms)
    sums = "2 halves × 4 bytes × inputs², with inputs × outputs of neurons"
    device = [
        Line(what="fitted output projections", how="of one block, at most", bytes=cutting.fitted),
        Line(what="sums of one block's parts", how=f"{sums}, over its parts", bytes=size),
        *max(walk, fit, key=lambda lines: sum(line.bytes for line in lines)),
    ]
    both = _state(facts, settings, "inputs of one block, of both models", (2, "models"), _count_windows(settings))
    return device, [both]


def _list_build(
    facts: Facts, settings: WorkbenchSettings, cutting: Cutting, streamed: StreamSizes | None, part: int | None
) -> tuple[list[Line], list[Line]]:
    """As `_list_walks`; the first line is that of the smaller model. What is not cut is shared on a CPU alone."""
    here = facts.device == "cpu"
    size, smaller = (cutting.own if here else cutting.sizes.smaller), cutting.sizes.smaller
    how = "its layers that are cut; the others are the dense model's" if here else "all its parameters"
    model = Line(what="the smaller model", how=how, bytes=size)
    if part is not None:  # what goes may all lie on others
        how = "what of the dense model lies there, at most"
        model = model.model_copy(update={"how": how, "bytes": min(part, size)})
    if streamed:
        model = describe_streamed(facts, streamed).model_copy(update={"what": "of the smaller model"})
    device = [
        model,
        count_once("forward of one block", facts.counts.forward_bytes),
        _state(facts, settings, "inputs of all blocks, one window", (facts.shape.blocks + 1, "places")),
    ]
    moved = Line(what="the smaller model on its way", how="all its parameters", bytes=smaller)
    return device, [] if here or streamed else [moved]


def _list_timing(facts: Facts, cutting: Cutting) -> tuple[list[Line], list[Line]]:
    """As `_list_walks`, of what is timed beside the dense model to know what a speed takes."""
    here = facts.device == "cpu"
    size = sum(own if here else smaller for smaller, own in cutting.timed)
    how = f"{len(cutting.timed)} at once{', what they share with the dense model left out' if here else ''}"
    device = [
        Line(what="smaller shapes", how=how, bytes=size),
        count_once("forward of one block", facts.counts.forward_bytes),
    ]
    largest = max(smaller for smaller, _ in cutting.timed)
    return device, [] if here else [Line(what="one of them on its way", how="all its parameters", bytes=largest)]
