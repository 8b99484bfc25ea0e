"""Fixed pieces of text, and sums over them in one order: on CPUs the same bits however many workers make them.

A text is cut into shards by the number of its windows alone. Sums over shards are those of a fixed binary tree, so that
a worker with several neighbouring shards may hand over their sum, and nothing depends on who made which.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tools.base.files import explain_full_disk
from tools.models.mapped import view_bytes


class StateStack:
    """A stack of lists of tensors in a file without a name, which is gone with the stack, or with the process.

    Bytes come back as they were, on CPU. Raises DiskFull when no space is left.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open for as long as the stack is
        weakref.finalize(self, self._file.close)
        self._heights: list[tuple[int, list[tuple[torch.Size, torch.dtype]]]] = []

    @property
    def height(self) -> int:
        """How many lists lie on it."""
        return len(self._heights)

    def push(self, states: Sequence[Tensor]) -> None:
        """Put the states of one block on top."""
        with explain_full_disk(self._directory):
            begin = self._file.seek(0, 2)
            for state in states:
                self._file.write(view_bytes(state))
        self._heights.append((begin, [(state.shape, state.dtype) for state in states]))

    def pop(self) -> list[Tensor]:
        """Take what was put on top last."""
        begin, kinds = self._heights.pop()
        self._file.seek(begin)
        states = []
        for shape, dtype in kinds:
            bytes_N = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
            self._file.readinto(bytes_N.numpy().data)
            states.append(bytes_N.view(dtype).view(shape))
        self._file.truncate(begin)
        return states


SHARDS = 8
"""Pieces that a text is cut into, and so the most workers that can share it."""

_DEAL = (0, 4, 2, 6, 1, 5, 3, 7)
"""The shards that windows go to, in turn. Any half or quarter of the shards then has its share of the first windows,
which are those that gradients are taken of."""

Span = tuple[int, int]
"""Consecutive shards or other items, from the first to before the last."""

Sums = dict[str, Tensor]
"""Sums over shards, by name; what no shard of a span has anything of is left out."""


def cut_shards(windows: int, texts: int = 1) -> list[list[int]]:
    """The windows of each shard, ascending; as many in each as in any other, or one more.

    Of several texts of so many windows, one behind the other, each shard has the same ones of each.
    """
    shards: list[list[int]] = [[] for _ in range(min(SHARDS, windows))]
    deal = [shard for shard in _DEAL if shard < len(shards)]
    for window in range(windows):
        shards[deal[window % len(deal)]].append(window)
    return [[text * windows + window for text in range(texts) for window in shard] for shard in shards]


def share_out(count: int, workers: int) -> list[Span]:
    """Which of `count` items each worker takes: consecutive ones, as even as can be; none for workers beyond them."""
    workers = min(count, workers)
    return [(count * i // workers, count * (i + 1) // workers) for i in range(workers)]


def list_nodes(tree: Span, span: Span) -> Iterator[Span]:
    """The fewest nodes of the tree over `tree` that make up `span`, in order."""
    if span[0] <= tree[0] and tree[1] <= span[1]:
        yield tree
    elif span[0] < tree[1] and tree[0] < span[1]:
        for half in _halves(tree):
            yield from list_nodes(half, span)


def count_held(tree: Span, span: Span, *, aside: bool = False) -> int:
    """How many sums of shards are held at once, at most, while those of a span's nodes are made one after another.

    Beside the nodes that are done, there is one for each level of the tree on the way to the last leaf, and this; of
    these levels the lowest alone where sums are put `aside`.
    """
    levels = [(node[1] - node[0] - 1).bit_length() for node in list_nodes(tree, span)]
    return max(done + (min(own, 1) if aside else own) + 1 for done, own in enumerate(levels))


def count_waiting(windows: int) -> int:
    """How many sums over the shards of a text wait at once, at most, where they are put aside."""
    return max(0, (len(cut_shards(windows)) - 1).bit_length() - 1)


class Aside(Protocol):
    """Sums that are not held while others are made."""

    def add(self, others: Sums) -> Sums:
        """With those of later shards, which are changed."""
        ...


def forget(_tensor: Tensor) -> None:
    """Let go of what was added to another."""


def sum_node(
    node: Span,
    leaf: Callable[[int], Sums],
    aside: Callable[[Sums], Aside] | None = None,
    give: Callable[[Tensor], None] = forget,
) -> Sums:
    """The sum of a node of the tree, from those of its shards; with `aside` sums wait so for those of several more.

    `give` is told of tensors that were added to others, whose memory nobody needs.
    """
    if node[1] - node[0] == 1:
        return leaf(node[0])
    left, right = _halves(node)
    if aside and right[1] - right[0] > 1:  # of two shards alone it is not worth it: what is added to takes as much
        waiting = aside(sum_node(left, leaf, aside, give))
        return waiting.add(sum_node(right, leaf, aside, give))
    return _add(sum_node(left, leaf, aside, give), sum_node(right, leaf, aside, give), give)


def join_nodes(tree: Span, known: Mapping[Span, Sums]) -> Sums:
    """The sum of the whole tree, from nodes that make it up. Raises KeyError when some are missing."""
    if tree in known or tree[1] - tree[0] == 1:
        return known[tree]
    left, right = _halves(tree)
    return _add(join_nodes(left, known), join_nodes(right, known))


def _halves(node: Span) -> tuple[Span, Span]:
    middle = (node[0] + node[1]) // 2
    return (node[0], middle), (middle, node[1])


def add_count(sums: Sums, name: str, *rows: Tensor) -> None:
    """Add to `n/NAME`, the tokens that the sums of a layer are over; experts see some of them."""
    key = f"n/{name}"
    sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + sum(map(len, rows))


def _add(left: Sums, right: Sums, give: Callable[[Tensor], None] = forget) -> Sums:
    for name, value in right.items():
        if name in left:
            left[name] += value
            give(value)
        else:
            left[name] = value
    return left
