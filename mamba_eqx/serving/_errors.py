"""Errors in the form that OpenAI's clients expect."""

import json

from ._aiohttp import web


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An answer of a status of 400 or above, with one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        """**Arguments:**

        - `status`: the HTTP status.
        - `message`: what is wrong, and the remedy.
        - `param`: the field of the request that is wrong.
        - `code`: OpenAI's code of the error.
        - `headers`: further headers of the response.
        """
        super().__init__(message)
        self.status, self.message = status, " ".join(message.split())[:1000]
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, object]:
        """Returns the error as JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> web.Response:
        """Returns the error as a response."""
        # ASCII also for lone surrogates of a request that a message quotes.
        text = json.dumps(self.body())
        return web.Response(
            status=self.status, text=text, content_type="application/json", headers=self.headers
        )


def invalid(message: str, param: str | None = None) -> ApiError:
    """Returns the error for an invalid request."""
    return ApiError(400, message, param=param)
