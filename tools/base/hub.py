"""Whether the hub answers at all: what downloads asks a dead one six times for every file, half a minute long."""

import math
import sys
import time

_UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError")
"""What the HTTP library calls it when there is nobody. A hub that answers late, or with an error, is there."""
_PATIENCE = 1.0
"""Seconds that it may take to answer, once it is connected to, before it counts as slow, and as there."""
_VALID = 60.0
"""Seconds for which one look stands."""

_last_look = (-math.inf, "")
"""When it was, and what was wrong; while something is, libraries are told here to do without the hub."""


def look_at_hub() -> str:
    """Why the hub cannot be asked, as half a sentence; "" where it can be.

    Where it cannot, libraries use what is on this machine until a later look finds it.
    """
    global _last_look
    from huggingface_hub import constants

    when, problem = _last_look
    if constants.HF_HUB_OFFLINE and not problem:
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    if time.monotonic() - when > _VALID:
        constants.HF_HUB_OFFLINE = False
        problem = _find_problem()
        _last_look = time.monotonic(), problem
    constants.HF_HUB_OFFLINE = bool(problem)
    if (datasets := sys.modules.get("datasets")) is not None:  # it has a copy of the switch
        datasets.config.HF_HUB_OFFLINE = bool(problem)
    return problem


def _find_problem() -> str:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=(constants.HF_HUB_ETAG_TIMEOUT, *3 * (_PATIENCE,)))
    except Exception as error:  # its HTTP library changes, and the names of what it raises stay
        if type(error).__name__ in _UNREACHED:
            said = " ".join(str(error).split())[:150] or type(error).__name__
            return f"{constants.ENDPOINT} cannot be reached ({said})"
    return ""
