"""The house plan: no circle between files, every file in the wheel, the lints and the first page as promised."""

import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

from tests.paths import ROOT
from tests.write_tables import PAGE, write_tables


def test_no_circle_between_files() -> None:
    """Imports inside functions count as any others; those for types alone do not."""
    house = grimp.build_graph("graph", "tools", "billhook_kernels", exclude_type_checking_imports=True, cache_dir=None)
    TopologicalSorter({file: house.find_modules_directly_imported_by(file) for file in house.modules}).prepare()


def test_no_other_distribution_has_a_package_of_our_names() -> None:
    """Of two that have, the later one to be installed writes over the files of the earlier."""
    owners = packages_distributions()
    others = {name: set(owners.get(name, ())) - {"billhook"} for name in ("graph", "tools", "billhook_kernels")}
    assert {name: found for name, found in others.items() if found} == {}


@pytest.mark.slow
def test_every_file_is_in_the_wheel(tmp_path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "graph", "tools", "kernels", "configs"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    files = {name for name in tracked.stdout.split() if Path(name).suffix not in (".md", ".txt") or "prompts" in name}
    moved = {re.sub("^configs/", "tools/base/configs/", name.removeprefix("kernels/")) for name in files}
    in_wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name for name in in_wheel if ".dist-info/" not in name} == moved


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_links_between_pages_lead_somewhere() -> None:
    """A file that is there, and in it a heading or a mark."""
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    pages += [
        page for room in ("graph", "tools", "kernels", "configs", "tests") for page in (ROOT / room).rglob("*.md")
    ]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, mark = link.partition("#")
            target = page.parent / name if name else page
            if not link.startswith("http") and not (target.exists() and (not mark or mark in _list_marks(target))):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def _list_marks(page: Path) -> set[str]:
    """Headings as GitHub makes marks of them, and those that are written out."""
    text = page.read_text(encoding="utf-8")
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in headings} | set(re.findall(r'<a id="([^"]+)"', text))


def test_tables_of_choices_are_those_of_the_registries() -> None:
    """Else: python -m tests.write_tables"""
    page = PAGE.read_text(encoding="utf-8")
    assert write_tables(page) == page
