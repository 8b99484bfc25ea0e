"""Values on their way between processes, and references to those that lie where all of them can read."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.team.connection import import_ray

T = TypeVar("T")


class Reference(NamedTuple, Generic[T]):
    """A value in Ray's object store."""

    ref: Any
    """Ray's own reference to what it was frozen to."""

    def fetch(self) -> T:
        """The value, with tensors of their own memory."""
        return cast(T, thaw(import_ray().get(self.ref)))


def keep(ray: Any, value: T) -> Reference[T]:
    """A value put where all workers can read it, to stand for it in several requests."""
    return Reference(ray.put(freeze(value)))


class _Array(NamedTuple):
    """A tensor on its way: Ray moves numpy's arrays without copying them."""

    values: NDArray[Any]
    dtype: str
    """Of torch: numpy has no bf16."""


def freeze(value: Any) -> Any:
    """The value with arrays for tensors, through dicts, lists and tuples."""
    if isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous()
        bits = whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole
        return _Array(bits.numpy(), str(whole.dtype).removeprefix("torch."))
    return _walk_through(value, freeze)


def thaw(value: Any) -> Any:
    """What was frozen, with tensors of their own memory."""
    if isinstance(value, _Array):
        return torch.from_numpy(np.array(value.values)).view(getattr(torch, value.dtype))
    return _walk_through(value, thaw)


def _walk_through(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    if isinstance(value, list):
        return [change(part) for part in value]
    if isinstance(value, tuple):
        parts = [change(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
