"""A model of which a block is held at a time: the same bits as one that is held whole, in the memory of a block."""

import gc
import os
import re
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tools.models.streamed
from tests.tiny import (
    make_tiny_model,
    make_tiny_tokenizer,
    save_tiny_gguf,
    tiny_settings,
)
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.models import load as sources
from tools.models.blocks import Blocks, check_blocks
from tools.models.layers import find_blocks, find_layers
from tools.models.load import choose_device, count_models, load_model
from tools.models.mapped import Mapped
from tools.models.streamed import convert_once, find_stream, measure_stream
from tools.surgery.parts import NEEDS_WHOLE, refuse_apart
from tools.workbench.open import use_workbench

IDS_BT = torch.arange(1, 17)[None] * 3
MAPS = Path("/proc/self/smaps")


def save(directory: Path, architecture: str) -> Path:
    make_tiny_model(architecture).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma3n", "gemma4", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_is_the_model_held_whole(architecture: str, dtype: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model", architecture)
    whole, _ = load_model(tiny_settings(path, dtype=dtype))
    streamed, _ = load_model(tiny_settings(path, dtype=dtype, device="stream"), tmp_path / "scratch")
    assert find_stream(streamed) is not None and find_stream(whole) is None
    assert list((tmp_path / "scratch").iterdir()) == [], "the file that weights lie in has no name"
    theirs = streamed.state_dict()
    assert list(theirs) == list(whole.state_dict())
    for name, weight in whole.state_dict().items():
        assert theirs[name].dtype == weight.dtype and torch.equal(theirs[name], weight), name
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert (streamed.get_input_embeddings().weight is streamed.get_output_embeddings().weight) == tied
    assert torch.equal(streamed(input_ids=IDS_BT).logits, whole(input_ids=IDS_BT).logits)
    check_blocks(Blocks(streamed), IDS_BT[0])  # forward and backward, block by block beside all at once
    assert not any(parameter.requires_grad for parameter in streamed.parameters())


def test_what_is_written_to_a_layer_is_there_when_its_block_runs(tiny_llama: Path, tmp_path: Path) -> None:
    whole, _ = load_model(tiny_settings(tiny_llama))
    streamed, _ = load_model(tiny_settings(tiny_llama, device="stream"), tmp_path)
    for model in (whole, streamed):
        model(input_ids=IDS_BT)  # after which the last block is still at hand
        for layer in find_layers(model):
            layer.write(torch.where(layer.weight_OI.abs() > 0.2, layer.weight_OI, 0))
    assert all(layer.is_streamed and layer.device.type == "cpu" for layer in find_layers(streamed))
    assert torch.equal(streamed(input_ids=IDS_BT).logits, whole(input_ids=IDS_BT).logits)


def test_only_the_block_that_runs_has_its_weights_in_memory(tmp_path: Path) -> None:
    """In others a module has the weights that lie on disk; a block has them again once it has run, or failed to."""
    streamed, _ = load_model(tiny_settings(save(tmp_path / "model", "llama"), device="stream"), tmp_path)
    places = {name: parameter.data_ptr() for name, parameter in streamed.named_parameters()}
    seen: list[list[str]] = []

    def look(*_arguments: Any) -> None:
        seen.append([n.split(".")[2] for n, p in streamed.named_parameters() if p.data_ptr() != places[n]])

    for block in find_blocks(streamed):
        block.mlp.register_forward_pre_hook(look)
    streamed(input_ids=IDS_BT)
    assert [set(blocks) for blocks in seen] == [{"0"}, {"1"}]
    assert {name: p.data_ptr() for name, p in streamed.named_parameters()} == places

    def fail(*_arguments: Any) -> None:
        raise RuntimeError("out of order")

    find_blocks(streamed)[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        streamed(input_ids=IDS_BT)
    assert {name: p.data_ptr() for name, p in streamed.named_parameters()} == places


def test_the_block_that_comes_next_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 2},
        )
    ).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    streamed, _ = load_model(tiny_settings(tmp_path / "model", device="stream"), tmp_path)
    blocks = Blocks(streamed)
    hidden_BTD = blocks.embed(IDS_BT[0])
    asked: list[set[str]] = []
    read_ahead = Mapped.read_ahead

    def note(mapped: Mapped, names: Iterable[str]) -> None:
        known = list(names)
        asked.append({name.split(".")[2] for name in known})
        read_ahead(mapped, known)

    monkeypatch.setattr(Mapped, "read_ahead", note)
    for block in (0, 0, 1, 2, 3, 2, 1, 2):
        blocks.run(IDS_BT[0], block, hidden_BTD)
    assert asked == [{"1"}, {"2"}, {"3"}, {"0"}, {"1"}, {"0"}, {"3"}]


