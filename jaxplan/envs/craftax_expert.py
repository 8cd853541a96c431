"""A scripted Craftax-Classic player in JAX: it uses only what a player sees.

Each step it updates its map, chooses the most urgent goal, computes one path field for
that goal and takes the first step along it. What it says is read off the same goal and
the same field, so the plan is what the feet do.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.config.schema import EnvConfig, ExpertConfig
from jaxplan.envs.base import Intent, Phrases
from jaxplan.envs.craftax_classic import ACTION_NAMES
from jaxplan.envs.craftax_expert_map import (
    CLOSED,
    IS_WALKED,
    STEPS,
    UNKNOWN,
    UNREACHABLE,
    WALKED,
    KnownMap,
    Sites,
    ahead,
    blank_map,
    cell_number,
    distance,
    draw_mobs,
    enclosed,
    find_sites,
    look_up,
    offset_to,
    path_field,
    remember,
    tiles_named,
    widen,
)
from jaxplan.envs.craftax_goals import (
    FED,
    FULL,
    HEALED,
    ITEM,
    ORES_WANTED,
    Goal,
    Situation,
    choose,
    goals_done,
    suppose,
)
from jaxplan.envs.craftax_plans import (
    BY_DARKNESS,
    BY_PURPOSE,
    GOAL_NAMES,
    STYLE_NAMES,
    STYLE_PHRASES,
    PlanFacts,
    say_plan,
)
from jaxplan.envs.craftax_view import (
    CENTRE,
    TILE,
    TILE_NAMES,
    VIEW_COLUMNS,
    VIEW_ROWS,
    VITAL_NAMES,
    PlayerView,
    view,
)

NOOP, DO, SLEEP, PLACE_STONE, PLACE_TABLE, PLACE_FURNACE, PLACE_PLANT = 0, *range(5, 11)
OPPOSITE = np.array([0, 2, 1, 4, 3])  # of a facing
WORTH_THE_WAY = 14  # cells; a new table is cheaper than one farther away
PLANT_RIPENS = 600  # env steps
_AT_REST = (Goal.REST, Goal.WAIT, Goal.STAY)  # awake and doing nothing
STUCK_AFTER, STUCK_EVERY = 30, 7  # env steps

_AWAY = (
    np.abs(np.arange(VIEW_ROWS) - CENTRE[0])[:, None]
    + np.abs(np.arange(VIEW_COLUMNS) - CENTRE[1])[None, :]
)
_ROCK = ("stone", "path", "coal", "iron", "diamond")
_GRASSLAND = ("grass", "tree", "sand")
_IS_DEADLY = tiles_named("lava", "invalid")  # an unseen cell may be lava
_IS_DUG = tiles_named("stone", "coal", "tree")


def _by_goal(rows: dict, default: Any) -> np.ndarray:
    """A table over all goals."""
    return np.array([rows.get(goal, default) for goal in Goal])


# The tiles a goal is after: walked to, faced, and worked on.
_TARGETS = _by_goal(
    {
        Goal.FIGHT_ZOMBIE: tiles_named("zombie"),
        Goal.FIGHT_SKELETON: tiles_named("skeleton"),
        Goal.DRINK: tiles_named("water"),
        Goal.EAT_COW: tiles_named("cow"),
        Goal.EAT_PLANT: tiles_named("plant", "ripe plant"),
        Goal.HUNT_SKELETON: tiles_named("skeleton"),
        Goal.PLACE_STONE: tiles_named(*WALKED),
        Goal.PLANT_SAPLING: tiles_named("grass"),
        Goal.COLLECT_SAPLING: tiles_named("grass"),
        Goal.COLLECT_WOOD: tiles_named("tree"),
        Goal.PLACE_TABLE: tiles_named(*WALKED),
        Goal.MINE_STONE: tiles_named("stone"),
        Goal.MINE_COAL: tiles_named("coal"),
        Goal.MINE_IRON: tiles_named("iron"),
        Goal.MINE_DIAMOND: tiles_named("diamond"),
        Goal.HUNT_ZOMBIE: tiles_named("zombie"),
    },
    tiles_named(),
)
# Beside which tiles the unknown is worth exploring for a goal, and what it costs to
# explore at all: a known target up to that far away is preferred.
_TERRAIN = _by_goal(
    {
        Goal.DRINK: tiles_named("water", "sand"),
        Goal.EAT_COW: tiles_named(*_GRASSLAND),
        Goal.COLLECT_WOOD: tiles_named(*_GRASSLAND),
        Goal.COLLECT_SAPLING: tiles_named(*_GRASSLAND),
        Goal.PLANT_SAPLING: tiles_named(*_GRASSLAND),
        Goal.HUNT_ZOMBIE: tiles_named(*_GRASSLAND),
    },
    tiles_named(*_ROCK),
)
_WRONG_TERRAIN = 20
_SEARCHED = {
    Goal.SHELTER: 60,
    Goal.DRINK: 30,
    Goal.EAT_COW: 30,
    Goal.HUNT_SKELETON: 30,
    Goal.HUNT_ZOMBIE: 30,
    Goal.COLLECT_SAPLING: 30,
    Goal.COLLECT_WOOD: 30,
    Goal.MINE_STONE: 30,
    Goal.MINE_COAL: 30,
    Goal.MINE_IRON: 30,
    Goal.MINE_DIAMOND: 30,
}
_EXPLORING = _by_goal(_SEARCHED, 400)
# What is done at the end of the way: beside a table, or facing a fitting tile.
_CRAFT = _by_goal(
    {
        Goal.MAKE_WOOD_PICKAXE: 11,
        Goal.MAKE_STONE_PICKAXE: 12,
        Goal.MAKE_IRON_PICKAXE: 13,
        Goal.MAKE_WOOD_SWORD: 14,
        Goal.MAKE_STONE_SWORD: 15,
        Goal.MAKE_IRON_SWORD: 16,
    },
    -1,
)
_FRONT_ACTION = _by_goal(
    {
        Goal.DRINK: DO,
        Goal.PLACE_STONE: PLACE_STONE,
        Goal.PLACE_TABLE: PLACE_TABLE,
        Goal.PLANT_SAPLING: PLACE_PLANT,
        Goal.COLLECT_SAPLING: DO,
    },
    NOOP,
)
_FRONT_TILES = _by_goal(
    {
        Goal.DRINK: tiles_named("water"),
        Goal.PLACE_STONE: tiles_named(*WALKED, "water"),
        Goal.PLACE_TABLE: tiles_named(*WALKED),
        Goal.PLANT_SAPLING: tiles_named("grass"),
        Goal.COLLECT_SAPLING: tiles_named("grass"),
    },
    tiles_named(),
)


def _entry_table() -> np.ndarray:
    """Cost of entering a tile, by pickaxe level (0 none, 3 iron) and tile code."""
    table = np.full((4, len(TILE_NAMES)), CLOSED)
    table[:, tiles_named("invalid", *WALKED)] = 1
    table[:, tiles_named("tree")] = 3
    table[:, tiles_named("zombie", "cow", "skeleton")] = 4
    table[1:, tiles_named("stone", "coal")] = 2
    table[2:, tiles_named("iron")] = 2
    table[3:, tiles_named("diamond")] = 2
    return table


_ENTRY = _entry_table()
_BRIDGE = 4  # cost of crossing water: place a stone, dig it, walk


@chex.dataclass(frozen=True)
class Memory:
    """What the player carries from step to step.

    Attributes:
        known: the blocks seen so far.
        env_steps: steps since the episode began.
        planted_at: the step at which the sapling stood; -1 before.
        thirsty: a drive; once on it stays on until its own limit, as the next four.
        hungry: goes on at little food or a cow nearby.
        tired: goes on at little energy, earlier in the dark.
        hurt: goes on at little health.
        dark: goes on in the evening.
        shelter: number of the outer of the two cells; 0 without a shelter.
        shelter_facing: the way into it.
        last_cell: where the player was one step ago.
        still: steps since it last moved or rested.
    """

    known: KnownMap
    env_steps: Int[Array, ""]
    planted_at: Int[Array, ""]
    thirsty: Bool[Array, ""]
    hungry: Bool[Array, ""]
    tired: Bool[Array, ""]
    hurt: Bool[Array, ""]
    dark: Bool[Array, ""]
    shelter: Int[Array, ""]
    shelter_facing: Int[Array, ""]
    last_cell: Int[Array, ""]
    still: Int[Array, ""]


@chex.dataclass(frozen=True)
class Way:
    """Where the path field leads from the player's cell.

    Attributes:
        cost: of the whole way; 0 on a place to stand.
        facing: of its first step.
        target: number of the cell at its end.
    """

    cost: Int[Array, ""]
    facing: Int[Array, ""]
    target: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class CraftaxExpert:
    """The scripted player as an `Expert`.

    Attributes:
        errors: share of steps in which it does something at random.
        dawdling: share of steps in which it does nothing.
        unknown: goals it does not know.
        short_places: its plans point with the words of the ``compact`` text.
    """

    errors: float = 0.0
    dawdling: float = 0.0
    unknown: frozenset[Goal] = frozenset()
    short_places: bool = True
    phrases: tuple[str, ...] = STYLE_PHRASES
    styles: tuple[str, ...] = STYLE_NAMES
    goal_names: tuple[str, ...] = GOAL_NAMES

    def init(self) -> Memory:
        """Remember nothing."""
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return Memory(
            known=blank_map(),
            env_steps=zero,
            planted_at=zero - 1,
            thirsty=no,
            hungry=no,
            tired=no,
            hurt=no,
            dark=no,
            shelter=zero,
            shelter_facing=zero,
            last_cell=zero,
            still=zero,
        )

    def act(
        self, key: PRNGKeyArray, memory: Memory, state: Any
    ) -> tuple[Memory, Int[Array, ""], Intent]:
        """Look, remember, want, walk, and know what for."""
        seen = view(state)
        memory = _take_in(memory, seen)
        scene = draw_mobs(memory.known, seen)
        sites = find_sites(memory.known)
        situation = _situation(memory, scene, sites, seen)
        goal, amount = choose(situation, self.unknown)
        way = _find_way(goal, scene, sites, seen)
        memory = _settle(memory, goal, sites, seen)
        action = _action(goal, way, scene, memory, seen)
        action = _shake(key, action, scene, memory, seen)
        tile = scene.reshape(-1)[way.target]
        goal, amount = _as_gone_for(goal, amount, tile)
        facts = PlanFacts(
            amount=amount,
            later=_later(situation, goal, amount, self.unknown),
            offset=offset_to(way.target, seen.position),
            target_tile=tile,
            supplies=jnp.concatenate([seen.inventory, seen.vitals]).astype(jnp.int32),
            reason=_reason(goal, memory, seen),
        )
        return memory, self._slip(key, action), Intent(goal=goal, facts=facts)

    def say(self, key: PRNGKeyArray, intent: Intent, style: Int[Array, ""]) -> Phrases:
        """Put an intent into words; see ``say_plan``."""
        return say_plan(key, intent, style, self.short_places)

    def _slip(self, key: PRNGKeyArray, action: Int[Array, ""]) -> Int[Array, ""]:
        """Err, or dawdle, as often as this player does."""
        err_key, which_key, dawdle_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        errs = jax.random.uniform(err_key) < self.errors
        dawdles = jax.random.uniform(dawdle_key) < self.dawdling
        other = jax.random.randint(which_key, (), 0, len(ACTION_NAMES), jnp.int32)
        return jnp.where(errs, other, jnp.where(dawdles, NOOP, action))


def make_craftax_expert(config: EnvConfig, skill: ExpertConfig) -> CraftaxExpert:
    """Make the scripted player of Craftax-Classic, as good or bad as ``skill`` says.

    Raises:
        ValueError: ``skill`` names a goal that there is not.
    """
    strange = [name for name in skill.unknown_goals if name not in GOAL_NAMES]
    if strange:
        raise ValueError(
            f"expert.unknown_goals: {strange} are no goals of this player; it has "
            f"{', '.join(GOAL_NAMES)}"
        )
    return CraftaxExpert(
        errors=skill.errors,
        dawdling=skill.dawdling,
        unknown=frozenset(Goal[name.upper()] for name in skill.unknown_goals),
        short_places=config.text == "compact",
    )


def _later(
    situation: Situation,
    goal: Int[Array, ""],
    amount: Int[Array, ""],
    unknown: frozenset[Goal],
) -> Int[Array, "2"]:
    """The two goals that will come when this one, and the next, are reached."""
    after_it = suppose(situation, goal, amount)
    second, second_amount = choose(after_it, unknown)
    third, _ = choose(suppose(after_it, second, second_amount), unknown)
    return jnp.stack([second, third])


def _reason(goal: Int[Array, ""], memory: Memory, seen: PlayerView) -> Int[Array, ""]:
    """Why a goal is wanted, as in ``PlanFacts``."""
    health, food, drink, energy = range(len(VITAL_NAMES))
    low = seen.vitals <= 6
    indoors = _is_one_of(goal, Goal.SHELTER, Goal.REST)
    cases = [
        ((goal == Goal.DRINK) & low[drink], drink),
        ((goal == Goal.EAT_COW) & low[food], food),
        (goal == Goal.SLEEP, energy),
        (indoors & memory.hurt, health),
        (indoors & memory.dark, BY_DARKNESS),
        (indoors & memory.tired, energy),
    ]
    conditions, reasons = zip(*cases, strict=True)
    return jnp.select(conditions, [jnp.int32(r) for r in reasons], BY_PURPOSE)


def _take_in(memory: Memory, seen: PlayerView) -> Memory:
    """Bring map, clocks and drives up to date with what is seen."""
    here = cell_number(seen.position)
    planted = goals_done(seen.achievements)[Goal.PLANT_SAPLING]
    memory = dataclasses.replace(
        memory,
        known=remember(memory.known, seen),
        env_steps=memory.env_steps + 1,
        planted_at=jnp.where(
            planted & (memory.planted_at < 0), memory.env_steps, memory.planted_at
        ),
        last_cell=here,
        still=jnp.where(here != memory.last_cell, 0, memory.still + 1),
    )
    return _feel(memory, seen)


def _switch(
    before: Bool[Array, ""], on: Bool[Array, ""], off: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Hysteresis: on at once, then on until ``off``. Without it plans flicker."""
    return on | (before & ~off)


