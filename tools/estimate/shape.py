"""The figures of a model that estimates are made of, and the lines that they are made into."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tools.estimate.block import Counts
from tools.models.disk import Line
from tools.models.layers import Layer, find_blocks, list_readers
from tools.models.readout import CHUNK


class Shape(NamedTuple):
    """The figures that all formulas are made of."""

    weights: int
    """Bytes of the whole model."""
    prunable: int
    """Bytes of the prunable layers."""
    item: int
    """Bytes of one number of the model."""
    blocks: int
    hidden: int
    """Width of what blocks pass on."""
    vocabulary: int
    flow: int
    """Numbers a token that the layers of one block read and write, at most."""
    widest: int
    """Inputs of the layer that has most."""
    flow_layer: int
    """Numbers a token that one layer reads and writes, at most."""
    moments: int
    """Bytes of the second moments of one block, at most."""
    members: int
    """Weights of the layers of one block, at most."""
    packed: int
    """Bytes of the prunable layers with their masks, as they travel when they were pruned."""


def measure_shape(model: Any, layers: Sequence[Layer], routed: float = 1.0) -> Shape:
    """The shape of a model, which may be on the meta device; its experts are sent the share `routed` of all tokens."""
    flows: dict[int, float] = {}
    moments: dict[int, int] = {}
    members: dict[int, int] = {}
    for layer in layers:
        outputs, inputs = layer.weight_OI.shape
        members[layer.block] = members.get(layer.block, 0) + outputs * inputs
        flows[layer.block] = flows.get(layer.block, 0) + (outputs + inputs) * (routed if layer.pool else 1)
    for layer in list_readers(layers):
        moments[layer.block] = moments.get(layer.block, 0) + 4 * layer.weight_OI.shape[1] ** 2
    head = model.get_output_embeddings().weight
    return Shape(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        prunable=sum(layer.weight_OI.nbytes for layer in layers),
        item=head.itemsize,
        blocks=len(find_blocks(model)),
        hidden=model.config.get_text_config().hidden_size,
        vocabulary=head.shape[0],
        flow=math.ceil(max(flows.values())),
        widest=max(layer.weight_OI.shape[1] for layer in layers),
        flow_layer=max(sum(layer.weight_OI.shape) for layer in layers),
        moments=max(moments.values()),
        members=max(members.values()),
        packed=sum(layer.weight_OI.nbytes + layer.weight_OI.numel() // 8 for layer in layers),
    )


def multiply(what: str, *factors: tuple[float, str]) -> Line:
    """A line that is one product: its factors are (number, what is counted), the last one in bytes."""
    how = " × ".join(f"{number:,} {name}".rstrip() for number, name in factors)
    return Line(what=what, how=how, bytes=round(math.prod(number for number, _ in factors)))


def count_once(what: str, size: int, on: str = "one window") -> Line:
    """A line whose bytes were counted while it was done once."""
    return Line(what=what, how=f"counted in a run of it on {on}", bytes=size)


def list_backward(shape: Shape, counts: Counts) -> list[Line]:
    """What a window holds on its way down: one block's graph, and a chunk at the head."""
    return [
        count_once("graph and backward of one block", counts.graph_bytes),
        count_once("logits of a chunk, with their gradients", counts.readout_bytes, name_chunk(shape)),
    ]


def name_chunk(shape: Shape) -> str:
    """The tokens that the head is given at once, and what it makes of them."""
    return f"{CHUNK} tokens, {shape.vocabulary:,} words"
