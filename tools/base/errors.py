"""Errors that a person can act on."""


class UserError(ValueError):
    """Bad input: the message is one line that says what was wrong and what to do."""


class ImpossiblePlan(ValueError):
    """The plan cannot be met; the message tells the planner why, in one line."""


class BrokenPlan(ImpossiblePlan):
    """The plan broke while it was carried out, for want of memory or in a layer whose numbers give no answer."""


class UnknownStatistics(UserError):
    """A text says nothing of a layer, or nothing finite."""


class DamagedFile(UserError):
    """A file is not what was written; the message says which, and what to do."""


class DegenerateText(UserError):
    """What the model wrote itself is no text to fit to or to judge by."""


class SharedText(UserError):
    """Two parts of the texts that must be disjoint are not."""


class BrokenBaseline(UserError):
    """The dense model cannot be profiled, for want of memory say; what was done stands, and the run can be resumed."""


class DiskFull(UserError):
    """No space was left in the middle of a run; what was done stands, and the run can be resumed."""


class DamagedArtifact(RuntimeError):
    """A file of the run directory does not match the hash it was written under."""


def in_one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of a library's says, on one line of at most `limit` characters; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