def _feel(memory: Memory, seen: PlayerView) -> Memory:
    """Update the drives. A drink or a cow nearby is taken early."""
    health, food, drink, energy = (seen.vitals[i] for i in range(len(VITAL_NAMES)))
    dark = _switch(memory.dark, seen.light < 0.2, seen.light >= 0.3)
    hurt = _switch(memory.hurt, health <= 3, health >= HEALED)
    done = goals_done(seen.achievements)
    low = jnp.where(dark, 2, 4)
    water, cow = _nearest(seen, "water") <= 4, _nearest(seen, "cow") <= 6
    sip = water & ((drink <= 6) | ~done[Goal.DRINK])
    bite = cow & ((food <= 6) | ~done[Goal.EAT_COW])
    safe = (dark | hurt) & enclosed(draw_mobs(memory.known, seen), seen.position)
    sleepy = jnp.where(safe, FULL - 1, jnp.where(dark, 6, 3))
    return dataclasses.replace(
        memory,
        thirsty=_switch(
            memory.thirsty,
            (drink <= low) | sip,
            (drink >= FULL) | ((drink > 4) & ~water),
        ),
        hungry=_switch(
            memory.hungry,
            (food <= low) | bite,
            (food >= FED) | ((food > 4) & ~cow),
        ),
        tired=_switch(memory.tired, energy <= sleepy, energy >= FULL),
        hurt=hurt,
        dark=dark,
    )


