"""What tells one process' code from another's."""

from pathlib import Path

from tools.base.settings import TeamSettings
from tools.team import worker
from tools.team.worker import CODE, hash_code


def test_code_in_any_folder_counts_with_its_place(tmp_path: Path) -> None:
    for place in ("billhook_kernels/a.py", "tools/b.py", "tools/base/c.py", "tools/results/page/templates/d.html"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"'{place}'\n")
    packages = tmp_path / "billhook_kernels", tmp_path / "tools"
    seen = [hash_code(*packages)]

    def differs() -> bool:
        seen.append(hash_code(*packages))
        return seen[-1] not in seen[:-1]

    assert not differs(), "the same again"
    (tmp_path / "kernels").mkdir()
    packages[0].rename(tmp_path / "kernels" / "billhook_kernels")
    packages = tmp_path / "kernels" / "billhook_kernels", tmp_path / "tools"
    assert not differs(), "as in a wheel, so in a checkout"
    (tmp_path / "tools" / "base" / "c.py").write_text("other = 1\n")
    assert differs()
    (tmp_path / "tools" / "base" / "c.py").rename(tmp_path / "tools" / "c.py")
    assert differs(), "the same code in another place"
    (tmp_path / "tools" / "results" / "page" / "templates" / "d.html").write_text("another page")
    (tmp_path / "tools" / "measure").mkdir()
    (tmp_path / "tools" / "measure" / "task.yaml").write_text("task: x")
    assert not differs(), "neither makes a result of a worker"


def test_the_code_that_runs_is_hashed() -> None:
    kernels, tools = CODE
    assert (kernels / "methods.py").is_file() and (tools / "team" / "worker.py").samefile(str(worker.__file__))


def test_the_same_bits_are_promised_of_cpus_alone() -> None:
    """On GPUs the backward of attention adds in any order."""
    help_of_workers = TeamSettings.model_fields["workers"].description or ""
    assert "On CPUs the results are the same, to the bit; on GPUs last bits may differ" in help_of_workers
    page = (CODE[1] / "README.md").read_text(encoding="utf-8")
    assert "On GPUs the same is not promised" in page
