"""finish: the test text, once; the exported model, its card, the report and the summary."""

from typing import Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.nodes.validate import accepted_trial
from graph.session import enter, open_bench
from graph.state import SAME_SPARSITY, State
from tools.allocate import allocate
from tools.export import export_model
from tools.files import write_json, write_text
from tools.recipes import Recipe
from tools.summary import Perplexities, Summary, describe_protocol, write_card, write_report


def finish(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Measure dense, uniform Wanda and the accepted weights on the test text; export and report."""
    config = state.config
    state = state.model_copy(update={"current": state.accepted})
    session = enter("finish", state, runtime)
    with open_bench(state, session) as bench:
        layers = bench.read_profile(state.profile).layers
        zeros, weights = bench.count_zeros()
        achieved, masks = zeros / weights, bench.hash_masks()

        def measure(checkpoint: str, label: str) -> float | None:
            return bench.evaluate(checkpoint, "test", state.profile, session.progress, label).perplexity

        reached = abs(achieved - config.target_sparsity) <= SAME_SPARSITY
        pattern = config.pattern if reached else ""
        uniform = Recipe(method="wanda", refit=False, allocation="uniform", pattern=pattern)
        least = sum(x.zeros for x in layers) / weights
        share = allocate(layers, max(achieved, least), uniform, protect=config.protect if pattern else [])
        perplexity = Perplexities(
            dense=measure("dense", "test, dense"),
            uniform_wanda=measure(bench.prune(state.profile, share, uniform, session.progress), "test, uniform Wanda"),
            pruned=measure(state.accepted, "test, pruned"),
        )
        bench.restore(state.accepted)
        best = accepted_trial(state)
        seconds = session.seconds
        summary = Summary(
            run=state.run,
            model=config.model,
            status="finished" if reached else "short-of-target",
            target_sparsity=config.target_sparsity,
            achieved_sparsity=achieved,
            perplexity=perplexity,
            kl=best.kl,
            plan=best.plan,
            iterations=state.iteration,
            rollbacks=sum(trial.verdict == "rollback" for trial in state.trials),
            evaluated_tokens=state.evaluated_tokens,
            agents=state.usage,
            seconds=round(seconds, 3),
            peak_memory_bytes=bench.peak_memory_bytes(),
            mask_sha256=masks,
            protocol=describe_protocol(config),
        )
        export_model(bench.model, bench.tokenizer, session.directory / "model", write_card(summary, config))
        sparsity = dict(zip(bench.by_name, bench.sparsities(), strict=True))
        trials = [trial.model_dump() for trial in ([state.dense] if state.dense else []) + state.trials]
        write_text(session.directory / "report.md", write_report(summary, trials, sparsity, state.stop))
        write_json(session.directory / "summary.json", summary.model_dump())
        session.emit(
            "result",
            **summary.model_dump(),
            model_directory=str(session.directory / "model"),
            report=str(session.directory / "report.md"),
        )
    return {"current": state.accepted, "seconds": session.seconds}
