"""Streaming text: whole characters, no stop string shown, and the same text for every cut of the stream."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepspan.serving.text import OutputText, StreamDecoder
from tests.serving.tiny_tokenizer import build

TOKENIZER = build()


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def test_half_a_character_is_never_shown():
    decoder = StreamDecoder(decode)
    ids = TOKENIZER.encode("a😀é", add_special_tokens=False).ids
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) == "a😀é"
    assert "\ufffd" not in "".join(pieces)
    assert len(ids) > len([piece for piece in pieces if piece])


def test_an_unfinished_character_at_the_end_is_flushed_as_a_replacement():
    decoder = StreamDecoder(decode)
    ids = TOKENIZER.encode("b😀", add_special_tokens=False).ids[:-1]
    assert "".join(decoder.push(token_id) for token_id in ids) == "b"
    assert decoder.flush() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30))
def test_pieces_join_to_the_decoding_of_all_tokens(ids):
    decoder = StreamDecoder(decode)
    assert "".join(decoder.push(token_id) for token_id in ids) + decoder.flush() == decode(ids)


def cut_at_first_complete_stop(pieces: list[str], stops: list[str]) -> str:
    """The definition: text grows piece by piece, and ends before the first stop string that is complete in it."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [at for at in map(text.find, stops) if at >= 0]:
            return text[: min(found)]
    return text


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab。", max_size=12), stops=st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3))
@example(text="a。a", stops=["。", "a。a"])
def test_stop_strings_cut_the_text_and_never_show(text, stops):
    output, decoder = OutputText(decode, stops), StreamDecoder(decode)
    shown, pieces = "", []
    for token_id in TOKENIZER.encode(text, add_special_tokens=False).ids:
        pieces.append(decoder.push(token_id))
        shown += output.push(token_id)
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        if output.stopped:
            break
    shown += output.flush()
    assert shown == cut_at_first_complete_stop([*pieces, decoder.flush()], stops)


@pytest.mark.parametrize("stops", [[], [""]])
def test_no_stop_strings(stops):
    output = OutputText(decode, stops)
    ids = TOKENIZER.encode("hello world", add_special_tokens=False).ids
    assert "".join(output.push(token_id) for token_id in ids) == "hello world"
