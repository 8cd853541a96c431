import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig, PlanConfig
from jaxplan.envs.craftax_view import TILE_NAMES, view
from jaxplan.envs.worlds import make_env
from jaxplan.plan.parse import render_turn
from jaxplan.rollout.setup import make_language
from jaxplan.text.tokenizer import load_tokenizer
from tests.envs import oracle
from tests.tokenizers import KINDS

LEVELS = {
    "compact": oracle.compact,
    "balrog": oracle.balrog,
    "balrog_precise": oracle.balrog_precise,
}
# What a player can neither see nor count.
HIDDEN = ["player_recover", "player_hunger", "player_thirst", "player_fatigue"]
HIDDEN += ["growing_plants_age", "achievements", "timestep"]


def texts(world, states):
    """Describe stacked states: one string each."""
    spoken = jax.device_get(jax.jit(jax.vmap(world.describe))(states))
    return [
        "".join(world.phrases[number] for number in ids[mask])
        for ids, mask in zip(spoken.ids, spoken.mask, strict=True)
    ]


def unstack(states):
    """List stacked states one by one, as NumPy arrays, without their random keys."""
    host = jax.device_get(states.replace(state_rng=None))
    count = len(host.timestep)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(count)]


@pytest.mark.parametrize("level", LEVELS)
def test_every_state_is_described_as_by_the_slow_describer(level, states):
    world = make_env(EnvConfig(text=level))
    for said, state in zip(texts(world, states), unstack(states), strict=True):
        assert said == LEVELS[level](state)


def by_hand(states):
    """A world built by hand: a tree ahead, a cow, a lake in the south-west."""
    state = jax.tree.map(lambda leaf: leaf[:1], states)
    blocks = np.full((1, 64, 64), TILE_NAMES.index("grass"))
    blocks[0, 31, 32] = TILE_NAMES.index("tree")
    blocks[0, 33:36, 28:31] = TILE_NAMES.index("water")
    return state.replace(
        map=jnp.asarray(blocks, jnp.int32),
        player_position=jnp.array([[32, 32]]),
        player_direction=jnp.array([3]),
        cows=state.cows.replace(
            position=jnp.array([[[30, 35], [0, 0], [0, 0]]]),
            mask=jnp.array([[True, False, False]]),
        ),
        zombies=state.zombies.replace(mask=jnp.zeros((1, 3), bool)),
        inventory=state.inventory.replace(wood=jnp.array([2])),
    )


