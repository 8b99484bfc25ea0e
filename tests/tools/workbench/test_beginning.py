"""A workbench whose windows begin with a beginning-of-sequence token: what is measured, alone or by workers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benches import REFIT, open_bench, prune
from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.progress import ignore_progress as ignore
from tools.measure.losses import evaluate_windows
from tools.models.disk import list_disk
from tools.results.schema import describe_protocol
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench
from tools.workbench.store import DENSE


def measure(bench: Workbench) -> list[Any]:
    """Ids of content, and figures, of all that is taken from windows."""
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    found: list[Any] = [profile, checkpoint, bench.weights.hash_masks()]
    found += [bench.evaluator.evaluate(checkpoint, split, profile, ignore) for split in ("validation", "test")]
    found += [
        bench.evaluator.measure_kl_each([DENSE, checkpoint], [0, 1]),
        bench.evaluator.evaluate_each([checkpoint], 2, profile, ignore),
    ]
    layers = bench.curves.describe_layers(profile, REFIT.model_copy(update={"curves": "method"}), ignore)
    return [*found, [layer.kappa for layer in layers]]


def test_losses_are_those_of_the_text_alone_whoever_measures_them(
    beginning_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench_closed: None
) -> None:
    settings = tiny_settings(beginning_llama)
    bench = open_bench(settings, tmp_path / "alone")
    assert bench.windows.lead == 1 and bench.windows.validation.shape == (3, 65)
    alone = measure(bench)
    profile, checkpoint = alone[:2]
    dense = bench.profiles.read(profile).dense
    bench.pruner.restore(checkpoint)
    ids_BT, hidden = bench.windows.validation, bench.profiles.read_hidden(profile)
    again = evaluate_windows(bench.model, ids_BT, hidden, "", ignore, lead=1)[0]
    assert alone[3] == again, "from the changed block on, and from the first"
    with torch.no_grad():
        log_p = bench.model(ids_BT, use_cache=False).logits.double().log_softmax(-1)
    expected = -log_p[:, 1:-1].gather(2, ids_BT[:, 2:, None]).mean((1, 2))
    assert again.nll == pytest.approx(expected.tolist(), rel=1e-5)
    close_workbench()

    gather_teams(monkeypatch)
    shared = settings.model_copy(update={"workers": "2", "worker_threads": 1})
    assert measure(open_bench(shared, tmp_path / "shared")) == alone
    close_workbench()
    never = open_bench(settings.model_copy(update={"bos": "never"}), tmp_path / "never")
    assert never.profiles.read(never.profile(ignore)).dense.nll != dense.nll


def test_never_gives_the_bits_of_a_tokenizer_that_begins_no_text(
    beginning_llama: Path, tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    never = measure(open_bench(tiny_settings(beginning_llama, bos="never"), tmp_path / "never"))
    close_workbench()
    assert measure(open_bench(tiny_settings(tiny_llama), tmp_path / "plain")) == never


def test_a_window_has_to_fit_behind_it(
    beginning_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.models.positions.count_positions", lambda _model: 256)
    texts = {"calibration_windows": 1, "gradient_windows": 1, "validation_windows": 2, "test_windows": 1}
    sentence = (
        r"^windows of 256 tokens behind the beginning-of-sequence token take 257 positions, but the model has 256; "
        r"use --window 255, or --bos never$"
    )
    with pytest.raises(UserError, match=sentence):
        open_bench(tiny_settings(beginning_llama, window=256, **texts), tmp_path / "long")
    with pytest.raises(UserError, match=r"^windows of 257 tokens do not fit the 256 positions .*; use --window 256$"):
        open_bench(tiny_settings(beginning_llama, window=257, bos="never", **texts), tmp_path / "long")
    for changes in ({"window": 255}, {"window": 256, "bos": "never"}):
        bench = open_bench(tiny_settings(beginning_llama, **texts, **changes), tmp_path / "fits")
        assert bench.windows.test.shape[1] == 256
        close_workbench()


def test_it_is_on_disk_and_in_the_protocol(beginning_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    bench = open_bench(tiny_settings(beginning_llama), tmp_path / "run")
    inputs = [
        list_disk(bench.model, bench.weights.layers, bench.settings, lead)[1].bytes for lead in (0, bench.windows.lead)
    ]
    assert inputs == [2 * 2 * 64 * 32 * 4, 2 * 2 * 65 * 32 * 4]
    said = [describe_protocol(bench.settings, bos=bos).windows for bos in (False, True)]
    assert said == ["windows of 64", "windows of 64, a beginning-of-sequence token before every window (not counted)"]
