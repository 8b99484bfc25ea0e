"""Packed models run as the models they were made of; damaged files are refused."""

import hashlib
import json
import os
import random
import shutil
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from billhook_kernels import native
from billhook_kernels.packed import PADDING, PackedLinear, PackedWeight, pack_rows
from tests.tiny import ARCHITECTURES, VOCABULARY, make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools import export
from tools.base.errors import DamagedArtifact, UserError
from tools.models import load, packing
from tools.models.formats import PACKED_FILE
from tools.models.layers import find_layers
from tools.models.load import load_model
from tools.models.packed import (
    KEY,
    describe_packed,
    hash_tensor,
    load_packed,
    measure_sizes,
    read_contents,
)
from tools.models.packing import save_packed

DAMAGED_FILES = int(os.environ.get("BILLHOOK_DAMAGED_FILES", "200"))
"""1000 take half a minute."""

IDS_BT = torch.arange(40)[None] % VOCABULARY
NATIVE = pytest.mark.skipif(bool(native.explain_absence(torch.bfloat16)), reason=native.explain_absence(torch.bfloat16))


def save_sparse(directory: Path, architecture: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model in a plain directory, about half of its layers' weights zero, a few of them negative zeros."""
    model = make_tiny_model(architecture)
    for layer in find_layers(model):
        weight_OI = torch.where(layer.weight_OI.abs() > 0.2, layer.weight_OI, 0)
        weight_OI[0, :3] = -0.0
        layer.write(weight_OI)
    model.to(dtype).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def load_plain(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval().requires_grad_(False)


def card(contents: Any) -> str:
    return f"# {describe_packed(contents)}\n"


def unpack(model: Any) -> dict[str, bytes]:
    """The bits of every tensor that a loaded packed model computes with."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = hash_tensor(tensor).encode()
    return state


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny Llama in bf16; read it, do not write to it."""
    place = tmp_path_factory.mktemp("packed")
    save_packed(load_plain(save_sparse(place / "plain", "llama")), make_tiny_tokenizer(), place / "packed", card)
    return place / "packed"


@NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_model_says_what_its_dense_one_says(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = load_plain(save_sparse(tmp_path / "plain", architecture, dtype), dtype)
    contents = save_packed(dense, make_tiny_tokenizer(), tmp_path / "packed", card)
    packed = load_packed(tmp_path / "packed")
    names = [layer.name for layer in find_layers(dense)]
    assert list(contents.layers) == names
    assert [name for name, module in packed.named_modules() if isinstance(module, PackedLinear)] == names

    # Forty tokens at once unpack each layer: the very products of the dense model, unless they are cut differently.
    with torch.no_grad():
        theirs, ours = dense(IDS_BT).logits, packed(IDS_BT).logits
    assert float((ours - theirs).abs().max()) <= 4 * torch.finfo(dtype).eps * float(theirs.abs().max())
    options = {"attention_mask": torch.ones(1, 5), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    said = [model.generate(IDS_BT[:, :5], **options).tolist() for model in (dense, packed)]
    assert said[0] == said[1]
    assert packed.generation_config.to_dict() == dense.generation_config.to_dict()


def test_no_dense_copy_is_held(packed_llama: Path) -> None:
    if native.explain_absence(torch.bfloat16):
        pytest.skip(native.explain_absence(torch.bfloat16))
    contents, packed = read_contents(packed_llama), load_packed(packed_llama)
    plain = load_plain(packed_llama.with_name("plain"))
    sizes = measure_sizes(packed)
    weights = sum(layer.weight_OI.nbytes for layer in find_layers(plain))
    kept = sum(record.nonzeros for record in contents.layers.values())
    assert sizes.dense_layers == weights
    masks, rows = (
        sum(x.mask_OW.nbytes for x in packed.modules() if isinstance(x, PackedLinear)),
        2 * (32 + 32 + 96 + 64),
    )
    assert sizes.layers == masks + 2 * (kept + PADDING * len(contents.layers)) + 8 * rows
    assert sizes.others == sum(p.nbytes for p in plain.parameters()) - weights
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.model.modules())


def test_tied_embeddings_are_stored_once_and_tied_again(packed_llama: Path) -> None:
    assert "lm_head.weight" not in read_contents(packed_llama).tensors
    packed = load_packed(packed_llama)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_layers_with_few_zeros_stay_dense(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    first = find_layers(model)[0]
    with pytest.raises(UserError, match=r"^no layer of the model has 25% zeros; prune it before it is packed$"):
        save_packed(model, make_tiny_tokenizer(), tmp_path / "packed", card)
    assert not (tmp_path / "packed").exists()
    first.write(torch.where(first.weight_OI > 0, first.weight_OI, 0))
    contents = save_packed(model, make_tiny_tokenizer(), tmp_path / "packed", card)
    assert list(contents.layers) == [first.name]
    packed = load_packed(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS_BT[:, :9]).logits, model(IDS_BT[:, :9]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_a_model_that_is_streamed_is_packed_to_the_same_bytes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save_sparse(tmp_path / "plain", architecture)
    assert export.main([str(plain), "--packed", str(tmp_path / "held")]) == 0
    monkeypatch.setattr(load, "FITS", 0.0)
    monkeypatch.setattr(load, "WIDEST", 1 << 40)
    assert export.main([str(plain), "--packed", str(tmp_path / "streamed")]) == 0
    for file in (PACKED_FILE, "config.json", "README.md"):
        held, streamed = ((tmp_path / name / file).read_bytes() for name in ("held", "streamed"))
        assert held == streamed, file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "plain", "streamed"], "nothing is left"


def test_what_is_packed_is_held_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def pack(weight_OI: torch.Tensor) -> PackedWeight:
        nonlocal most
        packed = pack_rows(weight_OI)
        alive.append(weakref.ref(packed.values))
        most = max(most, sum(ref() is not None for ref in alive))
        return packed

    monkeypatch.setattr(packing, "pack_rows", pack)
    save_packed(load_plain(save_sparse(tmp_path / "plain", "llama")), make_tiny_tokenizer(), tmp_path / "x", card)
    assert len(alive) == 14 and most <= 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_a_kernel_the_model_is_dense_and_that_is_said(architecture: str, tmp_path: Path) -> None:
    plain = load_plain(save_sparse(tmp_path / "plain", architecture, torch.float16), torch.float16)
    save_packed(plain, make_tiny_tokenizer(), tmp_path / "packed", card)
    said: list[str] = []
    unpacked = load_packed(tmp_path / "packed", warn=said.append)
    reason = "there is no native kernel for float16"
    assert said == [f"{tmp_path / 'packed'} is unpacked, and runs as a dense model does: {reason}"]
    expected, found = plain.state_dict(), unpacked.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))


def test_torch_runs_packed_layers_where_it_is_asked_to(
    packed_llama: Path, ask_for_kernels: Callable[[str], None]
) -> None:
    plain = load_plain(packed_llama.with_name("plain"))
    ask_for_kernels("torch")
    packed = load_packed(packed_llama)
    with torch.no_grad():
        assert torch.equal(packed(IDS_BT).logits, plain(IDS_BT).logits)
    ask_for_kernels("metal")
    with pytest.raises(UserError, match=r"^BILLHOOK_KERNELS is 'metal'; it may be torch, triton or native$"):
        load_packed(packed_llama)


def test_layers_stay_packed_for_triton(packed_llama: Path, ask_for_kernels: Callable[[str], None]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    ask_for_kernels("triton")
    said: list[str] = []
    packed = load_packed(packed_llama, warn=said.append)
    assert said == [] and any(isinstance(module, PackedLinear) for module in packed.modules())


def test_packed_models_load_like_others_in_their_own_format(packed_llama: Path) -> None:
    model, tokenizer = load_model(tiny_settings(packed_llama, dtype="bf16"))
    assert tokenizer("import this")["input_ids"] == make_tiny_tokenizer()("import this")["input_ids"]
    with pytest.raises(UserError, match=r"is packed in bf16; give --dtype bf16$"):
        load_model(tiny_settings(packed_llama, dtype="fp32"))
    if not native.explain_absence(torch.bfloat16):
        with pytest.raises(UserError, match=r"^the model is packed, to be run and not to be changed; give the dense"):
            find_layers(model)


def test_what_another_format_cannot_hold_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = save_sparse(tmp_path / "plain", "llama")
    model = load_plain(plain)
    find_layers(model)[0].weight_OI[0, -1] = 1e5
    model.save_pretrained(plain)
    assert export.main([str(plain), "--packed", str(tmp_path / "packed"), "--dtype", "fp16"]) == 2
    said = f"error: not all weights of {plain} are finite in fp16; use --dtype bf16\n"
    assert capsys.readouterr().err == said and not (tmp_path / "packed").exists()


def test_export_packs_what_a_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save_sparse(tmp_path / "runs" / "one" / "model", "llama")
    monkeypatch.setenv("BILLHOOK_RUNS_DIR", str(tmp_path / "runs"))
    assert export.main(["one", "--packed", str(tmp_path / "packed")]) == 0
    contents = read_contents(tmp_path / "packed")
    assert contents.dtype == "bf16" and len(contents.layers) == 14
    assert capsys.readouterr().out.splitlines() == [
        describe_packed(contents),
        f"run it: python -m tools.generate {tmp_path / 'packed'}",
    ]
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert [name for name in files if not name.startswith("tokenizer")] == [
        *("README.md", "config.json", "generation_config.json", PACKED_FILE)
    ]
    assert "# `one`, packed" in (tmp_path / "packed" / "README.md").read_text()
    assert export.main(["one", "--packed", str(tmp_path / "rounded"), "--dtype", "fp16"]) == 0
    cards = [(tmp_path / name / "README.md").read_text() for name in ("packed", "rounded")]
    assert ["bit for bit" in text for text in cards] == [True, False] and "pruned model, as rounded." in cards[1]
    assert read_contents(tmp_path / "rounded").dtype == "fp16"

    for arguments, problem in (
        (
            ["one", "--packed", str(tmp_path / "packed")],
            f"{tmp_path / 'packed'} exists already; choose another --packed",
        ),
        ([str(tmp_path / "packed"), "--packed", str(tmp_path / "x")], f"{tmp_path / 'packed'} is packed already"),
        (
            ["./two", "--packed", str(tmp_path / "x")],
            "model './two' is neither a directory, a .gguf file, package:NAME",
        ),
        (["one"], "one of the arguments --packed --gguf is required"),
        (["one", "--packed", ""], "--packed and --gguf want a path, and it is empty"),
        (["one", "--gguf", "a.gguf", "--dtype", "bf16"], "--dtype is about --packed; a .gguf file keeps the formats"),
        (["one", "--packed", "a", "--dense", "b"], "--dense is about --gguf; leave it out"),
        (["one", "--gguf", ""], "--packed and --gguf want a path, and it is empty"),
    ):
        capsys.readouterr()
        assert export.main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {problem}")
    (tmp_path / "runs" / "three").mkdir()
    (tmp_path / "runs" / "three" / "events.jsonl").touch()
    assert export.main(["three", "--packed", str(tmp_path / "x")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: run {tmp_path / 'runs' / 'three'} has no model yet; finish it with --resume\n"
    )


# --- damage --------------------------------------------------------------------------------------------------------


def flip_bit(directory: Path, draw: random.Random) -> None:
    """In the file's head half of the time, otherwise in its tensors or in config.json."""
    path = directory / draw.choice([PACKED_FILE, PACKED_FILE, PACKED_FILE, "config.json"])
    raw = bytearray(path.read_bytes())
    head = 8 + struct.unpack("<Q", raw[:8])[0] if path.name == PACKED_FILE else len(raw)
    at = draw.randrange(head) if draw.random() < 0.5 else draw.randrange(len(raw))
    raw[at] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def cut_short(directory: Path, draw: random.Random) -> None:
    path = directory / draw.choice([PACKED_FILE, PACKED_FILE, "config.json"])
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw))])


