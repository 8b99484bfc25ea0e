"""Keys and passwords are taken out of whatever is told."""

from pathlib import Path

import pytest

from tools.base.errors import UserError
from tools.base.secrets import read_secrets, redact

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


def test_a_file_of_keys_in_another_encoding_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes("MY_TOKEN=hf_secret_value".encode("utf-16"))
    with pytest.raises(UserError, match=r"^\.env is not UTF-8 text: .*; save it as that$") as refusal:
        read_secrets()
    assert "secret" not in str(refusal.value)
