"""Text that streams: whole characters only, and never a part of a stop word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from specserve.text import TextStream, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_engines: Path) -> Tokenizer:
    return load_tokenizer(demo_engines / "target")


def stream(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop_words: Sequence[str] = (), size: int = 1
) -> tuple[list[str], TextStream]:
    """Push tokens, `size` at a time, and finish; return every piece."""
    text = TextStream(tokenizer, stop_words)
    pieces = [text.push(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
    return [*pieces, text.finish()], text


TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café — “quoted” … ½",
    "你好\uff0c世界。日本語のテキスト 한국어",
    "😀👩‍👩‍👧‍👦 🏳️‍🌈 mixed 🎉 with text 👍🏽",
    "a\u0301 combining, \u200bzero width, tab\t and \r\n ends",
    " leading and trailing ",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_join_to_the_text_and_break_no_character(
    tokenizer: Tokenizer, text: str, size: int
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces, _ = stream(tokenizer, token_ids, size=size)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["😀", "界", "é"])
def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer, text: str) -> None:
    token_ids = [tokenizer.token_to_id(piece) for piece in _bytes_of(tokenizer, text)]
    pieces, _ = stream(tokenizer, token_ids)
    assert pieces == [""] * (len(token_ids) - 1) + [text, ""]


@pytest.mark.parametrize("num_missing", [1, 2, 3])
def test_a_character_that_never_completes_is_dropped(
    tokenizer: Tokenizer, num_missing: int
) -> None:
    token_ids = [tokenizer.token_to_id(piece) for piece in _bytes_of(tokenizer, "ab😀")]
    pieces, _ = stream(tokenizer, token_ids[:-num_missing])
    assert "".join(pieces) == "ab"


def test_whole_characters_of_a_token_that_ends_inside_one_are_given_out(
    tokenizer: Tokenizer,
) -> None:
    """A token may hold whole characters and the beginning of one; only the latter is dropped."""
    for token_id in range(tokenizer.get_vocab_size()):
        decoded = tokenizer.decode([token_id])
        whole = decoded.rstrip("\ufffd")
        if whole and whole != decoded and "\ufffd" not in whole:
            pieces, _ = stream(tokenizer, [token_id])
            assert "".join(pieces) == whole
            return
    pytest.skip("this tokenizer has no such token")


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    ids = tokenizer.encode("x = 1", add_special_tokens=False).ids
    pieces, text = stream(tokenizer, [*ids, end])
    assert "".join(pieces) == "x = 1"
    assert text.num_tokens == len(ids) + 1


def test_an_ordinary_token_is_no_text_where_it_ends_the_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x = 1", add_special_tokens=False).ids
    text = TextStream(tokenizer, end_id=ids[-1])
    assert text.push(ids) + text.finish() == "x = 1".removesuffix(tokenizer.decode(ids[-1:]))
    assert text.num_tokens == len(ids)


@given(data=st.data())
def test_any_tokens_stream_to_what_they_decode_to(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    # Bytes are a third of the tokens, so that most sequences hold broken and whole characters.
    any_token = st.one_of(st.integers(0, 4095), st.integers(2, 257), st.integers(120, 257))
    token_ids = data.draw(st.lists(any_token, max_size=20))
    pieces, _ = stream(tokenizer, token_ids)
    text, whole = "".join(pieces), tokenizer.decode(token_ids)
    assert whole.startswith(text)
    assert whole[len(text) :].strip("\ufffd ") == "", "more than a broken character was dropped"


# -- stop words --------------------------------------------------------------------------------


def characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode so that every character of an ASCII text is a token of its own."""
    return [tokenizer.token_to_id(piece) for piece in _bytes_of(tokenizer, text)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("word", ["STOP", "P", "abcST", "OPd"])
def test_stop_word_across_token_and_push_borders_ends_the_text(
    tokenizer: Tokenizer, word: str, size: int
) -> None:
    token_ids = characters(tokenizer, "abcSTOPdef")
    pieces, text = stream(tokenizer, token_ids, [word], size)
    assert "".join(pieces) == "abcSTOPdef".partition(word)[0]
    assert text.is_stopped
    assert text.num_tokens == "abcSTOPdef".index(word) + len(word)


def test_stop_word_inside_one_token_ends_the_text(tokenizer: Tokenizer) -> None:
    token_id = tokenizer.token_to_id("return")
    assert token_id is not None
    pieces, text = stream(tokenizer, [token_id, *characters(tokenizer, "xyz")], ["tur"])
    assert "".join(pieces) == "re"
    assert text.num_tokens == 1


def test_text_that_may_become_a_stop_word_is_held_back_and_then_given_out(
    tokenizer: Tokenizer,
) -> None:
    pieces, text = stream(tokenizer, characters(tokenizer, "aSTxSTO"), ["STOP"])
    assert pieces == ["a", "", "", "STx", "", "", "", "STO"]
    assert not text.is_stopped


def test_only_the_longest_possible_beginning_is_held_back(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, characters(tokenizer, "aabab!"), ["abac"])
    assert pieces == ["", "a", "", "", "ab", "ab!", ""]


def test_the_first_of_several_stop_words_wins(tokenizer: Tokenizer) -> None:
    token_ids = characters(tokenizer, "one two three")
    for words in (["three", "two"], ["two", "three"], ["wo t", "two", "zero"]):
        pieces, _ = stream(tokenizer, token_ids, words)
        assert "".join(pieces) == "one "


def test_of_overlapping_stop_words_in_one_piece_the_earliest_wins(tokenizer: Tokenizer) -> None:
    token_id = tokenizer.token_to_id("return")
    pieces, _ = stream(tokenizer, [token_id], ["urn", "etu", "n"])
    assert "".join(pieces) == "r"


def test_nothing_comes_after_a_stop_word(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer, ["b"])
    assert text.push(characters(tokenizer, "abc")) == "a"
    assert text.push(characters(tokenizer, "def")) == ""
    assert text.finish() == ""
    assert text.num_tokens == 2


def test_empty_stop_words_stop_nothing(tokenizer: Tokenizer) -> None:
    pieces, text = stream(tokenizer, characters(tokenizer, "abc"), ["", ""])
    assert "".join(pieces) == "abc"
    assert not text.is_stopped


def test_stop_word_of_many_bytes_is_seen(tokenizer: Tokenizer) -> None:
    token_ids = [tokenizer.token_to_id(piece) for piece in _bytes_of(tokenizer, "a界面b😀c")]
    pieces, _ = stream(tokenizer, token_ids, ["面b😀"])
    assert "".join(pieces) == "a界"


@given(
    text=st.text("ab", max_size=14),
    words=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_text_ends_before_the_first_stop_word_to_complete(
    tokenizer: Tokenizer, text: str, words: list[str], size: int
) -> None:
    pieces, streamed = stream(tokenizer, characters(tokenizer, text), words, size)
    ends = [text.index(word) + len(word) for word in words if word in text]
    if not ends:
        assert "".join(pieces) == text
        assert not streamed.is_stopped
        return
    complete = text[: min(ends)]  # what is known when the first stop word is complete
    begin = min(complete.index(word) for word in words if word in complete)
    assert "".join(pieces) == text[:begin]
    assert streamed.num_tokens == min(ends)


def test_a_folder_without_tokenizer_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json: build the engine again"):
        load_tokenizer(tmp_path)


def _bytes_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the byte-level BPE token of each UTF-8 byte of a text."""
    pieces: list[str] = []
    for character in text:
        (encoded,) = tokenizer.pre_tokenizer.pre_tokenize_str(character)
        pieces += encoded[0]
    return pieces
