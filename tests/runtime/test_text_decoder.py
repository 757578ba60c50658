"""Text that comes token by token is the text of all tokens, at a cost that does not grow."""

from typing import Any

import pytest

from shardkit.runtime.engine.text_decoder import TextDecoder, decode_stream
from tests.helpers.real_inputs import shared

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語のテキスト、한국어, и кириллица",
    "🙂🙃 👩‍👩‍👧‍👦 𐍈 ends in an emoji 🎉",
    "  spaces   and\n\nlines\tand tabs ",
]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A tokenizer of which every byte is a token, so that characters are spread over several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A trained tokenizer that falls back to bytes and drops the first space."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared("models/stories260K"))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_together_are_the_text_of_all_tokens(
    kind: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(decode_stream(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte_and_a_part_of_one_at_the_end(byte_level: Any) -> None:
    ids = byte_level("é🙂")["input_ids"]
    decoder = TextDecoder(byte_level)
    assert [decoder.add(token) for token in ids] == ["", "é", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert list(decode_stream(byte_level, ids[:3])) == ["é", "\ufffd"]
    assert list(decode_stream(byte_level, [])) == []


def test_special_tokens_are_skipped(byte_level: Any) -> None:
    a, b = byte_level("ab")["input_ids"]
    assert list(decode_stream(byte_level, [256, a, 256, 256, b, 256])) == ["a", "b"]


def test_every_token_is_decoded_a_bounded_number_of_times(byte_level: Any) -> None:
    decoded = 0

    class Counted:
        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal decoded
            decoded += len(ids)
            return str(byte_level.decode(ids, **options))

    ids = byte_level("naïve 日本 🙂 " * 50)["input_ids"]
    assert "".join(decode_stream(Counted(), ids)) == "naïve 日本 🙂 " * 50
    assert decoded < 16 * len(ids)
