"""Keys and passwords are taken out of whatever is told."""

import pytest

from tools.base.secrets import redact

KEY = "sk-proj-Zk39_secret-Qx7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"key {KEY}.", "key [key]."),
        ("Incorrect API key provided: sk-ab***yz. See", "Incorrect API key provided: [key]. See"),
        ("sk-ant-api03-Ab_c-d, sk-…", "[key], [key]"),
        ("provided: abcd*******wxyz", "provided: [key]"),
        ("a hf_secret_value b", "a [key] b"),
        ("http://user:password@host/v1", "http://[key]@host/v1"),
        ("task-wise, disk-bound, a placeholder", "task-wise, disk-bound, a placeholder"),
        ("openai:m@http://127.0.0.1:8000/v1 *.v_proj", "openai:m@http://127.0.0.1:8000/v1 *.v_proj"),
    ],
)
def test_redact(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_secret_value")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert redact(text) == expected
