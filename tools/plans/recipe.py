"""What a plan may ask of the tools: the recipe for a layer's weights, and corrections to the allocation."""

import operator
import re
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from tools.base.errors import ImpossiblePlan
from tools.base.words import escape
from tools.plans.layer_profile import MOST_SELECTOR
from tools.plans.methods import (
    LEVERS,
    METHODS,
    MOST_DAMPING,
    MOST_STEPS,
    PROFILED,
    REFIT_STEPS,
    MethodName,
    Statistics,
    name_sequential,
)
from tools.plans.mix import MARKS, SHORT, Mix, label_mix, parse_mix
from tools.plans.pattern import PatternText, parse_pattern
from tools.plans.rules import RULES, UNIFORM, RuleName


class Named(Protocol):
    """What every entry of a registry has."""

    @property
    def name(self) -> str:
        """By which people ask for it."""

    @property
    def sentence(self) -> str:
        """What it does, without a full stop; neighbours that share one are told of together."""


def describe_named(choices: Iterable[Named]) -> str:
    """`NAME: sentence. NAME, NAME: sentence.`"""
    return " ".join(f"{', '.join(names)}: {sentence}." for names, sentence in _group(choices))


def list_named(title: str, choices: Iterable[Named]) -> list[str]:
    """The lines of a Markdown table, for a README."""
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {escape(text)} |" for names, text in _group(choices)]
    return [f"| {title} | |", "|---|---|", *rows]


def _group(choices: Iterable[Named]) -> list[tuple[list[str], str]]:
    return [([x.name for x in group], text) for text, group in groupby(choices, key=lambda choice: choice.sentence)]


Damping = Annotated[float, Field(ge=0, le=MOST_DAMPING), AfterValidator(partial(round, ndigits=3))]
"""A share of each input's mean square, to what a label tells."""


def _leave_out_default(schema: dict[str, Any]) -> None:
    """The one that a schema would tell is that of the default method alone."""
    del schema["default"]


