import dataclasses
import heapq
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplan.config.schema import EnvConfig, ExpertConfig
from jaxplan.envs import craftax_expert as expert_module
from jaxplan.envs.base import Intent
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
from jaxplan.envs.craftax_plan_words import COUNTED, HEADS, SOUGHT
from jaxplan.envs.craftax_plans import (
    BY_DARKNESS,
    BY_PURPOSE,
    PLAN_PHRASES,
    STYLE_NAMES,
    STYLE_PHRASES,
    PlanFacts,
)
from jaxplan.envs.craftax_view import ITEM_NAMES, TILE, VITAL_NAMES, view
from tests.compiling import optimizing

WORLDS, ENV_STEPS = 8, 120
ALL_WORLDS, ALL_ENV_STEPS = 64, 1000


@cache
def world():
    return make_craftax_classic(EnvConfig())


@cache
def player(text="compact", **skill):
    return make_craftax_expert(EnvConfig(text=text), ExpertConfig(**skill))


def play(keys, env_steps, scrambled=None, expert=None, look=lambda state: None):
    """Actions, intents, achievements, who is alive, and sights, by world and step.

    Where ``scrambled``, the player is shown another world that looks the same.
    """
    expert = expert or player()

    def one_step(carry, step):
        key, memory, state, alive, scrambled = carry
        act_key, step_key = jax.random.split(jax.random.fold_in(key, step))
        shown = state
        if scrambled is not None:
            other = scramble_what_is_hidden(act_key, state)
            shown = jax.tree.map(partial(jnp.where, scrambled), other, state)
        memory, action, intent = expert.act(act_key, memory, shown)
        played = world().step(step_key, state, action)
        state = jax.tree.map(
            lambda new, old: jnp.where(alive, new, old), played.state, state
        )
        record = action, intent, state.achievements, alive, look(shown)
        alive &= ~played.terminated
        return (key, memory, state, alive, scrambled), record

    def one_world(key, scrambled):
        start = (key, expert.init(), world().reset(key), jnp.array(True), scrambled)
        return jax.lax.scan(one_step, start, jnp.arange(env_steps))[1]

    return jax.jit(jax.vmap(one_world))(keys, scrambled)


def short_keys():
    return jax.random.split(jax.random.key(0), WORLDS)


@cache
def short_games():
    """Games as they are, and again with what is hidden scrambled: one program."""
    played = play(
        jnp.concatenate([short_keys(), short_keys()]),
        ENV_STEPS,
        scrambled=jnp.arange(2 * WORLDS) >= WORLDS,
    )
    plain = jax.tree.map(lambda x: x[:WORLDS], played)
    return plain, jax.tree.map(lambda x: x[WORLDS:], played)


def scramble_what_is_hidden(key, state):
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
    jax.tree.map(np.testing.assert_array_equal, *short_games())


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
    return "".join(STYLE_PHRASES[i] for i in np.asarray(plan.ids)[mask])


@cache
def jitted_say(text="compact"):
    return jax.jit(player(text).say)


def intent_of(goal, amount, then, place, tile, after=None, reason=BY_PURPOSE, **held):
    supplies = [held.get(name, 0) for name in (*ITEM_NAMES, *VITAL_NAMES)]
    facts = PlanFacts(
        amount=jnp.array(amount),
        later=jnp.array([int(then), int(then if after is None else after)]),
        offset=jnp.array(place),
        target_tile=jnp.array(TILE[tile]),
        supplies=jnp.array(supplies),
        reason=jnp.array(reason),
    )
    return Intent(goal=jnp.array(int(goal)), facts=facts)


def wordings(style, intent, text="compact"):
    """All that can be said in a style, found by trying keys."""
    number = jnp.array(STYLE_NAMES.index(style))
    keys = jax.random.split(jax.random.key(0), 12)
    return {spoken(jitted_say(text)(key, intent, number)) for key in keys}


def test_plans_are_sentences_of_single_words():
    assert STYLE_PHRASES[: len(PLAN_PHRASES)] == PLAN_PHRASES
    for phrase in STYLE_PHRASES:
        assert phrase.startswith(" ")
        assert " " not in phrase[1:]
        assert phrase == phrase.lower()
        assert not set("<>{}") & set(phrase)
    assert len(set(STYLE_PHRASES)) == len(STYLE_PHRASES)
    assert len(PLAN_PHRASES) <= 150


