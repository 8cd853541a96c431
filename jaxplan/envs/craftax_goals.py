"""What the scripted Craftax player may want, and which want comes first.

The rules read a small `Situation` of scalars. They are asked twice: about the situation
as it is (the goal) and as it will be once the goal is reached (the goal after it, which
the plan announces).
"""

import dataclasses
import enum
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxplan.envs.craftax_expert_map import look_up
from jaxplan.envs.craftax_view import ITEM_NAMES

ITEM = {name: index for index, name in enumerate(ITEM_NAMES)}
FULL = 9
FED = 7
HEALED = 6
WOOD_TO_GO = 7  # three stone tools, two iron tools, a second table
ORES_WANTED = 2  # of coal and of iron: one for the pickaxe, one for the sword


class Goal(enum.IntEnum):
    """Everything the player can be after; one plan sentence each."""

    FIGHT_ZOMBIE = 0
    FIGHT_SKELETON = 1
    DRINK = 2
    EAT_COW = 3
    EAT_PLANT = 4
    SHELTER = 5
    SLEEP = 6
    REST = 7
    HUNT_SKELETON = 8
    PLACE_STONE = 9
    PLANT_SAPLING = 10
    COLLECT_SAPLING = 11
    COLLECT_WOOD = 12
    PLACE_TABLE = 13
    MAKE_WOOD_PICKAXE = 14
    MAKE_WOOD_SWORD = 15
    MINE_STONE = 16
    MAKE_STONE_PICKAXE = 17
    MAKE_STONE_SWORD = 18
    PLACE_FURNACE = 19
    MINE_COAL = 20
    MINE_IRON = 21
    MAKE_IRON_PICKAXE = 22
    MAKE_IRON_SWORD = 23
    MINE_DIAMOND = 24
    HUNT_ZOMBIE = 25
    WAIT = 26
    STAY = 27


# When a goal is wanted, the goal, and the amount that ends it (0 where none does).
Rule = tuple[Any, Goal, Any]


@chex.dataclass(frozen=True)
class Situation:
    """What the rules look at; every field is something the player has seen.

    Attributes:
        inventory: counts in the order of ``ITEM_NAMES``.
        done: the achievement that a goal is for is unlocked, per goal.
        thirsty: the drinking drive is on; so `hungry`, `tired`, `hurt` (see `drives`).
        watered: drink is full; it is drunk for the achievement alone.
        fed: likewise for food.
        exhausted: hurt, with food and drink enough to heal before all else.
        dark: too little light to walk about.
        enclosed: nothing can walk up to the player.
        zombie_beside: a zombie stands on one of the four neighbouring cells.
        skeleton_beside: the same for a skeleton.
        skeleton_near: a skeleton is close enough to go for it.
        plant_growing: a sapling was planted.
        plant_ripe: it is ripe by now, or seen to be.
        table_near: a known table is worth the way.
        forge_near: so is a place beside both a table and a furnace.
        coal_known: coal is on the map; likewise `iron_known`.
    """

    inventory: Int[Array, "12"]
    done: Bool[Array, " goals"]
    thirsty: Bool[Array, ""]
    hungry: Bool[Array, ""]
    watered: Bool[Array, ""]
    fed: Bool[Array, ""]
    tired: Bool[Array, ""]
    hurt: Bool[Array, ""]
    exhausted: Bool[Array, ""]
    dark: Bool[Array, ""]
    enclosed: Bool[Array, ""]
    zombie_beside: Bool[Array, ""]
    skeleton_beside: Bool[Array, ""]
    skeleton_near: Bool[Array, ""]
    plant_growing: Bool[Array, ""]
    plant_ripe: Bool[Array, ""]
    table_near: Bool[Array, ""]
    forge_near: Bool[Array, ""]
    coal_known: Bool[Array, ""]
    iron_known: Bool[Array, ""]


