"""What a Craftax-Classic player sees and carries, as one small pytree.

The only module that reads Craftax's state for describing: texts, the scripted expert
and the replays all look through `view`, so nothing hidden can reach any of them.
Mobs come from their own lists: the shipped symbolic observation loses some of them
(Craftax#57).
"""

from typing import Any

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

VIEW_ROWS, VIEW_COLUMNS = 7, 9
CENTRE = (3, 4)  # the player's own cell in the view: row, column

# The tile code is the index: Craftax's block numbers, then the four kinds of mobs.
TILE_NAMES = (
    "invalid",
    "out of bounds",
    "grass",
    "water",
    "stone",
    "tree",
    "wood",
    "path",
    "coal",
    "iron",
    "diamond",
    "table",
    "furnace",
    "sand",
    "lava",
    "plant",
    "ripe plant",
    "zombie",
    "cow",
    "skeleton",
    "arrow",
)
TILE = {name: code for code, name in enumerate(TILE_NAMES)}

VITAL_NAMES = ("health", "food", "drink", "energy")
ITEM_NAMES = (
    "wood",
    "stone",
    "coal",
    "iron",
    "diamond",
    "sapling",
    "wood_pickaxe",
    "stone_pickaxe",
    "iron_pickaxe",
    "wood_sword",
    "stone_sword",
    "iron_sword",
)
# Facing is the number of the move action in that direction; 0 does not occur.
FACING_NAMES = ("", "west", "east", "north", "south")
FACING_OFFSETS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # row, column


@chex.dataclass(frozen=True)
class PlayerView:
    """All that may be told to, or used by, a player.

    Attributes:
        tiles: codes into `TILE_NAMES`, north row first, west column first; a mob hides
            the block it stands on; beyond the map lies ``out of bounds``.
        position: row and column on the map, known to a player by dead reckoning.
        facing: 1 to 4, index into `FACING_NAMES`.
        vitals: 0 to 9 each, in the order of `VITAL_NAMES`.
        inventory: 0 to 9 each, in the order of `ITEM_NAMES`.
        light: daylight, 0 to 1.
        sleeping: the next action will be ignored.
        achievements: unlocked so far, in the order of the world's ``event_names``.
    """

    tiles: Int8[Array, "7 9"]
    position: Int[Array, "2"]
    facing: Int[Array, ""]
    vitals: Int[Array, "4"]
    inventory: Int[Array, "12"]
    light: Float[Array, ""]
    sleeping: Bool[Array, ""]
    achievements: Bool[Array, "22"]


def view(state: Any) -> PlayerView:
    """Look at the world through the player's eyes (one unbatched ``EnvState``)."""
    inventory = [getattr(state.inventory, name) for name in ITEM_NAMES]
    vitals = [getattr(state, f"player_{name}") for name in VITAL_NAMES]
    return PlayerView(
        tiles=_tiles(state),
        position=state.player_position,
        facing=jnp.asarray(state.player_direction),
        vitals=jnp.stack(vitals),
        inventory=jnp.stack(inventory),
        light=jnp.asarray(state.light_level),
        sleeping=jnp.asarray(state.is_sleeping),
        achievements=state.achievements,
    )


def _tiles(state: Any) -> Int8[Array, "7 9"]:
    """Crop the map around the player and draw the mobs over it."""
    rows = state.player_position[0] + jnp.arange(VIEW_ROWS) - CENTRE[0]
    columns = state.player_position[1] + jnp.arange(VIEW_COLUMNS) - CENTRE[1]
    height, width = state.map.shape
    on_map = ((rows >= 0) & (rows < height))[:, None] & (
        (columns >= 0) & (columns < width)
    )[None, :]
    blocks = state.map[
        jnp.clip(rows, 0, height - 1)[:, None], jnp.clip(columns, 0, width - 1)[None, :]
    ]
    blocks = jnp.where(on_map, blocks, TILE["out of bounds"])
    mobs = jnp.zeros_like(blocks)
    for name in ("zombie", "cow", "skeleton", "arrow"):  # the later is drawn on top
        kind = getattr(state, f"{name}s")
        there = (
            kind.mask[:, None, None]
            & (kind.position[:, 0, None, None] == rows[None, :, None])
            & (kind.position[:, 1, None, None] == columns[None, None, :])
        )
        mobs = jnp.where(there.any(0), TILE[name], mobs)
    return jnp.where(mobs > 0, mobs, blocks).astype(jnp.int8)
