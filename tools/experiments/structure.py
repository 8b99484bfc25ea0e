"""A model with whole parts cut out beside the dense one: perplexity, KL, size and speed."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from tools.base.errors import UserError
from tools.base.files import refuse_unwritable, write_json, write_text
from tools.base.progress import Progress
from tools.base.settings import CutSettings, WorkbenchSettings
from tools.measure.continuations import measure_speeds
from tools.measure.losses import evaluate_windows
from tools.measure.recall import EncodedPair, compare_recall, encode_questions, measure_recall
from tools.models.blocks import Blocks, check_blocks
from tools.models.layers import find_layers, measure_reach, refuse_small_reach
from tools.models.load import check_device, load_model, locate_model
from tools.models.positions import refuse_long_windows
from tools.models.readout import check_readout
from tools.models.save import export_model
from tools.results.cards import write_structure_card
from tools.results.losses import Evaluation
from tools.results.schema import describe_protocol
from tools.results.structure import Figures, Kept, Structure
from tools.surgery.choose import choose_cut
from tools.surgery.parts import convert_size, count_weights, refuse_apart, without_fits
from tools.surgery.rebuild import build_cut, check_cut
from tools.surgery.share import choose_by_curves
from tools.texts.windows import check_texts, count_lead, cut_windows
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.written import Author

PARTS = ("neurons", "heads", "blocks")
AUTO = "auto"
"""In the place of parts: all kinds, each as much as costs least."""
REMOVED = 0.2
"""Of the weights of the blocks' linear layers, where nothing is asked for."""


class StructureSettings(CutSettings, WorkbenchSettings):
    """The model, its texts, and what is cut."""

    one_text = "parts are cut by one"

    remove: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"Share of the weights of the blocks' linear layers to remove; {REMOVED} where neither this nor "
        "--size is given.",
    )
    size: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In place of --remove: share of the model's bytes that is to stay, embeddings and head counted.",
    )
    parts: str = Field(
        "neurons,heads",
        description="What is cut: neurons, heads, neurons,heads, blocks or auto, which takes of all three.",
    )
    out: str = Field("cut", min_length=1, description="Directory of the model and its figures.")


def parse_parts(parts: str) -> tuple[str, ...]:
    """The kinds of parts named. Raises UserError for one that there is not, or blocks beside one other."""
    if parts.strip() == AUTO:
        return PARTS
    kinds = tuple(dict.fromkeys(part.strip() for part in parts.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in PARTS]
    if unknown or not kinds or ("blocks" in kinds and len(kinds) > 1):
        raise UserError(f"--parts {parts!r} is none of neurons; heads; neurons,heads; blocks; {AUTO}")
    return kinds


def find_removed(model: Any, settings: StructureSettings) -> float:
    """The share of the weights of the blocks' linear layers to remove. Raises UserError where the rest is too large."""
    if settings.size is None:
        return settings.remove or REMOVED
    removed, outside = convert_size(model, settings.size)
    if removed >= 1:
        raise UserError(
            f"--size {settings.size:g} is too small: {outside:.2%} of the model's bytes are not of the "
            "blocks' linear layers, and stay"
        )
    return removed


def cut_model(settings: StructureSettings, step: Progress) -> Structure:
    """Choose, cut, refit, measure and write. Raises UserError, before anything is loaded where that is possible."""
    kinds = parse_parts(settings.parts)
    if settings.remove is not None and settings.size is not None:
        raise UserError("--remove and --size both say how much goes; give one of them")
    directory = Path(settings.out)
    if (directory / "model").exists():
        raise UserError(f"{directory / 'model'} exists already; choose another --out")
    refuse_unwritable(directory)
    locate_model(settings.model)
    check_device(settings.device)
    check_texts(settings)

    step("load model", 0, 1)
    dense, tokenizer = load_model(settings)
    refuse_apart(dense, "tools.structure")
    refuse_small_reach(measure_reach(dense, find_layers(dense)), partial=settings.partial)
    refuse_long_windows(dense, settings.window, count_lead(settings, tokenizer))
    index = Index(ArtifactStore(directory / "artifacts"))
    windows = cut_windows(settings, tokenizer, Author(dense, tokenizer, settings, index, step))
    calibration, validation = windows.calibration.to(dense.device), windows.validation.to(dense.device)
    check_readout(dense, calibration[0])
    pairs = encode_questions(settings, dense, tokenizer).get("validation", [])
    check_blocks(Blocks(dense), calibration[0])
    remove = find_removed(dense, settings)
    choose = choose_by_curves if kinds == PARTS else partial(choose_cut, kinds=kinds)
    cut, constraint, _ = choose(
        dense, remove=remove, windows_BT=calibration, step=step, lead=windows.lead, align=settings.align
    )

    measure = partial(evaluate_windows, lead=windows.lead)
    dense_losses, hidden = measure(dense, validation, None, "dense", step)
    plain = build_cut(dense, without_fits(cut))
    check_cut(dense, cut, plain, calibration[0])
    plain_losses, _ = measure(plain, validation, hidden, "cut without refit", step)
    model = build_cut(dense, cut)
    losses, _ = measure(model, validation, hidden, "cut with refit", step)
    speeds = measure_speeds([dense, model], validation[0], step)
    result = Structure(
        model=settings.model,
        parts=",".join(kinds),
        target=remove,
        size=settings.size,
        removed=1 - count_weights(model) / count_weights(dense),
        heads=cut.counts.heads,
        neurons=cut.counts.neurons,
        blocks=list(cut.dropped),
        constraint=constraint,
        dense=_figures(dense, dense_losses, speeds[0]),
        cut=_figures(model, losses, speeds[1]),
        perplexity_without_refit=plain_losses.perplexity,
        kl_without_refit=plain_losses.mean_kl,
        kl=losses.mean_kl,
        knowledge=_ask([dense, plain, model], pairs, settings.questions, step) if pairs else None,
        protocol=describe_protocol(settings, "validation", bos=windows.lead > 0),
    )
    export_model(model, tokenizer, directory / "model", write_structure_card(result))
    result.cut.file_bytes = sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors"))
    write_text(directory / "model" / "README.md", write_structure_card(result))
    write_json(directory / "structure.json", result.model_dump())
    return result


def _ask(models: list[Any], pairs: list[EncodedPair], source: str, step: Progress) -> Kept:
    """What the dense model knows of the questions, and what the cut one does without and with its fits."""
    labels = ("dense", "cut without refit", "cut with refit")
    dense, plain, cut = (
        measure_recall(model, pairs, f"questions, {label}", step) for model, label in zip(models, labels, strict=True)
    )
    before, after = compare_recall(plain, dense), compare_recall(cut, dense)
    return Kept(
        source=source,
        pairs=len(pairs),
        without_refit=before.share if before else None,
        share=after.share if after else None,
        error=after.error if after else None,
    )


def _figures(model: Any, evaluation: Evaluation, speed: tuple[float, float]) -> Figures:
    return Figures(
        parameters=sum(p.numel() for p in model.parameters()),
        file_bytes=sum(p.nbytes for p in model.parameters()),
        perplexity=evaluation.perplexity,
        seconds_per_window=speed[0],
        decoded_per_second=speed[1],
    )
