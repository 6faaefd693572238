"""The errors a user can meet. Each is one sentence: what is wrong, where, and what would be right.

`RequestError` and its children mean that the request was wrong (exit status 2, nothing written);
any other `UnisdError` means that the work failed (exit status 1).
"""


class UnisdError(Exception):
    """Root of every error this package raises on purpose."""


class RequestError(UnisdError, ValueError):
    """The request cannot be carried out as stated: a flag, a file or a layout is wrong."""


class ConfigError(RequestError):
    """A setting is unknown, contradictory, or impossible for this model and layout."""


class DataError(RequestError):
    """A data file is missing, empty, or has a broken record."""


class CheckpointError(RequestError):
    """A checkpoint is missing, incomplete, or belongs to another model or run."""


class MissingDependency(RequestError):
    """An optional library is needed and absent; the message carries the install line."""


class LostContact(UnisdError):
    """Another rank is gone or cannot be reached: its process, its host or the network between. Nothing is wrong here."""


class CheckFailed(UnisdError):
    """A check of the program on itself did not hold: a non-finite loss, stale rollout weights, parity."""
