"""Errors that a person can act on."""

import gc
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message is one line that says what was wrong and what to do."""


class ImpossiblePlan(ValueError):
    """The plan cannot be met; the message tells the planner why, in one line."""


class BrokenPlan(ImpossiblePlan):
    """The plan broke while it was carried out, for want of memory or in a layer whose numbers give no answer."""


class UnknownStatistics(UserError):
    """A text says nothing of a layer, or nothing finite."""


class DamagedFile(UserError):
    """A file is not what was written; the message says which, and what to do."""


class DegenerateText(UserError):
    """What the model wrote itself is no text to fit to or to judge by."""


class SharedText(UserError):
    """Two parts of the texts that must be disjoint are not."""


class BrokenBaseline(UserError):
    """The dense model cannot be profiled, for want of memory say; what was done stands, and the run can be resumed."""


class DiskFull(UserError):
    """No space was left in the middle of a run; what was done stands, and the run can be resumed."""


class DamagedArtifact(RuntimeError):
    """A file of the run directory does not match the hash it was written under."""


def in_one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of a library's says, on one line of at most `limit` characters; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


_ADVICE = "; free some and go on, or begin anew with a shorter --window or --dtype bf16"

_NO_MEMORY = re.compile(r"out of memory|not enough memory|DefaultCPUAllocator|_STATUS_ALLOC_FAILED")
"""How torch and what lies below it say so, where they have no class of their own for it."""


@contextmanager
def explain_layer(what: str) -> Iterator[None]:
    """Around what kernels do with one layer: BrokenPlan where there is no memory for it, or its numbers give no answer.

    The latter are the kernels' own ValueErrors, and matrices that LAPACK cannot solve.
    """
    try:
        yield
    except (UserError, ImpossiblePlan):
        raise
    except Exception as error:
        unsolved = isinstance(error, ValueError) or type(error).__name__.endswith("LinAlgError")
        why = in_one_line(error, 200) if unsolved else _explain_memory(error)
        if not why:
            raise
        raise BrokenPlan(f"{what}: {why}") from error


@contextmanager
def explain_work(what: str, kind: type[BrokenPlan] | type[BrokenBaseline] = BrokenPlan) -> Iterator[None]:
    """Around all that a plan asks for, or the dense model's profile: an error of this `kind` where it breaks.

    That is where memory is lacking, a layer breaks (`explain_layer`), or a plan's text says nothing of a layer. All
    memory that was taken inside is given back first, on the GPU too.
    """
    try:
        yield
    except Exception as error:
        told = (BrokenPlan, UnknownStatistics) if kind is BrokenPlan else (BrokenPlan,)
        known = isinstance(error, told)
        why = str(error) if known else _explain_memory(error)
        if not why:
            raise
        _give_back_memory(error)
        text = why if known else f"{what}: {why}"
        raise kind(text + _ADVICE if kind is BrokenBaseline and "out of memory" in text else text) from None


def _explain_memory(error: BaseException) -> str:
    """That memory was lacking, as the library says it; empty for any other error."""
    torchs = isinstance(error, RuntimeError)
    named = torchs and any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    if not isinstance(error, MemoryError) and not named and not (torchs and _NO_MEMORY.search(str(error))):
        return ""
    return f"out of memory ({in_one_line(error, 200)})"


def _give_back_memory(error: BaseException) -> None:
    """Let go of what the calls held that an error came through."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
    torch = sys.modules.get("torch")  # where it was never imported, it holds nothing
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
