"""How a checkpoint is written: compressed msgpack without pickle, that revives our state models and no other class.

Msgpack names a class by its module, and classes move from one to another: `FORMER_HOMES` says where those named in
older checkpoints are now. A config in which a field is missing was written before there was such a field, and has what
that meant.
"""

import zlib
from typing import Any

import ormsgpack
from langgraph.checkpoint.serde.jsonplus import EXT_NUMPY_ARRAY, EXT_PYDANTIC_V2, JsonPlusSerializer
from pydantic import BaseModel

from graph.config import RunConfig
from graph.goals.schema import Aim, Brief, NewText
from graph.planning.plan import Plan
from graph.reflecting.schema import Experience, Lesson, Note
from graph.state import Input, State, Trial
from tools.base.errors import in_one_line
from tools.base.settings import FORMER
from tools.instruments.probed import PastProbe
from tools.plans.groups import Group, GroupRecipe
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import TextFigures, Usage

WORTH_COMPRESSING = 512
"""Bytes from which a part of a checkpoint is compressed."""

CRC_BYTES = 4


class DamagedState(RuntimeError):
    """What is kept of a run is not what was written; the message is one line."""


# Every class that a checkpoint may revive. Another one would come back as a plain dict.
STATE_MODELS: tuple[type[BaseModel], ...] = (
    Adjustment,
    Aim,
    Brief,
    Experience,
    Group,
    GroupRecipe,
    Input,
    Lesson,
    NewText,
    Note,
    PastProbe,
    Plan,
    Recipe,
    RunConfig,
    State,
    TextFigures,
    Trial,
    Usage,
)

FORMER_HOMES: dict[str, tuple[type[BaseModel], ...]] = {
    "graph.state": (Lesson, Plan),
    "tools.recipes": (Adjustment, Recipe),
    "tools.summary": (Usage,),
}
"""Module by which checkpoints of earlier versions name classes that are in another now."""

_PRESENT = {
    (module, model.__name__): (model.__module__, model.__name__)
    for module, models in FORMER_HOMES.items()
    for model in models
}


class _Compressed(JsonPlusSerializer):
    """Msgpack, compressed: the savers keep the whole state at every step, and trials and lessons repeat themselves.

    Each part ends with a checksum. Raises DamagedState where it is another's.
    """

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = super().dumps_typed(obj)
        if kind == "null":
            return kind, data
        if len(data) >= WORTH_COMPRESSING:
            return f"{kind}+zlib", zlib.compress(data)  # ends with a checksum of its own
        return f"{kind}+crc", data + zlib.crc32(data).to_bytes(CRC_BYTES)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, packed = data
        try:
            if kind.endswith("+zlib"):
                kind, packed = kind.removesuffix("+zlib"), zlib.decompress(packed)
            elif kind.endswith("+crc"):
                kind, packed = kind.removesuffix("+crc"), _check(packed)
            elif kind not in ("null", "msgpack"):
                raise ValueError(f"{kind!r} is no kind of content")
            return super().loads_typed((kind, rename_moved(packed) if kind == "msgpack" else packed))
        except (ValueError, TypeError, LookupError, zlib.error) as error:
            raise DamagedState(f"a checkpoint in it does not match its checksum ({in_one_line(error, 100)})") from error


def _check(packed: bytes) -> bytes:
    """The content without its checksum. Raises ValueError where that is another's."""
    data, checksum = packed[:-CRC_BYTES], packed[-CRC_BYTES:]
    if zlib.crc32(data).to_bytes(CRC_BYTES) != checksum:
        raise ValueError("another checksum")
    return data


def make_serializer() -> JsonPlusSerializer:
    """Msgpack without pickle that revives the state models and LangGraph's own types only."""
    return _Compressed(pickle_fallback=False, allowed_msgpack_modules=STATE_MODELS)


def rename_moved(packed: bytes) -> bytes:
    """The same msgpack with classes named by where they are now, and configs whole; nothing is revived here."""
    return _pack(_unpack(packed))


def _rename(code: int, data: bytes) -> ormsgpack.Ext:
    """One of LangGraph's extensions: of a pydantic model (module, name, values, …); others may hold such ones."""
    if code == EXT_NUMPY_ARRAY:
        return ormsgpack.Ext(code, data)
    content = _unpack(data)
    if code == EXT_PYDANTIC_V2:
        content[:2] = _PRESENT.get(tuple(content[:2]), content[:2])
        content[2] = _fill(tuple(content[:2]), content[2])
    return ormsgpack.Ext(code, _pack(content))


def _fill(name: tuple[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a model by its present name, with what a config lacks that was written before there was such."""
    if name == (State.__module__, State.__name__) and "config" in values:
        return {**values, "config": _fill((RunConfig.__module__, RunConfig.__name__), values["config"])}
    if name != (RunConfig.__module__, RunConfig.__name__):
        return values
    return values | {field: value for field, value in FORMER.items() if field not in values}


def _unpack(packed: bytes) -> Any:
    return ormsgpack.unpackb(packed, ext_hook=_rename, option=ormsgpack.OPT_NON_STR_KEYS)


def _pack(content: Any) -> bytes:
    return ormsgpack.packb(content, option=ormsgpack.OPT_NON_STR_KEYS)
