"""Packing against a Python loop, and the proof that phrases may be concatenated."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxplan.envs.base import Phrases
from jaxplan.envs.craftax_classic import TEXTS
from jaxplan.envs.craftax_plans import PLAN_PHRASES, STYLE_PHRASES
from jaxplan.text.phrases import (
    PhraseTable,
    make_phrase_table,
    pack,
    phrases_text,
    ragged,
    spell,
)
from jaxplan.text.tokenizer import load_tokenizer
from tests.tokenizers import KINDS, llama2_like

WORLDS = {
    "compact": TEXTS["compact"].phrases,
    "balrog": TEXTS["balrog"].phrases,  # the precise level has the same
    "plan": PLAN_PHRASES,
    "styles": STYLE_PHRASES,
}
SLOTS, CAPACITY = 5, 7
packed = jax.jit(pack, static_argnames="capacity")


@pytest.fixture(scope="session", params=["shipped", *KINDS])
def tokenizer(request, tmp_path_factory):
    """The shipped tokenizer; small ones of the kinds that Llamas come with."""
    if request.param == "shipped":
        return load_tokenizer("shipped")
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def test_phrases_of_the_shipped_compact_text_and_plans_are_one_token_each():
    tokenizer = load_tokenizer("shipped")
    for world in ("compact", "plan"):
        table = make_phrase_table(tokenizer, WORLDS[world])
        assert (table.lengths == 1).all()
        assert np.unique(table.tokens).size == len(WORLDS[world])


@pytest.mark.parametrize("world", WORLDS)
def test_ids_of_phrases_concatenate_to_the_ids_of_the_text(tokenizer, world):
    phrases = WORLDS[world]
    table = jax.device_get(make_phrase_table(tokenizer, phrases))
    opens_only = {phrase for phrase in phrases if not phrase.strip("\n")}
    closes_only = {phrase for phrase in phrases if phrase.endswith("\n")} - opens_only
    inner = sorted(set(phrases) - opens_only - closes_only)
    chance = random.Random(0)
    opening = tokenizer.encode("You see")
    for _ in range(100):
        text = [
            *(chance.sample(sorted(opens_only), 1) if opens_only else []),
            *chance.choices(inner, k=12),
            *(chance.sample(sorted(closes_only), 1) if closes_only else []),
        ]
        numbers = np.array([phrases.index(phrase) for phrase in text])
        ids = [
            token
            for number in numbers
            for token in table.tokens[number, : table.lengths[number]].tolist()
        ]
        whole = phrases_text(phrases, numbers, np.ones(len(text), bool))
        assert whole == "".join(text)
        assert tokenizer.encode(f"You see{whole}") == [*opening, *ids]
        assert "".join(map(tokenizer.text_of, ids)) == whole


@pytest.mark.slow
def test_every_two_shipped_phrases_concatenate():
    tokenizer = load_tokenizer("shipped")
    for phrases in WORLDS.values():
        ids = {phrase: tokenizer.encode(phrase) for phrase in phrases}
        for left in phrases:
            made = tokenizer.backend.encode_batch([left + right for right in phrases])
            for right, encoding in zip(phrases, made, strict=True):
                assert encoding.ids == ids[left] + ids[right]


@pytest.mark.parametrize(
    "phrases", [(" wood", "en"), (" a", " b", "1"), (" wo", " wood", "od")]
)
def test_phrases_without_a_cut_between_them_are_refused_by_name(phrases):
    with pytest.raises(ValueError, match="cannot be put together") as error:
        make_phrase_table(load_tokenizer("shipped"), phrases)
    assert repr(phrases[-1]) in str(error.value)


def test_words_that_share_a_token_are_refused_where_nothing_cuts_words(tmp_path):
    with pytest.raises(ValueError, match=r"\['wo', '(wo|od)'\] cannot be put toge"):
        make_phrase_table(llama2_like(tmp_path), ("wo", "od"))


def test_a_phrase_of_one_character_is_tried_between_two_others(tmp_path):
    bpe = tokenizers.Tokenizer(
        models.WordLevel({"?": 0, "a": 1, "-": 2, "b": 3, "a-b": 4}, unk_token="?")
    )
    split = tokenizers.Regex("a-b|.")
    bpe.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    make_phrase_table(tokenizer, ("a", "-"))
    with pytest.raises(ValueError, match=r"phrases \['a', '-', 'b'\] cannot"):
        make_phrase_table(tokenizer, ("a", "-", "b"))


def pack_slowly(table, ids, mask, capacity):
    """Write phrase after phrase until one does not fit."""
    written, dropped = [], 0
    for number in (i for i, spoken in zip(ids, mask, strict=True) if spoken):
        phrase = table.tokens[number, : table.lengths[number]].tolist()
        if dropped or len(written) + len(phrase) > capacity:
            dropped += 1
        else:
            written += phrase
    return written + [0] * (capacity - len(written)), len(written), dropped


TABLE = PhraseTable(
    tokens=jnp.array([[5, 0, 0], [6, 7, 0], [1, 2, 3], [9, 0, 0]]),
    lengths=jnp.array([1, 2, 3, 1]),
)


@given(
    ids=st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS),
    mask=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
)
def test_packing_writes_the_spoken_phrases_that_fit(ids, mask):
    text = Phrases(ids=jnp.array(ids), mask=jnp.array(mask))
    tokens, length, dropped = packed(TABLE, text, capacity=CAPACITY)
    expected = pack_slowly(TABLE, ids, mask, CAPACITY)
    assert (tokens.tolist(), length, dropped) == expected


@given(
    texts=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS),
            st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_spelling_many_texts_at_once_is_packing_each(texts):
    lengths = np.asarray(TABLE.lengths)
    rows = [row[:n] for row, n in zip(TABLE.tokens.tolist(), lengths, strict=True)]
    ids, mask = (np.array(column) for column in zip(*texts, strict=True))
    for capacity in (CAPACITY, None):
        spelt, cut = spell(ragged(rows, np.int32), ids, mask, capacity)
        slow = [pack_slowly(TABLE, *text, capacity or 99) for text in texts]
        assert cut == sum(dropped > 0 for *_, dropped in slow)
        assert len(spelt.offsets) == len(texts) + 1
        for number, (tokens, length, _) in enumerate(slow):
            assert spelt.row(number).tolist() == tokens[:length]


def test_a_phrase_that_is_not_spoken_may_have_any_number():
    text = Phrases(ids=jnp.array([-1, 1, 99]), mask=jnp.array([False, True, False]))
    tokens, length, dropped = pack(TABLE, text, 3)
    assert (tokens.tolist(), length, dropped) == ([6, 7, 0], 2, 0)


def test_nothing_spoken_is_an_empty_text():
    text = Phrases(ids=jnp.zeros(2, jnp.int32), mask=jnp.zeros(2, bool))
    tokens, length, dropped = pack(TABLE, text, 3)
    assert (tokens.tolist(), length, dropped) == ([0, 0, 0], 0, 0)


def test_lanes_pack_together_as_they_do_alone():
    lanes = [
        Phrases(ids=jnp.array(ids), mask=jnp.array(mask))
        for ids, mask in [
            ([0, 1, 2], [True, True, True]),
            ([2, 2, 2], [True, False, True]),
        ]
    ]
    together = jax.vmap(pack, in_axes=(None, 0, None))(
        TABLE, jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes), 5
    )
    for number, lane in enumerate(lanes):
        alone = pack(TABLE, lane, 5)
        for one, all_of_them in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, all_of_them[number])
