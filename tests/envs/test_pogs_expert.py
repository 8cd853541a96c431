"""The explorer against networkx, and all scripted players against known rates."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig, PogsConfig
from jaxplan.envs.pogs_expert import PogsWanderer, find_ways, way_to
from jaxplan.envs.worlds import make_env, make_expert, make_references
from jaxplan.rollout.schedule import make_worlds
from jaxplan.rollout.scripted import play_scripted
from jaxplan.text.phrases import make_phrase_table, phrases_text
from jaxplan.text.tokenizer import load_tokenizer
from tests.envs.pogs_oracle import Explorer, game_of


def config(nodes=20, k_hops=2, min_backtracks=0):
    pogs = PogsConfig(nodes=nodes, k_hops=k_hops, min_backtracks=min_backtracks)
    return EnvConfig(name="pogs", max_steps=30, pogs=pogs)


def leads_back(tree, visited):
    """Whether each node but the first has one neighbour that was visited before it."""
    earlier = [{*visited[:place]} for place in range(len(visited))]
    ways = zip(visited, earlier, strict=True)
    return [len(before & {*tree[node]}) for node, before in ways] == [
        int(before != set()) for before in earlier
    ]


@pytest.mark.parametrize("k_hops", [1, 2, 3])
def test_the_explorer_plays_and_plans_like_one_on_networkx(k_hops):
    world, expert = make_env(config(k_hops=k_hops)), make_expert(config(k_hops=k_hops))
    reset, step, act = (jax.jit(f) for f in (world.reset, world.step, expert.act))
    chance, key = np.random.default_rng(0), jax.random.key(0)
    reasons = set()
    for seed in range(12):
        state, memory = reset(jax.random.key(seed)), expert.init()
        game, explorer = game_of(world, state), Explorer(k_hops)
        while not game.over:
            memory, action, intent = act(key, memory, state)
            plan = expert.say(key, intent, jnp.int32(0))
            assert int(action) == explorer.act(game)
            said = phrases_text(
                expert.phrases, np.asarray(plan.ids), np.asarray(plan.mask)
            )
            assert said == f" {explorer.plan(game)}"
            visited, *_, why, _ = said.split(" , ")
            reasons.add(why.strip())
            assert leads_back(game.graph, [int(n) for n in visited.split()[1:]])
            if chance.random() < 0.1:  # pushed off its way
                near = sorted(game.graph.neighbors(game.current))
                action = jnp.int32(chance.choice(near))
            game.step(int(action))
            state = step(key, state, action).state
    assert reasons == {"nearest open", "dead end", "target seen"}


def test_ways_are_the_shortest():
    graph = nx.random_labeled_tree(20, seed=4)
    edges = jnp.asarray(nx.to_numpy_array(graph, nodelist=range(20)) > 0)
    for start in (0, 7):
        ways = find_ways(edges, jnp.int32(start))
        for goal in range(20):
            way = np.asarray(way_to(ways, jnp.int32(goal)))
            expected = nx.shortest_path(graph, start, goal)[1:]
            assert way[way >= 0].tolist() == expected
            assert int(ways.steps[goal]) == len(expected)


def test_plans_are_one_token_a_phrase():
    tokenizer = load_tokenizer("shipped")
    table = make_phrase_table(tokenizer, make_expert(config(nodes=32)).phrases)
    assert (table.lengths == 1).all()


def distances(worlds):
    """Hops from start to target."""
    rows = zip(worlds.tree, worlds.current, worlds.target, strict=True)
    return [
        nx.shortest_path_length(nx.from_numpy_array(tree), int(start), int(target))
        for tree, start, target in rows
    ]


# Measured on 3,000 worlds each with gym-pogs' own explorer and networkx. By number of
# nodes, hops in sight and least backtracks: success of the explorer, of who avoids
# visited nodes and goes to the target in sight, of who only does the latter, and of a
# random walker; then the explorer's mean steps and backtracks, and the distance.
WORLDS = 3000
KNOWN = {
    (20, 2, 1): ((1.0, 0.7240, 0.4697, 0.2080), (12.391, 1.497, 5.852)),
    (20, 2, 2): ((1.0, 0.6370, 0.4590, 0.2317), (15.555, 2.287, 5.590)),
    (10, 2, 0): ((1.0, 0.9943, 0.9403, 0.7117), (3.308, 0.107, 2.986)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_code")
@pytest.mark.parametrize("sizes", KNOWN)
def test_scripted_players_fare_as_in_the_original(sizes):
    settings = config(*sizes)
    world = make_env(settings)
    players = list(make_references(settings).values())
    players.append(PogsWanderer(*sizes[:2], seeks=False, avoids=False))
    seeds = jnp.arange(1000, dtype=jnp.int32)
    worlds = make_worlds(world, seeds)
    rates, means = KNOWN[sizes]
    plays = [
        jax.device_get(play_scripted(worlds, seeds, env=world, player=p, steps=30))
        for p in players
    ]
    for played, known in zip(plays, rates, strict=True):
        success = played.terminated.any(axis=0).mean()
        spread = np.sqrt(known * (1 - known) * (1 / len(seeds) + 1 / WORLDS))
        assert success == pytest.approx(known, abs=3.5 * spread)
    explorer = plays[0]
    ours = (
        explorer.alive.sum(axis=0),
        explorer.counts["backtracks"].sum(axis=0),
        distances(jax.device_get(worlds)),
    )
    for number, known in zip(ours, means, strict=True):
        error = np.std(number) * np.sqrt(1 / len(seeds) + 1 / WORLDS)
        assert np.mean(number) == pytest.approx(known, abs=3.5 * error)
