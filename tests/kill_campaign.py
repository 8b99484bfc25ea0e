"""SIGKILL at random moments: every run that is resumed comes to what the run that was left alone comes to.

Two runs of a tiny model take turns: one that the rule plans and one that a chat model plans with tools and reflects
on, behind an endpoint on loopback whose answers depend on the conversation alone. Moments are drawn evenly over the
nodes, then over the time that the node took in the run that was left alone; every third run is killed once more while
it is resumed.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.end_to_end.helpers import TINY, at_home, fork, read_events, read_state, read_summary, train_tiny_model
from tests.openai_server import DEMO_CALLS, DEMO_PLANS, Answer, Body, OpenAIServer

ROUNDS = ("--max-iterations", "4", "--patience", "4", "--validation-windows", "6")
CHANGING = ("seconds", "peak_memory_bytes", "workers")
"""What a summary may say otherwise of the same run."""
KILLS_OF_ONE_RUN = (1, 1, 2)


@dataclass(frozen=True)
class Moment:
    """When a run is killed: so long after its node began for the nth time."""

    node: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Easy:
    """A run that was left alone: its flags, what it came to, and how long each of its nodes took."""

    flags: tuple[str, ...]
    result: dict[str, Any]
    requests: int
    """What the endpoint was asked."""
    nodes: list[tuple[str, float]]

    def draw(self, dice: random.Random) -> Moment:
        """A random moment of a random node."""
        name = dice.choice(sorted({name for name, _ in self.nodes}))
        count = dice.randint(1, sum(found == name for found, _ in self.nodes))
        took = [seconds for found, seconds in self.nodes if found == name][count - 1]
        return Moment(name, count, dice.uniform(0, took))


def run_campaign(times: int, seed: int, workers_every: int) -> int:
    """Kill and resume so many times; 1 when a run came out otherwise, else 0."""
    dice, home = random.Random(seed), Path(tempfile.mkdtemp(prefix="billhook-kill-"))
    done, wrong = 0, []
    with at_home(home), OpenAIServer(answer) as server:
        model, agent = train_tiny_model(home / "model"), server.planner("model")
        flags = ("--name", "run", "--model", str(model), *TINY, *ROUNDS)
        runs = [
            leave_alone(home / "rule", flags, server),
            leave_alone(home / "chat", (*flags, "--planner", agent, "--reflector", agent), server),
        ]
        for number in itertools.count():
            if done >= times:
                break
            easy, place = runs[number % 2], home / str(number)
            kills = min(KILLS_OF_ONE_RUN[number % 3], times - done)
            shared = bool(workers_every) and number % workers_every == workers_every - 1
            moments = [easy.draw(dice) for _ in range(kills)]
            difference = hurt(place, easy, moments, shared, server)
            done += kills
            wrong += [place] if difference else []
            where = ", then ".join(f"{moment.node} {moment.count} + {moment.seconds:.3f} s" for moment in moments)
            print(f"{done}: {'workers, ' if shared else ''}{where}: {difference or 'the same'}", flush=True)
            if not difference:
                shutil.rmtree(place)
    print(f"{done} kills and resumes, {len(wrong)} runs came out otherwise{''.join(f' · {run}' for run in wrong)}")
    if not wrong:
        shutil.rmtree(home)
    return bool(wrong)


def leave_alone(home: Path, flags: tuple[str, ...], server: OpenAIServer) -> Easy:
    """Run without a kill."""
    home.mkdir()
    before = len(server.requests)
    done = fork(home, *flags).finish()
    assert done.code == 0, f"{done.out}{done.err}"
    run = home / "runs" / "run"
    events = read_events(run)
    marks = [(event["node"], event["time"]) for event in events if event["type"] == "node"]
    ends = [time for _, time in marks[1:]] + [events[-1]["time"]]
    times = [(node, end - begin) for (node, begin), end in zip(marks, ends, strict=True)]
    return Easy(flags, read_result(run), len(server.requests) - before, times)


def hurt(home: Path, easy: Easy, moments: list[Moment], shared: bool, server: OpenAIServer) -> str:
    """Kill a run at these moments and resume it each time; in what it differs from the run that was left alone."""
    home.mkdir()
    before = len(server.requests)
    run, given = home / "runs" / "run", easy.flags + (("--workers", "2", "--worker-threads", "1") if shared else ())
    for moment in moments:
        work = fork(home, *given)
        wait_until(run, moment, lambda work=work: work.process.exitcode is not None)
        work.kill()
        if work.process.exitcode not in (0, -signal.SIGKILL):
            return f"ended with {work.process.exitcode}: {work.read('out')[-500:]}{work.read('err')}"
        if (run / "run.json").is_file():
            given = ("--resume", "run")
    last = fork(home, *given).finish(timeout=300)
    if last.code or last.err:
        return f"resumed with {last.code}: {last.out[-500:]}{last.err}"
    paid = len(server.requests) - before
    if paid > easy.requests + len(moments):  # each kill may lose the one reply that was on its way
        return f"{paid} requests in place of {easy.requests}"
    return compare(easy.result, read_result(run))


def wait_until(run: Path, moment: Moment, ended: Any) -> None:
    """Sleep until the moment has come, or the run has ended."""
    log, seen = run / "events.jsonl", 0
    while not ended():
        size = log.stat().st_size if log.is_file() else 0
        if size == seen:
            time.sleep(0.001)
            continue
        seen = size
        begun = [event for event in read_events(run, "node") if event["node"] == moment.node]
        if len(begun) >= moment.count:
            time.sleep(moment.seconds)
            return


def read_result(run: Path) -> dict[str, Any]:
    """What a run came to: masks, figures, trials, and everything that was spent."""
    state = read_state(run)
    return {
        "summary": {name: value for name, value in read_summary(run).items() if name not in CHANGING},
        "trials": [trial.model_dump(exclude={"seconds"}) for trial in state.trials],
        "lessons": [lesson.model_dump() for lesson in state.lessons],
        "notes": [note.model_dump() for note in state.notes],
        "probes": [probe.model_dump() for probe in state.probes],
        "usage": state.usage.model_dump(),
        "evaluated_tokens": state.evaluated_tokens,
    }


def compare(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The places where two results differ, in a line; empty where they are the same."""
    apart = []
    for part, value in expected.items():
        if value != found[part]:
            names = [name for name in value if value[name] != found[part].get(name)] if isinstance(value, dict) else []
            apart.append(f"{part} {' '.join(names)}: {json.dumps(value)[:300]} became {json.dumps(found[part])[:300]}")
    return "; ".join(apart)


def answer(body: Body) -> Answer:
    """A planner that asks its tools before each plan, or a reflector; the conversation alone decides what it says."""
    messages = body["messages"]
    asked = re.search(r"Plan round (\d+)\.", str(messages[1]["content"]))
    if not asked:
        round_ = int(re.findall(r"Reflect on round (\d+)\.", str(messages[1]["content"]))[0])
        return {"lessons": [], "note": {"text": f"Round {round_} was measured.", "trials": [round_]}}
    turn, answers = int(asked[1]) % len(DEMO_PLANS), sum(message["role"] == "assistant" for message in messages)
    return [*DEMO_CALLS[turn - 1], DEMO_PLANS[turn - 1]][min(answers, len(DEMO_CALLS[turn - 1]))]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill_campaign", description=__doc__)
    parser.add_argument("--times", type=int, default=100, metavar="N", help="kills; each is followed by a resume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=20, metavar="N", help="every Nth run has two workers; 0: none")
    options = parser.parse_args()
    return run_campaign(options.times, options.seed, options.workers)


if __name__ == "__main__":
    sys.exit(main())
