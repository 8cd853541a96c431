r"""POGS, Partially Observable Graph Search, as a `TextEnv`.

The player walks on a hidden tree towards a target it knows by name, and sees only what
is near. By the definitions of arXiv:2509.03581 and BartekCupial/gym-pogs 7acec95 (MIT):
+100 for reaching the target, -1 for naming a node that is no neighbour, nothing else.
That an action was refused is said in the next text and is no function of the reward.

Two text levels. ``compact``, a token a phrase, line breaks added::

    \n at 16 find 11
    2: 4 16 3: 5 7 16 4: 2 5: 3 7: 3 16: 2 3 >

and ``balrog``, the words of the paper's own wrapper::

    node: 2, neighbors: [4, 16]
    ...

    current node: 16, target node: 11

Paper: a backtrack is a *move* to the node before the last move; the original also
counts refused actions, so that two of them in a row look like a backtrack.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.config.schema import EnvConfig
from jaxplan.envs.base import EnvStep, Phrases
from jaxplan.envs.pogs_expert import Memory, blank_memory, explore
from jaxplan.envs.pogs_graph import (
    PogsState,
    PogsView,
    action_words,
    draw_state,
    node_words,
    view,
)

FOUND, REFUSED = 100.0, -1.0  # rewards
_DRAWS_TRIED = 256  # before hard worlds are said not to exist


@dataclasses.dataclass(frozen=True)
class PogsText:
    """One text level.

    Attributes:
        phrases: every phrase a description can contain.
        instructions: the text that opens a context.
        describe: from what the player sees to the numbers of phrases.
    """

    phrases: tuple[str, ...]
    instructions: str
    describe: Callable[[PogsView], Phrases]


def compact(num_nodes: int, k_hops: int) -> PogsText:
    """Build the text level ``compact``."""
    del k_hops  # the player sees it
    heads = tuple(f" {node}:" for node in range(num_nodes))
    marks = ("\n", " at", " find", " invalid", " >")
    return PogsText(
        phrases=(*node_words(num_nodes), *heads, *marks),
        instructions=" find the target",
        describe=_describe_compact,
    )


def _listed(
    heads: Int[Array, " N"], items: Int[Array, "N N"], edges: Bool[Array, "N N"]
) -> Phrases:
    """Say of every node in sight its head and its neighbours' items.

    Of the N (N + 1) places few are taken: a tree has no more than N - 1 edges.
    """
    num_nodes = heads.shape[0]
    near = jnp.any(edges, axis=1, keepdims=True)
    said = jnp.concatenate([near, edges], axis=1).reshape(-1)
    ids = jnp.concatenate([heads[:, None], items], axis=1).reshape(-1)
    taken = jnp.nonzero(said, size=3 * num_nodes - 2, fill_value=0)[0]
    return Phrases(ids=ids[taken], mask=jnp.arange(taken.shape[0]) < jnp.sum(said))


def _describe_compact(seen: PogsView) -> Phrases:
    num_nodes = seen.edges.shape[0]
    node = jnp.arange(num_nodes)
    line, at, find, invalid, end = 2 * num_nodes + np.arange(5)
    begin = jnp.stack([line, at, seen.current, find, seen.target, invalid])
    graph = _listed(
        num_nodes + node, jnp.broadcast_to(node, seen.edges.shape), seen.edges
    )
    yes = np.ones(1, bool)
    return Phrases(
        ids=jnp.append(jnp.concatenate([begin, graph.ids]), end),
        mask=jnp.concatenate([*[yes] * 5, seen.refused[None], graph.mask, yes]),
    )


def balrog(num_nodes: int, k_hops: int) -> PogsText:
    """Build the text level ``balrog``; its instructions are the paper's Prompt 21."""
    nodes = range(num_nodes)
    heads = tuple(f"\nnode: {node}, neighbors:" for node in nodes)
    items = tuple(
        f" {opening}{node}{closing}"
        for opening in ("", "[")
        for closing in (",", "]")
        for node in nodes
    )
    ends = (
        *(f"\n\ncurrent node: {node}," for node in nodes),
        *(f" target node: {node}" for node in nodes),
        "\nInvalid Move!",
    )
    return PogsText(
        phrases=(*heads, *items, *ends),
        instructions=_PROMPT.format(num_nodes=num_nodes, k_hops=k_hops),
        describe=_describe_balrog,
    )


_PROMPT = """\
You are an AI agent designed to navigate the Partially Observable Graph Search (POGS) \
environment. Your goal is to find and reach a target node in a partially observable \
graph by exploring the graph structure.

In a moment I will present you with an observation containing:
- Adjacency list of each visible
- Your current node position
- The target node you need to reach

The graph has {num_nodes} nodes and is partially observable, meaning you can only see \
connections within a k-nearest neighbor radius of your current position. In this \
episode k={k_hops}, graph=True.

Your action should be a single integer representing the label of the node you want to \
travel to. This node must be directly connected to your current node.

PLAY"""


def _describe_balrog(seen: PogsView) -> Phrases:
    edges = seen.edges
    num_nodes = edges.shape[0]
    node = jnp.arange(num_nodes)
    order = jnp.cumsum(edges, axis=1)
    first, last = order == 1, order == order[:, -1:]
    items = num_nodes * (1 + 2 * first + last) + node[None, :]
    graph = _listed(node, items, edges)
    end = jnp.stack([5 * num_nodes + seen.current, 6 * num_nodes + seen.target])
    invalid = jnp.full(1, 7 * num_nodes)
    return Phrases(
        ids=jnp.concatenate([graph.ids, end, invalid]),
        mask=jnp.concatenate([graph.mask, np.ones(2, bool), seen.refused[None]]),
    )


