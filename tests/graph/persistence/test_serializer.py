"""Checkpoints as bytes: every value keeps its type, and nothing else is revived."""

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from graph.persistence.serializer import STATE_MODELS, make_serializer
from graph.state import State
from tests.graph.persistence.values import TRIAL, VALUES
from tools.base.settings import WorkbenchSettings


def test_values_cover_the_whole_state() -> None:
    assert VALUES.keys() == State.model_fields.keys()


def test_every_value_keeps_its_type(caplog: pytest.LogCaptureFixture) -> None:
    serde = make_serializer()
    for name, value in VALUES.items():
        again = serde.loads_typed(serde.dumps_typed(value))
        assert type(again) is type(value), name
        assert again == value, name
    assert not caplog.records


def test_another_class_is_not_revived() -> None:
    serde = make_serializer()
    again = serde.loads_typed(serde.dumps_typed(WorkbenchSettings()))
    assert again == WorkbenchSettings().model_dump()


def test_a_state_is_compressed() -> None:
    plain = JsonPlusSerializer(allowed_msgpack_modules=STATE_MODELS)
    state = State(run="r", trials=[TRIAL] * 9)
    kind, data = make_serializer().dumps_typed(state)
    assert (kind, len(data) < len(plain.dumps_typed(state)[1]) / 2) == ("msgpack+zlib", True)


def test_the_state_holds_nothing_by_layer() -> None:
    """No field grows with the model: lists are of trials, costs, lessons and the like, and plans speak in selectors."""
    lists = {name for name, field in State.model_fields.items() if "list" in str(field.annotation)}
    assert lists == {"trials", "counted", "lessons", "experience", "notes", "probes", "written"}
