"""The live page: the report, read by this machine alone, loading itself again."""

import threading
from pathlib import Path

import httpx
import pytest

from graph.show.live import RELOAD_SECONDS, address, listen, serve
from tests.made_runs import write_run
from tools.base.errors import UserError


def test_the_page_is_the_report_of_the_moment_and_loads_itself_again(tmp_path: Path) -> None:
    with listen(0) as listener:
        url = address(listener)
        with serve(tmp_path / "demo", listener), httpx.Client(trust_env=False, timeout=60) as client:
            assert "holds no run" in client.get(url).text
            write_run(tmp_path / "demo", words="<script>alert(1)</script>")
            answer = client.get(url)
            assert answer.headers["refresh"] == str(RELOAD_SECONDS) and "30.0% refit:kappa" in answer.text
            assert "<script>alert" not in answer.text and "script-src" not in answer.headers["content-security-policy"]
            assert client.get(f"{url}events.jsonl").status_code == client.get(f"{url}../config.yaml").status_code == 404
            assert client.post(url).status_code == 405
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "page"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 400), ({"Origin": "https://evil.example"}, 403), ({"Host": "localhost"}, 200)],
)
def test_only_this_machines_own_readers_are_let_in(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    write_run(tmp_path / "demo")
    with listen(0) as listener, serve(tmp_path / "demo", listener):
        assert httpx.get(address(listener), headers=headers, trust_env=False).status_code == status


def test_a_port_that_is_taken() -> None:
    with listen(0) as taken, pytest.raises(UserError, match=r"^--serve cannot listen at port \d+: .*; give another"):
        listen(taken.getsockname()[1])
