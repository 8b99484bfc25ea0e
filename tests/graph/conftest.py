"""Fixtures of the graph's tests."""

import pytest


@pytest.fixture
def unknown_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine are reached without a proxy, and nothing is remembered of what an endpoint can do."""
    from graph.llm import ladder

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ladder, "_rungs", {})