# Which achievement a goal unlocks, in the world's order; the others unlock none.
_UNLOCKS = {
    Goal.COLLECT_WOOD: 0,
    Goal.PLACE_TABLE: 1,
    Goal.EAT_COW: 2,
    Goal.COLLECT_SAPLING: 3,
    Goal.DRINK: 4,
    Goal.MAKE_WOOD_PICKAXE: 5,
    Goal.MAKE_WOOD_SWORD: 6,
    Goal.PLANT_SAPLING: 7,
    Goal.FIGHT_ZOMBIE: 8,
    Goal.HUNT_ZOMBIE: 8,
    Goal.MINE_STONE: 9,
    Goal.PLACE_STONE: 10,
    Goal.EAT_PLANT: 11,
    Goal.FIGHT_SKELETON: 12,
    Goal.HUNT_SKELETON: 12,
    Goal.MAKE_STONE_PICKAXE: 13,
    Goal.MAKE_STONE_SWORD: 14,
    Goal.SLEEP: 15,
    Goal.PLACE_FURNACE: 16,
    Goal.MINE_COAL: 17,
    Goal.MINE_IRON: 18,
    Goal.MINE_DIAMOND: 19,
    Goal.MAKE_IRON_PICKAXE: 20,
    Goal.MAKE_IRON_SWORD: 21,
}
_IRON_RECIPE = {"wood": -1, "stone": -1, "coal": -1, "iron": -1}
# How reaching a goal changes the inventory, where that is a fixed difference.
_CHANGES = {
    Goal.PLACE_STONE: {"stone": -1},
    Goal.PLANT_SAPLING: {"sapling": -1},
    Goal.PLACE_TABLE: {"wood": -2},
    Goal.MAKE_WOOD_PICKAXE: {"wood": -1, "wood_pickaxe": 1},
    Goal.MAKE_WOOD_SWORD: {"wood": -1, "wood_sword": 1},
    Goal.MAKE_STONE_PICKAXE: {"wood": -1, "stone": -1, "stone_pickaxe": 1},
    Goal.MAKE_STONE_SWORD: {"wood": -1, "stone": -1, "stone_sword": 1},
    Goal.PLACE_FURNACE: {"stone": -1},
    Goal.MAKE_IRON_PICKAXE: {**_IRON_RECIPE, "iron_pickaxe": 1},
    Goal.MAKE_IRON_SWORD: {**_IRON_RECIPE, "iron_sword": 1},
}
# What is gathered up to an amount.
GATHERED = {
    Goal.COLLECT_SAPLING: "sapling",
    Goal.COLLECT_WOOD: "wood",
    Goal.MINE_STONE: "stone",
    Goal.MINE_COAL: "coal",
    Goal.MINE_IRON: "iron",
    Goal.MINE_DIAMOND: "diamond",
}


def _by_goal(rows: dict[Goal, dict[str, int]]) -> np.ndarray:
    """Item counts as a table over all goals."""
    table = np.zeros((len(Goal), len(ITEM)), np.int32)
    for goal, row in rows.items():
        for item, count in row.items():
            table[goal, ITEM[item]] = count
    return table


_CHANGE = _by_goal(_CHANGES)
_GATHERED = _by_goal({goal: {item: 1} for goal, item in GATHERED.items()})
_UNLOCK = np.array([_UNLOCKS.get(goal, -1) for goal in Goal])


def goals_done(achievements: Bool[Array, "22"]) -> Bool[Array, " goals"]:
    """Whether the achievement behind each goal is unlocked; True without one."""
    return jnp.where(_UNLOCK < 0, True, achievements[_UNLOCK])


