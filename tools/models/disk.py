"""What a run may write to disk, counted over the shapes of the model and the sizes of the texts."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from billhook_kernels.statistics import count_triangle
from tools.base.settings import TeamSettings, count_beside, count_checkpoints
from tools.models.artifacts import bound_artifact
from tools.models.layers import Layer, find_blocks, list_readers


class Line(BaseModel):
    """One item of a sum."""

    what: str
    how: str = Field(description="The formula, in words and figures.")
    bytes: int


class DiskPlan(NamedTuple):
    """What a run may write, and whether second moments are part of it."""

    lines: list[Line]
    at_once: int | None
    """Of how many blocks second moments lie there at once, at most; None where those of all are kept."""

    @property
    def bytes(self) -> int:
        """Sum of what is written."""
        return sum(line.bytes for line in self.lines)


class CutSizes(NamedTuple):
    """Bytes of what a run that takes parts away keeps on disk, at most."""

    checkpoint: int
    """Layers of one cut."""
    units: int
    """Which units of all blocks stay, by one cut, or the order in which they go."""
    smaller: int
    """The smaller model."""


def plan_disk(
    model: Any,
    layers: Sequence[Layer],
    settings: TeamSettings,
    room: float,
    lead: int = 0,
    *,
    streamed: bool = False,
    in_source: Container[str] = (),
    waiting: int = 0,
    checkpoints: int | None = None,
    sizes: CutSizes | None = None,
) -> DiskPlan:
    """What a run writes that has so many bytes of `room`: all second moments, or else those of as many blocks as fit.

    Of one block they are there in any case, be there room or not. Others are as in `list_disk`. Where parts go `sizes`
    are theirs, and no second moments are kept.
    """
    if sizes:
        lines = list_cut_disk(model, layers, settings, sizes, lead, checkpoints, streamed=streamed, in_source=in_source)
        return DiskPlan(lines, None)

    def plan(at_once: int | None) -> DiskPlan:
        lines = list_disk(
            model,
            layers,
            settings,
            lead,
            streamed=streamed,
            in_source=in_source,
            waiting=waiting,
            checkpoints=checkpoints,
            at_once=at_once,
        )
        return DiskPlan(lines, at_once)

    kept, one, two = plan(None), plan(1), plan(2)
    if kept.bytes <= room:
        return kept
    further = max(0.0, room - one.bytes) // max(two.bytes - one.bytes, 1)
    return plan(1 + min(int(further), max(layer.block for layer in layers)))


def list_disk(
    model: Any,
    layers: Sequence[Layer],
    settings: TeamSettings,
    lead: int = 0,
    *,
    streamed: bool = False,
    in_source: Container[str] = (),
    waiting: int = 0,
    checkpoints: int | None = None,
    at_once: int | None = None,
) -> list[Line]:
    """What a run may write: moments, block inputs, checkpoints, the exported model and the dense weights.

    Each window has `lead` tokens before its text. A model that is `streamed` lies there as it is now, too, once for
    each process on this machine, and what windows passed on; its layers whose names are `in_source` have their dense
    weights in files that are there already, and of a block's second moments so many sums over some of the text are
    `waiting`. Second moments are those of `at_once` blocks where that is given, and of `checkpoints` there are as many
    as `count_checkpoints` has it where it is not said how many.
    """
    copied = [layer for layer in layers if layer.name not in in_source]
    blocks, embedding = len(find_blocks(model)), model.get_input_embeddings().weight
    windows = settings.back_propagated
    tokens, wide, item = lead + settings.window, embedding.shape[1], embedding.element_size()
    checkpoints = count_checkpoints(settings) if checkpoints is None else checkpoints
    checkpoint = sum(bound_artifact(layer.weight_OI) for layer in layers)
    return [
        *(_list_kept_moments(layers, settings) if at_once is None else []),
        *([_describe_held_moments(layers, settings, at_once)] if at_once else []),
        Line(
            what="inputs of all blocks, while the model is profiled",
            how=f"{blocks:,} blocks × {windows:,} windows × {tokens:,} tokens × {wide:,} wide × {item:,} bytes",
            bytes=blocks * windows * tokens * wide * item,
        ),
        Line(
            what="layers of checkpoints",
            how=f"{checkpoints} × the prunable layers, each with its mask",
            bytes=checkpoints * checkpoint,
        ),
        *(_list_streamed(model, settings, tokens) if streamed else []),
        *([_describe_waiting(layers, settings, waiting)] if streamed and waiting else []),
        Line(what="the exported model", how="all parameters", bytes=_count_bytes(model)),
        *(_list_taken_apart(layers) if streamed else []),
        *([_describe_dense(copied, len(layers))] if copied else []),
    ]


def _list_taken_apart(layers: Sequence[Layer]) -> list[Line]:
    """What `tools.models.save` writes of a streamed model beside the export; nothing of one without experts."""
    experts = [layer.weight_OI for layer in layers if layer.pool]
    size = sum(weight_OI.numel() * weight_OI.element_size() for weight_OI in experts)
    what = "experts on their way to the export"
    return [Line(what=what, how=f"{len(experts):,} layers", bytes=size)] if experts else []


def list_cut_disk(
    model: Any,
    layers: Sequence[Layer],
    settings: TeamSettings,
    sizes: CutSizes,
    lead: int = 0,
    checkpoints: int | None = None,
    *,
    streamed: bool = False,
    in_source: Container[str] = (),
) -> list[Line]:
    """As `list_disk`, of a run that takes parts away: nothing is measured of single weights."""
    copied = [layer for layer in layers if layer.name not in in_source]
    checkpoints = count_checkpoints(settings) if checkpoints is None else checkpoints
    hidden = settings.count_all("validation")
    # what every block and the head read, and beside it what flowed back, as it is kept and as it was kept before
    walked, tokens = (len(find_blocks(model)) + 3) * settings.count_all("calibration"), lead + settings.window
    return [
        _describe_hidden("the dense model's hidden states", model, hidden, tokens),
        _describe_hidden("inputs of all blocks, and gradients, while the parts are measured", model, walked, tokens),
        Line(
            what="layers of checkpoints",
            how=f"{checkpoints} × masks of the prunable layers, and what was fitted to the units that stay",
            bytes=checkpoints * sizes.checkpoint,
        ),
        Line(
            what="which units stay, and the order in which they go",
            how=f"{checkpoints + 1} × 8 bytes × the units of all blocks",
            bytes=(checkpoints + 1) * sizes.units,
        ),
        Line(
            what="the exported model",
            how=f"as small as it comes out; {_count_bytes(model):,} bytes where no cut is kept",
            bytes=sizes.smaller,
        ),
        *([*_list_streamed(model, settings, tokens), _describe_made(sizes)] if streamed else []),
        *([_describe_dense(copied, len(layers))] if copied else []),
    ]


def _describe_made(sizes: CutSizes) -> Line:
    return Line(what="the smaller model, until it is exported", how="once more", bytes=sizes.smaller)


def _describe_hidden(what: str, model: Any, windows: int, tokens: int) -> Line:
    weight = model.get_input_embeddings().weight
    wide, item = weight.shape[1], weight.element_size()
    return Line(
        what=what,
        how=f"{windows:,} windows × {tokens:,} tokens × {wide:,} wide × {item:,} bytes",
        bytes=windows * tokens * wide * item,
    )


def _describe_dense(copied: Sequence[Layer], count: int) -> Line:
    others = f"; of {len(copied)} layers, the model's own files have others" if len(copied) < count else ""
    return Line(
        what="the dense weights of the prunable layers",
        how=f"each is pruned from them; mapped into memory while there is room{others}",
        bytes=sum(layer.weight_OI.nbytes for layer in copied),
    )


def _list_kept_moments(layers: Sequence[Layer], settings: TeamSettings) -> list[Line]:
    readers, texts = list_readers(layers), max(len(settings.text), 1)
    moments = sum(_count_moment(layer) for layer in readers)
    return [
        Line(
            what="second moments",
            how=f"{f'{texts} texts × ' if texts > 1 else ''}4 bytes × the upper half of inputs², over "
            f"{len(readers)} layers",
            bytes=texts * moments,
        ),
        *([Line(what="those of questions", how="as many", bytes=moments)] if settings.mixes_questions else []),
    ]


def _describe_held_moments(layers: Sequence[Layer], settings: TeamSettings, blocks: int) -> Line:
    """Of the texts of one recipe, while the layers of these blocks are pruned."""
    texts = max(len(settings.mixable), 1)
    return Line(
        what="second moments, of some blocks at a time",
        how=f"{f'{texts} texts × ' if texts > 1 else ''}4 bytes × the upper half of inputs², of {blocks:,} "
        f"{'blocks' if blocks > 1 else 'block'}",
        bytes=texts * blocks * _find_largest(layers, _count_moment),
    )


def _find_largest(layers: Sequence[Layer], count: Callable[[Layer], int]) -> int:
    """What the layers of a block come to that inputs are read by, in the block where that is most."""
    sizes = Counter[int]()
    for layer in list_readers(layers):
        sizes[layer.block] += count(layer)
    return max(sizes.values())


def _count_moment(layer: Layer) -> int:
    return 4 * count_triangle(layer.weight_OI.shape[1])


def _list_streamed(model: Any, settings: TeamSettings, tokens: int) -> list[Line]:
    processes = 1 + count_beside(settings)
    how = f"{f'{processes} processes × ' if processes > 1 else ''}all parameters"
    now = Line(what="the model as it is now", how=how, bytes=processes * _count_bytes(model))
    if settings.workers and not count_beside(settings):  # those of a cluster keep nothing
        return [now]
    texts = {"a validation": "validation", "a walk of the calibration text": "calibration"}
    states = [
        _describe_hidden(f"{what} under way", model, settings.count_all(text), tokens) for what, text in texts.items()
    ]
    # what is kept and what takes its place, and what there is no memory for
    return [now, *(Line(what=x.what, how=f"3 copies × {x.how}", bytes=3 * x.bytes) for x in states)]


def _describe_waiting(layers: Sequence[Layer], settings: TeamSettings, sums: int) -> Line:
    processes = max(count_beside(settings), 1)
    return Line(
        what="sums of second moments that wait for others",
        how=f"{f'{processes} processes × ' if processes > 1 else ''}{sums} × 4 bytes × inputs², over a block's layers",
        bytes=processes * sums * _find_largest(layers, lambda layer: 4 * layer.weight_OI.shape[1] ** 2),
    )


def _count_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
