"""Errors a user can act on."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something the user can mend: printed as one line without a traceback, exit code 2.

    The message says what happened with the values, what was expected, and what to do.
    """

    exit_code = 2


class ConfigError(UserError):
    """The experiment file, or an override on the command line, is wrong."""


class DataError(UserError):
    """A dataset or imported file holds something that cannot be used (file and line are named)."""


class LabelError(UserError):
    """The labels cannot carry the analysis asked for (too few of a class, all alike, ...)."""


class ModelError(UserError):
    """A model, tokenizer or chat template cannot be used as asked."""


class InputMissing(UserError):
    """A job that this one reads has not finished."""


class StorageError(UserError):
    """Reading or writing failed (disk full, no permission, I/O error); nothing already durable is lost."""

    def __init__(self, path: Path | str, cause: OSError, doing: str = "write") -> None:
        self.path = Path(path)
        self.cause = cause
        reason = cause.strerror or type(cause).__name__
        super().__init__(
            f"cannot {doing} {path}: {reason}. Everything saved earlier is intact; run the same command again once the cause is gone."
        )


class CorruptError(UserError):
    """A file's bytes are not those that its manifest or receipt names."""