def choose(
    s: Situation, unknown: frozenset[Goal] = frozenset()
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The most urgent goal and the amount that ends it (0 where none does).

    Args:
        s: what the rules look at.
        unknown: goals the player has never heard of; their rules are left out.
    """
    rules = [*_survival(s), *_early(s), *_wood(s), *_stone(s), *_iron(s), *_late(s)]
    rules = [rule for rule in rules if rule[1] not in unknown]
    rules.append((True, Goal.STAY, 0))  # for who does not even know of shelters
    wanted = jnp.stack([jnp.asarray(condition) for condition, _, _ in rules])
    first = jnp.argmax(wanted)
    goals = jnp.array([goal for _, goal, _ in rules], jnp.int32)
    amounts = jnp.stack([jnp.asarray(amount, jnp.int32) for _, _, amount in rules])
    return goals[first], amounts[first]


def _has(s: Situation, item: str) -> Int[Array, ""]:
    return s.inventory[ITEM[item]]


def _survival(s: Situation) -> list[Rule]:
    """Fights at hand, then thirst, hunger, rest."""
    indoors = s.tired | s.hurt | s.dark
    can_dig = _has(s, "wood_pickaxe") > 0
    return [
        (s.zombie_beside, Goal.FIGHT_ZOMBIE, 0),
        (s.skeleton_beside, Goal.FIGHT_SKELETON, 0),
        (s.enclosed & s.exhausted & s.tired, Goal.SLEEP, FULL),
        (s.enclosed & s.exhausted, Goal.REST, HEALED),
        (s.exhausted & can_dig & (_has(s, "stone") > 0), Goal.SHELTER, 0),
        (s.thirsty, Goal.DRINK, jnp.where(s.watered, 0, FULL)),
        (s.hungry, Goal.EAT_COW, jnp.where(s.fed, 0, FED)),
        (s.enclosed & s.tired, Goal.SLEEP, FULL),
        (s.enclosed & indoors, Goal.REST, jnp.where(s.hurt, HEALED, 0)),
        (indoors & can_dig & (_has(s, "stone") < 1), Goal.MINE_STONE, 1),
        (indoors & can_dig, Goal.SHELTER, 0),
    ]


def _early(s: Situation) -> list[Rule]:
    """Small chances beside the way."""
    return [
        (s.skeleton_near & ~s.done[Goal.HUNT_SKELETON], Goal.HUNT_SKELETON, 0),
        (~s.done[Goal.PLACE_STONE] & (_has(s, "stone") > 0), Goal.PLACE_STONE, 0),
        (s.plant_ripe & ~s.done[Goal.EAT_PLANT], Goal.EAT_PLANT, 0),
        (~s.plant_growing & (_has(s, "sapling") > 0), Goal.PLANT_SAPLING, 0),
        (~s.plant_growing, Goal.COLLECT_SAPLING, 1),
    ]


def _craft_at_table(
    s: Situation, pickaxe: Any, sword: Any, wood: Any, make: tuple[Goal, Goal]
) -> list[Rule]:
    """Get the wood, build a table unless one is near, make what is missing."""
    missing = pickaxe | sword
    wood = wood + 2 * ~s.table_near
    return [
        (missing & (_has(s, "wood") < wood), Goal.COLLECT_WOOD, wood),
        (missing & ~s.table_near, Goal.PLACE_TABLE, 0),
        (pickaxe, make[0], 0),
        (sword, make[1], 0),
    ]


def _wood(s: Situation) -> list[Rule]:
    """A table, the wooden tools."""
    pickaxe, sword = _has(s, "wood_pickaxe") < 1, _has(s, "wood_sword") < 1
    make = Goal.MAKE_WOOD_PICKAXE, Goal.MAKE_WOOD_SWORD
    return _craft_at_table(s, pickaxe, sword, pickaxe.astype(int) + sword, make)


def _stone(s: Situation) -> list[Rule]:
    """Wood for all that follows, the stone tools (two swords hit twice as hard)."""
    pickaxe = _has(s, "stone_pickaxe") < 1
    swords = jnp.maximum(2 - _has(s, "stone_sword"), 0)
    missing = pickaxe + swords
    furnace = ~s.done[Goal.PLACE_FURNACE]
    stone = missing + furnace
    leaving = (missing == 3) & (_has(s, "stone") < 1)
    make = Goal.MAKE_STONE_PICKAXE, Goal.MAKE_STONE_SWORD
    return [
        (leaving & (_has(s, "wood") < WOOD_TO_GO), Goal.COLLECT_WOOD, WOOD_TO_GO),
        ((missing > 0) & (_has(s, "stone") < stone), Goal.MINE_STONE, stone),
        *_craft_at_table(s, pickaxe, swords > 0, missing, make),
        (furnace & (_has(s, "stone") < 1), Goal.MINE_STONE, 1),
        (furnace & ~s.table_near & (_has(s, "wood") < 2), Goal.COLLECT_WOOD, 2),
        (furnace & ~s.table_near, Goal.PLACE_TABLE, 0),
        (furnace, Goal.PLACE_FURNACE, 0),
    ]


def _iron(s: Situation) -> list[Rule]:
    """Coal and iron, then the iron tools beside a table and a furnace."""
    pickaxe, sword = _has(s, "iron_pickaxe") < 1, _has(s, "iron_sword") < 1
    missing = pickaxe.astype(int) + sword
    # One set makes the pickaxe at once when no second one is known.
    coal = jnp.where(pickaxe & ~s.coal_known, 1, missing)
    iron = jnp.where(pickaxe & ~s.iron_known, 1, missing)
    tools = jnp.minimum(coal, iron)
    table = ~s.table_near & ~s.forge_near
    wood, stone = tools + 2 * table, tools + ~s.forge_near
    any_missing = missing > 0
    return [
        (any_missing & (_has(s, "coal") < coal), Goal.MINE_COAL, coal),
        (any_missing & (_has(s, "iron") < iron), Goal.MINE_IRON, iron),
        (any_missing & (_has(s, "wood") < wood), Goal.COLLECT_WOOD, wood),
        (any_missing & (_has(s, "stone") < stone), Goal.MINE_STONE, stone),
        (any_missing & table, Goal.PLACE_TABLE, 0),
        (any_missing & ~s.forge_near, Goal.PLACE_FURNACE, 0),
        (pickaxe, Goal.MAKE_IRON_PICKAXE, 0),
        (sword, Goal.MAKE_IRON_SWORD, 0),
    ]


def _late(s: Situation) -> list[Rule]:
    """What is left when all tools are made; the last rule holds whenever known."""
    return [
        (~s.done[Goal.MINE_DIAMOND], Goal.MINE_DIAMOND, 1),
        (~s.done[Goal.HUNT_SKELETON], Goal.HUNT_SKELETON, 0),
        (~s.done[Goal.HUNT_ZOMBIE], Goal.HUNT_ZOMBIE, 0),
        (s.enclosed & ~s.done[Goal.EAT_PLANT], Goal.WAIT, 0),
        (s.enclosed, Goal.STAY, 0),
        (_has(s, "stone") < 1, Goal.MINE_STONE, 1),
        (True, Goal.SHELTER, 0),
    ]


def suppose(s: Situation, goal: Int[Array, ""], amount: Int[Array, ""]) -> Situation:
    """The situation once ``goal`` is reached."""
    gathered = look_up(_GATHERED, goal) * amount
    inventory = jnp.maximum(s.inventory, gathered) + look_up(_CHANGE, goal)
    same_unlock = (look_up(_UNLOCK, goal) == _UNLOCK) & (_UNLOCK >= 0)
    rests, sleeps = goal == Goal.REST, goal == Goal.SLEEP
    return dataclasses.replace(
        s,
        inventory=jnp.maximum(inventory, 0),
        done=s.done | same_unlock,
        thirsty=s.thirsty & (goal != Goal.DRINK),
        hungry=s.hungry & (goal != Goal.EAT_COW) & (goal != Goal.EAT_PLANT),
        tired=s.tired & ~sleeps & ~rests,
        exhausted=s.exhausted & ~sleeps & ~rests,
        hurt=s.hurt & ~sleeps & ~rests,
        dark=s.dark & ~rests,
        enclosed=s.enclosed | (goal == Goal.SHELTER),
        zombie_beside=s.zombie_beside & (goal != Goal.FIGHT_ZOMBIE),
        skeleton_beside=s.skeleton_beside & (goal != Goal.FIGHT_SKELETON),
        skeleton_near=s.skeleton_near & (goal != Goal.FIGHT_SKELETON),
        plant_growing=s.plant_growing | (goal == Goal.PLANT_SAPLING),
        plant_ripe=s.plant_ripe | (goal == Goal.WAIT),
        table_near=s.table_near | (goal == Goal.PLACE_TABLE),
        forge_near=s.forge_near | (goal == Goal.PLACE_FURNACE),
    )
