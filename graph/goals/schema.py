"""What is made of a goal: what each text counts and may lose, texts that the model writes, and prompts to look at."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graph.config import RunConfig
from tools.base.named import NAME
from tools.base.options import describe_problem
from tools.texts.written import deal_prompts

MOST_TEXTS, MOST_PROMPTS, MOST_PROBES = 8, 12, 6
LEAST_PROMPTS = 3
"""One for each of calibration, validation and test: no prompt serves two of them."""
PROMPT_LIMIT = 200
"""Characters of a prompt or probe."""
GREATEST = 100.0
"""A weight, or a rise as a fraction, that a brief may have."""


class Aim(BaseModel):
    """What a text counts, and what it may lose."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="The name of a text, as listed, or of one of new_texts.")
    weight: float = Field(
        ge=0,
        le=GREATEST,
        description="What the text counts beside the others in what is fitted and judged. 0: it may go; it is "
        "measured, and nothing is fitted to it.",
    )
    max_rise: float | None = Field(
        None,
        gt=0,
        le=GREATEST,
        description="Largest rise of its perplexity above the dense model's, as a fraction: 0.2 means 20 %. A plan "
        "that goes beyond is rolled back, whatever it gains elsewhere. null: none but one that was given.",
    )


class NewText(BaseModel):
    """A text that the dense model writes, from prompts."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=f"^{NAME}$", description="A new name: a small letter, then small letters, digits or _.")
    prompts: list[str] = Field(
        min_length=LEAST_PROMPTS,
        max_length=MOST_PROMPTS,
        description=f"What the model is asked or begins with, each different, of at most {PROMPT_LIMIT} characters: of "
        "three the first is for fitting, the second for judging, the third for the report; more give more kinds of "
        "text to fit to.",
    )


class Brief(BaseModel):
    """What a run's goal comes to; fixed for the run."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(
        "", max_length=1000, description="What the goal keeps and what it gives up, and which text stands for what."
    )
    new_texts: list[NewText] = Field(
        default_factory=list,
        max_length=MOST_TEXTS,
        description="Texts for what the goal names and no listed text shows; none where none are allowed.",
    )
    aims: list[Aim] = Field(
        min_length=1, max_length=2 * MOST_TEXTS, description="One for every listed text and for every new one."
    )
    min_answers: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share of the right answers' probability that a plan must keep, as questions show it; a plan "
        "that keeps less is rolled back. Only where questions are asked. null: as the config has it.",
    )
    probes: list[str] = Field(
        default_factory=list,
        max_length=MOST_PROBES,
        description=f"Beginnings of text, at most {PROMPT_LIMIT} characters each, that dense and pruned model continue "
        "in the report, so that a person sees whether each part is kept.",
    )

    @property
    def line(self) -> str:
        """In one line, such as `code 75% (at most +20%), prose 25%, french 0%`."""
        total = sum(aim.weight for aim in self.aims)
        answers = f"; answers at least {self.min_answers:.0%}" if self.min_answers else ""
        bounds = {aim.name: f" (at most +{aim.max_rise:.0%})" for aim in self.aims if aim.max_rise}
        shares = ", ".join(f"{aim.name} {aim.weight / total:.0%}{bounds.get(aim.name, '')}" for aim in self.aims)
        return shares + answers


def weigh_alike(config: RunConfig) -> Brief:
    """The rule's brief, which reads no words: the weights that the config gives, or the same for every text.

    Weights that are greater than a brief's may be count the same beside one another; so far no bound is reached.
    """
    weights = config.weights_of_texts
    beyond = max(max(weights.values()) / GREATEST, 1.0)
    bounds = {name: min(most, GREATEST) for name, most in config.text_bounds.items()}
    aims = [Aim(name=name, weight=weights[name] / beyond, max_rise=bounds.get(name)) for name in config.text]
    return Brief(reason="every text as the config weighs it: no words are read by a rule", aims=aims)


