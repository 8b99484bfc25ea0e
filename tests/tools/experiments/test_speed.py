"""How benchmarks take turns, and what of them is timed."""

from tools.base.settings import TeamSettings
from tools.experiments.speed import BenchSettings, Site, Task


def test_tasks_take_turns_and_the_first_round_warms_up(site: Site) -> None:
    seen: list[str] = []
    tasks = Task(lambda: seen.append("a")), Task(lambda: seen.append("b"), lambda: seen.append("before b"))
    seconds = site.time(*tasks)
    assert seen == ["a", "before b", "b"] * (1 + site.settings.rounds)
    assert [len(taken) for taken in seconds] == [site.settings.rounds] * 2

    seen.clear()
    site.settings.round_seconds = 0
    assert [len(taken) for taken in site.time(*tasks)] == [1, 1]
    assert seen == ["a", "before b", "b"]


def test_defaults_are_smaller_but_fields_are_the_runs_own() -> None:
    for name, field in TeamSettings.model_fields.items():
        own = BenchSettings.model_fields[name]
        assert (own.description, own.metadata) == (field.description, field.metadata)
        if field.default and (name.endswith("window") or name.endswith("windows")):
            assert own.default < field.default
        else:
            assert own.default == field.default or name == "worker_threads"
