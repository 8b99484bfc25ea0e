"""Shared fixtures. No test reaches a hub: models and texts are made here or come with Python."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before the imports below
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import hypothesis
import pytest

hypothesis.settings.register_profile("billhook", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("billhook")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read it, do not write to it."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture
def workbench_closed() -> Iterator[None]:
    """Let go of the one workbench of this process after the test."""
    from tools.workbench import close_workbench

    yield
    close_workbench()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were written to, in order."""
    from tools.layers import Layer

    names: list[str] = []
    write = Layer.write

    def record(layer: Any, weight_OI: Any) -> None:
        names.append(layer.name)
        write(layer, weight_OI)

    monkeypatch.setattr(Layer, "write", record)
    return names
