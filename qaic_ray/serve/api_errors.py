"""Errors as the OpenAI interface tells them: a status, and an object that says what is wrong."""

from __future__ import annotations

from typing import Any

from qaic_ray.errors import FleetBusy, FleetClosed, QaicRayError
from qaic_ray.rows import ErrorClass, Row

BUSY_RETRY_S = 1
"""Seconds after which a client that met a full queue may come again."""
CLOSED_RETRY_S = 5
"""The same where the server starts or ends: another one may stand behind the address by then."""

CLIENT_GONE = 499
"""The status, for logs alone, of a request whose client went away."""

STATUSES = {
    400: ("invalid_request_error", "A field is wrong: `param` names it."),
    401: ("authentication_error", "There is no API key, or no such key."),
    403: ("permission_error", "The address is not one of this machine's own names."),
    404: ("not_found_error", "There is no such route, model, file or batch."),
    408: ("timeout_error", "The body, or the answer, did not come in time."),
    413: ("invalid_request_error", "The body is longer than the server takes."),
    429: ("rate_limit_error", "Too much is open: come again after `Retry-After` seconds."),
    500: ("internal_error", "A card failed at each attempt, or there is a fault of qaic-ray."),
    503: ("service_unavailable_error", "The server starts or ends: come again."),
    507: ("internal_error", "The server's folder of files and batches cannot be written."),
}
"""Statuses, the interface's word for each, and what it means here."""


class ApiError(QaicRayError):
    """What a request is answered with in place of what it asked for.

    Attributes:
        status: of HTTP.
        type: the interface's word for the kind of error.
        param: the field that is wrong, where it is one.
        code: the interface's word for the error, where it has one.
        retry_after_s: when to come again, where that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """The interface's word for the kind of error."""
        default = "invalid_request_error" if self.status < 500 else "internal_error"
        return STATUSES.get(self.status, (default, ""))[0]

    @property
    def headers(self) -> dict[str, str]:
        """That the answer has besides."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(self.retry_after_s)}

    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that is wrong."""
    return ApiError(400, message, param=param, code=code)


def of_fleet(error: FleetBusy | FleetClosed) -> ApiError:
    """The error of a fleet that takes no prompt."""
    if isinstance(error, FleetBusy):
        return ApiError(
            429, f"{error} Try again later.", code="queue_full", retry_after_s=BUSY_RETRY_S
        )
    return ApiError(503, str(error), code="fleet_closed", retry_after_s=CLOSED_RETRY_S)


def of_row(row: Row) -> ApiError:
    """The error of a prompt that has no answer.

    A prompt that was refused is its author's affair; a card that failed at each attempt is not.
    """
    message = row.error or "There is no answer."
    match row.error_class:
        case ErrorClass.CANCELLED:
            return ApiError(CLIENT_GONE, message, code="cancelled")
        case ErrorClass.DEVICE:
            return ApiError(500, message, code="device_failed")
    return bad_request(message)