def lie(directory: Path, draw: random.Random) -> None:
    """Change one figure of the metadata, or of safetensors' own header."""
    raw = (directory / PACKED_FILE).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    contents = json.loads(header["__metadata__"][KEY])
    kind = draw.choice(["dtype", "version", "shape", "transposed", "nonzeros", "name", "tensor", "header", "offsets"])
    layer = contents["layers"][draw.choice(sorted(contents["layers"]))]
    if kind == "dtype":
        contents["dtype"] = draw.choice(["fp16", "fp32", "int8"])
    elif kind == "version":
        contents["version"] = draw.choice([0, 2, -1, "1", None, 10**30])
    elif kind == "shape":
        layer["shape"][draw.randrange(2)] += draw.choice([-1, 1, 32, -(10**9), 10**18])
    elif kind == "transposed":
        layer["transposed"] = True
    elif kind == "nonzeros":
        layer["nonzeros"] += draw.choice([-1, 1, 2**40])
    elif kind == "name":
        name = draw.choice(sorted(contents["layers"]))
        contents["layers"][name.replace("0", "7") if "0" in name else f"{name}x"] = contents["layers"].pop(name)
    elif kind == "tensor":
        contents["tensors"].pop(draw.choice(sorted(contents["tensors"])))
    else:
        name = draw.choice(sorted(set(header) - {"__metadata__"}))
        if kind == "header":
            header[name]["dtype"] = draw.choice(["F16", "I16", "U32", "U8", "F64"])
        else:
            header[name]["data_offsets"][draw.randrange(2)] += draw.choice([-(2**40), -2, 2, 64, 2**40, 2**63])
    changed = header["__metadata__"][KEY] != (text := json.dumps(contents, separators=(",", ":")))
    header["__metadata__"][KEY] = text
    assert changed or kind in ("header", "offsets")
    new = json.dumps(header).encode()
    (directory / PACKED_FILE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def forge(directory: Path, draw: random.Random) -> None:
    """Change a mask or the number of values, with hashes and metadata to match: only counting tells."""
    tensors = load_file(directory / PACKED_FILE)
    contents = read_contents(directory).model_dump()
    name = draw.choice(sorted(contents["layers"]))
    mask_OW, values = tensors[f"{name}.mask"], tensors[f"{name}.values"]
    kind = draw.choice(
        ["more bits", "fewer values", "no padding", "mask shape", "mask dtype", "value dtype", "padding"]
    )
    if kind == "more bits":
        mask_OW.view(-1)[draw.randrange(mask_OW.numel())] = -1
    elif kind == "fewer values":
        values = values[draw.randrange(1, values.numel()) :].clone()
    elif kind == "no padding":
        values = values[:-PADDING].clone()
    elif kind == "mask shape":
        mask_OW = mask_OW.view(-1)
    elif kind == "mask dtype":
        mask_OW = mask_OW.view(torch.float32)
    elif kind == "value dtype":
        values = values.view(torch.float16)
    else:
        values[-1] = 1
    tensors[f"{name}.mask"], tensors[f"{name}.values"] = mask_OW, values
    record = contents["layers"][name]
    record["mask_sha256"], record["values_sha256"] = hash_tensor(mask_OW), hash_tensor(values)
    record["nonzeros"] = max(0, values.numel() - PADDING)
    save_file(tensors, directory / PACKED_FILE, {KEY: json.dumps(contents)})


def test_damaged_files_are_refused_or_change_no_bit(packed_llama: Path, tmp_path: Path) -> None:
    expected = unpack(load_packed(packed_llama))
    damages: list[Callable[[Path, random.Random], None]] = [flip_bit, cut_short, lie, forge]
    refused = dict.fromkeys((damage.__name__ for damage in damages), 0)
    for i in range(DAMAGED_FILES):
        directory, damage = tmp_path / str(i), damages[i % len(damages)]
        shutil.copytree(packed_llama, directory)
        damage(directory, random.Random(i))
        problem = ""
        try:
            model = load_packed(directory)
        except (UserError, DamagedArtifact) as error:
            problem = str(error)
        assert "\n" not in problem and len(problem) < 700
        refused[damage.__name__] += bool(problem)
        assert problem or unpack(model) == expected, f"damage {i} by {damage.__name__} went unnoticed"
        shutil.rmtree(directory)
    share = DAMAGED_FILES // len(damages)
    assert refused["cut_short"] >= share and refused["lie"] >= share and refused["forge"] >= share
    assert refused["flip_bit"] >= 0.9 * share


def test_what_is_wrong_is_said(packed_llama: Path, tmp_path: Path) -> None:
    def spoil(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
        directory = tmp_path / "spoilt"
        shutil.copytree(packed_llama, directory, dirs_exist_ok=True)
        tensors, contents = load_file(directory / PACKED_FILE), read_contents(directory).model_dump()
        change(tensors, contents)
        save_file(tensors, directory / PACKED_FILE, {KEY: json.dumps(contents)})
        with pytest.raises((UserError, DamagedArtifact)) as caught:
            load_packed(directory)
        return str(caught.value).replace(str(directory / PACKED_FILE), "FILE")

    name = "model.layers.0.mlp.up_proj"

    def rehash(tensors: dict[str, Any], contents: dict[str, Any]) -> None:
        for part in ("mask", "values"):
            contents["layers"][name][f"{part}_sha256"] = hash_tensor(tensors[f"{name}.{part}"])

    def set_bits(tensors: dict[str, Any], contents: dict[str, Any]) -> None:
        tensors[f"{name}.mask"][:] = -1
        rehash(tensors, contents)

    values = read_contents(packed_llama).layers[name].nonzeros + PADDING
    damaged = "packed model FILE is damaged: "
    assert spoil(set_bits) == f"{damaged}layer {name}: {values} values for {48 * 32} set bits and 32 of padding"
    assert spoil(lambda tensors, _: tensors[f"{name}.values"].zero_()) == (
        f"{damaged}layer {name} does not match its hashes"
    )
    assert spoil(lambda tensors, _: tensors["model.norm.weight"].zero_()) == (
        f"{damaged}tensor model.norm.weight does not match its hash"
    )
    assert spoil(lambda _, contents: contents.update(version=2)) == (
        "packed model FILE has version 2 of the format; this Billhook reads 1"
    )
    assert spoil(lambda _, contents: contents["layers"][name].update(shape=[48, 31])) == (
        f"{damaged}layer {name} is (48, 31), in its config (48, 32)"
    )
    assert spoil(lambda tensors, _: tensors.pop("model.norm.weight")) == (
        f"{damaged}its tensors are not those that its metadata names"
    )
    with pytest.raises(UserError, match=r"holds no packed model \(packed.safetensors\); make one with python -m tools"):
        load_packed(packed_llama.with_name("plain"))
    shutil.copytree(packed_llama, tmp_path / "edited")
    (tmp_path / "edited" / "config.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"config.json is not the one that it was packed with$"):
        load_packed(tmp_path / "edited")
    assert hashlib.sha256((packed_llama / "config.json").read_bytes()).hexdigest() == (
        read_contents(packed_llama).config_sha256
    )
