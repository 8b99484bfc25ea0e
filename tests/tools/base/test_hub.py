"""A hub is asked where it answers, however late, and libraries do without one that does not."""

import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import datasets
import pytest
from huggingface_hub import constants

import tools.base.hub
from tests.hub_server import HubServer
from tools.base.hub import look_at_hub


def switches() -> set[bool]:
    return {constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE}


def look_again(monkeypatch: pytest.MonkeyPatch) -> str:
    when, problem = tools.base.hub._last_look
    monkeypatch.setattr(tools.base.hub, "_last_look", (when - 61, problem))
    return look_at_hub()


@pytest.fixture
def hole(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The hub is an address that nothing ever answers from: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        yield url


def test_a_dead_hub_is_looked_for_once_and_done_without_until_it_is_back(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    problem = f"{gone.url} cannot be reached ([Errno 111] Connection refused)"
    assert look_at_hub() == problem and switches() == {True}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert look_at_hub() == problem and hub.requests == [], "a look stands for a minute"
    assert look_again(monkeypatch) == "" and switches() == {False}
    assert look_at_hub() == "" and hub.requests == ["HEAD /"]


def test_an_address_that_swallows_everything(hole: str) -> None:
    assert look_at_hub() == f"{hole} cannot be reached (timed out)"
    assert switches() == {True}


def test_a_hub_that_is_slow_is_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.base.hub, "_PATIENCE", 0.05)
    hub.delay = 0.2
    assert look_at_hub() == "" and switches() == {False}


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_a_hub_that_answers_with_an_error_is_there(status: int, hub: HubServer) -> None:
    hub.broken = (status, "no")
    assert look_at_hub() == "" and switches() == {False}
    assert hub.requests == ["HEAD /"]


def test_whoever_wants_no_hub_has_none_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert look_at_hub() == "the hub is not asked, as HF_HUB_OFFLINE is set"
    assert hub.requests == [] and tools.base.hub._last_look == (-math.inf, "")
