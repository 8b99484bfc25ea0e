"""Model cards, `README.md` beside a model's weights: of a run, and of a model that parts were cut out of.

Nothing in a run's card says where files lie on this machine.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.base.named import hide_directories, hide_path, is_hub_id, parse_hub
from tools.base.settings import WorkbenchSettings
from tools.base.words import escape
from tools.results.schema import ANSWERS_KEPT, Summary
from tools.results.sentences import describe_result, name_share, name_sparsity
from tools.results.structure import HEADS, Kept, Structure, list_rows, name_removed
from tools.results.tables import list_benchmarks, list_goal, list_perplexities, list_table, list_texts

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.base.rundir import read_config_values
from tools.base.settings import SPLITS
from tools.results.page.record import read_summary
from tools.results.schema import Origin, Protocol

CUT_BY = (
    *(*SPLITS, "text", "text_cut", "text_spread", "window", "calibration_mix"),
    *(f"{split}_windows" for split in SPLITS),
)
"""Settings by which text is cut into windows: those of the test text lie behind, and between, those of the others."""


def find_origin(model: str, protocol: Protocol, config: Mapping[str, Any]) -> Origin | None:
    """The last run that cut what is in the directory `model`; None where none did. Raises UserError.

    Where that run went on from a cut of an earlier one, the model is that one's, and so on. A run that cut nothing
    itself, of a model that was cut before, passes on what it knows of that. `protocol` is that of perplexities which
    the one before the cut is told beside, and `config` what the run of these was begun with.
    """
    directory = Path(model).parent
    summary = read_summary(directory) if Path(model).name == "model" else None
    found = _trace(summary) if summary else None
    if summary is None or found is None:
        return None
    before, now = (read_config_values(directory), config)
    alike = summary.protocol == protocol and all(before.get(name) == now.get(name) for name in CUT_BY)
    return found if alike else found.model_copy(update={"perplexity": None})


def _trace(summary: Summary) -> Origin | None:
    """What a run hands on of where its model came from."""
    earlier = summary.origin
    if summary.cut is None:
        return earlier
    return Origin(
        run=summary.run,
        model=earlier.model if earlier else summary.model,
        cut=summary.cut,
        left=earlier.share if earlier else 1.0,
        perplexity=earlier.perplexity if earlier else summary.perplexity.dense,
    )


def _write(front: str, title: str, lines: Sequence[str]) -> str:
    """A card with its front matter, in YAML."""
    return "\n".join(["---", front, "---", f"# {title}", "", *lines, ""])


def write_card(summary: Summary, settings: WorkbenchSettings) -> str:
    """The model card, `model/README.md`, with nothing in it of where files lie on this machine."""
    name, text = hide_path(_find_base(summary)), _hide_texts(summary.protocol.text, settings)
    return _write(
        _card_data(summary, settings).to_yaml(),
        f"{escape(name)}, {_name_done(summary)}",
        [
            describe_result(summary),
            "",
            _tell_file(summary),
            "",
            *list_perplexities(summary.perplexity, escape(text), "this model", summary.wanda_statistics),
            "",
            f"Perplexity was measured on {escape(text)} ({summary.protocol.tokens} tokens, {summary.protocol.windows}, "
            f"{summary.protocol.dtype}). `mask_sha256`: `{summary.mask_sha256}`.",
            "",
            *list_goal(summary.goal),
            *list_texts(summary.texts),
            *list_benchmarks(summary.benchmarks),
            f"What the licence of {escape(name)} says of derived models holds for this one.",
        ],
    )


def _tell_file(summary: Summary) -> str:
    """What the file is beside the dense model's, in a sentence."""
    if summary.cut:
        return "Whole parts are gone: the file is smaller than the dense one and loads with stock `transformers`."
    if summary.asked != "sparsity":
        return "Nothing was taken away: no cut that was tried was kept."
    if summary.origin:
        return (
            "Whole parts are gone, and zeros of what stays are stored as ordinary numbers: the file is smaller than "
            "the dense one and loads with stock `transformers`; its zeros make it no faster by themselves."
        )
    return (
        "The zeros are stored as ordinary numbers: the file loads with stock `transformers`, and is neither smaller "
        "nor faster than the dense one by itself."
    )


def _name_done(summary: Summary) -> str:
    """What was done to the model, in the title's words."""
    cut, origin = summary.cut, summary.origin
    done = [name_share((origin.share if origin else 1) * (cut.share if cut else 1))] if cut or origin else []
    done += [f"pruned to {name_sparsity(summary)}"] if summary.asked == "sparsity" else []
    return " and ".join(done) or "not cut"


def _name_kinds(summary: Summary) -> list[str]:
    """What a model is called of which parts are gone, or weights, or both; nothing of which nothing is."""
    kinds = ["structured"] if summary.cut or summary.origin else []
    kinds += ["sparse"] if summary.asked == "sparsity" else []
    return ["pruned", *kinds] if kinds else []


def _find_base(summary: Summary) -> str:
    """The model that all was taken from, in one run or two."""
    return summary.origin.model if summary.origin else summary.model


def _hide_texts(text: str, settings: WorkbenchSettings) -> str:
    """What is measured on, for strangers; named texts are several."""
    return hide_directories(text) if settings.text else hide_path(text)


def _card_data(summary: Summary, settings: WorkbenchSettings) -> "ModelCardData":
    """The card's front matter: what the model was made of, and its own results as the hub reads them."""
    from huggingface_hub import EvalResult, ModelCardData

    base = _find_base(summary)
    name, found = hide_path(base), []
    if summary.perplexity.pruned is not None:
        measured = settings.name_texts("test")
        text = parse_hub(measured) if measured.startswith("hub:") else None
        place = _hide_texts(measured, settings)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=text.name if text else place,
                dataset_name=text.name if text else place,
                dataset_config=text.config if text else None,
                dataset_split=text.split if text else None,
                metric_type="perplexity",
                metric_name="Perplexity",
                metric_value=round(summary.perplexity.pruned, 4),
            )
        )
    found += [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
        )
        for score in summary.benchmarks
        if score.model == "pruned" and score.value is not None
    ]
    calibration = [*settings.text.values()] or [settings.calibration]
    named = list(dict.fromkeys(parse_hub(source).name for source in calibration if source.startswith("hub:")))
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=named or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*_name_kinds(summary), "billhook"],
        model_name=f"{name}-pruned",
        eval_results=found or None,
    )


def write_structure_card(result: Structure) -> str:
    """The card of a model that parts were cut out of."""
    protocol = result.protocol
    return _write(
        "library_name: transformers\ntags: [pruned, structured, billhook]",
        f"{hide_path(result.model)}, {name_removed(result)}",
        [
            f"Constraint: {result.constraint}.",
            "",
            "The file is smaller than the dense one and loads with stock `transformers`.",
            "",
            *list_table(HEADS, list_rows(result), left=1),
            "",
            f"Perplexity was measured on `{hide_directories(protocol.text)}` ({protocol.tokens} tokens, "
            f"{protocol.windows}, {protocol.dtype}).",
            *(_tell_kept(result.knowledge) if result.knowledge else []),
        ],
    )


def _tell_kept(kept: Kept) -> list[str]:
    return ["", f"{ANSWERS_KEPT}, on {kept.pairs} questions of `{hide_path(kept.source)}`."]
