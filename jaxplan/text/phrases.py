"""From words to ids: phrases are tokenized once, texts are put together on the device.

A text is a list of phrase numbers. That works only where *concatenating the ids of
phrases equals tokenizing the concatenated string*; a table is built with that proof, or
not at all.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxplan.text.tokenizer import Tokenizer


@runtime_checkable
class PhraseList(Protocol):
    """A text: the phrases whose mask is True, in order (``Phrases`` of a world)."""

    @property
    def ids(self) -> Int[Array, " N"]:
        """Numbers of phrases."""
        ...

    @property
    def mask(self) -> Bool[Array, " N"]:
        """True where a phrase belongs to the text."""
        ...


@chex.dataclass(frozen=True)
class PhraseTable:
    """The ids of every phrase.

    Attributes:
        tokens: ids, 0 beyond the length of the phrase.
        lengths: number of tokens of the phrase.
    """

    tokens: Int[Array, "P W"]
    lengths: Int[Array, " P"]


def make_phrase_table(tokenizer: Tokenizer, phrases: tuple[str, ...]) -> PhraseTable:
    """Tokenize every phrase, and prove that their ids may be concatenated.

    Many tokenizers join a line break with what is before it. So worlds keep to two
    rules, and what they exclude is not tried: consecutive line breaks are never split
    over two phrases, and a phrase of line breaks alone only opens a text.

    Raises:
        ValueError: tokenizing two phrases together differs from tokenizing each.
    """
    _check_boundaries(tokenizer, phrases)
    ids = tokenizer.encode_batch(phrases)
    lengths = np.array([len(i) for i in ids], np.int32)
    tokens = np.zeros((len(phrases), max(1, lengths.max(initial=0))), np.int32)
    for row, phrase_ids in zip(tokens, ids, strict=True):
        row[: len(phrase_ids)] = phrase_ids
    return PhraseTable(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths))


def pack(
    table: PhraseTable, phrases: PhraseList, capacity: int
) -> tuple[Int[Array, " capacity"], Int[Array, ""], Int[Array, ""]]:
    """Write a text down as ids: a cumulative sum and one scatter.

    A phrase that does not fit is dropped, together with all that follow it.

    Args:
        table: the ids of every phrase.
        phrases: one text.
        capacity: room, in tokens.

    Returns:
        The ids, 0 beyond the end; their number; the number of phrases dropped.
    """
    ids = jnp.where(phrases.mask, phrases.ids, 0)
    lengths = jnp.where(phrases.mask, table.lengths[ids], 0)
    ends = jnp.cumsum(lengths)
    fits = phrases.mask & (ends <= capacity)
    column = jnp.arange(table.tokens.shape[1])
    written = fits[:, None] & (column[None, :] < lengths[:, None])
    places = (ends - lengths)[:, None] + column[None, :]
    tokens = jnp.zeros(capacity, table.tokens.dtype)
    tokens = tokens.at[jnp.where(written, places, capacity)].set(
        table.tokens[ids], mode="drop"
    )
    length = jnp.max(jnp.where(fits, ends, 0), initial=0)
    return tokens, length, jnp.sum(phrases.mask & ~fits)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths (host): row i is ``values[offsets[i]:offsets[i + 1]]``.

    Attributes:
        values: of all rows, one behind the other.
        offsets: one more than rows.
    """

    values: np.ndarray
    offsets: np.ndarray

    def row(self, number: int) -> np.ndarray:
        """One row."""
        return self.values[self.offsets[number] : self.offsets[number + 1]]


def ragged(rows: Iterable[Sequence[int]], dtype: Any) -> Ragged:
    """Put rows one behind the other."""
    listed = list(rows)
    offsets = np.cumsum([0, *map(len, listed)])
    values = [np.asarray(row, dtype) for row in listed]
    return Ragged(np.concatenate([np.zeros(0, dtype), *values]), offsets)


def spell(
    pieces: Ragged, ids: np.ndarray, mask: np.ndarray, capacity: int | None = None
) -> tuple[Ragged, int]:
    """Write many texts down at once (host): ``pack`` without a device, for any pieces.

    Args:
        pieces: what each phrase is made of: its token ids, or its bytes.
        ids: phrases of the texts, [texts, phrases].
        mask: which of them are spoken.
        capacity: room in pieces; a phrase that does not fit is dropped, together with
            all that follow it.

    Returns:
        The texts, and how many of them were cut.
    """
    lengths = np.where(mask, np.diff(pieces.offsets)[ids], 0)
    cut = 0
    if capacity is not None:
        fits = lengths.cumsum(axis=1) <= capacity
        cut = int((mask & ~fits).any(axis=1).sum())
        lengths = np.where(fits, lengths, 0)
    kept = lengths > 0
    counts = lengths[kept]
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    values = pieces.values[np.repeat(pieces.offsets[ids[kept]], counts) + within]
    return Ragged(values, np.append(0, lengths.sum(axis=1).cumsum())), cut


def phrases_text(phrases: tuple[str, ...], ids: np.ndarray, mask: np.ndarray) -> str:
    """Write one text out for people (host)."""
    kept = np.asarray(ids)[np.asarray(mask)]
    return "".join(phrases[phrase] for phrase in kept)


def _check_boundaries(tokenizer: Tokenizer, phrases: tuple[str, ...]) -> None:
    """Tokenize one pair of phrases for every kind of boundary between two of them.

    A boundary is safe where the tokenizer cuts words, or where no token could reach
    across. Whether it cuts depends on the characters around the place, so one phrase
    stands for all that end, or begin, with the same two characters. A phrase of a
    single character shows what is before it: it is tried behind every ending.
    """
    endings = list({phrase[-2:]: phrase for phrase in phrases}.values())
    beginnings = list({phrase[:2]: phrase for phrase in phrases}.values())
    short = [phrase for phrase in phrases if len(phrase) == 1]
    before: list[tuple[str, ...]] = [(end,) for end in endings]
    before += [(end, char) for end in endings for char in short if _may_meet(end, char)]
    alone = {phrase: tokenizer.encode_words(phrase) for phrase in phrases}
    for left, begin in itertools.product(before, beginnings):
        if _may_meet(left[-1], begin):
            _check_joined(tokenizer, alone, (*left, begin))


def _may_meet(left: str, right: str) -> bool:
    """Tell whether a world may put one phrase behind the other."""
    return right.strip("\n") != "" and not (
        left.endswith("\n") and right.startswith("\n")
    )


def _check_joined(
    tokenizer: Tokenizer, alone: dict[str, list[list[int]]], joined: tuple[str, ...]
) -> None:
    expected = [word for phrase in joined for word in alone[phrase]]
    made = tokenizer.encode_words("".join(joined))
    apart = not any(itertools.starmap(tokenizer.may_span, itertools.pairwise(joined)))
    flat = itertools.chain.from_iterable
    if made != expected and not (apart and [*flat(made)] == [*flat(expected)]):
        raise ValueError(
            f"phrases {list(joined)} cannot be put together: one by one this tokenizer "
            f"cuts them into {[tokenizer.decode(word) for word in expected]}, together "
            f"into {[tokenizer.decode(word) for word in made]}; let phrases begin with "
            "a space or a line break, or use another tokenizer"
        )
