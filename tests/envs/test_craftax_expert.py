import dataclasses
import heapq
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplan.config.schema import EnvConfig
from jaxplan.envs import craftax_expert as expert_module
from jaxplan.envs.craftax_classic import make_craftax_classic
from jaxplan.envs.craftax_expert import make_craftax_expert
from jaxplan.envs.craftax_expert_map import (
    CLOSED,
    COLUMNS,
    MAX_SWEEPS,
    ROWS,
    STEPS,
    UNREACHABLE,
    blank_map,
    enclosed,
    find_sites,
    path_field,
    remember,
)
from jaxplan.envs.craftax_goals import Goal, Situation, choose, goals_done, suppose
from jaxplan.envs.craftax_plans import PLAN_PHRASES, say_plan
from jaxplan.envs.craftax_view import TILE, view

WORLDS, ENV_STEPS = 8, 120
ALL_WORLDS, ALL_ENV_STEPS = 64, 1000


@cache
def world():
    return make_craftax_classic(EnvConfig())


@cache
def player():
    return make_craftax_expert(EnvConfig())


def play(keys, env_steps, disturb=None):
    """Actions, plans, achievements and who is alive, by world and step."""

    def one_step(carry, step):
        key, memory, state, alive = carry
        act_key, step_key = jax.random.split(jax.random.fold_in(key, step))
        shown = state if disturb is None else disturb(act_key, memory, state)
        memory, action, plan = player().act(act_key, memory, shown)
        played = world().step(step_key, state, action)
        state = jax.tree.map(
            lambda new, old: jnp.where(alive, new, old), played.state, state
        )
        record = action, plan, state.achievements, alive
        return (key, memory, state, alive & ~played.terminated), record

    def one_world(key):
        start = (key, player().init(), world().reset(key), jnp.array(True))
        return jax.lax.scan(one_step, start, jnp.arange(env_steps))[1]

    return jax.jit(jax.vmap(one_world))(keys)


@cache
def short_games():
    return play(jax.random.split(jax.random.key(0), WORLDS), ENV_STEPS)


def scramble_what_is_hidden(key, memory, state):
    """Another world that looks the same: its unseen half and hidden counters differ."""
    rows, columns = jnp.indices(state.map.shape)
    unseen = (jnp.abs(rows - state.player_position[0]) > 3) | (
        jnp.abs(columns - state.player_position[1]) > 4
    )
    noise = jax.random.randint(key, state.map.shape, 2, 17, state.map.dtype)

    def far_mobs_gone(mobs):
        away = jnp.abs(mobs.position - state.player_position[None, :])
        seen = (away[:, 0] <= 3) & (away[:, 1] <= 4)
        return mobs.replace(
            mask=mobs.mask & seen,
            health=mobs.health + 1,
            attack_cooldown=mobs.attack_cooldown + 1,
        )

    return state.replace(
        map=jnp.where(unseen, noise, state.map),
        mob_map=~state.mob_map,
        zombies=far_mobs_gone(state.zombies),
        cows=far_mobs_gone(state.cows),
        skeletons=far_mobs_gone(state.skeletons),
        arrows=far_mobs_gone(state.arrows),
        arrow_directions=-state.arrow_directions,
        growing_plants_age=state.growing_plants_age + 7,
        growing_plants_positions=state.growing_plants_positions + 1,
        player_hunger=state.player_hunger + 1,
        player_thirst=state.player_thirst + 1,
        player_fatigue=state.player_fatigue + 1,
        player_recover=state.player_recover + 1,
        state_rng=jax.random.fold_in(state.state_rng, 1),
        timestep=state.timestep + 1,
    )


@pytest.mark.slow
def test_worlds_that_look_the_same_are_played_the_same():
    keys = jax.random.split(jax.random.key(0), WORLDS)
    scrambled = play(keys, ENV_STEPS, scramble_what_is_hidden)
    jax.tree.map(np.testing.assert_array_equal, scrambled, short_games())