TEXTS = {"compact": compact, "balrog": balrog}


@dataclasses.dataclass(frozen=True)
class Pogs:
    """The world and the words for it; two equal ones share their compiled code."""

    text: PogsText
    num_nodes: int
    k_hops: int
    min_backtracks: int
    max_steps: int
    event_names: tuple[str, ...] = ("target",)

    @property
    def action_names(self) -> tuple[str, ...]:
        """The label of every node."""
        return action_words(self.num_nodes)

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase a description can contain."""
        return self.text.phrases

    @property
    def instructions(self) -> str:
        """The text that opens a context, once."""
        return self.text.instructions

    def reset(self, key: PRNGKeyArray) -> PogsState:
        """Draw worlds until one is hard enough for the explorer with a memory."""

        def draw(attempt: Int[Array, ""]) -> tuple[Int[Array, ""], PogsState]:
            new = jax.random.fold_in(key, attempt)
            return attempt + 1, draw_state(new, self.num_nodes)

        first = draw(jnp.int32(0))
        if self.min_backtracks == 0:
            return first[1]
        return jax.lax.while_loop(
            lambda drawn: self.returns(drawn[1]) < self.min_backtracks,
            lambda drawn: draw(drawn[0]),
            first,
        )[1]

    def returns(self, state: PogsState) -> Int[Array, ""]:
        """Count how often the explorer comes back to where it was, in one episode."""

        def one_step(carry: tuple[Memory, PogsState, Array], _: None):
            memory, state, over = carry
            new, way = explore(memory, view(state, self.k_hops), self.k_hops)
            step = self.step(jax.random.key(0), state, way[0])
            kept = jax.tree.map(lambda a, b: jnp.where(over, a, b), memory, new)
            over = over | step.terminated | step.truncated
            return (kept, step.state, over), None

        start = blank_memory(self.num_nodes), state, jnp.array(False)
        (memory, _, _), _ = jax.lax.scan(one_step, start, None, self.max_steps)
        return memory.returns

    def step(
        self, key: PRNGKeyArray, state: PogsState, action: Int[Array, ""]
    ) -> EnvStep:
        """Walk to a neighbour. Never resets; never both terminated and truncated."""
        del key  # nothing is left to chance
        action = action.astype(jnp.int32)
        moved = state.tree[state.current, action]
        found = moved & (action == state.target)
        env_steps = state.env_steps + 1
        new = dataclasses.replace(
            state,
            current=jnp.where(moved, action, state.current),
            before=jnp.where(moved, state.current, state.before),
            refused=~moved,
            env_steps=env_steps,
        )
        return EnvStep(
            state=new,
            reward=jnp.where(moved, FOUND * found, REFUSED).astype(jnp.float32),
            terminated=found,
            truncated=(env_steps >= self.max_steps) & ~found,
            events=found[None],
            counts={
                "backtracks": (moved & (action == state.before)).astype(jnp.int32),
                "invalid_moves": (~moved).astype(jnp.int32),
            },
        )

    def describe(self, state: PogsState) -> Phrases:
        """Say what the player sees, and nothing else."""
        return self.text.describe(view(state, self.k_hops))

    def passive(self, state: PogsState) -> Bool[Array, ""]:
        """Nobody sleeps here."""
        return jnp.zeros_like(state.refused)

    def draw(self, states: PogsState) -> dict[str, Any]:
        """Draw the tree, and in every frame where the player is and what it sees."""
        seen = jax.vmap(partial(view, k_hops=self.k_hops))(states)
        tree, current, visible = jax.device_get(
            (states.tree[0], states.current, jnp.any(seen.edges, axis=-1))
        )
        frames = [
            {"at": int(at), "visible": np.flatnonzero(nodes).tolist()}
            for at, nodes in zip(current, visible, strict=True)
        ]
        graph = {
            "nodes": self.num_nodes,
            "edges": np.argwhere(np.triu(tree)).tolist(),
            "target": int(states.target[0]),
        }
        return {"graph": graph, "frames": frames}


def make_pogs(config: EnvConfig) -> Pogs:
    """Build the world of ``config``.

    Raises:
        ValueError: there is no such text level, or no world is as hard as asked for.
    """
    pogs = config.pogs
    if config.text not in TEXTS:
        raise ValueError(
            f"env.text='{config.text}': POGS has no such text; allowed: {list(TEXTS)}"
        )
    world = Pogs(
        text=TEXTS[config.text](pogs.nodes, pogs.k_hops),
        num_nodes=pogs.nodes,
        k_hops=pogs.k_hops,
        min_backtracks=pogs.min_backtracks,
        max_steps=config.max_steps,
    )
    if pogs.min_backtracks:
        _check_hard_worlds_exist(world)
    return world


def _check_hard_worlds_exist(world: Pogs) -> None:
    """Draw some worlds of all kinds: drawing until one is hard has to end."""
    keys = jax.random.split(jax.random.key(0), _DRAWS_TRIED)
    states = jax.vmap(partial(draw_state, num_nodes=world.num_nodes))(keys)
    most = int(jnp.max(jax.vmap(world.returns)(states)))
    if most < world.min_backtracks:
        raise ValueError(
            f"env.pogs.min_backtracks={world.min_backtracks}: of {_DRAWS_TRIED} worlds "
            f"with {world.num_nodes} nodes, {world.k_hops} hops in sight and "
            f"{world.max_steps} steps the hardest needs {most}; take fewer backtracks "
            "or more nodes"
        )