def test_a_terse_plan_says_goal_place_stop_and_what_comes_then():
    def say(goal, amount, then, south, east, tile):
        intent = intent_of(goal, amount, then, [south, east], tile)
        (only,) = wordings("terse", intent)
        return only

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


def test_styles_say_the_same_in_their_own_ways():
    mining = intent_of(
        *(Goal.MINE_IRON, 2, Goal.MAKE_IRON_PICKAXE, [-3, -2], "iron"),
        after=Goal.MAKE_IRON_SWORD,
        iron=1,
    )
    said = wordings("gap_bridging", mining)
    assert said == {
        " i have 1 iron and need 2 iron , so mine iron 3n2w . then make iron pickaxe",
        " still need 1 more iron : mine iron 3n2w"
        " . that opens the way to an iron pickaxe",
    }
    assert wordings("justified", mining) >= {
        " mine iron 3n2w until 2 iron because iron tools need iron"
        " . then make iron pickaxe"
    }
    assert wordings("next_steps", mining) >= {
        " next steps : mine iron 3n2w ; make iron pickaxe ; make iron sword"
    }
    asleep = intent_of(
        *(Goal.SLEEP, 9, Goal.DRINK, [0, 0], "path"),
        reason=VITAL_NAMES.index("energy"),
        energy=2,
    )
    assert wordings("justified", asleep) >= {
        " sleep until 9 energy because energy is 2 . then drink water"
    }
    digging = intent_of(
        Goal.SHELTER, 0, Goal.SLEEP, [0, 6], "invalid", reason=BY_DARKNESS
    )
    assert wordings("justified", digging) >= {
        " explore east for rock because it is dark . then sleep"
    }
    assert wordings("information_gap", digging) >= {
        " not known : where rock is , so explore east . still open : sleep"
    }
    for style in STYLE_NAMES[1:]:
        assert len(wordings(style, mining)) == 2


def test_other_texts_are_pointed_at_in_whole_words():
    mining = intent_of(Goal.MINE_IRON, 2, Goal.MINE_IRON, [-3, -2], "iron")
    assert wordings("terse", mining, text="balrog") == {
        " mine iron 3 north 2 west until 2 iron"
    }


@cache
def whole_games():
    """Games to their end, compiled as users do, and all there is to see in them."""
    keys = jax.random.split(jax.random.key(64), ALL_WORLDS)
    with optimizing():
        return jax.device_get(play(keys, ALL_ENV_STEPS, look=view))


def long_games():
    """As much of them as it takes to check what was said."""
    return jax.tree.map(lambda x: x[:12, :500], whole_games())


@cache
def all_said():
    """By style, text and place in the long games of many plans."""
    _, intents, _, alive, seen = long_games()
    chance = np.random.default_rng(0)
    where = np.argwhere(alive & ~seen.sleeping)
    where = where[chance.choice(len(where), 400, replace=False)]
    own = jax.tree.map(lambda array: array[where[:, 0], where[:, 1]], intents)
    say = jax.jit(jax.vmap(player().say, in_axes=(0, 0, None)))
    keys = jax.random.split(jax.random.key(1), len(where))
    said = {}
    for number, style in enumerate(STYLE_NAMES):
        plans = jax.device_get(say(keys, own, jnp.array(number)))
        said[style] = [
            (spoken(jax.tree.map(lambda a, i=i: a[i], plans)), *where[i])
            for i in range(len(where))
        ]
    return said


PLACE = re.compile(
    r" (?:(\d+)n|(\d+)s)?(?:(\d+)w|(\d+)e)?(?= )"
    r"| (\d+) (north|south)(?: (\d+) (west|east))?| (\d+) (west|east)"
)


def read_place(text):
    """Rows south and columns east that a plan names, or None."""
    for found in PLACE.finditer(f"{text} "):
        n, s, w, e, rows, row_side, columns, column_side, alone, side = found.groups()
        if rows:
            south = int(rows) * (1 if row_side == "south" else -1)
            east = int(columns or 0) * (1 if column_side == "east" else -1)
            return south, east
        if alone:
            return 0, int(alone) * (1 if side == "east" else -1)
        if n or s or w or e:
            return int(s or 0) - int(n or 0), int(e or 0) - int(w or 0)
    return None


def names_of(goal):
    """Words that tell a goal from the others: its head or what it seeks."""
    return {HEADS[goal], SOUGHT.get(goal, HEADS[goal])}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLE_NAMES)