def dijkstra(start, entry):
    """Cost and first cell of the cheapest ways, by a queue in plain Python."""
    cost = np.array(start)
    queue = [(value, cell) for cell, value in enumerate(start) if value < UNREACHABLE]
    heapq.heapify(queue)
    while queue:
        value, cell = heapq.heappop(queue)
        if value > cost[cell]:
            continue
        for step in STEPS[1:]:
            neighbour, through = cell + step, value + entry[cell]
            if 0 <= neighbour < len(cost) and through < cost[neighbour]:
                cost[neighbour] = through
                heapq.heappush(queue, (through, neighbour))
    return cost


@cache
def jitted_field():
    return jax.jit(path_field)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), walls=st.floats(0, 0.5), targets=st.integers(0, 6)
)
def test_the_path_field_is_dijkstra_where_the_player_stands(seed, walls, targets):
    rng = np.random.default_rng(seed)
    inside = np.zeros((ROWS, COLUMNS), bool)
    inside[3:21, 4:24] = True
    entry = np.where(rng.random(inside.shape) < walls, CLOSED, 1)
    entry = np.where(entry == 1, rng.integers(1, 5, inside.shape), entry)
    entry = np.where(inside, entry, CLOSED).reshape(-1)
    cells = np.flatnonzero(inside)
    start = np.full(entry.shape, UNREACHABLE)
    start[rng.choice(cells, targets, replace=False)] = rng.integers(0, 40, targets)
    here = rng.choice(cells)

    cost, target = jitted_field()(jnp.array(start), jnp.array(entry), jnp.array(here))
    expected = dijkstra(start, entry)
    assert cost[here] == expected[here]
    if cost[here] < CLOSED:
        best = target[here]
        to_best = np.full(entry.shape, UNREACHABLE)
        to_best[best] = start[best]
        assert dijkstra(to_best, entry)[here] == expected[here]
        around = here + STEPS[1:]
        onward = np.asarray(cost)[around] + entry[around]
        assert onward.min() == expected[here] or cost[here] == start[here]


def test_a_way_longer_than_the_sweeps_is_given_up_not_looped_over():
    entry = np.full((ROWS, COLUMNS), CLOSED)
    for row in range(3, 66, 2):  # a snake of corridors, far longer than the limit
        entry[row, 4:68] = 1
        entry[row + 1, 67 if row % 4 == 3 else 4] = 1
    start = np.full(entry.size, UNREACHABLE)
    start[3 * COLUMNS + 4] = 0
    end = 65 * COLUMNS + 4
    cost, _ = jitted_field()(jnp.array(start), jnp.array(entry.ravel()), jnp.array(end))
    assert cost[end] >= CLOSED
    near = 3 * COLUMNS + 4 + MAX_SWEEPS // 4
    cost, _ = jitted_field()(
        jnp.array(start), jnp.array(entry.ravel()), jnp.array(near)
    )
    assert cost[near] == MAX_SWEEPS // 4


def test_the_map_keeps_what_was_seen_and_never_guesses_what_an_arrow_hides():
    seen = view(jax.jit(world().reset)(jax.random.key(1)))
    tiles = seen.tiles.at[0, 0].set(TILE["arrow"]).at[0, 1].set(TILE["skeleton"])
    tiles = tiles.at[0, 2].set(TILE["lava"])
    known = remember(blank_map(), dataclasses.replace(seen, tiles=tiles))
    row, column = seen.position  # of the view's corner in the map with its margin
    assert known[row, column] == TILE["invalid"]
    assert known[row, column + 1] == TILE["path"]
    hidden = tiles.at[0, 2].set(TILE["arrow"])
    again = remember(known, dataclasses.replace(seen, tiles=hidden))
    assert again[row, column + 2] == TILE["lava"]
    assert int((known != blank_map()).sum()) == 62


