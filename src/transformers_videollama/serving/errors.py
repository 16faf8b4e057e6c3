"""What a request is refused with: an error in the shape of the OpenAI API."""

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """
    A request that is not answered.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What was expected, what came and what to do; shown to whoever asked.
        code (`str`, *optional*): The kind of error, for programs.
        param (`str`, *optional*): The field of the request that is wrong.
        headers (`dict[str, str]`, *optional*): Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(_printable(message))
        self.status = status
        self.code = code
        self.param = None if param is None else _printable(param)
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _printable(text: str) -> str:
    """Without halves of characters, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()
