"""The tokenizer door: exact texts of tokens, and clear words for what it refuses."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxplan.config.schema import PlanConfig
from jaxplan.envs.craftax_classic import ACTION_NAMES
from jaxplan.text.tokenizer import SHIPPED, load_tokenizer
from tests.tokenizers import KINDS, llama2_like, llama3_like

shipped = load_tokenizer("shipped")


@given(st.text() | st.text("abc <>/\n12"))
def test_decoding_undoes_encoding(text):
    assert shipped.decode(shipped.encode(text)) == text


@given(st.text(max_size=8))
def test_texts_of_tokens_join_to_the_bytes_of_the_text(text):
    joined = "".join(shipped.text_of(token) for token in shipped.encode(text))
    assert joined.encode("utf-8", "surrogateescape") == text.encode()


def test_special_tokens_are_one_token_each_and_have_no_text():
    for name in ("<pad>", PlanConfig().open, PlanConfig().close, *ACTION_NAMES):
        (token,) = shipped.encode(name)
        assert shipped.text_of(token) == ""
        assert shipped.decode([token]) == name
    assert shipped.encode("<pad>") == [shipped.pad_id] == [0]


def test_action_names_are_found_only_as_words_of_their_own():
    (action,) = shipped.encode("Do")
    assert action in shipped.encode("Do it")
    assert action not in shipped.encode("Don't do Doing")


def test_a_whole_turn_as_text_has_the_ids_of_its_parts():
    turn = ("<plan>", " mine", " 2", " wood", "</plan>", "Move West")
    parts = [token for part in turn for token in shipped.encode(part)]
    assert shipped.encode("".join(turn)) == parts
    assert len(parts) == len(turn)


def test_the_same_file_is_the_same_tokenizer(tmp_path):
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(SHIPPED.read_bytes())
    assert shipped.sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    for name in (str(copy), str(tmp_path)):
        loaded = load_tokenizer(name)
        assert loaded == shipped
        assert hash(loaded) == hash(shipped)
        assert loaded.vocab_size == shipped.vocab_size == 1024


def test_settings_for_batches_in_the_file_do_not_touch_encoding(tmp_path):
    other = tokenizers.Tokenizer.from_file(str(SHIPPED))
    other.enable_truncation(2)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))
    text = " n=tree e=water s=path"
    assert load_tokenizer(str(tmp_path)).encode(text) == shipped.encode(text)


def test_tokens_of_a_metaspace_vocabulary_have_their_text(tmp_path):
    vocab = {"▁tree": 0, "s": 1, "<0xC3>": 2, "<0xA9>": 3, "?": 4}
    words = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    replace = decoders.Replace("▁", " ")
    words.decoder = decoders.Sequence([replace, decoders.ByteFallback()])
    words.add_special_tokens(["<pad>"])
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert [loaded.text_of(token) for token in (0, 1, 5)] == [" tree", "s", ""]
    assert loaded.pad_id == 5
    halves = loaded.text_of(2) + loaded.text_of(3)
    assert halves.encode("utf-8", "surrogateescape").decode() == "é"
    assert not loaded.text_of(2).isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_inside_another_has_no_space_put_before_it(tmp_path, kind):
    tokenizer = KINDS[kind](tmp_path)
    for text in ("Move West", " find wood", "tree\n", "\n\nYou see:", "<plan> é"):
        ids = tokenizer.encode_inside(text)
        joined = "".join(map(tokenizer.text_of, ids))
        assert joined.encode("utf-8", "surrogateescape") == text.encode()
        assert tokenizer.encode_batch([text]) == [ids]
    opening = tokenizer.encode("Move West")
    first = "".join(map(tokenizer.text_of, opening))
    assert first == {"like Llama 3": "Move West", "like Llama 2": " Move West"}[kind]


def test_every_way_to_ask_for_a_first_space_is_known(tmp_path):
    spec = json.loads(SHIPPED.read_text())
    path = tmp_path / "tokenizer.json"
    llama2_like(tmp_path)
    llama2 = json.loads(path.read_text())
    older = llama2 | {
        "pre_tokenizer": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
    }
    oldest = older | {"normalizer": older["normalizer"]["normalizers"][0]}
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    for number, other in enumerate((llama2, older, oldest, spec)):
        path.write_text(json.dumps(other))
        loaded = load_tokenizer(str(path))
        assert loaded.text_of(loaded.encode("Stone")[0])[0] == " ", number
        assert loaded.text_of(loaded.encode_inside("Stone")[0])[0] == "S", number


def test_two_texts_follow_each_other_where_their_ids_do(tmp_path):
    tokenizer = llama3_like(tmp_path)
    pairs = [("\n", "Do"), (" wo", "od"), (" a.", "\n"), (" wood", " is")]
    assert tokenizer.may_follow(pairs) == [True, False, False, True]
    assert tokenizer.may_follow([]) == []
    assert [tokenizer.may_span(*pair) for pair in pairs] == [False, True, True, False]


def test_a_missing_file_is_named_with_what_may_be_given(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "none.json"), "shiped"):
        with pytest.raises(FileNotFoundError, match=r"not exist .* give 'shipped'"):
            load_tokenizer(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##"}])
def test_a_tokenizer_that_cannot_spell_text_exactly_is_refused(tmp_path, decoder):
    spec = json.loads(SHIPPED.read_text())
    if decoder:
        decoder["cleanup"] = True
    spec["decoder"] = decoder
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="only ByteLevel and Metaspace"):
        load_tokenizer(str(path))