def test_shelters_are_two_walled_cells_behind_an_entrance():
    text = """
        #######
        #######
        ..#####
        #######
        #######
    """
    code = {"#": TILE["stone"], ".": TILE["path"]}
    rows = [[code[mark] for mark in line.strip()] for line in text.split()]
    known = blank_map().at[20:25, 20:27].set(jnp.array(rows, jnp.int8))
    entrances = find_sites(known).entrances
    assert entrances[2, 22, 21]  # eastwards from the inner end of the tunnel
    assert int(entrances.sum()) == 2  # and walking in from its mouth is no wall
    position = jnp.array([22 - 3, 21 - 4])
    assert not enclosed(known, position)
    assert enclosed(known.at[22, 20].set(TILE["stone"]), position)


def test_drives_stay_on_until_their_own_limit():
    seen = view(jax.jit(world().reset)(jax.random.key(1)))
    barren = jnp.full_like(seen.tiles, TILE["sand"]).at[3, 6].set(TILE["water"])
    feel = jax.jit(expert_module._feel)
    memory, thirst = player().init(), []
    for drink in (9, 7, 6, 7, 8, 9, 8, 7):
        vitals = jnp.array([9, 9, drink, 9])
        done = jnp.ones(22, bool)
        seen = dataclasses.replace(seen, tiles=barren, vitals=vitals, achievements=done)
        memory = feel(memory, seen)
        thirst.append(bool(memory.thirsty))
    assert thirst == [False, False, True, True, True, False, False, False]

    memory, hurt = player().init(), []
    for health in (9, 4, 3, 4, 5, 6, 5, 4):
        memory = feel(
            memory, dataclasses.replace(seen, vitals=jnp.array([health, 9, 9, 9]))
        )
        hurt.append(bool(memory.hurt))
    assert hurt == [False, False, True, True, True, False, False, False]

    memory, dark = player().init(), []
    for light in (0.5, 0.25, 0.1, 0.25, 0.35, 0.25):
        memory = feel(memory, dataclasses.replace(seen, light=jnp.float32(light)))
        dark.append(bool(memory.dark))
    assert dark == [False, False, True, True, False, False]


def nothing_urgent():
    no = jnp.array(False)
    flags = {field.name: no for field in dataclasses.fields(Situation)}
    flags |= {"inventory": jnp.zeros(12, jnp.int32)}
    flags |= {"done": goals_done(jnp.zeros(22, bool))}
    flags |= {"coal_known": ~no, "iron_known": ~no}
    return Situation(**flags)


def test_the_rules_lead_through_all_tools_in_order():
    situation, told = nothing_urgent(), []
    while not told or told[-1][0] != "MINE_DIAMOND":
        goal, amount = jax.jit(choose)(situation)
        told.append((Goal(int(goal)).name, int(amount)))
        situation = jax.jit(suppose)(situation, goal, amount)
        assert int(situation.inventory.min()) >= 0
    assert told == [
        ("COLLECT_SAPLING", 1),
        ("PLANT_SAPLING", 0),
        ("COLLECT_WOOD", 4),
        ("PLACE_TABLE", 0),
        ("MAKE_WOOD_PICKAXE", 0),
        ("MAKE_WOOD_SWORD", 0),
        ("COLLECT_WOOD", 7),
        ("MINE_STONE", 4),
        ("PLACE_STONE", 0),
        ("MINE_STONE", 4),
        ("MAKE_STONE_PICKAXE", 0),
        ("MAKE_STONE_SWORD", 0),
        ("MAKE_STONE_SWORD", 0),
        ("PLACE_FURNACE", 0),
        ("MINE_COAL", 2),
        ("MINE_IRON", 2),
        ("MINE_STONE", 2),
        ("MAKE_IRON_PICKAXE", 0),
        ("MAKE_IRON_SWORD", 0),
        ("MINE_DIAMOND", 1),
    ]


def test_fights_come_before_thirst_thirst_before_hunger_and_hunger_before_sleep():
    yes = jnp.array(True)
    urgent = dataclasses.replace(
        nothing_urgent(),
        inventory=jnp.full(12, 1, jnp.int32),
        zombie_beside=yes,
        thirsty=yes,
        hungry=yes,
        tired=yes,
    )
    goals = []
    for _ in range(5):
        goal, amount = jax.jit(choose)(urgent)
        goals.append(Goal(int(goal)).name)
        urgent = jax.jit(suppose)(urgent, goal, amount)
    assert goals == ["FIGHT_ZOMBIE", "DRINK", "EAT_COW", "SHELTER", "SLEEP"]


