r"""Text level ``compact``: every phrase a single token of the shipped tokenizer.

One observation, line breaks added::

    \n n>tree e=grass s=grass w=water          (">" marks the faced tile)
    health=9 food=8 drink=7 energy=9 light=8   (light in tenths)
    wood=2 wood_pickaxe=1
    water 1w tree 1n cow 3n2e                  (nearest of each kind)
    >                                          (the player's turn)

A phrase is a line break, or a space and a run of non-space characters: what the shipped
tokenizer keeps together.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxplan.envs.base import Phrases
from jaxplan.envs.craftax_view import (
    CENTRE,
    FACING_NAMES,
    FACING_OFFSETS,
    ITEM_NAMES,
    TILE,
    TILE_NAMES,
    VITAL_NAMES,
    PlayerView,
)
from jaxplan.envs.craftax_words import (
    OFFSETS,
    Describer,
    PhraseBook,
    around,
    keep_nearest,
    nearest,
    offset_word,
)

MAX_PHRASES = 40  # an observation is never longer: the farthest kinds are left out

_NEIGHBOURS = ("north", "east", "south", "west")
_FACINGS = np.array([FACING_NAMES.index(name) for name in _NEIGHBOURS])
_PLAIN = ("grass", "sand", "path")  # neither goal nor danger
_NEVER_SEEN = ("invalid", "out of bounds", "wood")  # wood is an item, never a block
_KINDS = tuple(n for n in TILE_NAMES if n not in _PLAIN and n not in _NEVER_SEEN)
_CODES = tuple(TILE[name] for name in _KINDS)


def _word(name: str) -> str:
    return {"out of bounds": "edge"}.get(name, name.replace(" ", "_"))


_BOOK = PhraseBook()
_BEGIN = _BOOK.add("\n")
_NEIGHBOUR = _BOOK.add(
    [
        [[f" {side[0]}{mark}{_word(name)}" for name in TILE_NAMES] for mark in "=>"]
        for side in _NEIGHBOURS
    ]
)
_VITAL = _BOOK.add([[f" {name}={n}" for n in range(10)] for name in VITAL_NAMES])
_LIGHT = _BOOK.add([f" light={tenths}" for tenths in range(11)])
_ASLEEP = _BOOK.add(" asleep")
_ITEM = _BOOK.add([[f" {name}={n}" for n in range(1, 10)] for name in ITEM_NAMES])
_KIND = _BOOK.add([f" {_word(name)}" for name in _KINDS])
_OFFSET = _BOOK.add([offset_word(*offset) for offset in OFFSETS])
_END = _BOOK.add(" >")


def describe_compact(seen: PlayerView) -> Phrases:
    """Say what the player sees in at most `MAX_PHRASES` phrases."""
    tenths = jnp.round(10 * seen.light).astype(jnp.int32)
    begin = [
        _BEGIN[None],
        _neighbours(seen),
        jnp.asarray(_VITAL)[jnp.arange(4), seen.vitals],
        jnp.asarray(_LIGHT)[tenths][None],
        _ASLEEP[None],
        jnp.asarray(_ITEM)[jnp.arange(12), jnp.maximum(seen.inventory, 1) - 1],
    ]
    always = np.ones(1 + 4 + 4 + 1, bool)  # begin, neighbours, vitals, light
    spoken = jnp.concatenate([always, seen.sleeping[None], seen.inventory > 0])
    index, visible = nearest(around(seen.tiles), _CODES)
    room = (MAX_PHRASES - spoken.sum() - 1) // 2  # a kind is two phrases, the end one
    kinds = jnp.stack([jnp.asarray(_KIND), jnp.asarray(_OFFSET)[index]], axis=1)
    kept = keep_nearest(index, visible, room)
    return Phrases(
        ids=jnp.concatenate([*begin, kinds.reshape(-1), _END[None]]),
        mask=jnp.concatenate([spoken, jnp.repeat(kept, 2), np.ones(1, bool)]),
    )


def _neighbours(seen: PlayerView) -> Int[Array, "4"]:
    cells = np.array(FACING_OFFSETS)[_FACINGS] + np.array([CENTRE])
    tiles = seen.tiles[cells[:, 0], cells[:, 1]]
    faced = (seen.facing == _FACINGS).astype(jnp.int32)
    return jnp.asarray(_NEIGHBOUR)[jnp.arange(4), faced, tiles]


COMPACT = Describer(
    phrases=_BOOK.phrases,
    max_phrases=MAX_PHRASES,
    instructions=" collect place make eat drink fight sleep",  # what is rewarded
    describe=describe_compact,
)