def check_brief(brief: Brief, config: RunConfig) -> None:
    """Raises ValueError, in words for who made it, where the brief cannot be followed."""
    new = [text.name for text in brief.new_texts]
    names, aimed = [*config.text, *new], [aim.name for aim in brief.aims]
    if twice := [name for name, times in (Counter(names) + Counter()).items() if times > 1]:
        raise ValueError(f"new_texts name {twice[0]!r}, and there is such a text already; choose another name")
    if unknown := [name for name in aimed if name not in names]:
        raise ValueError(f"aims name {unknown[0]!r}, which is none of the texts {', '.join(names)}")
    if twice := [name for name, times in Counter(aimed).items() if times > 1]:
        raise ValueError(f"aims name {twice[0]!r} twice")
    if missing := [name for name in names if name not in aimed]:
        raise ValueError(f"aims have none for {missing[0]!r}; a weight of 0 lets it go")
    if not any(aim.weight for aim in brief.aims):
        raise ValueError("all weights are 0: nothing would be kept")
    if brief.min_answers and not config.questions:
        raise ValueError("min_answers is a bound on questions, and none are asked; leave it null")
    check_prompts(brief.new_texts, brief.probes)
    each, allowed = count_new_text(config), config.goal_tokens
    if len(new) * each > allowed:
        raise ValueError(
            f"{len(new)} new texts of {each:,} tokens each are {len(new) * each:,} tokens, and the model may write "
            f"{allowed:,} (goal_tokens); ask for {count_allowed(config)} at most"
        )
    check_followed(follow_brief(config, brief))


def count_allowed(config: RunConfig) -> int:
    """Texts that the model may write for a goal, for brief and plans together."""
    return config.goal_tokens // count_new_text(config)


def check_followed(config: RunConfig) -> None:
    """Raises ValueError where a config with other texts is none, or two of them share a prompt."""
    try:
        RunConfig.model_validate(config.model_dump())
    except ValidationError as error:
        raise ValueError("; ".join(describe_problem(problem) for problem in error.errors()[:3])) from error
    deal_prompts(config)


def check_prompts(texts: Sequence[NewText], probes: Sequence[str] = ()) -> None:
    """Raises ValueError where a prompt cannot be one, or stands there twice."""
    prompts = [" ".join(prompt.split()) for text in texts for prompt in text.prompts]
    for prompt in (*prompts, *probes):
        if not prompt.strip() or len(prompt) > PROMPT_LIMIT:
            raise ValueError(f"prompts and probes have 1 to {PROMPT_LIMIT} characters each")
    if any("|" in prompt for prompt in prompts):
        raise ValueError("a prompt cannot hold '|'")
    if twice := [prompt for prompt, times in Counter(prompts).items() if times > 1]:
        raise ValueError(f"the prompt {twice[0]!r} is there twice; no prompt serves two texts")


def count_new_text(config: RunConfig) -> int:
    """Tokens of a text that the model writes for a goal: all its windows."""
    kinds = (config.calibration_windows, config.validation_windows, config.test_windows)
    return config.window * sum(kinds)


def keep_bounds(brief: Brief, config: RunConfig) -> Brief:
    """The brief of a model with no bound looser than the person's own, whatever the model says of these."""
    given, aims = config.text_bounds, []
    for aim in brief.aims:
        bounds = [bound for bound in (given.get(aim.name), aim.max_rise) if bound]
        aims.append(aim.model_copy(update={"max_rise": min(bounds, default=None)}))
    answers = max(config.min_fact_retention, brief.min_answers or 0.0)
    return brief.model_copy(update={"aims": aims, "min_answers": answers or None})


def follow_brief(config: RunConfig, brief: Brief | None) -> RunConfig:
    """The config with texts, weights and bounds as a brief has them that was checked for it."""
    if brief is None:
        return config
    changes: dict[str, Any] = {
        "text": _add_texts(config, brief.new_texts),
        "text_weights": {aim.name: aim.weight for aim in brief.aims},
        "text_bounds": {aim.name: aim.max_rise for aim in brief.aims if aim.max_rise},
    }
    if brief.min_answers:
        changes["min_fact_retention"] = brief.min_answers
    return config.model_copy(update=changes)


def follow_new_texts(config: RunConfig, texts: Sequence[NewText]) -> RunConfig:
    """The config with further texts that count nothing in what is judged; what the others count stays."""
    if not texts:
        return config
    weights = {**config.weights_of_texts, **dict.fromkeys((text.name for text in texts), 0.0)}
    return config.model_copy(update={"text": _add_texts(config, texts), "text_weights": weights})


def _add_texts(config: RunConfig, texts: Sequence[NewText]) -> dict[str, str]:
    new = {text.name: "self:" + " | ".join(" ".join(p.split()) for p in text.prompts) for text in texts}
    return {**config.text, **new}
