"""Whether a model and its texts are still what they were when a directory was begun: both are known by their names."""

import hashlib

from tools.base.errors import UserError
from tools.base.settings import TEAM, WorkbenchSettings
from tools.texts.windows import Windows
from tools.workbench.store import Index


def refuse_changed(index: Index, settings: WorkbenchSettings, weights: str, rest: str, windows: Windows) -> None:
    """Keep what `weights` of prunable layers and the `rest` of the model, by their hashes, and windows of text the
    settings stand for when they are first seen.

    Raises UserError where they stand for others now: what was measured before would be compared with, or taken for,
    what is measured of them.
    """
    key = ["opened", settings.model_dump_json(exclude=set(TEAM))]
    found = {"weights": weights, "rest": rest, "texts": _hash_windows(windows)}
    known = index.measure_once(key, lambda: found)
    model = f"model {settings.model}"
    for what, word in (("weights", model), ("rest", model), ("texts", "a text")):
        if known[what] != found[what]:
            raise UserError(
                f"{word} is another than when this was begun, by the same name: what was measured holds of it no more; "
                "begin anew, in another directory"
            )


def _hash_windows(windows: Windows) -> str:
    digest = hashlib.sha256()
    for text_BT in (windows.calibration, windows.validation, windows.test):
        digest.update(f"{tuple(text_BT.shape)}\n".encode())
        digest.update(text_BT.numpy().tobytes())
    return digest.hexdigest()
