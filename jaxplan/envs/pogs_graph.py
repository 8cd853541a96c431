"""POGS: the hidden tree, where the player is, and what a player sees of it.

Texts, scripted players and hard mode all look through `view`, so nothing hidden can
reach any of them. Nodes are numbers; a set of nodes is a mask [N], a graph a symmetric
matrix [N, N].
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

NOWHERE = -1


@chex.dataclass(frozen=True)
class PogsState:
    """The world.

    Attributes:
        tree: which nodes are neighbours.
        current: where the player is.
        target: where it wants to be.
        before: where it was before its last move; ``NOWHERE`` before the first.
        refused: the last action named no neighbour.
        env_steps: actions played.
    """

    tree: Bool[Array, "*axes N N"]
    current: Int[Array, "*axes"]
    target: Int[Array, "*axes"]
    before: Int[Array, "*axes"]
    refused: Bool[Array, "*axes"]
    env_steps: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class PogsView:
    """All that may be told to, or used by, a player.

    Attributes:
        edges: between nodes that are both within sight; nothing is remembered.
        current: where the player is.
        target: where it wants to be.
        refused: the last action named no neighbour.
    """

    edges: Bool[Array, "*axes N N"]
    current: Int[Array, "*axes"]
    target: Int[Array, "*axes"]
    refused: Bool[Array, "*axes"]


def action_words(num_nodes: int) -> tuple[str, ...]:
    """Name every node as actions do; the index is the node."""
    return tuple(str(node) for node in range(num_nodes))


def node_words(num_nodes: int) -> tuple[str, ...]:
    """Name every node as ``compact`` texts and plans do; the index is the node."""
    return tuple(f" {node}" for node in range(num_nodes))


def draw_state(key: PRNGKeyArray, num_nodes: int) -> PogsState:
    """Draw a tree uniformly, then two different nodes to start from and to find."""
    tree_key, start_key, target_key = jax.random.split(key, 3)
    sequence = jax.random.randint(
        tree_key, (num_nodes - 2,), 0, num_nodes, dtype=jnp.int32
    )
    start = jax.random.randint(start_key, (), 0, num_nodes, jnp.int32)
    away = jax.random.randint(target_key, (), 1, num_nodes, jnp.int32)
    return PogsState(
        tree=tree_of(sequence),
        current=start,
        target=(start + away) % num_nodes,
        before=jnp.int32(NOWHERE),
        refused=jnp.array(False),
        env_steps=jnp.int32(0),
    )


def tree_of(sequence: Int[Array, " links"]) -> Bool[Array, "N N"]:
    """Decode a Pruefer sequence: every labelled tree on N nodes has just one.

    The lowest leaf is linked to the next node of the sequence and removed, until two
    nodes are left (H. Pruefer 1918).

    Args:
        sequence: N - 2 nodes.
    """
    num_nodes = sequence.shape[0] + 2
    degree = jnp.ones(num_nodes, jnp.int32).at[sequence].add(1)
    tree = jnp.zeros((num_nodes, num_nodes), bool)

    def link(carry, node):
        tree, degree = carry
        leaf = jnp.argmax(degree == 1)
        tree = tree.at[leaf, node].set(True)
        return (tree, degree.at[leaf].add(-1).at[node].add(-1)), None

    (tree, degree), _ = jax.lax.scan(link, (tree, degree), sequence)
    ends = degree == 1
    last = ends[:, None] & ends[None, :] & ~jnp.eye(num_nodes, dtype=bool)
    return tree | tree.T | last


def beside(nodes: Bool[Array, " N"], edges: Bool[Array, "N N"]) -> Bool[Array, " N"]:
    """Find the neighbours of a set of nodes."""
    return jnp.any(edges & nodes[:, None], axis=0)


def view(state: PogsState, k_hops: int) -> PogsView:
    """Look around: all edges among the nodes at most ``k_hops`` away."""
    seen = jnp.arange(state.tree.shape[0]) == state.current
    for _ in range(k_hops):
        seen = seen | beside(seen, state.tree)
    return PogsView(
        edges=state.tree & seen[:, None] & seen[None, :],
        current=state.current,
        target=state.target,
        refused=state.refused,
    )
