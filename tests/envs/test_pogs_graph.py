"""Trees and sight against networkx."""

import itertools

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxplan.envs.pogs_graph import draw_state, tree_of, view

decode = jax.jit(tree_of)
look = jax.jit(view, static_argnames="k_hops")


def edges(matrix):
    return {tuple(edge) for edge in np.argwhere(np.triu(matrix)).tolist()}


@given(st.lists(st.integers(0, 19), min_size=18, max_size=18))
def test_a_pruefer_sequence_becomes_the_tree_networkx_makes_of_it(sequence):
    expected = nx.from_prufer_sequence(sequence)
    matrix = np.asarray(decode(np.array(sequence, np.int32)))
    np.testing.assert_array_equal(matrix, matrix.T)
    assert edges(matrix) == {tuple(sorted(edge)) for edge in expected.edges}


def test_every_labelled_tree_has_one_sequence():
    trees = {
        frozenset(edges(decode(np.array(sequence, np.int32))))
        for sequence in itertools.product(range(4), repeat=2)
    }
    assert len(trees) == 4**2  # Cayley: n ** (n - 2)
    assert edges(decode(np.zeros(0, np.int32))) == {(0, 1)}


def test_trees_starts_and_targets_are_drawn_uniformly():
    count = 8000
    keys = jax.random.split(jax.random.key(0), count)
    states = jax.vmap(lambda key: draw_state(key, 4))(keys)
    kinds = np.unique(np.asarray(states.tree), axis=0, return_counts=True)[1]
    pairs = np.asarray(4 * states.current + states.target)
    drawn = np.unique(pairs, return_counts=True)[1]
    for observed, expected in ((kinds, 16), (drawn, 12)):
        assert len(observed) == expected
        chi_square = np.sum((observed - count / expected) ** 2) * expected / count
        assert chi_square < expected - 1 + 4 * np.sqrt(2 * (expected - 1))
    assert (states.current != states.target).all()


@pytest.mark.parametrize("k_hops", [1, 2, 3])
def test_a_player_sees_the_edges_within_its_hops(k_hops):
    for seed in range(20):
        state = draw_state(jax.random.key(seed), 20)
        graph = nx.from_numpy_array(np.asarray(state.tree))
        near = nx.ego_graph(graph, int(state.current), radius=k_hops)
        seen = look(state, k_hops=k_hops)
        assert edges(seen.edges) == {tuple(sorted(edge)) for edge in near.edges}


def test_nothing_out_of_sight_changes_what_is_seen():
    state = draw_state(jax.random.key(3), 20)
    seen = look(state, k_hops=2)
    near = np.asarray(seen.edges).any(axis=0)
    inner = np.asarray(look(state, k_hops=1).edges).any(axis=0)
    both_far = ~inner[:, None] & ~inner[None, :] & ~(near[:, None] & near[None, :])
    other = state.tree ^ jnp.asarray(both_far)
    changed = look(state.replace(tree=other), k_hops=2)
    for ours, theirs in zip(
        jax.tree.leaves(seen), jax.tree.leaves(changed), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