@pytest.mark.skipif(not MAPS.is_file(), reason="this system has no /proc")
def test_what_is_read_of_the_file_is_a_block(tmp_path: Path) -> None:
    """Whether blocks run, forward or backward, or their weights are read one after another."""

    def held() -> int:
        parts = re.findall(r"/(?:#\d+ \(deleted\)|model\.saf).*\n(?:.*\n)*?Rss:\s+(\d+) kB", MAPS.read_text())
        return sum(map(int, parts)) * 1024

    config = transformers.LlamaConfig(
        **{"vocab_size": 320, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 4},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    gc.collect()
    before, most = held(), 0
    streamed, _ = load_model(tiny_settings(tmp_path / "model", device="stream"), tmp_path)
    assert held() - before < 2**20, "once it is loaded nothing of it needs to be in memory"

    def look(*_arguments: Any) -> None:
        nonlocal most
        most = max(most, held() - before)

    for block in find_blocks(streamed):
        block.register_forward_hook(look)
    streamed(input_ids=IDS_BT)
    check_blocks(Blocks(streamed), IDS_BT[0])
    for layer in find_layers(streamed):
        layer.write(layer.weight_OI * 2)
        look()
    sizes = measure_stream(streamed)
    assert sizes.block < most < 2 * sizes.block + sizes.outside


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = tiny_settings(save_tiny_gguf(tmp_path / "tiny.gguf"), dtype="bf16")
    whole, _ = load_model(settings)
    stream = settings.model_copy(update={"device": "stream"})
    for _ in range(2):
        streamed, tokenizer = load_model(stream, tmp_path)
        assert torch.equal(streamed(input_ids=IDS_BT).logits, whole(input_ids=IDS_BT).logits)
        assert tokenizer("for x in y:")["input_ids"] == make_tiny_tokenizer()("for x in y:")["input_ids"]
        monkeypatch.setattr("tools.models.streamed.ProcessPoolExecutor", None)  # it is there now
    (directory,) = [path for path in (tmp_path / "cache" / "billhook").iterdir() if path.is_dir()]
    assert re.fullmatch(r"tiny-bf16-[0-9a-f]{16}", directory.name)


def convert_slowly(directory: Path) -> None:
    time.sleep(0.5)
    (directory / "config.json").write_text("{}")
    with (directory.parent / "made.txt").open("a") as made:
        made.write("once\n")


def test_weights_lie_in_the_cache_where_no_directory_is_given(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files lie in memory on many a machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert find_stream(load_model(tiny_settings(tiny_llama, device="stream"))[0])
    assert [path.name for path in tmp_path.iterdir()] == ["billhook"]


def be_killed(aside: Path) -> None:
    """As by a system whose memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_conversion_that_is_killed_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"weights")
    with pytest.raises(
        UserError, match=r"^the process that converts model\.gguf was killed, most likely because memory"
    ):
        convert_once(tmp_path / "model.gguf", "bf16", be_killed)
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] in ([], [".lock"])


def test_who_comes_while_a_file_is_converted_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"weights")
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda _: convert_once(tmp_path / "model.gguf", "bf16", convert_slowly), range(2)))
    assert found[0] == found[1] and (found[0] / "config.json").is_file()
    assert (found[0].parent / "made.txt").read_text() == "once\n"


def test_auto_streams_what_does_not_fit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(tiny_llama, device="auto")
    assert choose_device(settings) is settings
    size = sum(parameter.nbytes for parameter in make_tiny_model("llama").parameters())
    monkeypatch.setattr(sources, "count_free", lambda: 1.3 * size)
    assert choose_device(settings).device == "auto"
    monkeypatch.setattr(sources, "count_free", lambda: 1.2 * size)
    assert choose_device(settings).device == "stream"
    assert choose_device(settings.model_copy(update={"device": "cpu"})).device == "cpu"
    monkeypatch.setattr(sources, "count_free", lambda: 3.8 * size)
    assert choose_device(settings.model_copy(update={"workers": "2"})).device == "auto", "this process and each worker"
    monkeypatch.setattr(sources, "count_free", lambda: 3.7 * size)
    assert choose_device(settings.model_copy(update={"workers": "2"})).device == "stream"
    assert choose_device(settings.model_copy(update={"workers": "auto"})).device == "auto", "a worker on each machine"
    monkeypatch.setattr(sources, "count_free", lambda: 1.2 * size)
    said: list[str] = []
    with use_workbench(settings, tmp_path, said.append, ignore_progress) as bench:
        assert find_stream(bench.model) is not None
    assert said == [
        "the model and what a run holds beside it do not fit the memory that is free: one block of it at a time comes "
        "from disk"
    ]


def test_the_first_worker_shares_its_gpu_with_this_process(tiny_llama: Path) -> None:
    counted = {
        workers: [count_models(tiny_settings(tiny_llama, workers=workers), device) for device in ("cpu", "cuda")]
        for workers in ("", "8", "auto")
    }
    assert counted == {"": [1, 1], "8": [9, 2], "auto": [2, 2]}


def test_what_cannot_be_streamed_is_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^FLAP {NEEDS_WHOLE}$"):
        refuse_apart(load_model(tiny_settings(tiny_llama, device="stream"), tmp_path / "scratch")[0], "FLAP")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match=r"^model '.*broken' could not be loaded: .+$"):
        load_model(tiny_settings(broken, device="stream"), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma3n", "opt", "gpt_oss"])
def test_of_a_gpu_embeddings_and_head_take_memory_only_while_the_head_runs(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the CPU had a memory of its own: what comes to it is a copy."""
    monkeypatch.setattr(tools.models.streamed, "has_own_memory", lambda device: True)
    path = save(tmp_path / "model", architecture)
    whole, _ = load_model(tiny_settings(path))
    streamed, _ = load_model(tiny_settings(path, device="stream"), tmp_path)
    assert type(streamed).__name__ == type(whole).__name__ and streamed.device == torch.device("cpu")
    head = streamed.get_output_embeddings()
    apart = [module.weight for module in streamed.modules() if isinstance(module, torch.nn.Embedding)]
    places = [weight.data_ptr() for weight in (*apart, head.weight)]
    seen: list[tuple[int, bool]] = []

    def look(_module: Any, given: tuple[torch.Tensor], _output: Any) -> None:
        seen.append((given[0].shape[-2], head.weight.data_ptr() != places[-1]))

    linear = torch.nn.functional.linear

    def see(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape == head.weight.shape:
            look(None, (given,), None)
        return linear(given, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", see)
    assert torch.equal(streamed(input_ids=IDS_BT).logits, whole(input_ids=IDS_BT).logits)
    assert seen[0] == (IDS_BT.shape[1], True), "it is a copy that runs"
    seen.clear()
    Blocks(streamed).embed(IDS_BT[0])
    assert set(seen) == {(0, False)}, "of no tokens it is not brought"
    check_blocks(Blocks(streamed), IDS_BT[0])
    assert [weight.data_ptr() for weight in (*apart, head.weight)] == places
    for name, weight in whole.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], weight), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_blocks_come_to_a_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    whole, _ = load_model(tiny_settings(tiny_llama, device="cuda"))
    streamed, _ = load_model(tiny_settings(tiny_llama, device="stream"), tmp_path)
    assert {layer.device.type for layer in find_layers(streamed)} == {"cuda"}
    assert {layer.weight_OI.device.type for layer in find_layers(streamed)} == {"cpu"}
    assert streamed.get_input_embeddings().weight.device.type == "cpu" and streamed.device.type == "cuda"
    ids_BT = IDS_BT.cuda()
    torch.testing.assert_close(streamed(input_ids=ids_BT).logits, whole(input_ids=ids_BT).logits)
    check_blocks(Blocks(streamed), ids_BT[0])
