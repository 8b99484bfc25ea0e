"""What breaks although nobody made a mistake is one line, and gives its memory back; all else is what it was."""

import errno
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tools.base.errors import (
    BrokenBaseline,
    BrokenPlan,
    DiskFull,
    ImpossiblePlan,
    UnknownStatistics,
    UserError,
    explain_layer,
    explain_work,
)

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    CPU,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("no room\nat all"),
    MemoryError(),
]
UNSOLVED = [
    torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite"),
    np.linalg.LinAlgError("Singular matrix"),
    ValueError("the updated weights are not finite"),
]
OTHERS = [
    *(TypeError("a"), KeyError("a"), AssertionError("a"), AttributeError("a"), RuntimeError("a shape is wrong")),
    *(OSError(errno.ENOSPC, "No space left on device"), DiskFull("the disk is full"), UserError("worker 1 died")),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", LACKS, ids=lambda error: f"{type(error).__name__} {error}"[:30])
def test_a_lack_of_memory_is_told(error: Exception) -> None:
    said = " ".join(str(error).split())[:200] or "MemoryError"
    with pytest.raises(BrokenPlan) as caught, explain_work("pruning"):
        raise error
    assert str(caught.value) == f"pruning: out of memory ({said})"
    with pytest.raises(BrokenPlan) as caught, explain_work("pruning"), explain_layer("pruning layer a"):
        raise error
    assert str(caught.value) == f"pruning layer a: out of memory ({said})"
    with pytest.raises(BrokenBaseline) as refused, explain_work("profiling the model", BrokenBaseline):
        raise error
    assert str(refused.value) == (
        f"profiling the model: out of memory ({said}); free some and go on, or begin anew with a shorter --window or "
        "--dtype bf16"
    )


def test_torch_says_it_in_these_words() -> None:
    said = r"^pruning: out of memory \(\[enforce fail .*DefaultCPUAllocator: "
    with pytest.raises(BrokenPlan, match=said), explain_work("pruning"):
        torch.empty(10**15)


@pytest.mark.parametrize("error", UNSOLVED, ids=lambda error: type(error).__name__)
def test_numbers_that_give_no_answer_are_told_where_a_layer_is_at_work_alone(error: Exception) -> None:
    with pytest.raises(BrokenPlan) as caught, explain_work("pruning"), explain_layer("pruning layer a"):
        raise error
    assert str(caught.value) == f"pruning layer a: {error}"
    with pytest.raises(type(error)) as passed, explain_work("pruning"):
        raise error
    assert passed.value is error


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_every_other_error_stays_what_it_is(error: BaseException) -> None:
    for kind in (BrokenPlan, BrokenBaseline):
        with pytest.raises(type(error)) as caught, explain_work("pruning", kind), explain_layer("pruning layer a"):
            raise error
        assert caught.value is error


def test_what_a_text_does_not_say_breaks_a_plan_and_refuses_a_baseline() -> None:
    with pytest.raises(BrokenPlan, match=r"^layer a never ran$"), explain_work("pruning"):
        raise UnknownStatistics("layer a never ran")
    with pytest.raises(UnknownStatistics), explain_work("profiling the model", BrokenBaseline):
        raise UnknownStatistics("layer a never ran")
    with pytest.raises(ImpossiblePlan) as caught, explain_work("pruning"):
        raise ImpossiblePlan("no such layer")
    assert type(caught.value) is ImpossiblePlan


def test_what_the_work_held_is_given_back_before_anybody_hears_of_it() -> None:
    held: list[weakref.ref[Any]] = []

    def prune() -> None:
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        with explain_layer("pruning layer a"):
            allocate()

    def allocate() -> None:
        part = torch.ones(1000)
        held.append(weakref.ref(part))
        raise MemoryError("no room")

    try:
        with explain_work("pruning"):
            prune()
    except BrokenPlan:
        assert [reference() for reference in held] == [None, None]
