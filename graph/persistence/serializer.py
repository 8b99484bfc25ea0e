"""How a checkpoint is written: compressed msgpack without pickle, that revives our state models and no other class."""

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

from graph.config import RunConfig
from graph.goals.schema import Aim, Brief, NewText
from graph.planning.plan import Plan
from graph.reflecting.schema import Experience, Lesson, Note
from graph.state import Input, State
from tools.base.errors import in_one_line
from tools.instruments.probed import PastProbe
from tools.plans.groups import Group, GroupRecipe
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import TextFigures, Usage
from tools.results.trial import Trial

LOOK_SECONDS = 1.0
"""How often one that waits looks whether it is still to wait."""

_changed = threading.Condition()
_threads: set[str] = set()
"""Threads of checkpoints that a saver below has been asked for."""
_expected: dict[str, BaseException | None] = {}
"""Ids of tasks that somebody will wait for, and what went wrong when they were saved."""
_saved: set[str] = set()
"""Those that a saver is done with."""


class TellingSaver(BaseCheckpointSaver[str]):
    """A saver that tells when it has saved what a task gave, or could not."""

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        _threads.add(config["configurable"]["thread_id"])
        return super().get_tuple(config)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        _threads.add(config["configurable"]["thread_id"])
        return await super().aget_tuple(config)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        try:
            super().put_writes(config, writes, task_id, task_path)
        except BaseException as error:
            _tell(task_id, error)
            raise
        _tell(task_id)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        try:
            await super().aput_writes(config, writes, task_id, task_path)
        except BaseException as error:
            _tell(task_id, error)
            raise
        _tell(task_id)


def _tell(task: str, error: BaseException | None = None) -> None:
    with _changed:
        if task in _expected:
            _expected[task] = error
            _saved.add(task)
            _changed.notify_all()


def expect(thread: str | None, task: str) -> bool:
    """Say, before a task ends, that somebody will wait for it; whether one of these savers keeps its thread."""
    if thread not in _threads:
        return False
    with _changed:
        _expected[task] = None
        _saved.discard(task)
    return True


def wait_saved(task: str, check: Callable[[], None]) -> None:
    """Wait until an expected task is saved, and raise what kept it from being so; `check` may raise meanwhile."""
    with _changed:
        try:
            while not _changed.wait_for(lambda: task in _saved, LOOK_SECONDS):
                check()
            if error := _expected[task]:
                raise error
        finally:
            del _expected[task]
            _saved.discard(task)


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
            return super().loads_typed((kind, packed))
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
