"""A model of which a block is held, never the whole: its weights lie on disk, and a block's come when it runs.

While a block runs, copies of its weights are on the device that it runs on; they go when another block's come, or when
they are written to, or with the last graph that needs them. At all other times a module has the weights that lie on
disk, mapped into memory: whoever reads or writes those finds them as in any model.

So have embeddings and head. For a GPU rows are looked up where the embeddings lie, and the head comes when it runs, as
a block does; what little else is in no block is on the GPU all the time.
"""

import functools
import gc
import glob
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from filelock import FileLock
from torch import nn

from tools.base.errors import UserError
from tools.base.files import write_directory
from tools.base.rundir import hash_once
from tools.models.layers import STREAMED, find_blocks
from tools.models.mapped import Mapped, has_same_bits, map_source, map_tensors

SHARD = 256 * 2**20
"""Bytes of a file in which such a model is written, at least."""

_STREAM = "_billhook_stream"
"""Under this name a model has its `Stream`."""


class _Owner(NamedTuple):
    """A module, with the name under which it has a parameter."""

    module: nn.Module
    name: str


@dataclass(frozen=True)
class _Streamed:
    """A block of a stream (`StreamedBlock`), or the head behind the last one."""

    stream: "Stream"
    block: int

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def touch(self) -> None:
        self.stream.touch(self.block)


