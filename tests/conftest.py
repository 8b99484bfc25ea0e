"""Shared fixtures. No test reaches a hub: models and texts are made here or come with Python."""

import gc
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before the imports below
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Likewise by triton, which transformers imports. With 0 instead, on a machine with a GPU, Triton's kernels run there.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.hub_server import HubServer

# A shell has the commands that it runs in the background ignore Ctrl-C, and those that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("billhook", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("billhook")


@pytest.fixture(autouse=True, scope="module")
def collections_are_short() -> None:
    """Spare the collector what is imported by now: whatever lets go of a model ends with a full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def nobody_waits_for_the_disk() -> Iterator[None]:
    """Power does not fail here, and whoever waits for every file takes a twelfth longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; read it, do not write to it."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def beginning_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model; its tokenizer begins a text with a beginning-of-sequence token."""
    from tests.tiny import make_beginning_tokenizer, save_tiny_model

    directory = save_tiny_model(tmp_path_factory.mktemp("models") / "beginning-llama", "llama")
    make_beginning_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator["HubServer"]:
    """The hub that huggingface_hub knows, and its cache; it reads its variables once, when it is imported."""
    import datasets
    import huggingface_hub.hf_api
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    import tools.base.hub
    from tests.hub_server import HubServer

    monkeypatch.setattr(tools.base.hub, "_last_look", (-math.inf, ""))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # transformers keeps one of its own, and would ask the hub of an earlier test for three quarters of a minute
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
        close_session()


@pytest.fixture
def ask_for_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets BILLHOOK_KERNELS, at first to nothing; it is otherwise read once in a process."""
    from billhook_kernels import dispatch

    def ask(kernels: str) -> None:
        forget()
        monkeypatch.setenv(dispatch.VARIABLE, kernels)

    def forget() -> None:
        for function in (dispatch.choose_kernel, dispatch.explain_triton):
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


@pytest.fixture
def raw_gamma(monkeypatch: pytest.MonkeyPatch) -> None:
    """γ as the tokens have it: what a test asks of a tiny model may hang on that, for of few tokens it leans far."""
    monkeypatch.setattr("tools.statistics.known.PRIOR", 0)