def _nearest(seen: PlayerView, name: str) -> Int[Array, ""]:
    """Manhattan distance to the nearest such tile in view."""
    return jnp.min(jnp.where(seen.tiles == TILE[name], _AWAY, UNREACHABLE))


def _situation(
    memory: Memory, scene: KnownMap, sites: Sites, seen: PlayerView
) -> Situation:
    """Boil what is seen and remembered down to what the rules ask for."""
    known, beside = memory.known, ahead(scene, seen.position)[1:]
    growing = memory.planted_at >= 0
    overdue = memory.env_steps - memory.planted_at > PLANT_RIPENS
    _, food, drink, _ = seen.vitals
    armed = seen.inventory[ITEM["wood_sword"]] > 0
    zombie = (beside == TILE["zombie"]).any() | _zombie_comes(scene, seen)
    return Situation(
        inventory=seen.inventory.astype(jnp.int32),
        done=goals_done(seen.achievements),
        thirsty=memory.thirsty,
        hungry=memory.hungry,
        watered=drink >= FULL,
        fed=food >= FED,
        tired=memory.tired,
        hurt=memory.hurt,
        exhausted=memory.hurt & (food > 2) & (drink > 2),
        dark=memory.dark,
        enclosed=enclosed(scene, seen.position),
        zombie_beside=zombie,
        skeleton_beside=(beside == TILE["skeleton"]).any(),
        skeleton_near=(_nearest(seen, "skeleton") <= 7) & armed,
        plant_growing=growing,
        plant_ripe=growing & (overdue | (known == TILE["ripe plant"]).any()),
        table_near=distance(sites.bench, seen.position) <= WORTH_THE_WAY,
        forge_near=distance(sites.forge, seen.position) <= WORTH_THE_WAY,
        coal_known=(known == TILE["coal"]).any(),
        iron_known=(known == TILE["iron"]).any(),
    )


