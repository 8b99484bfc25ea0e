"""A run's model built without its weights: what that reads of the disk, and what tells how the run's files will lie."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.base.errors import UserError, in_one_line
from tools.base.settings import TeamSettings, WorkbenchSettings
from tools.models.disk import Line
from tools.models.formats import DTYPES
from tools.models.hub import check_in_reach
from tools.models.layers import Layer, Reach, find_layers, measure_reach, refuse_small_reach
from tools.models.load import ModelPlace, build_on_meta, load_tokenizer, locate_model
from tools.models.mapped import list_in_source, map_source
from tools.models.positions import refuse_long_windows
from tools.models.streamed import find_conversion
from tools.texts.windows import count_lead


class Empty(NamedTuple):
    """A model on torch's meta device."""

    model: Any
    layers: list[Layer]
    reach: Reach
    lead: int
    """Tokens of each window before its text."""
    reading: int
    """Bytes that reading the model's file takes in CPU memory beside the model."""

    @property
    def weights(self) -> int:
        """Of the prunable layers."""
        return sum(layer.weight_OI.numel() for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def build_empty(settings: WorkbenchSettings, lead: int | None = None) -> Empty:
    """The model of a hub id, a directory, a .gguf file, a package or a .json file, of which only the config is read.

    A window has `lead` tokens before its text, or as many as the tokenizer has. Raises UserError where the model cannot
    be built, reads no such windows, or too little of it can be pruned.
    """
    place = _locate_config(settings.model)
    check_in_reach(settings.model)
    try:
        model, stored = build_on_meta(place, settings)
    except Exception as error:  # every way a config can be broken has a class of error of its own
        raise UserError(f"model {settings.model!r} could not be built from its config: {in_one_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise UserError("the model has no output head; a causal language model is needed")
    lead = _read_lead(settings) if lead is None else lead
    refuse_long_windows(model, settings.window, lead)
    layers = find_layers(model)
    reach = measure_reach(model, layers)
    refuse_small_reach(reach, partial=settings.partial)
    sizes, dtype = [parameter.numel() for parameter in model.parameters()], getattr(torch, DTYPES[settings.dtype])
    if place.gguf_file:
        reading = os.path.getsize(os.path.join(place.path, place.gguf_file)) + 4 * max(sizes)
    else:  # the file is mapped, and its weights are used as they are where they have the run's format
        converted = isinstance(stored, torch.dtype) and stored != dtype
        reading = stored.itemsize * sum(sizes) if converted else 0
    return Empty(model, layers, reach, lead, reading)


def _read_lead(settings: WorkbenchSettings) -> int:
    """0 where there is a config alone, without a tokenizer."""
    try:
        return 0 if settings.model.endswith(".json") else count_lead(settings, load_tokenizer(settings))
    except Exception:  # every way a tokenizer can be missing has a class of error of its own
        return 0


def read_source(settings: WorkbenchSettings, layers: list[Layer]) -> set[str]:
    """Names of the layers whose dense weights a streamed model has in its own files, by their headers.

    None of them where the files are not here: of a hub id that was not downloaded, a .gguf file that was not converted
    yet, a config alone.
    """
    path, gguf_file = _locate_config(settings.model)
    if not gguf_file:
        return list_in_source(layers, map_source(path))
    made = find_conversion(Path(path, gguf_file), settings.dtype)
    return list_in_source(layers, map_source(str(made))) if made else set()


def list_conversion(settings: TeamSettings, whole: int) -> list[Line]:
    """What streaming a .gguf file takes once, beside the run's directory: its `whole` bytes as safetensors."""
    path, gguf_file = _locate_config(settings.model)
    if not gguf_file or find_conversion(Path(path, gguf_file), settings.dtype):
        return []
    return [Line(what="the .gguf file, converted once, in ~/.cache/billhook", how="all parameters", bytes=whole)]


def _locate_config(source: str) -> ModelPlace:
    """As `locate_model`, which a config on its own is not a model for."""
    if not source.endswith(".json"):
        return locate_model(source)
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
        raise UserError(f"model config {source} does not exist; give the path of a config.json")
    return ModelPlace(path, None)
