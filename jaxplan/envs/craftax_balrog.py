r"""Text levels ``balrog`` and ``balrog_precise``: BALROG's words for Crafter.

Source: balrog-ai/BALROG af7d1f1, ``environments/crafter`` (MIT). ``balrog`` is its
default, the nearest tile of each kind ("tree 3 steps to your north-west");
``balrog_precise`` names every tile but grass, sand and path, water and lava only at
their edges ("3 steps north and 2 steps west").

Phrases begin with a line break or a space after a letter or digit, where tokenizers cut
anyway. A full stop and a line break may be one token, so no phrase but the last ends in
a full stop.

Paper: status and inventory stay in every observation, BALROG shows them in the current
one only; all observations are headed "Current Observation:", as they were when written.
Paper: near the west and north border BALROG sees nothing at all; here only what lies
beyond the map is left out.
Paper: the farthest lines are left out beyond a fixed number (12 and 54, the most that
was seen in play; at most 17 and 62 are possible).
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8

from jaxplan.envs.base import Phrases
from jaxplan.envs.craftax_view import (
    CENTRE,
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
)

INSTRUCTIONS = """\
You are an agent playing Crafter. The following are the only valid actions you can \
take in the game, followed by a short description of each action:

Noop: do nothing,
Move West: move west on flat ground,
Move East: move east on flat ground,
Move North: move north on flat ground,
Move South: move south on flat ground,
Do: Multiuse action to collect material, drink from lake and hit creature in front,
Sleep: sleep when energy level is below maximum,
Place Stone: place a stone in front,
Place Table: place a table,
Place Furnace: place a furnace,
Place Plant: place a plant,
Make Wood Pickaxe: craft a wood pickaxe with a nearby table and wood in inventory,
Make Stone Pickaxe: craft a stone pickaxe with a nearby table, wood, and stone in \
inventory,
Make Iron Pickaxe: craft an iron pickaxe with a nearby table and furnace, wood, coal, \
and iron in inventory,
Make Wood Sword: craft a wood sword with a nearby table and wood in inventory,
Make Stone Sword: craft a stone sword with a nearby table, wood, and stone in inventory,
Make Iron Sword: craft an iron sword with a nearby table and furnace, wood, coal, and \
iron in inventory.

These are the game achievements you can get:
1. Collect Wood
2. Place Table
3. Eat Cow
4. Collect Sapling
5. Collect Drink
6. Make Wood Pickaxe
7. Make Wood Sword
8. Place Plant
9. Defeat Zombie
10. Collect Stone
11. Place Stone
12. Eat Plant
13. Defeat Skeleton
14. Make Stone Pickaxe
15. Make Stone Sword
16. Wake Up
17. Place Furnace
18. Collect Coal
19. Collect Iron
20. Make Iron Pickaxe
21. Make Iron Sword
22. Collect Diamond

In a moment I will present a history of actions and observations from the game.
Your goal is to get as far as possible by completing all the achievements.