def test_a_plan_says_what_the_player_goes_for(style):
    """The text is read again; what it names is there, and is the player's target."""
    _, intents, _, _, seen = long_games()
    places = 0
    for text, game, step in all_said()[style]:
        goal = Goal(int(intents.goal[game, step]))
        facts = jax.tree.map(lambda a, at=(game, step): a[at], intents.facts)
        if style not in ("high_level_strategy", "milestone"):  # these name outcomes
            assert any(f" {name}" in text for name in names_of(goal)), text
        place = read_place(text)
        if place is None:
            continue
        places += 1
        assert place == tuple(np.clip(facts.offset, -31, 31)), text
        row, column = place[0] + 3, place[1] + 4
        if 0 <= row < 7 and 0 <= column < 9 and goal in SOUGHT:
            tile = seen.tiles[game, step, row, column]
            kinds = {
                "rock": ("grass", "sand", "path"),
                "plant": ("plant", "ripe plant"),
            }
            kind = kinds.get(SOUGHT[goal], (SOUGHT[goal],))
            assert tile in [TILE[name] for name in kind], text
    assert places > 100


@pytest.mark.slow
def test_what_is_gathered_is_what_the_plan_pointed_at():
    """Whenever the counted thing grows, the plan named the very cell it came from."""
    actions, intents, _, alive, seen = long_games()
    step_of = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])
    checked = 0
    for goal in (Goal.COLLECT_WOOD, Goal.MINE_STONE, Goal.MINE_COAL, Goal.MINE_IRON):
        item = ITEM_NAMES.index(COUNTED[goal])
        more = np.diff(seen.inventory[..., item], axis=1) > 0
        own = more & alive[:, 1:] & (intents.goal[:, :-1] == int(goal))
        for game, step in np.argwhere(own):
            assert actions[game, step] == 5  # do
            faced = step_of[seen.facing[game, step]]
            target = intents.facts.offset[game, step]
            if goal == Goal.MINE_STONE and (target != faced).any():
                continue  # dug away on the way to better stone
            np.testing.assert_array_equal(target, faced)
            checked += 1
    assert checked > 100


@pytest.mark.slow
def test_what_comes_then_mostly_comes():
    """At the end of a goal that was not broken off, its successor was announced."""
    _, intents, _, alive, _ = long_games()
    sudden = [Goal.FIGHT_ZOMBIE, Goal.FIGHT_SKELETON, Goal.DRINK, Goal.EAT_COW]
    kept = told = 0
    for goals, later, lives in zip(
        intents.goal, intents.facts.later[..., 0], alive, strict=True
    ):
        changes = np.flatnonzero((np.diff(goals) != 0) & lives[1:])
        for step in changes:
            if goals[step + 1] in sudden or goals[step] in sudden:
                continue
            told += 1
            kept += later[step] == goals[step + 1]
    assert told > 100
    assert kept / told > 0.6


@pytest.mark.slow
def test_every_plan_is_short_enough_and_leads_on():
    for style, texts in all_said().items():
        lengths = [len(text.split()) for text, *_ in texts]
        assert min(lengths) >= 1, style
        assert max(lengths) <= 60, style
    assert max(len(text.split()) for text, *_ in all_said()["terse"]) <= 17


@pytest.mark.slow
def test_weaker_players_are_weaker():
    def reached(played):
        return jax.device_get((played[0], played[1].goal, played[2][:, -1].sum(-1)))

    def try_with(**skill):
        return reached(play(short_keys(), ENV_STEPS, expert=player(**skill)))

    _, _, best = reached(short_games()[0])
    _, _, erring = try_with(errors=0.4)
    actions, _, slow = try_with(dawdling=0.5)
    unknown = ("collect_sapling", "make_wood_sword", "drink")
    _, goals, ignorant = try_with(unknown_goals=unknown)
    for weaker in (erring, slow, ignorant):
        assert weaker.mean() < best.mean() - 1
    assert 0.4 < (actions == 0).mean() < 0.7
    assert not np.isin(goals, [int(Goal[name.upper()]) for name in unknown]).any()


def test_a_goal_that_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match=r"\['dig_gold'\] are no goals.*make_iron_sword"
    ):
        player(unknown_goals=("dig_gold",))


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
    _, _, achievements, alive, _ = whole_games()
    assert float(achievements[:, -1].sum(-1).mean()) >= 19
    assert float(alive[:, -1].mean()) >= 0.75
