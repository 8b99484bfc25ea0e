"""What work takes on a model that comes block by block, against the bare forward of the same text.

Shape suffixes: B windows, T tokens.
"""

from torch import Tensor

from tools.base.progress import ignore_progress
from tools.experiments.speed import SPARSITY, UPDATED, Site, Task
from tools.experiments.speed_statistics import collect_profile
from tools.measure.losses import pass_blocks
from tools.models.blocks import Blocks
from tools.models.readout import CHUNK, compute_logits
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.speed import Result
from tools.workbench.store import DENSE

MASKED_REFIT = Recipe(method="refit", refit=False, allocation="kappa", curves="mask", statistics="dense")


def bench_stream(site: Site) -> list[Result]:
    """Profile and validation beside a bare forward, a round's refit beside SparseGPT's; its workbench streams."""
    bench = site.bench
    blocks, allocation = Blocks(bench.model), site.share_out(SPARSITY)
    validation_BT = bench.windows.validation.to(bench.device)

    def forward(windows_BT: Tensor) -> None:
        bench.restore(DENSE)
        pass_blocks(blocks, windows_BT)

    def read_out(windows_BT: Tensor) -> None:
        bench.restore(DENSE)
        for hidden_BTD in pass_blocks(blocks, windows_BT).values():
            for chunk_TD in hidden_BTD[0].to(bench.device).split(CHUNK):
                compute_logits(bench.model, chunk_TD)

    def profile() -> None:
        bench.restore(DENSE)
        collect_profile(site, blocks, site.calibration_BT)

    def forget() -> None:
        """What is kept on disk would only be read back."""
        bench.restore(DENSE)
        (bench.store.directory / "index.jsonl").unlink(missing_ok=True)
        for path in (bench.directory / "evaluations").glob("*.json"):
            path.unlink()

    def prune(recipe: Recipe) -> str:
        return bench.prune(site.profile, order_allocation(recipe, allocation), ignore_progress)

    def validate() -> None:
        bench.evaluate(DENSE, "validation", site.profile, ignore_progress)

    bare, profiled, updated, refitted, passed, validated = site.time(
        Task(lambda: forward(site.calibration_BT)),
        Task(profile),
        Task(lambda: prune(UPDATED), forget),
        Task(lambda: prune(MASKED_REFIT), forget),
        Task(lambda: read_out(validation_BT)),
        Task(validate, forget),
    )
    whole = f"profile of {site.calibration_BT.numel()} tokens, gradients of {site.settings.gradient_windows} windows"
    text = f"validation on {validation_BT.numel()} tokens"
    reference = "bare forward of these tokens, block by block"
    return [
        site.compare("stream/profile", whole, profiled, f"{reference}, without logits", bare, 4.0),
        site.compare("stream/refit", "a round's refit of all layers", refitted, "SparseGPT's update", updated, 3.0),
        site.compare("stream/validation", text, validated, f"{reference}, with logits", passed, 1.2),
    ]
