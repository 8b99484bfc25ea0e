"""Shared fixtures. No test reaches a hub: models and texts are made here or come with Python."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before the imports below
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Likewise by triton, which transformers imports. With 0 instead, on a machine with a GPU, Triton's kernels run there.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

# A shell has the commands that it runs in the background ignore Ctrl-C, and those that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("billhook", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("billhook")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read it, do not write to it."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture
def ask_for_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets BILLHOOK_KERNELS, at first to nothing; it is otherwise read once in a process."""
    from kernels import dispatch

    def ask(kernels: str) -> None:
        forget()
        monkeypatch.setenv(dispatch.VARIABLE, kernels)

    def forget() -> None:
        for function in (dispatch.choose_kernel, dispatch.choose_product, dispatch.explain_triton):
            function.cache_clear()

    ask("")
    yield ask
    forget()


@pytest.fixture
def workbench_closed() -> Iterator[None]:
    """Let go of the one workbench of this process after the test."""
    from tools.workbench.open import close_workbench

    yield
    close_workbench()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were written to, in order."""
    from tools.models.layers import Layer

    names: list[str] = []
    write = Layer.write

    def record(layer: Any, weight_OI: Any) -> None:
        names.append(layer.name)
        write(layer, weight_OI)

    monkeypatch.setattr(Layer, "write", record)
    return names