BY_HAND = {
    "compact": "\n n>tree e=grass s=grass w=grass health=9 food=9 drink=9 energy=9 "
    "light=8 wood=2 water 1s2w tree 1n cow 2n3e >",
    "balrog": """

Current Observation:
Your status:
- health: 9/9
- food: 9/9
- drink: 9/9
- energy: 9/9

Your inventory:
- wood: 2
You see:
- grass 1 step to your west
- water 3 steps to your south-west
- tree 1 step to your north
- cow 5 steps to your north-east

You face tree at your front.
""",
    "balrog_precise": """

Current Observation:
Your status:
- health: 9/9
- food: 9/9
- drink: 9/9
- energy: 9/9

Your inventory:
- wood: 2
You see:
- water 1 step south and 4 steps west
- water 1 step south and 3 steps west
- water 1 step south and 2 steps west
- water 2 steps south and 2 steps west
- water 3 steps south and 2 steps west
- tree 1 step north
- cow 2 steps north and 3 steps east

You face tree at your front.
""",
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_world_built_by_hand_is_described_in_the_expected_words(level, states):
    world = make_env(EnvConfig(text=level))
    assert texts(world, by_hand(states)) == [BY_HAND[level]]


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_player_cannot_see_does_not_change_the_text(level, states):
    world = make_env(EnvConfig(text=level))
    chance = np.random.default_rng(3)
    count = len(states.timestep)
    rows, columns = np.ogrid[:64, :64]
    away = np.abs(rows - np.asarray(states.player_position)[:, 0, None, None]) > 3
    away = away | (
        np.abs(columns - np.asarray(states.player_position)[:, 1, None, None]) > 4
    )
    other_blocks = chance.choice(oracle.BLOCKS, (count, 64, 64))
    other = states.replace(
        map=jnp.where(away, other_blocks, states.map).astype(jnp.int32),
        mob_map=~states.mob_map,
        arrow_directions=-states.arrow_directions,
        state_rng=jax.random.split(jax.random.key(9), count),
        **{name: jnp.ones_like(getattr(states, name)) for name in HIDDEN},
        **{
            name: _other_mobs(states, name) for name in ("zombies", "cows", "skeletons")
        },
    )
    assert texts(world, other) == texts(world, states)


def _other_mobs(states, name):
    """Wound all mobs, and let those out of sight change places or appear."""
    mobs = getattr(states, name)
    far = jnp.abs(mobs.position - states.player_position[:, None])
    seen = mobs.mask & (far <= np.array([[[3, 4]]])).all(-1)
    there = states.player_position[:, None] + np.array([[[4, -5]]])
    return mobs.replace(
        position=jnp.where(seen[..., None], mobs.position, there),
        mask=jnp.ones_like(mobs.mask),
        health=mobs.health + 1,
        attack_cooldown=mobs.attack_cooldown + 1,
    )


def crowded(states):
    """As much to say as can be: all items, every kind of tile in sight, asleep."""
    state = jax.tree.map(lambda leaf: leaf[:1], states)
    blocks = oracle.BLOCKS[np.arange(64 * 64).reshape(1, 64, 64) % len(oracle.BLOCKS)]
    mobs = {}
    for name, column in (("zombies", 30), ("cows", 32), ("skeletons", 34)):
        mob = getattr(state, name)
        there = jnp.broadcast_to(jnp.array([30, column]), mob.position.shape)
        mobs[name] = mob.replace(position=there, mask=jnp.ones_like(mob.mask))
    return state.replace(
        map=jnp.asarray(blocks, jnp.int32),
        player_position=jnp.array([[32, 32]]),
        is_sleeping=jnp.array([True]),
        inventory=jax.tree.map(lambda _: jnp.array([9]), state.inventory),
        **mobs,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_no_description_is_longer_than_promised(level, states):
    world = make_env(EnvConfig(text=level))
    for some in (states, crowded(states)):
        spoken = jax.jit(jax.vmap(world.describe))(some)
        assert int(spoken.mask.sum(1).max()) <= world.max_phrases
    assert texts(world, crowded(states)) == [LEVELS[level](unstack(crowded(states))[0])]


def test_the_fullest_compact_description_uses_all_but_one_phrase_at_most(states):
    world = make_env(EnvConfig(text="compact"))
    assert world.max_phrases - len(texts(world, crowded(states))[0].split()) - 1 in (
        0,
        1,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_phrases_are_few_and_all_different(level):
    phrases = make_env(EnvConfig(text=level)).phrases
    assert len(set(phrases)) == len(phrases) < 3000


def test_a_compact_phrase_is_a_line_break_or_one_word_with_its_space():
    for phrase in make_env(EnvConfig(text="compact")).phrases:
        assert re.fullmatch(r"\n| \S+", phrase), phrase


def test_the_compact_instructions_take_few_tokens_of_every_context():
    instructions = make_env(EnvConfig(text="compact")).instructions
    assert len(load_tokenizer("shipped").encode(instructions)) <= 8


@pytest.mark.parametrize("level", ["balrog", "balrog_precise"])
def test_balrog_phrases_meet_where_every_tokenizer_cuts(level):
    for phrase in make_env(EnvConfig(text=level)).phrases:
        assert re.match(r"[\n ]", phrase), phrase
        assert re.search(r"[a-z0-9]$", phrase) or phrase.endswith("at your front.\n")


def test_a_mob_hides_the_block_it_stands_on(states):
    seen = jax.jit(jax.vmap(view))(by_hand(states))
    assert TILE_NAMES[int(seen.tiles[0, 1, 7])] == "cow"


def test_beyond_the_map_lies_out_of_bounds(states):
    corner = by_hand(states).replace(player_position=jnp.array([[0, 63]]))
    tiles = np.asarray(jax.jit(jax.vmap(view))(corner).tiles[0])
    beyond = tiles == TILE_NAMES.index("out of bounds")
    np.testing.assert_array_equal(beyond[:3], True)
    np.testing.assert_array_equal(beyond[:, 5:], True)
    np.testing.assert_array_equal(beyond[3:, :5], False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["balrog", "balrog_precise"])
def test_a_stream_of_turns_has_the_ids_of_its_whole_text(level, kind, states, tmp_path):
    """Every state is seen once, with a plan before every other action."""
    world, tokenizer = make_env(EnvConfig(text=level)), KINDS[kind](tmp_path)
    plan = PlanConfig(open="<plan>", close=" </plan>\n")
    language = make_language(tokenizer, world, plan)
    grammar, table = jax.device_get((language.grammar, language.table))
    text, ids = world.instructions, language.prompt(0)
    spoken = jax.device_get(jax.jit(jax.vmap(world.describe))(states))
    for number, (phrases, mask) in enumerate(zip(spoken.ids, spoken.mask, strict=True)):
        for phrase in phrases[mask]:
            ids += table.tokens[phrase, : table.lengths[phrase]].tolist()
            text += world.phrases[phrase]
        action = world.action_names[number % len(world.action_names)]
        said = (" find 2 wood.", " rest, then mine coal")[number % 4 // 2]
        said = said if number % 2 else None
        ids += render_turn(tokenizer, grammar, said, action)
        text += f"{plan.open}{said}{plan.close}{action}" if said else action
    assert tokenizer.encode(text) == ids