def _zombie_comes(scene: KnownMap, seen: PlayerView) -> Bool[Array, ""]:
    """Whether a zombie is about to step before a sword that kills it in one hit.

    It hits as soon as it may once it stands beside the player, so meeting it with the
    sword raised costs nothing, and turning to it costs two health.
    """
    stone, iron = (seen.inventory[ITEM[f"{kind}_sword"]] for kind in ("stone", "iron"))
    free = look_up(IS_WALKED, ahead(scene, seen.position)[seen.facing])
    behind = ahead(scene, seen.position, 2)[seen.facing]
    return ((stone >= 2) | (iron >= 1)) & free & (behind == TILE["zombie"])


def _find_way(
    goal: Int[Array, ""], scene: KnownMap, sites: Sites, seen: PlayerView
) -> Way:
    """The cheapest way to the nearest target of a goal, or to where to explore."""
    here = cell_number(seen.position)
    pickaxes = (seen.inventory[ITEM[f"{k}_pickaxe"]] for k in ("wood", "stone", "iron"))
    level = jnp.max(jnp.stack([(n > 0) * i for i, n in enumerate(pickaxes, 1)]))
    bridging = (level > 0) & (seen.inventory[ITEM["stone"]] >= 2)
    entry_of = look_up(_ENTRY, level)
    entry_of = entry_of.at[TILE["water"]].set(jnp.where(bridging, _BRIDGE, CLOSED))
    target_of = look_up(_TARGETS, goal) | _ores_on_the_way(goal, level, seen)

    target = target_of[scene].reshape(-1).at[here].set(False)
    terrain = widen(look_up(_TERRAIN, goal)[scene]).reshape(-1)
    explore = look_up(_EXPLORING, goal) + jnp.where(terrain, 0, _WRONG_TERRAIN)
    start = jnp.where(scene.reshape(-1) == UNKNOWN, explore, UNREACHABLE)
    start = jnp.where(target | _stands(goal, sites).reshape(-1), 0, start)
    entry = jnp.where(target, 1, entry_of[scene].reshape(-1))
    cost, leads_to = path_field(start, entry, here)

    around = here + STEPS
    # Among equally good ways the one that needs no turn.
    steps = 2 * (entry + cost)[around] + (jnp.arange(5) != seen.facing)
    facing = 1 + jnp.argmin(steps[1:])
    arrived = cost[here] == 0
    return Way(
        cost=cost[here],
        facing=facing,
        target=leads_to[jnp.where(arrived, here, around[facing])],
    )