class Recipe(BaseModel):
    """How weights are chosen, shared out over the layers, and what happens to the survivors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodName = Field(  # any is carried out; a schema names those that planners have a use for
        "refit",
        description=describe_named(LEVERS.values()),
        json_schema_extra={"enum": [*LEVERS]},
    )
    refit_steps: int = Field(
        REFIT_STEPS,
        ge=1,
        le=MOST_STEPS,
        description="For method refit: steps in which the mask grows. More let it follow what the survivors take over; "
        "each adds 2 products to the 3 of a round's refit.",
    )
    refit: bool = Field(
        True,
        description="After any method but refit, fit all surviving weights of a layer by least squares; costs most of "
        "a round's time and usually wins much.",
    )
    allocation: RuleName = Field(
        "kappa", description=f"{describe_named(RULES.values())} Sharing out takes no time, only curves do."
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="1 follows the allocation, 0 is uniform, between is linear; costs nothing."
    )

    gamma: Literal["plain", "clipped"] = Field(
        "plain",
        description="clipped counts no token's gradient for more than 10 times the median token's when weights are "
        "chosen, such as the first ones'; does harm where activations are massive; costs nothing.",
    )
    damping: Damping = Field(
        0.0,
        exclude_if=operator.not_,
        description="Where survivors are fitted: share of its mean square added to each input's, such as 0.3. More "
        "believes less of what inputs have in common on this text; costs curves of a method anew.",
    )
    curves: Literal["mask", "method"] = Field(
        "method",
        description="Of which change of the weights the allocation's KL curves are. method: what this method and refit "
        "really leave, by pruning every layer to five sparsities; costs two rounds' pruning, once for a method, of "
        "any statistics. mask: what the two-sided mask removes, from the profile.",
    )
    statistics: Statistics = Field(
        METHODS["refit"].statistics,
        description="Whose inputs the layers are fitted to. dense: the dense model's. sequential: block by block, "
        "behind pruned predecessors; 2 more forwards of the calibration text. Left out: "
        f"sequential for {name_sequential(LEVERS.values())}, as published, else dense.",
        json_schema_extra=_leave_out_default,
    )
    mix: SkipJsonSchema[Mix] = Field(  # planners are told of it in runs that have several texts
        (),
        exclude_if=operator.not_,
        description="What each text counts in statistics and polish, as weights; left out, as in the run. A sum of "
        "what is known of each, at no cost but curves of a method anew and, when questions first count, a profile.",
    )
    polish: SkipJsonSchema[bool] = Field(  # planners are told of it in runs that allow it
        False,
        exclude_if=operator.not_,
        description="Once all layers are pruned, fit all their survivors together against the KL to the dense model, "
        "on the calibration text; zeros stay.",
    )
    polish_tokens: SkipJsonSchema[int] = Field(
        0,
        ge=0,
        exclude_if=operator.not_,
        description="Tokens of a polish; 0: as many as the config allows.",
    )
    pattern: SkipJsonSchema[PatternText] = Field(  # the user's choice, so that no planner is told of it
        "",
        description="N:M, N zeros in every M consecutive inputs; empty for zeros anywhere. The user's choice.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_own_statistics(cls, values: Any) -> Any:
        """Statistics that are left out are those that the method's authors take."""
        if isinstance(values, dict) and "statistics" not in values:
            name = values.get("method")
            if isinstance(name, str) and name in METHODS:
                return {**values, "statistics": METHODS[name].statistics}
        return values

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None for zeros anywhere."""
        return parse_pattern(self.pattern) if self.pattern else None

    @model_validator(mode="after")
    def _check_polish(self) -> Self:
        if self.polish_tokens and not self.polish:
            raise ValueError(f"polish_tokens {self.polish_tokens} are for a recipe with polish")
        return self

    @property
    def refits_after(self) -> bool:
        """Whether a refit follows the method; the method `refit` ends with its own."""
        return self.refit and not METHODS[self.method].refits_in_steps

    @property
    def refits(self) -> bool:
        """Whether the survivors end as a least-squares fit, by the method or after it."""
        return self.refit or METHODS[self.method].refits_in_steps

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of `LayerProfile` that its allocation reads; none with a pattern, which says all."""
        return () if self.pattern else RULES[self.allocation].needs

    @property
    def reads_curves(self) -> bool:
        """Whether its allocation goes by KL curves, so that factors on them count."""
        return not self.pattern and RULES[self.allocation].reads_curves

    @property
    def needs_curves(self) -> bool:
        """Whether its allocation reads other KL curves than the profile's, which are those of the two-sided mask."""
        return self.reads_curves and self.curves == "method" and self.mask_label != PROFILED

    @property
    def changes_survivors(self) -> bool:
        """Whether the surviving weights are others than the dense model's."""
        return self.refits or METHODS[self.method].changes_survivors

    @property
    def clips(self) -> bool:
        """Whether gamma is clipped; methods that choose weights without it have no use for that."""
        return self.gamma == "clipped" and METHODS[self.method].weighs_outputs

    @property
    def fit_damping(self) -> float:
        """`damping` where survivors are fitted, else 0: methods that fit none have no use for it."""
        return self.damping if self.refits else 0.0

    @property
    def in_order(self) -> bool:
        """Whether layers are pruned block by block, by what they read behind pruned predecessors."""
        return self.statistics != "dense"

    @property
    def steps(self) -> int:
        """`refit_steps` where they count: methods other than refit have no use for them."""
        return self.refit_steps if METHODS[self.method].refits_in_steps else REFIT_STEPS

    @property
    def mask_label(self) -> str:
        """What is done inside a layer, such as `two-sided+refit`, or `refit3` for other than `REFIT_STEPS` steps.

        Statistics are marked where they are not those that the method's authors take: `wanda~dense`.
        """
        steps = "" if self.steps == REFIT_STEPS else f"{self.steps}"
        marks = [
            "+refit" if self.refits_after else "",
            "~clipped" if self.clips else "",
            f"~damped{self.fit_damping:g}" if self.fit_damping else "",
            label_mix(self.mix),
            "" if self.statistics == METHODS[self.method].statistics else f"~{self.statistics}",
        ]
        return f"{self.method}{steps}{''.join(marks)}"

    @property
    def polish_label(self) -> str:
        """What is done to all layers together at the end, such as `+polish25000`; without a number the config's."""
        tokens = f"{self.polish_tokens}" if self.polish_tokens else ""
        return f"+polish{tokens}" if self.polish else ""

    @property
    def work_label(self) -> str:
        """As `mask_label`, with the polish."""
        return f"{self.mask_label}{self.polish_label}"

    @property
    def allocation_label(self) -> str:
        """How sparsity is shared out, such as `kappa@0.8`; `kappa-mask` where the curves are the two-sided mask's."""
        mask = "-mask" if RULES[self.allocation].reads_curves and self.curves == "mask" else ""
        strength = f"@{self.strength:g}" if self.allocation != UNIFORM and self.strength != 1 else ""
        return f"{self.allocation}{mask}{strength}"

    @property
    def label(self) -> str:
        """The whole recipe in short, such as `two-sided+refit:kappa@0.8`; `parse_recipe` reads it."""
        return f"{self.work_label}:{self.allocation_label}"

    def count_polish(self, allowed: int) -> int:
        """Tokens that it polishes on, where it does not say how many `allowed` ones; 0 for none.

        Raises ImpossiblePlan, in one line, where none are allowed.
        """
        if self.polish and not (tokens := self.polish_tokens or allowed):
            raise ImpossiblePlan(
                f"recipe {self.label!r} polishes, on no tokens; give --polish-tokens, or write +polish25000"
            )
        return tokens if self.polish else 0

    def for_curves(self) -> "Recipe":
        """The recipe whose KL curves it reads: the dense model's, whose levels are the steps of the method refit."""
        return self.model_copy(update={"statistics": "dense", "refit_steps": REFIT_STEPS})

    def within_layers(self) -> "Recipe":
        """The part of the recipe that makes a layer's weights, once it is known how many of them go."""
        return Recipe(
            method=self.method,
            refit=self.refits_after,
            refit_steps=self.steps,
            gamma="clipped" if self.clips else "plain",
            damping=self.fit_damping,
            statistics=self.statistics,
            mix=self.mix,
            pattern=self.pattern,
        )


