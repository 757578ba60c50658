"""Turns token ids into text as they come, at a cost per token that does not grow."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what a tokenizer decodes a part of a character to
CONTEXT = 8  # tokens of a prompt that the text of the next one may depend on


class TextDecoder:
    """Decodes token ids one by one; the pieces together are the text of them all.

    A token's text depends on its neighbors: a character may be spread over several tokens, and
    many tokenizers drop a space at the beginning. So new tokens are decoded behind those of the
    piece before them, and are held back while their last character is incomplete.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        """Decode what follows the token ids of a prompt, whose own text is not returned."""
        self._tokenizer = tokenizer
        self._previous = list(prompt[-CONTEXT:])  # the tokens before those that are pending
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


def decode_stream(tokenizer: Any, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """The text of token ids after a prompt, in pieces that are not empty, as they are complete."""
    decoder = TextDecoder(tokenizer, prompt)
    for token in ids:
        if piece := decoder.add(token):
            yield piece
    if rest := decoder.flush():
        yield rest
