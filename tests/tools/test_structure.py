"""The command writes a smaller model and its figures, and refuses in one line what cannot be cut."""

import json
from pathlib import Path

import pytest
import transformers

from tests.rows import write_questions
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.progress import ignore_progress
from tools.measure.losses import evaluate_windows
from tools.measure.recall import compare_recall, encode_questions, measure_recall
from tools.structure import main
from tools.surgery.parts import count_weights
from tools.texts.windows import cut_windows


@pytest.mark.parametrize(
    ("architecture", "flags", "message"),
    [
        ("llama", "--remove 1", "remove: input should be less than 1, not '1'"),
        ("llama", "--remove 0", "remove: input should be greater than 0, not '0'"),
        ("llama", "--size 1", "size: input should be less than 1, not '1'"),
        ("llama", "--size 0.5 --remove 0.5", "--remove and --size both say how much goes; give one of them"),
        (
            "llama",
            "--size 0.4",
            "--size 0.4 is too small: 40.37% of the model's bytes are not of the blocks' linear layers, and stay",
        ),
        ("llama", "--size 0.5", "0.838542 is too much to remove: 70.00% is the most that can go here"),
        ("llama", "--size 0.99", "0.0167708 is too little to remove: 10.00% is the least that can go here"),
        ("llama", "--parts legs", "--parts 'legs' is none of neurons; heads; neurons,heads; blocks; auto"),
        (
            "llama",
            "--parts blocks,heads",
            "--parts 'blocks,heads' is none of neurons; heads; neurons,heads; blocks; auto",
        ),
        ("llama", "--remove 0.99", "0.99 is too much to remove: 70.00% is the most that can go here"),
        ("llama", "--remove 0.001", "0.001 is too little to remove: 10.00% is the least that can go here"),
        ("llama", "--parts heads --remove 0.5", "0.5 is too much to remove: 20.00% is the most that can go here"),
        ("llama", "--parts neurons --remove 0.7", "0.7 is too much to remove: 50.00% is the most that can go here"),
        ("opt", "--parts neurons --remove 0.03", "0.03 is too little to remove: 7.14% is the least that can go here"),
        (
            "llama",
            "--parts auto --remove 0.99",
            "0.99 of the weights cannot be removed here: it is too much, or less than a few neurons",
        ),
        ("llama", "--parts blocks --remove 0.75", "0.75 is too much to remove: 50.00% is the most that can go here"),
        ("llama", "--parts blocks --remove 0.1", "0.1 is too little to remove: 50.00% is the least that can go here"),
        (
            "gpt2",
            "--parts heads",
            "the heads of GPT2LMHeadModel cannot be cut: its attention holds attn.c_attn, attn.c_proj, not q_proj, "
            "k_proj, v_proj and one output projection; its neurons or blocks may",
        ),
        (
            "opt",
            "--parts heads",
            "OPTForCausalLM takes no such cut: embed_dim must be divisible by num_heads (got `embed_dim`: 32 and "
            "`num_heads`: 3).",
        ),
        (
            "opt",
            "--parts heads --remove 0.3",
            "OPTForCausalLM takes no such cut: its config has no way to say that "
            "model.decoder.layers.0.self_attn.k_proj.bias is (16,), not (32,); other parts may be cut",
        ),
        (
            "qwen3_moe",
            "--parts neurons",
            "the neurons of Qwen3MoeForCausalLM cannot be cut: beside attention its blocks hold "
            "mlp.experts.gate_proj, mlp.experts.up_proj, mlp.experts.down_proj, not projections up and one down; its "
            "heads or blocks may",
        ),
        (
            "llama",
            "--device stream",
            "tools.structure needs the whole model on one device; use another --device than stream or spread",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    architecture: str, flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny_model(tmp_path / "dense", architecture)
    assert main(["--out", str(tmp_path / "cut"), *describe(source), *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "cut").exists()


def describe(source: Path) -> list[str]:
    """Flags of a small run."""
    sizes = "--window 64 --calibration-windows 4 --validation-windows 3 --test-windows 2 --text-spread 1 --device cpu"
    return ["--model", str(source), *sizes.split()]


@pytest.mark.parametrize("parts", ["neurons,heads", "blocks", "auto"])
def test_the_command_writes_a_smaller_model_and_its_figures(
    parts: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "cut"), *describe(tiny_llama), "--parts", parts, "--remove", "0.4"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "cut" / "structure.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    assert figures["cut"]["parameters"] == loaded.num_parameters() < figures["dense"]["parameters"] == 25_760
    file = tmp_path / "cut" / "model" / "model.safetensors"
    assert figures["cut"]["file_bytes"] == file.stat().st_size < (tiny_llama / "model.safetensors").stat().st_size
    achieved = 1 - count_weights(loaded) / (2 * 7680)
    assert figures["removed"] == pytest.approx(achieved) == pytest.approx(0.4 if parts != "blocks" else 0.5)
    assert figures["kl"] < figures["kl_without_refit"]
    assert all(figures[model][speed] > 0 for model in ("dense", "cut") for speed in SPEEDS)
    if parts == "auto":
        assert figures["parts"] == "neurons,heads,blocks"
        assert figures["constraint"].startswith("every block that stays loses the same number, those that the least KL")
    elif parts == "blocks":
        assert (figures["heads"], figures["neurons"], len(figures["blocks"])) == (0, 0, 1)
        assert figures["constraint"].startswith("whole blocks, in this order, each the one without which KL was lowest")
    else:
        assert figures["blocks"] == []
        widths = f"{figures['heads']} of 2 groups of heads and {figures['neurons']} of 48 neurons"
        assert figures["constraint"].startswith(f"every block loses the same number, its own lowest-scored: {widths}")
    for words in (f"{figures['dense']['perplexity']:.2f}", f"{figures['cut']['perplexity']:.2f}", "cut and refitted"):
        assert words in printed and words in (tmp_path / "cut" / "model" / "README.md").read_text()
    assert f"{figures['removed']:.2%} removed (asked for 40.00%); " in printed
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'cut' / 'model'} exists already; choose another --out\n"
    (tmp_path / "file").write_text("")
    assert main([*flags, "--out", str(tmp_path / "file" / "cut")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'cut'} cannot be written: File exists\n"


@pytest.mark.parametrize(("size", "neurons", "heads"), [(0.8, 24, 0), (0.6, 40, 1)])
def test_as_much_of_the_whole_model_stays_as_asked(
    size: float, neurons: int, heads: int, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "cut"), *describe(tiny_llama), "--size", str(size)]) == 0
    figures = json.loads((tmp_path / "cut" / "structure.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    assert (figures["neurons"], figures["heads"], figures["size"]) == (neurons, heads, size)
    gone = 2 * (96 * neurons + 1536 * heads)
    assert loaded.num_parameters() == 25_760 - gone
    assert abs(gone - (1 - size) * 25_760) <= 2 * 96 * 8 / 2, "no further away than half of eight neurons of each block"
    assert f"{1 - gone / 25_760:.2%} of the model stays (asked for {size:.2%}); " in capsys.readouterr().out


def test_it_tells_how_much_of_the_answers_is_kept(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_questions(tmp_path / "q.jsonl", 24)
    asked = ["--questions", source, "--question-pairs", "8"]
    assert main(["--out", str(tmp_path / "cut"), *describe(tiny_llama), *asked]) == 0
    kept = json.loads((tmp_path / "cut" / "structure.json").read_text())["knowledge"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    settings = tiny_settings(tiny_llama, window=64, questions=source, question_pairs=8)
    recalls = []
    for directory in (tiny_llama, tmp_path / "cut" / "model"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        pairs = encode_questions(settings, model, tokenizer)["validation"]
        recalls.append(measure_recall(model, pairs, "", ignore_progress))
    found = compare_recall(recalls[1], recalls[0])
    assert found is not None and (kept["source"], kept["pairs"]) == (source, 8)
    assert (kept["share"], kept["error"]) == pytest.approx((found.share, found.error), rel=1e-5)
    told = f"{kept['share']:.1%} ± {kept['error']:.1%}"
    card = (tmp_path / "cut" / "model" / "README.md").read_text()
    assert "answers kept, of 8" in capsys.readouterr().out
    assert f"| answers kept, of 8 |  | {kept['without_refit']:.1%} | {told} |" in card
    assert card.rstrip().endswith("per token, on 8 questions of `file:q.jsonl`.") and str(tmp_path) not in card


def test_text_that_the_model_wrote(tiny_llama: Path, tmp_path: Path) -> None:
    assert (
        main(["--out", str(tmp_path / "cut"), *describe(tiny_llama), "--calibration", "self", "--parts", "neurons"])
        == 0
    )
    assert len(list((tmp_path / "cut" / "artifacts").rglob("*.json"))) >= 2, "its beginning, and each batch"


SPEEDS = ("seconds_per_window", "decoded_per_second")


@pytest.mark.parametrize(("model", "lead"), [("tiny_llama", 0), ("beginning_llama", 1)])
def test_the_figures_are_those_of_the_written_model(
    model: str, lead: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    dense = request.getfixturevalue(model)
    assert main(["--out", str(tmp_path / "cut"), *describe(dense), "--parts", "neurons"]) == 0
    figures = json.loads((tmp_path / "cut" / "structure.json").read_text())
    assert figures["protocol"]["bos"] is bool(lead)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "cut" / "model")
    windows = cut_windows(tiny_settings(dense, window=64), tokenizer)
    assert windows.lead == lead
    for source, name in ((dense, "dense"), (tmp_path / "cut" / "model", "cut")):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
        evaluation, _ = evaluate_windows(loaded, windows.validation, None, "", ignore_progress, lead=lead)
        assert figures[name]["perplexity"] == pytest.approx(evaluation.perplexity, rel=1e-5)