class Stream:
    """The weights of a model whose blocks come one by one."""

    def __init__(self, model: Any, mapped: Mapped, device: torch.device, source: Mapped, scratch: Path) -> None:
        """All parameters are those of `mapped`, by their names, in a file of the directory `scratch`."""
        self.device, self._mapped, self.scratch = device, mapped, scratch
        self.source = source
        """Those that the model's own files have bit for bit as they were loaded, by their names."""
        blocks = find_blocks(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._owners: list[list[_Owner]] = []
        self._names: list[list[str]] = []
        """Of each block, and of the head behind the last one where that comes by turn."""
        for block in blocks:
            self._add(block, names)
            block.forward = self._bring_for(len(self._owners) - 1, block.forward)
        self._last = len(blocks) - 1
        inside = {name for block in self._names for name in block}
        self._outside = [name for name in mapped if name not in inside]
        setattr(model, _STREAM, self)
        self.shard = max(SHARD, *(parameter.nbytes for parameter in model.parameters()))
        """Bytes of the files that it is written in."""
        if has_own_memory(device):
            self._take_outside(model, names)
        self._touched: int | None = None
        self._copied: dict[int, dict[int, nn.Parameter]] = {}
        """Copies by the blocks that they are of: of one, or of the last one and the head."""
        self._graphed = -1
        """The block that had a graph made of it last."""
        self._before = -1
        """The block that was copied before."""
        self.let_go()

    def _add(self, part: nn.Module, names: Mapping[int, str]) -> None:
        for module in part.modules():
            setattr(module, STREAMED, _Streamed(self, len(self._owners)))
        self._owners.append(_list_owners(part))
        self._names.append([names[id(parameter)] for parameter in part.parameters()])

    def _take_outside(self, model: Any, names: Mapping[int, str]) -> None:
        """See to what is in no block: it is not to lie on the device but for the smallest of it."""
        outside = list_outside(model)
        if outside.head is not None:
            self._add(outside.head, names)
            bringing = self._bring_for(len(self._owners) - 1, outside.head.forward)
            outside.head.forward = _sparing(outside.head.forward, bringing, self.device)
        for embedding in outside.embeddings:
            embedding.forward = _looking_up(embedding.forward, self.device)
        for module in outside.others:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(self.device)
        near = {id(module) for module in outside.embeddings}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and id(module) not in near:
                    module._buffers[name] = buffer.to(self.device)
        _say_device(model, self.device)

    def touch(self, block: int) -> None:
        """As `StreamedBlock.touch`; what is written to a block that was copied is for the next copies of it."""
        self._copied.pop(block, None)
        if self._touched not in (None, block):
            self.let_go(self._touched)
        self._touched = block

    def let_go(self, block: int | None = None) -> None:
        """Take what was read of the weights of a block, or of all, out of this process' memory."""
        blocks = range(len(self._names)) if block is None else [block]
        self._mapped.let_go(name for index in blocks for name in self._names[index])
        self._mapped.let_go(self._outside)

    def _bring_for(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def bring(*args: Any, **kwargs: Any) -> Any:
            with self._bring(block):
                return forward(*args, **kwargs)

        return bring

    @contextmanager
    def _bring(self, block: int) -> Iterator[None]:
        """Inside, a block has copies of its weights on the device: as many windows as pass it one after another, the
        same."""
        before = [(owner, owner.module._parameters[owner.name]) for owner in self._owners[block]]
        copies = self._copy(block, [parameter for _, parameter in before if parameter is not None])
        try:
            for owner, parameter in before:
                owner.module._parameters[owner.name] = copies[id(parameter)]
            yield
        finally:
            for owner, parameter in before:
                owner.module._parameters[owner.name] = parameter

    def _copy(self, block: int, parameters: Sequence[nn.Parameter]) -> dict[int, nn.Parameter]:
        """Copies of a block's parameters, by the identity of each; one that has several names is copied once.

        They take the place of those before, but where the head follows on the last block for gradients: the graph holds
        that block anyway, and both come again with the next window.
        """
        if block not in self._copied:
            stays = self._last if block - 1 == self._graphed == self._last else None
            self._copied = {other: held for other, held in self._copied.items() if other == stays}
            self._copied[block] = {
                id(p): nn.Parameter(p.detach().to(self.device, copy=True), requires_grad=False) for p in parameters
            }
            self.let_go(block)
            self._read_ahead(block)
        if torch.is_grad_enabled():
            self._graphed = block
        return self._copied[block]

    def _read_ahead(self, block: int) -> None:
        """Have the block that comes next read while this one runs: after the last one the first, and up but for those
        who come down."""
        down = block == self._before - 1
        self._before = block
        self._mapped.read_ahead(self._names[(block - 1 if down else block + 1) % len(self._names)])


def find_stream(model: Any) -> Stream | None:
    """Where a model's blocks are streamed from; None of one that is held whole."""
    return getattr(model, _STREAM, None)


def _list_owners(block: nn.Module) -> list[_Owner]:
    return [
        _Owner(module, name)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def has_own_memory(device: torch.device) -> bool:
    """Whether what lies on a device does not lie in CPU memory."""
    return device.type != "cpu"


class Outside(NamedTuple):
    """Modules with weights of their own, of a model, that are in no block."""

    head: nn.Module | None
    embeddings: Sequence[nn.Module]
    others: Sequence[nn.Module]


def list_outside(model: Any) -> Outside:
    """They may be on the meta device."""
    head = model.get_output_embeddings()
    apart = {module for block in find_blocks(model) for module in block.modules()} | {head}
    rest = [module for module in model.modules() if module not in apart and module._parameters]
    embeddings = [module for module in rest if isinstance(module, nn.Embedding)]
    return Outside(head, embeddings, [module for module in rest if module not in embeddings])


def _looking_up(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """An embedding's forward that looks its rows up where they lie, for a device."""

    @functools.wraps(forward)
    def look_up(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = send_to_device((args, kwargs), "cpu")
        return send_to_device(forward(*args, **kwargs), device)

    return look_up


def _sparing(forward: Callable[..., Any], bringing: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A head's forward that brings its weights to a device where it is given any tokens."""

    @functools.wraps(forward)
    def run(hidden: torch.Tensor) -> Any:
        return bringing(hidden) if hidden.numel() else forward(hidden.cpu()).to(device)

    return run


def _say_device(model: Any, device: torch.device) -> None:
    """The library takes a model to be where its first weight is, which is the embeddings'."""
    own = type(model)
    says = {"device": property(lambda _: device), "__module__": own.__module__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (own,), says)


class StreamSizes(NamedTuple):
    """Bytes of a model that is streamed."""

    block: int
    """Of its largest block."""
    outside: int
    """Of embeddings, head and whatever else is in no block."""
    blocks: int
    """Of all blocks."""
    head: int
    others: int
    """Of what is neither in a block nor head or embeddings."""


def measure_stream(model: Any) -> StreamSizes:
    """What is held of a model, which may be on the meta device."""
    blocks = find_blocks(model)
    whole, inside = (sum(p.nbytes for p in part.parameters()) for part in (model, blocks))
    outside = list_outside(model)
    head = sum(p.nbytes for p in outside.head.parameters()) if outside.head else 0
    others = sum(p.nbytes for module in outside.others for p in module.parameters(recurse=False))
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    return StreamSizes(largest, whole - inside, inside, head, others)


# --- loading -------------------------------------------------------------------------------------------------------


def stream_model(
    path: str, load: Callable[..., tuple[Any, Mapping[str, Any]]], empty: Any, device: torch.device, scratch: Path
) -> tuple[Any, Mapping[str, Any]]:
    """(a model whose blocks are streamed to `device`, what `from_pretrained` said of loading it).

    `load` is `from_pretrained` of `path`, a directory of safetensors or a hub id, which is given the places of modules;
    `empty` the model on the meta device. Weights come one by one; a file without a name in the directory `scratch` is
    where they lie. Raises DiskFull, or whatever `load` raises.
    """
    from accelerate.hooks import remove_hook_from_module

    empty.tie_weights()
    shared: dict[int, list[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    with _Offloaded(scratch) as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match")  # buffers, which it places so
        model, loading = load(device_map=_place_on_disk(empty), offload_folder=folder)
        offloaded, source, same = _find_offloaded(model), map_source(path), list[str]()

        def read() -> Iterator[tuple[str, torch.Tensor]]:
            for first, *_ in shared.values():
                there = model.get_parameter(first)
                weight = offloaded[first] if there.is_meta else there.data
                yield first, weight
                if first in source and has_same_bits(source[first], weight):
                    same.append(first)
                source.let_go([first] if first in source else [])

        mapped = map_tensors(read(), scratch)
        source.let_go(source)  # the system reads a little of a tensor's neighbours with it
    remove_hook_from_module(model, recurse=True)
    for attribute in ("to", "cuda", "hf_device_map"):  # what accelerate's dispatch put there
        vars(model).pop(attribute, None)
    for names in shared.values():
        parameter = nn.Parameter(mapped[names[0]], requires_grad=False)
        for name in names:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = parameter
    gc.collect()
    Stream(model, mapped, device, Mapped({name: source.places[name] for name in same}), scratch)
    return model, loading


def stream_beside(
    stream: Stream, make: Callable[[Mapping[str, torch.Tensor]], Any], weights: Iterable[tuple[str, torch.Tensor]]
) -> Any:
    """The model that is made of weights which come one by one, streamed as another one is.

    `make` takes them by name, as they lie in a file without a name beside the other's, and copies none. Raises
    DiskFull, or whatever `make` raises.
    """
    mapped = map_tensors(weights, stream.scratch, "the smaller model")
    model = make(mapped)
    Stream(model, mapped, stream.device, Mapped({}), stream.scratch)
    return model


def _find_offloaded(model: Any) -> Mapping[str, torch.Tensor]:
    """All weights that the library left on disk, by name, each read when it is asked for."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    each = [hook for outer in hooks for hook in getattr(outer, "hooks", [outer])]
    whole: Mapping[str, torch.Tensor]
    [whole, *_] = [hook.weights_map.dataset for hook in each if getattr(hook, "weights_map", None) is not None]
    return whole


LOADING = ".loading-"
"""How a directory begins that is there while a model is loaded."""


def forget_loading(directory: Path) -> None:
    """Delete what killed processes left that were loading a model beside what lies in a directory, whose only user the
    caller is."""
    for left in directory.glob(f"{LOADING}*"):
        shutil.rmtree(left, ignore_errors=True)


class _Offloaded(tempfile.TemporaryDirectory[str]):
    """Where the library puts weights aside that it changes as it reads them; it says so, and is kept quiet."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        super().__init__(dir=scratch, prefix=LOADING)
        self._logger = logging.getLogger("accelerate.big_modeling")
        self._before = self._logger.level

    def __enter__(self) -> str:
        self._logger.setLevel(logging.ERROR)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._logger.setLevel(self._before)
        super().__exit__(*error)


def _place_on_disk(empty: Any) -> dict[str, str]:
    """Every module with weights of its own on disk, but for the smallest: the library wants one that is not.

    Buffers that are saved, such as a block's scale in Gemma 4, are no weights, and stay in memory.
    """
    sizes = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in empty.named_modules()
        if module._parameters
    }
    leaves = [name for name in sizes if not any(other.startswith(f"{name}.") for other in sizes)]
    smallest = min(leaves, key=sizes.__getitem__)  # with all that is inside it, therefore a leaf
    buffers = empty.state_dict().keys() - {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    return dict.fromkeys(sizes, "disk") | dict.fromkeys([smallest, *sorted(buffers)], "cpu")


def convert_once(source: Path, dtype: str, convert: Callable[[Path], None]) -> Path:
    """A directory of safetensors that a file was converted to, by `convert(DIRECTORY)` in a process of its own.

    It is made the first time, and kept for all that come; whoever comes meanwhile waits. Raises whatever `convert`
    raises, which must be a function that another process can be handed; UserError where that is killed.
    """
    directory = name_conversion(source, dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)

    def make(aside: Path) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            try:
                other.submit(convert, aside).result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"the process that converts {source.name} was killed, most likely because memory was short; "
                    "it takes some more, once, for what it makes is kept"
                ) from error

    with FileLock(f"{directory}.lock"):
        if not (directory / "config.json").is_file():
            write_directory(directory, make)
    return directory


def find_conversion(source: Path, dtype: str) -> Path | None:
    """What `convert_once` made of a file, if it is there; where nothing is of such a name the file is not read."""
    if not any(find_cache().glob(f"{glob.escape(source.stem)}-{dtype}-*")):
        return None
    directory = name_conversion(source, dtype)
    return directory if directory.is_dir() else None


def name_conversion(source: Path, dtype: str) -> Path:
    """Where `convert_once` has what it makes of a file, under that one's content in the user's cache."""
    return find_cache() / f"{source.stem}-{dtype}-{hash_once(source)[:16]}"


def find_cache() -> Path:
    """The user's directory for what is made once, on a disk: temporary files lie in memory on many a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "billhook"