def _stands(goal: Int[Array, ""], sites: Sites) -> Bool[Array, "70 72"]:
    """The cells to stand on for a goal that is reached by standing somewhere."""
    forging = (goal == Goal.MAKE_IRON_PICKAXE) | (goal == Goal.MAKE_IRON_SWORD)
    at_table = (look_up(_CRAFT, goal) >= 0) | (goal == Goal.PLACE_FURNACE)
    return jnp.select(
        [goal == Goal.SHELTER, forging, at_table],
        [sites.entrances.any(0), sites.forge, sites.bench],
        False,
    )


def _ores_on_the_way(
    goal: Int[Array, ""], level: Int[Array, ""], seen: PlayerView
) -> Bool[Array, " tiles"]:
    """Ores needed later are as good a target as what is mined now."""
    mining = (goal == Goal.MINE_STONE) | (goal == Goal.MINE_COAL)
    coal = mining & (seen.inventory[ITEM["coal"]] < ORES_WANTED)
    iron = mining & (seen.inventory[ITEM["iron"]] < ORES_WANTED) & (level >= 2)
    none = jnp.zeros(len(TILE_NAMES), bool)
    return none.at[TILE["coal"]].set(coal).at[TILE["iron"]].set(iron)


def _as_gone_for(
    goal: Int[Array, ""], amount: Int[Array, ""], tile: Array
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The goal by what it really goes for: an ore on the way has its own name."""
    mining = (goal == Goal.MINE_STONE) | (goal == Goal.MINE_COAL)
    coal, iron = mining & (tile == TILE["coal"]), mining & (tile == TILE["iron"])
    named = jnp.where(coal, int(Goal.MINE_COAL), goal)
    named = jnp.where(iron, int(Goal.MINE_IRON), named)
    return named, jnp.where(named == goal, amount, ORES_WANTED)


def _settle(
    memory: Memory, goal: Int[Array, ""], sites: Sites, seen: PlayerView
) -> Memory:
    """Decide for a shelter at its entrance, give it up when it is left.

    Who rests on purpose is not stuck.
    """
    here = cell_number(seen.position)
    inward = look_up(STEPS, memory.shelter_facing)
    depth = here - memory.shelter  # one step before the outer cell, in it, or inside
    at_it = (depth == -inward) | (depth == 0) | (depth == inward)
    resting = _is_one_of(goal, Goal.SLEEP, *_AT_REST) | seen.sleeping
    busy = _is_one_of(goal, Goal.SHELTER, Goal.FIGHT_ZOMBIE, Goal.FIGHT_SKELETON)
    keep = (memory.shelter > 0) & at_it & (resting | busy)
    fits = sites.entrances.reshape(5, -1)[:, here]
    facing = jnp.argmax(fits)
    fresh = (goal == Goal.SHELTER) & fits.any()
    found = jnp.where(fresh, here + look_up(STEPS, facing), 0)
    return dataclasses.replace(
        memory,
        still=jnp.where(resting, 0, memory.still),
        shelter=jnp.where(keep, memory.shelter, found),
        shelter_facing=jnp.where(keep, memory.shelter_facing, facing),
    )


def _is_one_of(goal: Int[Array, ""], *goals: Goal) -> Bool[Array, ""]:
    return (goal == jnp.array(goals)).any()


def _action(
    goal: Int[Array, ""],
    way: Way,
    scene: KnownMap,
    memory: Memory,
    seen: PlayerView,
) -> Int[Array, ""]:
    """The action that brings the goal nearer."""
    beside = ahead(scene, seen.position)
    front = beside[seen.facing]
    arrived = way.cost == 0
    waiting = (goal == Goal.FIGHT_ZOMBIE) & ~(beside == TILE["zombie"]).any()
    cases = [
        (goal == Goal.SLEEP, SLEEP),
        (waiting | _is_one_of(goal, *_AT_REST), NOOP),
        (
            (goal == Goal.SHELTER) & (memory.shelter > 0),
            _build_shelter(scene, memory, seen),
        ),
        (look_up(_FRONT_TILES, goal)[front], look_up(_FRONT_ACTION, goal)),
        (arrived & (look_up(_CRAFT, goal) >= 0), look_up(_CRAFT, goal)),
        (arrived & (goal == Goal.PLACE_FURNACE), _place_furnace(scene, seen)),
    ]
    conditions, actions = zip(*cases, strict=True)
    return jnp.select(conditions, actions, _go(way.facing, scene, seen))


def _go(facing: Int[Array, ""], scene: KnownMap, seen: PlayerView) -> Int[Array, ""]:
    """One action towards a neighbour: walk, turn to it, hit or dig it, bridge it."""
    tile = ahead(scene, seen.position)[facing]
    walk = look_up(IS_WALKED, tile) | (seen.facing != facing)
    work = jnp.where(tile == TILE["water"], PLACE_STONE, DO)
    return jnp.where(look_up(_IS_DEADLY, tile), NOOP, jnp.where(walk, facing, work))


def _place_furnace(scene: KnownMap, seen: PlayerView) -> Int[Array, ""]:
    """Place it, or get a free cell in front, if possible without walking off."""
    beside = ahead(scene, seen.position)
    ready = look_up(IS_WALKED, beside[seen.facing])
    digging, free = look_up(_IS_DUG, beside[1:]), look_up(IS_WALKED, beside[1:])
    facing = 1 + jnp.argmax(2 * digging + 1 * free)
    return jnp.where(ready, PLACE_FURNACE, _go(facing, scene, seen))


def _build_shelter(scene: KnownMap, memory: Memory, seen: PlayerView) -> Int[Array, ""]:
    """Dig two cells, step back (which turns the face to the entrance), close it."""
    here, inward = cell_number(seen.position), memory.shelter_facing
    outward = look_up(OPPOSITE, inward)
    closing = (here == memory.shelter) & (seen.facing == outward)
    at_end = here == memory.shelter + look_up(STEPS, inward)
    facing = jnp.where(at_end, outward, inward)
    return jnp.where(closing, PLACE_STONE, _go(facing, scene, seen))


def _shake(
    key: PRNGKeyArray,
    action: Int[Array, ""],
    scene: KnownMap,
    memory: Memory,
    seen: PlayerView,
) -> Int[Array, ""]:
    """A random step now and then for a player that is stuck; never into lava."""
    stuck = (memory.still > STUCK_AFTER) & (memory.still % STUCK_EVERY == 0)
    facing = jax.random.randint(key, (), 1, 5)
    safe = ~look_up(_IS_DEADLY, ahead(scene, seen.position)[facing])
    return jnp.where(stuck & safe, facing, action)
