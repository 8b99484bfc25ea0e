"""What tools/README.md says that large models need is what --dry-run says."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import run
from tests.tools.estimate.helpers import LLAMA_70B, QWEN3_8B, write_config
from tools.estimate import places

ROOT = Path(__file__).resolve().parents[2]
QWEN3_4B = {**QWEN3_8B, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
PROCESS = 586_000_000
"""Bytes that Python, torch and transformers took where the table was made; this process holds pytest's work as well."""
CONFIGS = {"Qwen3-4B": QWEN3_4B, "Qwen3-8B": QWEN3_8B, "Llama-70B": LLAMA_70B}


def read_rows() -> list[list[str]]:
    """Model, machine and figures, as they stand in the table."""
    text = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    table = text.partition("| | on | each GPU |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    for before, row in itertools.pairwise(rows):
        if len(row) < len(before):  # the model's name stands in the first of its rows
            row.insert(0, before[0])
    return rows


ROWS = read_rows()


def check_shown(shown: str, told: list[str]) -> None:
    """One of the numbers that were told is the first one that is shown, to as many digits."""
    number = re.match(r"[\d,]+(?:\.(\d+))?", shown)
    assert number and f"{float(told[0]):,.{len(number[1] or '')}f}" == number[0], (shown, told)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]} on {row[1]}" for row in ROWS])
def test_the_table_is_what_the_command_says(
    row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(places, "measure_process", lambda: PROCESS)
    model, machine, gpu, cpu, disk, work, reading = row
    memory, *flags = machine.split(", ", 1)
    flags = re.findall(r"`(.+)`", flags[0])[0].split() if flags else []
    device = [] if "--device" in flags else ["--device", "cuda"]
    directory, config = write_config(tmp_path, CONFIGS[model]), ROOT / "configs" / "qwen3-8b.yaml"
    asked = ["--device-memory", memory.removesuffix(" GB").replace(" × ", "x"), *device, *flags]
    assert run.main(["--dry-run", "--config", str(config), "--model", str(directory), *asked]) == 0
    said = capsys.readouterr().out
    check_shown(gpu, re.findall(r"^fits .+ of \S+ GB: (\S+) GB at most", said, re.MULTILINE))
    everywhere = r"^peak memory of the CPU(?: of a machine with all of them)?: (\S+) GB"
    check_shown(cpu, re.findall(everywhere, said, re.MULTILINE))
    check_shown(disk, re.findall(r"^disk: (\S+) GB", said, re.MULTILINE))
    busiest = re.findall(r"([\d.]+) PFLOP of it by", said)
    check_shown(work, busiest or re.findall(r"^work: about (\S+) PFLOP", said, re.MULTILINE))
    read = re.findall(r"^streamed: .+: ([\d.]+) GB, (.+) at 1\.0 GB a second", said, re.MULTILINE)
    assert bool(read) == (not reading.startswith("once"))
    for size, time in read:
        check_shown(reading, [size])
        assert reading.endswith(", " + re.sub(r" \d+ s$", "", time))
