"""Every exception Sapwood raises on purpose.

    SapwoodError
    ├── InvalidRequest      the caller's arguments are wrong (HTTP 400); also a ValueError
    │   ├── UnsupportedModel    the checkpoint needs what this version does not have
    │   └── PromptTooLong       more tokens than the context or the KV pool can hold
    ├── CapacityError       no room now: queue, rows or KV pool are full (HTTP 503)
    ├── EngineDead          the engine has stopped or its executor failed
    └── InternalError       a broken invariant: a bug of ours

A message names the argument, what was expected, what came, and the remedy.
"""


class SapwoodError(Exception):
    """Base of all errors raised by Sapwood."""


class InvalidRequest(SapwoodError, ValueError):
    """The caller's arguments are wrong. `param` names the offending argument where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedModel(InvalidRequest):
    """The checkpoint's architecture or one of its features is not supported."""


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than the context length, or than the whole KV pool, can hold."""


class MissingExtra(SapwoodError, ImportError):
    """An optional dependency is needed; the message holds the command that installs it."""


class CapacityError(SapwoodError):
    """A queue, table or pool is full; retrying later can succeed."""


class EngineDead(SapwoodError):
    """The engine was shut down or its executor failed; no request can be served."""


class InternalError(SapwoodError):
    """A broken invariant: a bug of ours. Please report it."""