_IN_STEPS = "|".join(f"(?<=^{name})" for name, method in METHODS.items() if method.refits_in_steps)

_LABEL = re.compile(
    rf"(?P<method>[a-z-]+?)(?:(?:{_IN_STEPS})(?P<steps>\d+))?(?P<refit>\+refit)?(?P<clipped>~clipped)?"
    rf"(?:~damped(?P<damping>[\d.]+))?(?P<mix>{MARKS})?"
    r"(?:~(?P<statistics>dense|sequential))?"
    r"(?P<polish>\+polish(?P<polish_tokens>\d+)?)?"
    r"(?::(?P<allocation>[a-z][a-z-]*?)(?P<mask>-mask)?(?:@(?P<strength>[\d.]+))?)?"
)

_ORDER = (r"\+refit", "~clipped", "~damped.*", rf"~\d.*|~({'|'.join(SHORT)})", "~[a-z]+", r"\+polish.*")
"""The marks of a label as `_LABEL` has them one behind the other."""


def _order_marks(label: str) -> str:
    """The label with its marks in their order, whichever they were given in; unknown ones at the end."""
    done, colon, shared = label.partition(":")
    method, *marks = re.split("(?=[~+])", done)

    def rank(mark: str) -> int:
        return next((place for place, form in enumerate(_ORDER) if re.fullmatch(form, mark)), len(_ORDER))

    return f"{method}{''.join(sorted(marks, key=rank))}{colon}{shared}"


def parse_recipe(label: str) -> Recipe:
    """The recipe of `METHOD[+refit][~clipped][~dampedSHARE][~SHARETEXT…][~STATISTICS]
    [+polish[TOKENS]][:ALLOCATION[@STRENGTH]]`.

    Marks behind METHOD may stand in any order. SHARETEXT, such as `~0.7code~0.3prose`, is a mixture of named texts, or
    of `run` and `questions`: with a quarter or half of these, `~quarter` or `~half`.
    STATISTICS is dense or sequential; without that mark they are those that the method's authors take. Without
    an allocation it is uniform.
    Raises ValueError in one line for another form or a name that there is not.
    """
    form = _LABEL.fullmatch(_order_marks(label.strip()))
    if form is None:
        raise ValueError(f"recipe {label!r} is not of the form METHOD[+refit]:ALLOCATION, such as refit:kappa")
    try:
        return Recipe.model_validate(
            {
                "method": form["method"],
                "refit": form["refit"] is not None,
                "refit_steps": form["steps"] or REFIT_STEPS,
                "gamma": "clipped" if form["clipped"] else "plain",
                "damping": form["damping"] or 0.0,
                **({"statistics": form["statistics"]} if form["statistics"] else {}),
                "mix": parse_mix(form["mix"]),
                "polish": form["polish"] is not None,
                "polish_tokens": form["polish_tokens"] or 0,
                "allocation": form["allocation"] or UNIFORM,
                "curves": "mask" if form["mask"] else "method",
                "strength": form["strength"] or 1.0,
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"recipe {label!r}: {problem['loc'][0]}: {problem['msg'].lower()}") from error


MAX_ADJUSTMENTS = 64
"""Corrections that one plan may hold."""

LEAST_FACTOR, MOST_FACTOR = 0.05, 20.0
"""What a plan may count a layer's KL curve times, at least and at most."""


class Adjustment(BaseModel):
    """One correction to the allocation, for the layers a selector names."""

    model_config = ConfigDict(extra="forbid")

    selector: str = Field(
        min_length=1,
        max_length=MOST_SELECTOR,
        description="Which layers: a glob over layer names, optionally after a range of blocks, such as "
        "'*.[qk]_proj', 'blocks 0-3' or 'blocks 0-3 · *.v_proj'; or several, set apart by ';'.",
    )
    action: Literal["factor", "bounds", "protect"] = Field(
        description="factor: the layers count this many times as much as predicted. bounds: least and greatest "
        "sparsity of each. protect: leave them dense."
    )
    factor: float | None = Field(
        None, ge=LEAST_FACTOR, le=MOST_FACTOR, description="For action factor; 2 = twice as precious."
    )
    low: float | None = Field(None, ge=0, le=1, description="For action bounds: least sparsity, as a fraction.")
    high: float | None = Field(None, ge=0, le=1, description="For action bounds: greatest sparsity, as a fraction.")
    reason: str = Field("", max_length=500, description="Why, in a few words.")

    @model_validator(mode="after")
    def _check_action(self) -> Self:
        if self.action == "factor" and self.factor is None:
            raise ValueError("action 'factor' needs a factor")
        if self.action == "bounds" and self.low is None and self.high is None:
            raise ValueError("action 'bounds' needs low or high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self
