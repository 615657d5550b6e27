"""What goes wrong, as HTTP says it: a status, and a body in OpenAI's form.

Receives the exceptions of errors.py and outputs that ended with an error from every route; hands statuses and bodies to
server/exchange.py and server/streaming.py.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from sapwood.errors import CapacityError, EngineDead, InvalidRequest, PromptTooLong
from sapwood.request import ErrorType, RequestOutput

# status -> OpenAI's `type`
TYPES: Final = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        431: "invalid_request_error",
        500: "server_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)
OUTPUT_STATUS: Final = MappingProxyType({ErrorType.TIMEOUT: 504, ErrorType.CAPACITY: 503, ErrorType.INTERNAL: 500})
RETRY_AFTER: Final = MappingProxyType({"retry-after": "1"})


class Problem(Exception):
    """An answer that is an error. param names the request's field it is about, code is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The JSON of the error."""
        error: dict[str, Any] = {
            "message": str(self),
            "type": TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


def problem_of(error: Exception) -> Problem | None:
    """What a client is told of an exception; None where it is a bug of ours, whose text is nobody's business."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InvalidRequest):
        # OpenAI's clients look for this code, to shorten and try again.
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return Problem(400, str(error), param=error.param, code=code)
    if isinstance(error, CapacityError):
        return Problem(503, str(error), code="queue_full", headers=RETRY_AFTER)
    if isinstance(error, EngineDead):
        return Problem(503, str(error), code="engine_dead")
    return None


def problem_of_output(output: RequestOutput) -> Problem | None:
    """The error that ended a request; None where it ended well or was aborted by a caller."""
    if output.error is None:
        return None
    kind = output.error_type or ErrorType.INTERNAL
    return Problem(OUTPUT_STATUS[kind], output.error, code=kind.value)


def internal() -> Problem:
    return Problem(500, "internal error; the server's log has the details", code="internal")