def spoken(plan):
    mask = np.asarray(plan.mask)
    return "".join(PLAN_PHRASES[i] for i in np.asarray(plan.ids)[mask])


def test_plans_are_sentences_of_single_words():
    for phrase in PLAN_PHRASES:
        assert phrase.startswith(" ")
        assert " " not in phrase[1:]
        assert phrase == phrase.lower()
    assert len(set(PLAN_PHRASES)) == len(PLAN_PHRASES) <= 150


def test_a_plan_says_goal_place_stop_and_what_comes_then():
    def say(goal, amount, then, south, east, tile):
        plan = say_plan(
            jnp.array(int(goal)),
            jnp.array(amount),
            jnp.array(int(then)),
            jnp.array([south, east]),
            jnp.array(TILE[tile]),
        )
        return spoken(plan)

    iron = Goal.MINE_IRON, 2, Goal.MAKE_IRON_PICKAXE
    assert say(*iron, -3, -2, "iron") == (
        " mine iron 3n2w until 2 iron , then make iron pickaxe"
    )
    assert say(*iron, -4, -2, "iron") == (  # out of view
        " mine iron 4 north 2 west until 2 iron , then make iron pickaxe"
    )
    assert say(*iron, 9, -2, "invalid") == (
        " explore south for iron until 2 iron , then make iron pickaxe"
    )
    assert say(*iron, 9, -8, "invalid").startswith(" explore south west for iron")
    assert say(Goal.DRINK, 9, Goal.EAT_COW, 0, -40, "water") == (
        " drink water 31 west until 9 drink , then eat cow"
    )
    assert say(Goal.REST, 0, Goal.MINE_DIAMOND, 5, 5, "grass") == (
        " rest until light , then mine diamond"
    )
    sword = Goal.MAKE_STONE_SWORD, 0, Goal.PLACE_FURNACE
    assert say(*sword, 4, 2, "grass") == (
        " make stone sword at table 4 south 2 east , then place furnace"
    )


@pytest.mark.slow
def test_every_plan_fits_and_leads_on():
    _, plans, _, alive = short_games()
    assert plans.ids.shape == (WORLDS, ENV_STEPS, plans.mask.shape[-1])
    assert plans.mask.shape[-1] <= 20
    assert int(plans.ids.min()) >= 0
    assert int(plans.ids.max()) < len(PLAN_PHRASES)
    lengths = np.asarray(plans.mask.sum(-1))[np.asarray(alive)]
    assert lengths.min() >= 2
    assert lengths.max() <= 17
    talk = np.asarray(plans.mask[..., 0])
    assert talk.all()  # every plan begins with what to do


@pytest.mark.slow
def test_the_player_is_one_trace_without_callbacks():
    traces = []

    @jax.jit
    @jax.vmap
    def act(key, memory, state):
        traces.append(None)
        return player().act(key, memory, state)

    keys = jax.random.split(jax.random.key(3), 2)
    states = jax.vmap(world().reset)(keys)
    memory = jax.vmap(lambda _: player().init())(keys)
    lowered = act.lower(keys, memory, states).as_text()
    assert "callback" not in lowered
    memory, _, _ = act(keys, memory, states)
    act(keys, memory, states)
    assert len(traces) == 1


@pytest.mark.slow
def test_sixty_four_games_unlock_nineteen_achievements_on_average():
    keys = jax.random.split(jax.random.key(64), ALL_WORLDS)
    _, plans, achievements, alive = play(keys, ALL_ENV_STEPS)
    assert float(achievements[:, -1].sum(-1).mean()) >= 19
    assert float(alive[:, -1].mean()) >= 0.75
    mean_length = float((plans.mask.sum(-1) * alive).sum() / alive.sum())
    assert 6 <= mean_length <= 16
