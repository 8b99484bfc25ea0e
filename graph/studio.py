"""Serve the graph and all past runs to LangGraph Studio, on this machine only.

    python -m graph.studio [--port 2024] [--runs-dir runs] [--state postgresql://HOST/DATABASE]

Starts `langgraph dev` on the runs directory's own checkpoints, registers every run made by
`python -m graph.run` as a thread and every file of configs/ as an assistant, and waits until Ctrl-C.
The server writes its output to studio.log in the runs directory, and its list of threads (a cache, in
pickle) to .langgraph_api in the present directory; runs and memory are in the SQLite file, or the
PostgreSQL database, alone.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx
from langgraph_sdk import get_sync_client

from graph.config import PROMPTS, check_config
from graph.persistence import STATE_VARIABLE, state_url
from tools.base.errors import UserError
from tools.base.options import CONFIGS, read_yaml
from tools.base.rundir import RUNS_DIR_VARIABLE, runs_directory
from tools.base.secrets import read_secrets

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 15.0

# Without the first three, the server reports how it is used, and asks the network whether it is up to date.
QUIET = {
    "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    "LANGGRAPH_NO_VERSION_CHECK": "true",
    "LANGSMITH_TRACING": "false",
    "LANGGRAPH_STRICT_MSGPACK": "true",
    "LOG_COLOR": "false",
}


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; the exit status: 0, 1 when the server ended by itself, 2 for bad input."""
    options = _parse(arguments)
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) != signal.SIG_IGN:  # nohup asks to outlive the terminal
            signal.signal(kind, _interrupt)
    try:
        if options.state:
            os.environ[STATE_VARIABLE] = options.state
        state_url()
        check_can_serve(options.port)
        read_secrets()  # the server reads no .env, and a planner may need a key
        with serve(options.port, options.runs_dir.resolve()) as server:
            register_configs(options.port)
            runs = register_runs(options.port, options.runs_dir)
            _print_address(options.port, options.runs_dir, runs)
            server.wait()
            raise RuntimeError(_explain_end(server, options.runs_dir))
    except KeyboardInterrupt:
        print("stopped")
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1


def check_can_serve(port: int) -> None:
    """UserError when the server is not installed, its config is missing, or the port is taken."""
    if any(importlib.util.find_spec(module) is None for module in ("langgraph_cli", "langgraph_api")):
        raise UserError("Studio's server is not installed; install it with: pip install -e '.[studio]'")
    if not (ROOT / "langgraph.json").is_file():
        raise UserError(f"{ROOT / 'langgraph.json'} is missing; run this from a clone of Billhook")
    with socket.socket() as probe:
        # The server itself would quietly take another port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} is taken; choose another with --port ({error.strerror})") from error


