"""What a server is called, whom it answers, and the most that one request may ask for."""

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server answers.

    Args:
        model: What clients call the model.
        api_key: What they must send, as a bearer token; None if anybody may ask.
        hosts: The host names that a request may name; none for any. On the loopback they keep web
            pages from reaching the server by a name of their own.
        request_timeout: Seconds after which a request fails with 504, waiting included.
        max_body_bytes: Of a request's body.
        max_prompts: Prompts, or texts to embed, of one request.
        max_choices: Completions of one prompt.
        max_stops: Texts to stop at.
        pooling: How the vectors of an encoder's tokens become one: their mean, or that of the first
            or the last token.
    """

    model: str
    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    request_timeout: float = 600.0
    max_body_bytes: int = 8 << 20
    max_prompts: int = 64
    max_choices: int = 16
    max_stops: int = 16
    pooling: Pooling = "mean"
