"""What can be wrong with a request, with the status and the kind that Text Embeddings Inference
gives it."""


class RequestError(Exception):
    """Say why a request has no scores; `status` and `kind` are those of the answer."""

    status, kind = 500, "backend"


class Unauthorized(RequestError):
    """Say that the bearer token is missing or wrong."""

    status, kind = 401, "unauthorized"


class Empty(RequestError):
    """Say that there are no texts."""

    status, kind = 400, "empty"


class TooSlow(RequestError):
    """Say that the body of a request did not arrive in time."""

    status, kind = 408, "timeout"


class TooLarge(RequestError):
    """Say that a request has more bytes, texts or tokens than are allowed."""

    status, kind = 413, "validation"


class WrongType(RequestError):
    """Say that a body is no JSON by its header."""

    status, kind = 415, "validation"


class Untokenizable(RequestError):
    """Say that texts cannot become tokens, such as a query that leaves no room for a document."""

    status, kind = 422, "tokenizer"


class Unscorable(RequestError):
    """Say that the model has no such scores, or that they are not finite."""

    status, kind = 424, "backend"


class Overloaded(RequestError):
    """Say that too much waits; `retry_after` is in seconds."""

    status, kind = 429, "overloaded"

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message, retry_after)  # both, so that it can be sent to another process
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.args[0]


class Unhealthy(RequestError):
    """Say that nothing scores any more."""

    status, kind = 503, "unhealthy"


class Late(RequestError):
    """Say that a request was not answered within its time."""

    status, kind = 504, "timeout"