@contextmanager
def serve(port: int, runs_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running server on `port`; it and whatever it started are gone afterwards.

    Raises UserError when the runs directory cannot be written, RuntimeError when the server does not come up.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        log = _log(runs_dir).open("wb")
    except OSError as error:
        raise UserError(f"cannot write {_log(runs_dir)}: {error.strerror}") from error
    with log:
        # A session of its own: Ctrl-C reaches only us, and we end the whole group.
        server = subprocess.Popen(
            _command(port), env=_environment(runs_dir), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_up(server, port, runs_dir)
            yield server
        finally:
            _stop(server)


def find_runs(runs_dir: Path) -> dict[str, str]:
    """Thread id of every run in `runs_dir`, by name; a run.json that cannot be read is named on stderr."""
    runs = {}
    for file in sorted(runs_dir.glob("*/run.json")):
        try:
            runs[file.parent.name] = str(uuid.UUID(json.loads(file.read_text(encoding="utf-8"))["thread_id"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"left out: {file} names no thread ({type(error).__name__}: {error})", file=sys.stderr)
    return runs


def register_runs(port: int, runs_dir: Path) -> dict[str, str]:
    """Make every run in `runs_dir` a thread of the server; thread ids by name."""
    runs = find_runs(runs_dir)
    # No key: it would go to a server that asks for none.
    with get_sync_client(url=_address(port), api_key=None) as client:
        for name, thread_id in runs.items():
            client.threads.create(
                thread_id=thread_id, graph_id="billhook", if_exists="do_nothing", metadata={"run": name}
            )
    return runs


def register_configs(port: int) -> None:
    """Make every file of configs/ an assistant of the server, whose context (planner, reflector …) can be edited."""
    with get_sync_client(url=_address(port), api_key=None) as client:
        for file in sorted(CONFIGS.glob("*.yaml")):
            context, mark = read_context(file), str(uuid.uuid5(uuid.NAMESPACE_URL, f"billhook/configs/{file.stem}"))
            made = client.assistants.create(
                "billhook", name=file.stem, assistant_id=mark, context=context, if_exists="do_nothing"
            )
            if made["context"] != context:  # the server remembers the file of an earlier start
                client.assistants.update(mark, context=context)


def read_context(file: Path) -> dict[str, Any]:
    """The fields of a config file, prompts as their text: the server reads no files for them. Raises UserError."""
    values = read_yaml(file)
    named = [field for field in PROMPTS if field in values]
    return values | (check_config(values).model_dump(include=set(named)) if named else {})


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m graph.studio", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=_port, default=2024, help="port on 127.0.0.1 (default: 2024)")
    parser.add_argument(
        "--runs-dir", type=Path, default=runs_directory(), help="where the runs are (default: %(default)s)"
    )
    parser.add_argument(
        "--state", metavar="URL", help=f"PostgreSQL database of checkpoints and memory; ${STATE_VARIABLE}"
    )
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port between 1 and 65535")
    return int(text)


def _command(port: int) -> list[str]:
    config = str(ROOT / "langgraph.json")
    options = ["--no-browser", "--no-reload", "--host", HOST, "--port", str(port), "--config", config]
    return [sys.executable, "-m", "langgraph_cli", "dev", *options]


def _environment(runs_dir: Path) -> dict[str, str]:
    # The clone comes first, so that `graph.build` is found from any directory.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | QUIET | {RUNS_DIR_VARIABLE: str(runs_dir), "PYTHONPATH": path}


def _wait_until_up(server: subprocess.Popen[bytes], port: int, runs_dir: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(_explain_end(server, runs_dir))
        try:
            # trust_env off: a proxy named in the environment cannot reach this machine.
            if httpx.get(f"{_address(port)}/ok", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"the server did not come up within {START_SECONDS:.0f} s; see {_log(runs_dir)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started: its whole process group, at first politely."""
    again = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave it half stopped
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(STOP_SECONDS)
        except (ProcessLookupError, PermissionError):  # the group is empty; macOS says it the second way
            break
        except subprocess.TimeoutExpired:
            continue
    signal.signal(signal.SIGINT, again)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _explain_end(server: subprocess.Popen[bytes], runs_dir: Path) -> str:
    tail = _log(runs_dir).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
    return "\n".join(
        [*tail, f"the server ended by itself (exit {server.poll()}); its whole output is in {_log(runs_dir)}"]
    )


def _print_address(port: int, runs_dir: Path, runs: dict[str, str]) -> None:
    print(f"Studio: https://smith.langchain.com/studio/?baseUrl={_address(port)}")
    print(f"Server: {_address(port)} (this machine only), output in {_log(runs_dir)}")
    print(f"Runs in {runs_dir}:" if runs else f"No runs in {runs_dir} yet.")
    width = max(map(len, runs), default=0)
    for name, thread_id in runs.items():
        print(f"  {name:{width}}  {thread_id}")
    print("Ctrl-C stops the server.", flush=True)


def _address(port: int) -> str:
    return f"http://{HOST}:{port}"


def _log(runs_dir: Path) -> Path:
    return runs_dir / "studio.log"


if __name__ == "__main__":
    sys.exit(main())
