"""The world against the original's definitions, move by move and word by word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig, PlanConfig, PogsConfig
from jaxplan.envs.base import Drawn, TextEnv
from jaxplan.envs.worlds import make_env
from jaxplan.plan.grammar import make_grammar
from jaxplan.text.phrases import make_phrase_table, phrases_text
from jaxplan.text.tokenizer import load_tokenizer
from tests.envs.pogs_oracle import Explorer, game_of


def pogs(**changes):
    config = {"name": "pogs", "text": "balrog", "max_steps": 12} | changes
    sizes = {"k_hops": 2, **config.pop("pogs", {})}
    return make_env(EnvConfig(**config, pogs=PogsConfig(**sizes)))


WORLD, COMPACT = pogs(), pogs(text="compact")
reset, step = jax.jit(WORLD.reset), jax.jit(WORLD.step)
describe, describe_compactly = jax.jit(WORLD.describe), jax.jit(COMPACT.describe)
KEY = jax.random.key(0)


def say(world, seen):
    return phrases_text(world.phrases, np.asarray(seen.ids), np.asarray(seen.mask))


def moves(chance, game, count):
    """Mostly neighbours, now and then any node."""
    for _ in range(count):
        if game.over:
            return
        near = sorted(game.graph.neighbors(game.current))
        yield int(chance.choice(near if chance.random() < 0.7 else 20))


@pytest.fixture(scope="module")
def plays():
    """Random play beside the oracle: (state, game) before, and the step, flat."""
    chance, rows = np.random.default_rng(0), []
    for seed in range(25):
        state = reset(jax.random.key(seed))
        game = game_of(WORLD, state)
        for action in moves(chance, game, 15):
            texts = say(WORLD, describe(state)), game.text()
            compact = say(COMPACT, describe_compactly(state))
            listed = {n: sorted(game.seen()[n]) for n in sorted(game.seen())}
            facts = game.current, game.target, game.refused, listed
            result = step(KEY, state, jnp.int32(action))
            rows.append((result, game.step(action), texts, compact, facts))
            assert int(result.state.current) == game.current
            state = result.state
        assert game.over
    return rows


def test_rewards_endings_and_counts_are_those_of_the_original(plays):
    seen = set()
    for result, (reward, found, late, backtracks, invalid), *_ in plays:
        assert float(result.reward) == reward
        assert bool(result.terminated) == found == bool(result.events[0])
        assert bool(result.truncated) == late
        assert int(result.counts["backtracks"]) == backtracks
        assert int(result.counts["invalid_moves"]) == invalid
        seen.add((reward, late, backtracks))
    assert {reward for reward, _, _ in seen} == {-1.0, 0.0, 100.0}
    assert {late for _, late, _ in seen} == {True, False}
    assert {back for _, _, back in seen} == {0, 1}


def test_balrog_texts_are_those_of_the_wrapper(plays):
    for _, _, (ours, theirs), _, _ in plays:
        assert ours == theirs


def test_the_example_of_the_original_reads_as_there():
    links = [(2, 4), (2, 16), (3, 5), (3, 7), (3, 16)]
    tree = np.zeros((20, 20), bool)
    for a, b in links:
        tree[a, b] = tree[b, a] = True
    state = reset(KEY).replace(
        tree=jnp.asarray(tree), current=jnp.int32(16), target=jnp.int32(11)
    )
    assert say(WORLD, describe(state)) == (
        "\nnode: 2, neighbors: [4, 16]\nnode: 3, neighbors: [5, 7, 16]"
        "\nnode: 4, neighbors: [2]\nnode: 5, neighbors: [3]\nnode: 7, neighbors: [3]"
        "\nnode: 16, neighbors: [2, 3]\n\ncurrent node: 16, target node: 11"
    )
    assert say(COMPACT, describe_compactly(state)) == (
        "\n at 16 find 11 2: 4 16 3: 5 7 16 4: 2 5: 3 7: 3 16: 2 3 >"
    )


def test_compact_texts_say_the_same(plays):
    for *_, ours, (current, target, refused, listed) in plays:
        words = [f" at {current} find {target}", *[" invalid"] * refused]
        for node, near in listed.items():
            words += [f" {node}:", *(f" {other}" for other in near)]
        assert ours == "\n" + "".join(words) + " >"


def test_a_refusal_is_said_and_is_no_function_of_the_reward():
    """The original calls any move with a reward of -1 invalid."""
    state = reset(KEY)
    game = game_of(WORLD, state)
    stranger = next(n for n in range(20) if n not in game.graph[game.current])
    friend = next(n for n in game.graph[game.current] if n != game.target)
    refused = step(KEY, state, jnp.int32(stranger)).state
    assert say(WORLD, describe(refused)).endswith("Invalid Move!")
    assert " invalid" in say(COMPACT, describe_compactly(refused))
    moved = step(KEY, refused, jnp.int32(friend)).state
    assert "nvalid" not in say(WORLD, describe(moved))


def test_refused_actions_hide_no_backtrack_and_make_none():
    state = reset(KEY)
    game = game_of(WORLD, state)
    start = game.current
    friend = next(n for n in game.graph[start] if n != game.target)
    stranger = next(n for n in range(20) if n not in game.graph[friend])
    counted = []
    for action in (friend, stranger, stranger, start):
        result = step(KEY, state, jnp.int32(action))
        state = result.state
        counted.append(int(result.counts["backtracks"]))
    assert counted == [0, 0, 0, 1]


def test_hard_worlds_send_the_explorer_back():
    world = pogs(max_steps=30, pogs={"min_backtracks": 2})
    make = jax.jit(world.reset)
    for seed in range(12):
        game, explorer = game_of(world, make(jax.random.key(seed))), Explorer(2)
        while not game.over:
            game.step(explorer.act(game))
        assert explorer.returns >= 2


def test_the_explorer_is_counted_as_the_original_counts_it():
    world = pogs(max_steps=30)
    count = jax.jit(world.returns)
    counts = set()
    for seed in range(40):
        state = reset(jax.random.key(seed))
        game, explorer = game_of(world, state), Explorer(2)
        while not game.over:
            game.step(explorer.act(game))
        assert int(count(state)) == explorer.returns
        counts.add(explorer.returns)
    assert len(counts) >= 3


def test_a_world_is_a_text_env_that_can_be_drawn():
    assert isinstance(WORLD, TextEnv)
    assert isinstance(WORLD, Drawn)
    assert pogs() == WORLD
    assert hash(pogs()) == hash(WORLD)
    assert pogs() != COMPACT


def test_a_drawing_shows_the_player_and_what_it_sees(plays):
    states = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[r[0].state for r in plays[:5]]
    )
    drawing = WORLD.draw(states)
    tree = np.asarray(states.tree[0])
    assert len(drawing["graph"]["edges"]) == 19
    assert all(tree[a, b] for a, b in drawing["graph"]["edges"])
    assert len(drawing["frames"]) == 5
    for frame, at in zip(drawing["frames"], states.current, strict=True):
        assert frame["at"] == at
        assert frame["at"] in frame["visible"]


@pytest.mark.parametrize("text", ["compact", "balrog"])
def test_texts_and_actions_fit_the_shipped_tokenizer(text):
    tokenizer = load_tokenizer("shipped")
    world = pogs(text=text, pogs={"nodes": 32})
    table = make_phrase_table(tokenizer, world.phrases)
    make_grammar(tokenizer, world.action_names, PlanConfig())
    if text == "compact":
        assert (table.lengths == 1).all()
    assert all(len(tokenizer.encode(name)) == 1 for name in world.action_names)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'balrog_precise': POGS has no such text"):
        pogs(text="balrog_precise")
    with pytest.raises(ValueError, match=r"min_backtracks=3: of 256 worlds with 3 nod"):
        pogs(pogs={"nodes": 3, "min_backtracks": 3})
