"""What the scripted Craftax player remembers of the map, and how it finds its way.

One idea: a single cost-to-go field answers "the nearest known target, or else where to
explore". Unknown cells are targets too, only dearer ones. The field also carries, in
its low bits, *which* target it leads to, so the plan can name what the feet go for.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8

from jaxplan.envs.craftax_view import (
    CENTRE,
    FACING_OFFSETS,
    TILE,
    TILE_NAMES,
    PlayerView,
)

MAP_SIZE = 64
# A margin as wide as the view reaches: the view never hangs over the edge.
ROWS, COLUMNS = MAP_SIZE + 2 * CENTRE[0], MAP_SIZE + 2 * CENTRE[1]
UNKNOWN = TILE["invalid"]
STEPS = np.array([row * COLUMNS + column for row, column in FACING_OFFSETS])

CLOSED = 10_000  # cost of entering a cell that cannot be entered
UNREACHABLE = 2 * CLOSED
MAX_SWEEPS = 160
SWEEPS_PER_CHECK = 4
_TARGET_BITS = 13  # 2**13 > ROWS * COLUMNS

KnownMap = Int8[Array, "70 72"]
Mask = Bool[Array, "70 72"]


def tiles_named(*names: str) -> np.ndarray:
    """A table over tile codes: whether the tile carries one of the names."""
    return np.isin(TILE_NAMES, names)


WALKED = ("grass", "sand", "path")
IS_WALKED = tiles_named(*WALKED)
# Stops whatever walks or, water apart, flies; arrows cross lava, so it is not here.
_IS_WALL = tiles_named(
    *("water", "stone", "tree", "coal", "iron", "diamond", "table", "furnace"),
    *("plant", "ripe plant", "out of bounds"),
)
_IS_ROOM = tiles_named(*WALKED, "stone", "coal", "tree")


def look_up(table: np.ndarray, index: Int[Array, "..."]) -> Array:
    """Rows of a constant table."""
    return jnp.asarray(table)[index]


def blank_map() -> KnownMap:
    """Nothing seen yet; the size of the world and the rim around it are known."""
    inside = jnp.full((MAP_SIZE, MAP_SIZE), UNKNOWN, jnp.int8)
    rim = ((CENTRE[0], CENTRE[0]), (CENTRE[1], CENTRE[1]))
    return jnp.pad(inside, rim, constant_values=TILE["out of bounds"])


def cell_number(position: Int[Array, "2"]) -> Int[Array, ""]:
    """Number of a map position in the flattened known map."""
    return (position[0] + CENTRE[0]) * COLUMNS + position[1] + CENTRE[1]


def offset_to(cell: Int[Array, ""], position: Int[Array, "2"]) -> Int[Array, "2"]:
    """Rows south and columns east from a map position to a numbered cell."""
    row, column = cell // COLUMNS - CENTRE[0], cell % COLUMNS - CENTRE[1]
    return jnp.stack([row, column]) - position


def ahead(
    scene: KnownMap, position: Int[Array, "2"], steps: int = 1
) -> Int8[Array, "5"]:
    """The tiles that many steps away, by facing; the first is the player's own."""
    return scene.reshape(-1)[cell_number(position) + steps * STEPS]


def remember(known: KnownMap, view: PlayerView) -> KnownMap:
    """Write the view into the map; under a mob the older memory stays.

    A cell first seen below a mob is taken for what that mob walks on until the next
    look. An arrow tells nothing of the cell it flies over: it may be lava.
    """
    corner = (view.position[0], view.position[1])
    before = jax.lax.dynamic_slice(known, corner, view.tiles.shape)
    ground = jnp.where(view.tiles == TILE["skeleton"], TILE["path"], TILE["grass"])
    ground = jnp.where(view.tiles == TILE["arrow"], UNKNOWN, ground)
    below = jnp.where(before == UNKNOWN, ground.astype(jnp.int8), before)
    blocks = jnp.where(view.tiles >= TILE["zombie"], below, view.tiles)
    return jax.lax.dynamic_update_slice(known, blocks, corner)


def draw_mobs(known: KnownMap, view: PlayerView) -> KnownMap:
    """Draw the mobs in view over the map, but not arrows: they are gone in a step."""
    corner = (view.position[0], view.position[1])
    below = jax.lax.dynamic_slice(known, corner, view.tiles.shape)
    tiles = jnp.where(view.tiles == TILE["arrow"], below, view.tiles)
    return jax.lax.dynamic_update_slice(known, tiles, corner)


def widen(mask: Mask) -> Mask:
    """Mark a cell where it or one of its 8 neighbours is marked."""
    rows = mask | _shifted(mask, 1) | _shifted(mask, -1)
    return rows | _shifted(rows, COLUMNS) | _shifted(rows, -COLUMNS)


def _shifted(mask: Mask, step: int) -> Mask:
    """At each cell the mark of the cell ``step`` numbers on.

    Rows run into each other, which is harmless: the margin lies between them.
    """
    return jnp.roll(mask.reshape(-1), -step).reshape(mask.shape)


