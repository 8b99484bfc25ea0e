"""What there is for a run: the GPUs of this machine or another, or its memory, and how a model is laid over them."""

import math
import re
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field

from tools.base.errors import UserError
from tools.base.memory import count_free, count_memory
from tools.estimate.block import count_kinds
from tools.models.disk import Line
from tools.models.layers import find_blocks, name_blocks
from tools.models.load import spread_blocks

ROOM = 4
"""How many times the memory of one block of each kind must be free for them to be run."""


class Devices(BaseModel):
    """What the model may be put on: so many GPUs of one size, or the memory of a machine whose CPU is the device."""

    count: int = Field(ge=1)
    bytes: int = Field(gt=0, description="Memory of each.")


class Room(NamedTuple):
    """Memory of a machine in bytes, of each GPU and of the CPU; infinite where it is not known."""

    gpu: float
    cpu: float


def read_devices(text: str) -> Devices:
    """`"80"`, or `"8x80"` for eight of them, in GB. Raises UserError for another form."""
    form = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,6}(?:\.\d+)?)", text, re.ASCII)
    if form is None or float(form[2]) == 0:
        raise UserError(f"device memory {text!r} is neither GB, such as 80, nor COUNTxGB, such as 8x80")
    return Devices(count=int(form[1] or 1), bytes=round(float(form[2]) * 1e9))


def find_devices(device: str) -> Devices | None:
    """The GPUs that are here, as alike as the smallest, or this machine's memory; None where there is no GPU."""
    if device == "cpu":
        return Devices(count=1, bytes=count_memory())
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return Devices(count=len(sizes), bytes=min(sizes)) if sizes else None


def find_room(device: str, devices: Devices | None, *, here: bool) -> Room:
    """What is known of the memory of a machine with these devices; of another than this one its GPUs or CPU alone."""
    size = devices.bytes if devices else math.inf
    if device == "cpu":
        return Room(gpu=math.inf, cpu=size)
    return Room(gpu=size, cpu=count_memory() if here else math.inf)


def lay_out(model: Any, devices: Devices | None) -> list[Line]:
    """What each GPU holds of a model that is laid over them. Raises UserError when there are none, or too few."""
    if devices is None:
        raise UserError("torch sees no GPU here to spread the model over; plan for others with --device-memory 8x80")
    places = spread_blocks(model, dict.fromkeys(range(devices.count), devices.bytes))
    sizes = dict.fromkeys(range(devices.count), 0)
    for name, parameter in model.named_parameters():
        sizes[next(place for part, place in places.items() if not part or f"{name}.".startswith(f"{part}."))] += (
            parameter.nbytes
        )
    blocks = find_blocks(model)
    prefix = name_blocks(model)
    lines = []
    for place, size in sizes.items():
        own = [part for part, where in places.items() if where == place]
        count = sum(any(f"{prefix}.{b}.".startswith(f"{part}.") for part in own if part) for b in range(len(blocks)))
        others = [part for part in own if not f"{part}.".startswith(f"{prefix}.")]
        how = f"{len(blocks) if '' in own else count} blocks{''.join(f', {part}' for part in others if part)}"
        lines.append(Line(what=f"GPU {place}", how=how, bytes=size))
    return lines


def explain_absence(model: Any, device: str) -> str:
    """Why no block of a model on the meta device can be run here; "" where one can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU here"
    blocks = find_blocks(model)
    needed = ROOM * sum(p.nbytes for first, _ in count_kinds(model) for p in blocks[first].parameters())
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else count_free()
    return "" if needed <= free else "one block of it does not fit the memory that is free here"
