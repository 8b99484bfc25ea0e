"""The speed of rollbacks, and of validations that begin where the weights differ.

Shape suffixes: B windows, T tokens, D hidden width.
"""

from tools.base.progress import ignore_progress
from tools.experiments.speed import OTHER_SPARSITY, SPARSITY, UPDATED, Site, Task
from tools.measure.losses import evaluate_windows
from tools.models.blocks import Blocks
from tools.plans.work_order import order_allocation
from tools.results.speed import Result
from tools.workbench.store import DENSE


def bench_validation(site: Site) -> list[Result]:
    """Rollbacks, and a validation that starts where the weights differ, against a validation of the whole model."""
    bench, blocks = site.bench, len(Blocks(site.bench.model))
    windows_BT, lead = bench.windows.validation.to(bench.device), bench.windows.lead
    third = 2 * blocks // 3
    allocation, other = site.share_out(SPARSITY), site.share_out(OTHER_SPARSITY).zeros

    def prune(first: int) -> str:
        """The checkpoint in which blocks from `first` on are pruned less."""
        less = {layer.name: other[layer.name] for layer in bench.layers if layer.block >= first}
        changed = allocation.model_copy(update={"zeros": allocation.zeros | less})
        return bench.prune(site.profile, order_allocation(UPDATED, changed), ignore_progress)

    all_alike, last_third, last_block = prune(blocks), prune(third), prune(blocks - 1)
    hidden_BTD = bench.store.read_tensors(bench.read_profile(site.profile).hidden)["hidden"]

    def forget() -> None:
        for path in (bench.directory / "evaluations").glob("*.json"):
            path.unlink()

    def change_last_third() -> None:
        forget()
        bench.evaluate(all_alike, "validation", site.profile, ignore_progress)
        bench.restore(last_third)

    full, cached, everything, block = site.time(
        Task(lambda: evaluate_windows(bench.model, windows_BT, hidden_BTD, "", ignore_progress, lead=lead)),
        Task(lambda: bench.evaluate(last_third, "validation", site.profile, ignore_progress), change_last_third),
        Task(lambda: bench.restore(all_alike), lambda: bench.restore(DENSE)),
        Task(lambda: bench.restore(all_alike), lambda: bench.restore(last_block)),
    )
    reference = f"full validation, {windows_BT.numel()} tokens"
    tail = f"validation when only blocks {third} to {blocks - 1} of {blocks} changed"
    return [
        site.compare("validation/last-third", tail, cached, reference, full),
        site.compare("rollback/all", "rollback in which every layer differs", everything, reference, full),
        site.compare("rollback/last-block", "rollback in which the last block differs", block, reference, full),
    ]
