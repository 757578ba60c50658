"""Turns token ids into text as they come, at a cost per token that does not grow."""

from collections.abc import Iterable, Iterator
from typing import Any

INCOMPLETE = "\ufffd"  # what a tokenizer decodes a part of a character to


class TextDecoder:
    """Decodes token ids one by one; the pieces together are the text of them all.

    A token's text depends on its neighbors: a character may be spread over several tokens, and
    many tokenizers drop a space at the beginning. So new tokens are decoded behind those of the
    piece before them, and are held back while their last character is incomplete.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._previous: list[int] = []  # the tokens of the last piece
        self._pending: list[int] = []  # tokens whose text has not been returned

    def add(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._pending.append(token)
        text = self._decode_pending()
        return "" if text.endswith(INCOMPLETE) else self._advance(text)

    def flush(self) -> str:
        """The text of the tokens that are held back, complete or not."""
        return self._advance(self._decode_pending())

    def _decode_pending(self) -> str:
        before = len(self._decode(self._previous))
        return self._decode(self._previous + self._pending)[before:]

    def _advance(self, text: str) -> str:
        if text:
            self._previous, self._pending = self._pending, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def decode_stream(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids, in pieces that are not empty, each as soon as it is complete."""
    decoder = TextDecoder(tokenizer)
    for token in ids:
        if piece := decoder.add(token):
            yield piece
    if rest := decoder.flush():
        yield rest