PLAY!"""

NEAREST_LINES = 12
PRECISE_LINES = 54

_NAMES = ["plant" if name == "ripe plant" else name for name in TILE_NAMES]
_NEVER_NAMED = ("invalid", "out of bounds", "wood", "ripe plant")
_KINDS = tuple(TILE[name] for name in TILE_NAMES if name not in _NEVER_NAMED)
_BEYOND = TILE["out of bounds"]
_PLAIN = (TILE["grass"], TILE["sand"], TILE["path"])
_EDGE_ONLY = (TILE["water"], TILE["lava"])
_NOTHING = len(TILE_NAMES)  # one past the last tile: what is faced has no name
# Crafter lists the sapling first.
_ITEM_ORDER = np.array([5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])

# The sentence before the map is finished by the phrase that opens the map.
_AFTER_ITEMS, _AFTER_EMPTY, _AFTER_ASLEEP, _AFTER_DEATH = range(4)
_OPENINGS = ("\n", " inventory.\n", " full.\n\n\n\n", " died.\n\n\n\n")


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _directions(row: int, column: int) -> list[tuple[int, str]]:
    north_south = (abs(row), "north" if row < 0 else "south")
    west_east = (abs(column), "west" if column < 0 else "east")
    return [part for part in (north_south, west_east) if part[0]]


def _location(row: int, column: int) -> str:
    compass = "-".join(word for _, word in _directions(row, column))
    return f" {_steps(abs(row) + abs(column))} to your {compass}"


def _precise_location(row: int, column: int) -> str:
    parts = [f"{_steps(count)} {word}" for count, word in _directions(row, column)]
    return f" {' and '.join(parts)}"


_BOOK = PhraseBook()
_BEGIN = "\n\nCurrent Observation:\nYour status:"
_VITAL = _BOOK.add(
    [
        [f"{_BEGIN if name == 'health' else ''}\n- {name}: {n}/9" for n in range(10)]
        for name in VITAL_NAMES
    ]
)
_ITEM = _BOOK.add(
    [
        [
            [f"{header}\n- {ITEM_NAMES[item]}: {n}" for n in range(1, 10)]
            for item in _ITEM_ORDER
        ]
        for header in ("", "\n\nYour inventory:")
    ]
)
_NO_ITEMS = _BOOK.add("\n\nYou have nothing in your")
_ASLEEP = _BOOK.add(
    [
        f"{opening}You are sleeping, and will not be able take actions until energy is"
        for opening in _OPENINGS[:2]
    ]
)
_DIED = _BOOK.add([f"{opening}You" for opening in _OPENINGS[:2]])
_FIRST_KIND = _BOOK.add(
    [[f"{opening}You see:\n- {name}" for name in _NAMES] for opening in _OPENINGS]
)
_KIND = _BOOK.add([f"\n- {name}" for name in _NAMES])
_LOCATION = _BOOK.add([_location(*offset) for offset in OFFSETS])
_PRECISE_LOCATION = _BOOK.add([_precise_location(*offset) for offset in OFFSETS])
_FACING = _BOOK.add(
    [f"\n\nYou face {name} at your front.\n" for name in [*_NAMES, "nothing"]]
)
# Where nothing is seen nothing is faced: one phrase, for the full stop inside.
_SEE_NOTHING = _BOOK.add(
    [
        f"{opening}You see nothing away from you.\n\nYou face nothing at your front.\n"
        for opening in _OPENINGS
    ]
)


def _describe(
    seen: PlayerView,
    list_tiles: Callable[[Int8[Array, "7 9"]], tuple[Array, Array, Array]],
    unnamed: tuple[int, ...],
) -> Phrases:
    """Speak status, inventory, the listed tiles and the faced one.

    Args:
        seen: what the player sees.
        list_tiles: gives tile code, location phrase and mask of every possible line.
        unnamed: kinds of tiles that are nothing when faced.
    """
    owned, opening = _inventory(seen)
    status, opening = _status(seen, opening)
    kinds, locations, shown = list_tiles(seen.tiles)
    first = shown & (jnp.cumsum(shown) == 1)
    kind_ids = jnp.where(
        first, jnp.asarray(_FIRST_KIND)[opening, kinds], jnp.asarray(_KIND)[kinds]
    )
    lines = jnp.stack([kind_ids, locations], axis=1).reshape(-1)
    faced = jnp.asarray(_FACING)[_faced_tile(seen, unnamed)]
    end = jnp.where(shown.any(), faced, jnp.asarray(_SEE_NOTHING)[opening])
    vitals = jnp.asarray(_VITAL)[jnp.arange(4), seen.vitals]
    return Phrases(
        ids=jnp.concatenate([vitals, owned.ids, status.ids, lines, end[None]]),
        mask=jnp.concatenate(
            [
                np.ones(4, bool),
                owned.mask,
                status.mask,
                jnp.repeat(shown, 2),
                np.ones(1, bool),
            ]
        ),
    )


def _inventory(seen: PlayerView) -> tuple[Phrases, Int[Array, ""]]:
    """Speak the inventory; also return how the next phrase must open."""
    counts = seen.inventory[_ITEM_ORDER]
    has = counts > 0
    first = (has & (jnp.cumsum(has) == 1)).astype(jnp.int32)
    entries = jnp.asarray(_ITEM)[first, jnp.arange(12), jnp.maximum(counts, 1) - 1]
    empty = ~has.any()
    phrases = Phrases(ids=jnp.append(entries, _NO_ITEMS), mask=jnp.append(has, empty))
    return phrases, jnp.where(empty, _AFTER_EMPTY, _AFTER_ITEMS)


def _status(
    seen: PlayerView, opening: Int[Array, ""]
) -> tuple[Phrases, Int[Array, ""]]:
    """Speak of sleep or death; also return how the next phrase must open."""
    dead = seen.vitals[VITAL_NAMES.index("health")] <= 0
    sentence = jnp.where(
        seen.sleeping, jnp.asarray(_ASLEEP)[opening], jnp.asarray(_DIED)[opening]
    )
    opening = jnp.where(dead, _AFTER_DEATH, opening)
    opening = jnp.where(seen.sleeping, _AFTER_ASLEEP, opening)
    return Phrases(ids=sentence[None], mask=(seen.sleeping | dead)[None]), opening


def _faced_tile(seen: PlayerView, unnamed: tuple[int, ...]) -> Int[Array, ""]:
    cell = jnp.asarray(FACING_OFFSETS)[seen.facing] + np.array(CENTRE)
    tile = seen.tiles[cell[0], cell[1]].astype(jnp.int32)
    return jnp.where((tile == np.array(unnamed)).any(), _NOTHING, tile)


def _nearest_of_each(
    tiles: Int8[Array, "7 9"],
) -> tuple[Int[Array, " K"], Int[Array, " K"], Bool[Array, " K"]]:
    """List the nearest tile of each kind, in the order the kinds are first found."""
    cells = around(_as_named(tiles))
    kinds = np.array(_KINDS)
    found_at = jnp.argmax(cells[None, :] == kinds[:, None], axis=1)
    index, shown = nearest(cells, _KINDS)
    order = jnp.argsort(jnp.where(shown, found_at, len(OFFSETS)))
    index, shown = index[order], shown[order]
    kept = keep_nearest(index, shown, NEAREST_LINES)
    return jnp.asarray(kinds)[order], jnp.asarray(_LOCATION)[index], kept


def _every_tile(
    tiles: Int8[Array, "7 9"],
) -> tuple[Int[Array, "62"], Int[Array, "62"], Bool[Array, "62"]]:
    """List every tile that is not plain; of water and lava the edges only."""
    tiles = _as_named(tiles)
    cells, edges = around(tiles), around(_edges(tiles))
    named = ~_is_one_of(cells, (*_PLAIN, _BEYOND))
    shown = named & (~_is_one_of(cells, _EDGE_ONLY) | edges)
    kept = keep_nearest(jnp.arange(len(OFFSETS)), shown, PRECISE_LINES)
    return cells.astype(jnp.int32), jnp.asarray(_PRECISE_LOCATION), kept


def _is_one_of(cells: Int8[Array, "62"], kinds: tuple[int, ...]) -> Bool[Array, "62"]:
    return (cells[None, :] == np.array(kinds, np.int8)[:, None]).any(0)


def _as_named(tiles: Int8[Array, "7 9"]) -> Int8[Array, "7 9"]:
    """Make tiles of one name one kind: a ripe plant is a plant."""
    return jnp.where(tiles == TILE["ripe plant"], np.int8(TILE["plant"]), tiles)


def _edges(tiles: Int8[Array, "7 9"]) -> Bool[Array, "7 9"]:
    """Tell which tiles touch another kind (or the player) side by side in the view."""
    tiles = tiles.at[CENTRE].set(-1)

    def differ(a: Array, b: Array) -> Array:
        return (a != b) & (a != _BEYOND) & (b != _BEYOND)

    rows = differ(tiles[1:], tiles[:-1])
    columns = differ(tiles[:, 1:], tiles[:, :-1])
    return (
        jnp.pad(rows, ((1, 0), (0, 0)))
        | jnp.pad(rows, ((0, 1), (0, 0)))
        | jnp.pad(columns, ((0, 0), (1, 0)))
        | jnp.pad(columns, ((0, 0), (0, 1)))
    )


_OTHER_PHRASES = 4 + 12 + 1 + 1  # vitals, items, sleep or death, faced tile

BALROG = Describer(
    phrases=_BOOK.phrases,
    max_phrases=_OTHER_PHRASES + 2 * NEAREST_LINES,
    instructions=INSTRUCTIONS,
    describe=partial(_describe, list_tiles=_nearest_of_each, unnamed=(_BEYOND,)),
)
BALROG_PRECISE = Describer(
    phrases=_BOOK.phrases,
    max_phrases=_OTHER_PHRASES + 2 * PRECISE_LINES,
    instructions=INSTRUCTIONS,
    describe=partial(_describe, list_tiles=_every_tile, unnamed=(*_PLAIN, _BEYOND)),
)
