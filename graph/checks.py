"""What a run that begins is refused for, beside what the model of its options refuses: runs begun so are still read."""

from graph.config import HEURISTIC, PROMPTS, Agent, RunConfig
from tools.base.errors import UserError


def check_target(config: RunConfig) -> None:
    """Refuse two targets in one run, the sparsity being another than the default. Raises UserError.

    Not part of the model: a run that takes parts away knows, once the model is open, which sparsity its size is.
    """
    usual = RunConfig.model_fields["target_sparsity"].default
    if config.takes_parts and config.target_sparsity != usual:
        raise UserError(
            "target_size and target_sparsity are two targets: cut first, then set zeros in what stays by a run with "
            "--model RUN/model --target-sparsity"
        )
    if config.takes_parts and config.max_layer_sparsity != RunConfig.model_fields["max_layer_sparsity"].default:
        raise UserError("max_layer_sparsity bounds zeros, and a cut takes whole parts away; leave it out")


def check_budget(config: RunConfig, name: str = "max_evaluated_tokens") -> None:
    """Refuse tokens, as the option `name` gives them, that are not enough for one trial. Raises UserError."""
    tokens, needed = config.max_evaluated_tokens, config.validation_tokens
    if 0 < tokens < needed:
        raise UserError(f"{name} {tokens:,} allow no trial: one takes {needed:,}")


def check_prices(config: RunConfig) -> None:
    """Refuse a cap on a cost that nobody can reckon. Raises UserError."""
    agents: tuple[tuple[Agent, str], ...] = (("planner", config.planner), ("reflector", config.reflector))
    for agent, spec in agents:
        free = spec == HEURISTIC or spec.startswith(("local:", "exchange:"))
        if config.max_agent_cost and not free and not all(config.find_prices(agent)):
            raise UserError(
                f"max_agent_cost caps nothing without prices: give --{agent}-price-input and --{agent}-price-output, "
                f"in dollars per million tokens of {spec}, or --max-agent-cost 0"
            )


def refuse_prompt_files(config: RunConfig) -> None:
    """Refuse a prompt that is still the name of its file: nobody at the command line gave it. Raises UserError."""
    for field in PROMPTS:
        if getattr(config, field).startswith("file:"):
            raise UserError(f"{field}: files are read as prompts at the command line alone; give the text itself")
