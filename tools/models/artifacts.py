"""A pruned layer as the tensors of its artifact, and back, bit for bit: the bits of `kernels/FORMAT.md`.

An artifact holds `mask`, and `values` where the survivors are others than the dense layer's; and `bias` where that is.

Shape suffixes: O output features, I input features, W = ceil(I / 32) words of a mask row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from billhook_kernels.packed import (
    BITS,
    PADDING,
    WORD,
    PackedWeight,
    check_mask,
    check_packed,
    find_kept,
    pack_mask,
    pack_rows,
    unpack_mask,
    unpack_rows,
)


def pack_pruned(pruned_OI: Tensor, *, values: bool) -> dict[str, Tensor]:
    """The tensors, on the CPU, that stand for a pruned layer; without `values` they need the dense weights beside."""
    if not values:
        return {"mask": pack_mask(find_kept(pruned_OI)).cpu()}
    packed = pack_rows(pruned_OI)
    return {"mask": packed.mask_OW.cpu(), "values": packed.values.cpu()}


FORMAT = 1
"""Version of the format that artifacts are written in."""

HEADER = 512
"""Bytes of a file of one or two tensors that are not theirs, at most: their names, dtypes and shapes as JSON."""


def bound_artifact(weight_OI: Tensor) -> int:
    """Bytes of the file that stands for a pruned layer of this shape and dtype, at most; no value is read."""
    return bound_mask(weight_OI) + bound_values(weight_OI, weight_OI.numel())


def bound_mask(weight_OI: Tensor) -> int:
    """As `bound_artifact`, where the survivors are the dense layer's."""
    rows, columns = weight_OI.shape
    return 4 * rows * -(-columns // WORD) + HEADER


def bound_values(weight_OI: Tensor, kept: int) -> int:
    """Bytes of so many values in such a file."""
    return (kept + PADDING) * weight_OI.element_size()


def unpack_pruned(tensors: Mapping[str, Tensor], dense_OI: Tensor, device: torch.device) -> Tensor:
    """The weights that an artifact stands for, made on a device, or the dense ones, where they are, if it has neither a
    mask nor values.

    Raises ValueError, in one line, when its tensors, which are on the CPU, do not fit the layer or one another.
    """
    if "mask" not in tensors:
        return dense_OI
    rows, columns = dense_OI.shape
    mask_OW, values = tensors["mask"], tensors.get("values")
    if values is not None:
        mask_OW, values, offsets_O, _ = check_packed(mask_OW, values, (rows, columns))
        return unpack_rows(PackedWeight(mask_OW.to(device), values.to(device), offsets_O, columns))
    check_mask(mask_OW, (rows, columns))
    bits_OI = dense_OI.to(device).view(BITS[dense_OI.dtype])  # as integers: a third of the time that `where` takes
    return (bits_OI * unpack_mask(mask_OW.to(device), columns)).view(dense_OI.dtype)
