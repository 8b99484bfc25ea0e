"""Who does the work on the one loaded model: this process alone, or workers beside it."""

from dataclasses import dataclass
from pathlib import Path

from tools.base.progress import Warn
from tools.base.settings import TeamSettings
from tools.models.blocks import Blocks
from tools.statistics.extent import Extent, work_alone
from tools.statistics.passage import KeptPassages
from tools.statistics.requests import Team
from tools.team.cluster import Cluster
from tools.team.worker import Texts
from tools.workbench.weights import Weights


@dataclass
class Crew:
    """Whom the parts of a workbench ask."""

    team: Team
    """Whoever walks through calibration text."""
    extent: Extent
    cluster: Cluster | None = None
    """The workers, where there are some."""

    @property
    def abreast(self) -> int:
        """How many checkpoints are measured at once: one by each worker, or one by this process alone."""
        return self.cluster.size if self.cluster else 1

    def close(self) -> None:
        """Let workers go that were gathered."""
        if self.cluster is not None:
            self.cluster.close()


def gather_crew(
    settings: TeamSettings,
    blocks: Blocks,
    weights: Weights,
    texts: Texts,
    scratch: Path,
    warn: Warn,
    kept: KeptPassages | None = None,
) -> Crew:
    """Workers where the settings ask for them; in the directory `scratch` lie files without a name.

    How far this process' walks have come is `kept`; workers of this machine keep theirs in `scratch`.
    Raises UserError when they cannot be had.
    """
    windows = texts.windows
    calibration = windows.calibration.to(blocks.model.device)
    team, extent = work_alone(
        blocks,
        weights.layers,
        calibration,
        settings.gradient_windows,
        settings.seed,
        scratch,
        windows.mixed,
        windows.lead,
        max(len(windows.texts), 1),
        kept,
    )
    if not settings.workers:
        return Crew(team, extent)
    cluster = Cluster(settings, texts, weights, blocks.model, scratch, warn)
    return Crew(cluster, extent, cluster)
