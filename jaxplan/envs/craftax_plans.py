"""The words of the scripted Craftax player's plans.

A plan is a natural sentence of one-word phrases: what to do, where, until when, and
what comes then. It is filled from the goal the player follows at that very step.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxplan.envs.base import Phrases
from jaxplan.envs.craftax_expert_map import look_up
from jaxplan.envs.craftax_goals import GATHERED, Goal
from jaxplan.envs.craftax_view import CENTRE, TILE, VIEW_COLUMNS, VIEW_ROWS
from jaxplan.envs.craftax_words import OFFSETS, offset_word

FARTHEST = 31  # a plan says 31 for what is farther
_HEADS = {
    Goal.FIGHT_ZOMBIE: "fight zombie",
    Goal.FIGHT_SKELETON: "fight skeleton",
    Goal.DRINK: "drink water",
    Goal.EAT_COW: "eat cow",
    Goal.EAT_PLANT: "eat plant",
    Goal.SHELTER: "dig shelter",
    Goal.SLEEP: "sleep",
    Goal.REST: "rest",
    Goal.WAIT: "wait for plant",
    Goal.STAY: "stay in shelter",
    Goal.HUNT_SKELETON: "hunt skeleton",
    Goal.PLACE_STONE: "place stone",
    Goal.PLANT_SAPLING: "plant sapling",
    Goal.COLLECT_SAPLING: "collect sapling",
    Goal.COLLECT_WOOD: "collect wood",
    Goal.PLACE_TABLE: "place table",
    Goal.MAKE_WOOD_PICKAXE: "make wood pickaxe",
    Goal.MAKE_WOOD_SWORD: "make wood sword",
    Goal.MINE_STONE: "mine stone",
    Goal.MAKE_STONE_PICKAXE: "make stone pickaxe",
    Goal.MAKE_STONE_SWORD: "make stone sword",
    Goal.PLACE_FURNACE: "place furnace",
    Goal.MINE_COAL: "mine coal",
    Goal.MINE_IRON: "mine iron",
    Goal.MAKE_IRON_PICKAXE: "make iron pickaxe",
    Goal.MAKE_IRON_SWORD: "make iron sword",
    Goal.MINE_DIAMOND: "mine diamond",
    Goal.HUNT_ZOMBIE: "hunt zombie",
}
# What the stop condition counts; the amount comes from the rules.
_COUNTED = {
    **GATHERED,
    Goal.DRINK: "drink",
    Goal.EAT_COW: "food",
    Goal.EAT_PLANT: "food",
    Goal.SLEEP: "energy",
    Goal.REST: "health",
}
# What is looked for when no target is known.
_SOUGHT = {
    Goal.DRINK: "water",
    Goal.EAT_COW: "cow",
    Goal.EAT_PLANT: "plant",
    Goal.SHELTER: "rock",
    Goal.HUNT_SKELETON: "skeleton",
    Goal.COLLECT_WOOD: "tree",
    Goal.PLANT_SAPLING: "grass",
    Goal.COLLECT_SAPLING: "grass",
    Goal.MINE_STONE: "stone",
    Goal.MINE_COAL: "coal",
    Goal.MINE_IRON: "iron",
    Goal.MINE_DIAMOND: "diamond",
    Goal.HUNT_ZOMBIE: "zombie",
}
# Goals reached beside a table, and those for which no place is said.
_NEAR_TABLE = {
    Goal.MAKE_WOOD_PICKAXE,
    Goal.MAKE_WOOD_SWORD,
    Goal.MAKE_STONE_PICKAXE,
    Goal.MAKE_STONE_SWORD,
    Goal.PLACE_FURNACE,
    Goal.MAKE_IRON_PICKAXE,
    Goal.MAKE_IRON_SWORD,
}
_ON_THE_SPOT = {
    Goal.SLEEP,
    Goal.REST,
    Goal.WAIT,
    Goal.STAY,
    Goal.PLACE_TABLE,
    Goal.PLACE_STONE,
}

_GRAMMAR = "explore for at table until light , then north south west east"


def _phrase_list() -> tuple[str, ...]:
    numbers = (str(number) for number in range(1, FARTHEST + 1))
    texts = (*_HEADS.values(), *_COUNTED.values(), *_SOUGHT.values())
    offsets = (offset_word(*offset) for offset in OFFSETS)
    words = " ".join((*numbers, _GRAMMAR, *texts, *offsets)).split()
    return tuple(f" {word}" for word in dict.fromkeys(words))


PLAN_PHRASES = _phrase_list()
_ID = {phrase.strip(): index for index, phrase in enumerate(PLAN_PHRASES)}
_ABSENT = -1
_IN_VIEW = np.full((VIEW_ROWS, VIEW_COLUMNS), _ABSENT)  # by row and column of the view
for _row, _column in OFFSETS:
    _cell = _row + CENTRE[0], _column + CENTRE[1]
    _IN_VIEW[_cell] = _ID[offset_word(_row, _column).strip()]


def _number(value: Int[Array, ""]) -> Int[Array, ""]:
    """The phrase of a number from 1; absent for 0."""
    return jnp.where(value > 0, jnp.minimum(value, FARTHEST) - 1, _ABSENT)


def _words(texts: dict, width: int) -> np.ndarray:
    """Texts as rows of phrase ids over all goals, absent at the end."""
    table = np.full((len(Goal), width), _ABSENT)
    for goal, text in texts.items():
        for column, word in enumerate(text.split()):
            table[goal, column] = _ID[word]
    return table


_HEAD_TABLE = _words(_HEADS, 3)
_COUNTED_TABLE = _words(_COUNTED, 1)[:, 0]
_SOUGHT_TABLE = _words(_SOUGHT, 1)[:, 0]
_NEAR_TABLE_TABLE = np.array([goal in _NEAR_TABLE for goal in Goal])
_SPOT_TABLE = np.array([goal in _ON_THE_SPOT for goal in Goal])


def _head(
    goal: Int[Array, ""], exploring: Array, south: Array, east: Array
) -> Int[Array, " 5"]:
    """What to do, or where to look for what."""
    do = jnp.concatenate(
        [
            look_up(_HEAD_TABLE, goal),
            jnp.where(
                look_up(_NEAR_TABLE_TABLE, goal),
                jnp.array([_ID["at"], _ID["table"]]),
                _ABSENT,
            ),
        ]
    )
    north_south, east_west = _directions(south, east)
    slanted = jnp.abs(south) * 2 >= jnp.abs(east), jnp.abs(east) * 2 >= jnp.abs(south)
    look = jnp.stack(
        [
            jnp.array(_ID["explore"]),
            jnp.where(slanted[0], north_south, _ABSENT),
            jnp.where(slanted[1], east_west, _ABSENT),
            jnp.array(_ID["for"]),
            look_up(_SOUGHT_TABLE, goal),
        ]
    )
    return jnp.where(exploring, look, do)


def _directions(south: Array, east: Array) -> tuple[Array, Array]:
    """The words for two signed offsets; absent for 0."""
    sides = jnp.array([_ID["north"], _ABSENT, _ID["south"]])
    others = jnp.array([_ID["west"], _ABSENT, _ID["east"]])
    return sides[jnp.sign(south) + 1], others[jnp.sign(east) + 1]


def _where(south: Array, east: Array, said: Array) -> Int[Array, " 4"]:
    """Distance and direction of the target.

    A target in view is pointed out with the very word ``compact`` has for its place.
    """
    north_south, east_west = _directions(south, east)
    far = jnp.stack(
        [_number(jnp.abs(south)), north_south, _number(jnp.abs(east)), east_west]
    )
    row, column = south + CENTRE[0], east + CENTRE[1]
    seen = (row >= 0) & (row < VIEW_ROWS) & (column >= 0) & (column < VIEW_COLUMNS)
    place = jnp.clip(row, 0, VIEW_ROWS - 1), jnp.clip(column, 0, VIEW_COLUMNS - 1)
    near = jnp.full(4, _ABSENT).at[0].set(jnp.asarray(_IN_VIEW)[place])
    return jnp.where(said, jnp.where(seen, near, far), _ABSENT)


def _until(goal: Int[Array, ""], amount: Int[Array, ""]) -> Int[Array, " 3"]:
    """The stop condition that the observation will show."""
    counted = look_up(_COUNTED_TABLE, goal)
    waiting = (goal == Goal.REST) & (amount == 0)
    until = jnp.array(_ID["until"])
    count = jnp.stack([until, _number(amount), counted])
    light = jnp.stack([until, jnp.array(_ID["light"]), jnp.array(_ABSENT)])
    counts = (counted >= 0) & (amount > 0)
    return jnp.where(waiting, light, jnp.where(counts, count, _ABSENT))


def say_plan(
    goal: Int[Array, ""],
    amount: Int[Array, ""],
    next_goal: Int[Array, ""],
    offset: Int[Array, "2"],
    target_tile: Array,
) -> Phrases:
    """Say the goal, where it is, when it is reached, and the goal after it.

    Args:
        goal: what the player goes for.
        amount: the count that ends it; 0 where none does.
        next_goal: what it will go for then.
        offset: rows south and columns east to the target.
        target_tile: what is known to be there; unknown means exploring.
    """
    south, east = offset
    on_spot = look_up(_SPOT_TABLE, goal)
    sought = look_up(_SOUGHT_TABLE, goal) >= 0
    exploring = (target_tile == TILE["invalid"]) & sought
    then = jnp.where(next_goal == goal, _ABSENT, look_up(_HEAD_TABLE, next_goal))
    link = jnp.where(next_goal == goal, _ABSENT, jnp.array([_ID[","], _ID["then"]]))
    words = jnp.concatenate(
        [
            _head(goal, exploring, south, east),
            _where(south, east, ~exploring & ~on_spot),
            _until(goal, amount),
            link,
            then,
        ]
    )
    return Phrases(ids=jnp.maximum(words, 0).astype(jnp.int32), mask=words >= 0)