def distance(mask: Mask, position: Int[Array, "2"]) -> Int[Array, ""]:
    """Manhattan distance to the nearest marked cell; `UNREACHABLE` without one."""
    rows = jnp.abs(jnp.arange(ROWS) - CENTRE[0] - position[0])
    columns = jnp.abs(jnp.arange(COLUMNS) - CENTRE[1] - position[1])
    away = rows[:, None] + columns[None, :]
    return jnp.min(jnp.where(mask, away, UNREACHABLE))


@chex.dataclass(frozen=True)
class Sites:
    """Places made of several cells.

    Attributes:
        bench: cells from which a table can be used.
        forge: cells from which a table and a furnace can be used.
        entrances: cells before two that make a shelter, by facing; none at index 0.
    """

    bench: Mask
    forge: Mask
    entrances: Bool[Array, "5 70 72"]


def find_sites(known: KnownMap) -> Sites:
    """Find the work places and the shelters on the known map."""
    bench = widen(known == TILE["table"])
    return Sites(
        bench=bench,
        forge=bench & widen(known == TILE["furnace"]),
        entrances=_entrances(known),
    )


def _entrances(known: KnownMap) -> Bool[Array, "5 70 72"]:
    """Cells from which two cells in line, walled all around, can be dug or walked."""
    wall, room = look_up(_IS_WALL, known), look_up(_IS_ROOM, known)
    row_room = room & _shifted(wall, COLUMNS) & _shifted(wall, -COLUMNS)
    column_room = room & _shifted(wall, 1) & _shifted(wall, -1)
    rooms = (row_room, row_room, column_room, column_room)
    fits = [jnp.zeros_like(wall)]
    for in_line, step in zip(rooms, STEPS[1:].tolist(), strict=True):
        two_rooms = _shifted(in_line, step) & _shifted(in_line, 2 * step)
        fits.append(look_up(IS_WALKED, known) & two_rooms & _shifted(wall, 3 * step))
    return jnp.stack(fits)


def enclosed(scene: KnownMap, position: Int[Array, "2"]) -> Bool[Array, ""]:
    """Whether nothing can come near: each neighbour is a wall or a walled niche."""
    here, tiles = cell_number(position), scene.reshape(-1)
    closed = jnp.array(True)
    for step in STEPS[1:]:
        neighbour = here + step
        others = neighbour + STEPS[1:][STEPS[1:] != -step]
        niche = look_up(IS_WALKED, tiles[neighbour])
        niche &= look_up(_IS_WALL, tiles[others]).all()
        closed &= niche | look_up(_IS_WALL, tiles[neighbour])
    return closed


def path_field(
    start: Int[Array, " cells"],
    entry: Int[Array, " cells"],
    here: Int[Array, ""],
) -> tuple[Int[Array, " cells"], Int[Array, " cells"]]:
    """Cheapest way to a target from the cells around ``here``.

    ``cost(c) = min(start(c), min over 4 neighbours n of entry(n) + cost(n))`` by
    repeated relaxation. After k sweeps every way of at most k moves is counted, and a
    longer one costs more than k; so the loop may end once ``cost(here) <= k``. The
    result is exact at ``here`` and along the best ways from it, not everywhere.

    Args:
        start: cost of stopping at a cell; `UNREACHABLE` where it is no target. The
            cells are those of a map with rows of `COLUMNS` and a closed rim.
        entry: cost of entering a cell, at least 1; `CLOSED` where it cannot be.
        here: the player's cell.

    Returns:
        The cost from each cell, and the number of the target it leads to.
    """
    numbers = jnp.arange(start.shape[0], dtype=jnp.int32)
    coded = (start.astype(jnp.int32) << _TARGET_BITS) + numbers
    toll = entry.astype(jnp.int32) << _TARGET_BITS

    def sweep(field):
        through = toll + field
        west = through[COLUMNS - 1 : -COLUMNS - 1]
        east = through[COLUMNS + 1 : 1 - COLUMNS]
        north, south = through[: -2 * COLUMNS], through[2 * COLUMNS :]
        nearest = jnp.minimum(jnp.minimum(west, east), jnp.minimum(north, south))
        return field.at[COLUMNS:-COLUMNS].min(nearest)

    def relax(carry):
        field, sweeps, _ = carry
        swept = field
        for _ in range(SWEEPS_PER_CHECK):
            swept = sweep(swept)
        return swept, sweeps + SWEEPS_PER_CHECK, jnp.any(swept != field)

    def unfinished(carry):
        field, sweeps, changed = carry
        settled = (field[here] >> _TARGET_BITS) <= sweeps
        return changed & ~settled & (sweeps < MAX_SWEEPS)

    field, _, _ = jax.lax.while_loop(unfinished, relax, (coded, 0, jnp.array(True)))
    return field >> _TARGET_BITS, field & ((1 << _TARGET_BITS) - 1)
