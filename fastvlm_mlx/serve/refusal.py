"""What is wrong with a request, as the error object that OpenAI's clients understand, and with which status.

A client's mistake is never a 5xx, which clients send again by themselves. What went wrong in the server itself is told
to its log, not to the client: a message of that kind may name files.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CancelledError, DeviceError, FastVLMError, ImageError, OptionError, OutOfMemoryError, PromptError

RETRY_SECONDS = 2  # after which a client that was turned away may try again

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}  # the `type` of an error object, by status


class Refusal(FastVLMError):
    """A request that is not answered: an HTTP status, and what OpenAI's error object says.

    `param` is the field of the request that it is about, `code` a word for programs to act on, `headers` go with the
    response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_SECONDS))

    def to_dict(self) -> dict[str, Any]:
        """The error object, as it stands in a response's body or in the middle of a stream."""
        return {
            "error": {
                "message": str(self),
                "type": KINDS.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A refusal with status 400."""
    return Refusal(400, message, param=param, code=code)


def refusal_of(error: BaseException, param: str | None = None) -> Refusal:
    """What to say of an exception that ended a request; `param` is the field it came from, where that is known."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (ImageError, PromptError, OptionError)):
        return bad_request(str(error), param or error.option)
    if isinstance(error, OutOfMemoryError):
        return Refusal(503, f"{error}", code="out_of_memory")
    if isinstance(error, DeviceError):
        return Refusal(503, f"{error}", code="device_error")
    if isinstance(error, CancelledError):
        return Refusal(503, "The answer was broken off before it was finished.", code="cancelled")
    return Refusal(500, "The server failed at this request; its log says where.", code="internal_error")
