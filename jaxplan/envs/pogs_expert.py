"""Scripted POGS players: the explorer with a memory and a plan, and two without either.

The explorer (after gym-pogs 7acec95, ``MemorySymbolicPOGSAgent``) goes to the target as
soon as it knows a way, and before that to the nearest node at the edge of what it
knows. What it says is read off its memory at that very step::

     visited 16 3 5 , open 16 3 , nearest open , go 7 9
     visited 16 3 5 7 , open 16 , dead end , go 3
     visited 16 3 5 7 2 , open , target seen , go 11

``visited`` are the nodes it has been at in the order of its first visits, each once: in
a tree the way back from a node is over the only neighbour before it in that list.
``open`` are the visited nodes beyond which something is unexplored, the newest first;
then why, and which way. What is remembered is said even where the target is seen: a
student that says so by mistake would otherwise have forgotten everything. A way is said
as far as a reader who has no more than the plan and the view could know it.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.config.schema import EnvConfig, ExpertConfig
from jaxplan.envs.base import Expert, Intent, Phrases
from jaxplan.envs.pogs_graph import (
    NOWHERE,
    PogsState,
    PogsView,
    beside,
    node_words,
    view,
)

# The most a plan says: the newest visited nodes, the newest open ones, the first nodes
# of the way.
VISITED, OPEN, WAY = 24, 3, 4
_WORDS = ("visited", "open", "nearest", "dead", "end", "target", "seen", "go", ",")


def plan_phrases(num_nodes: int) -> tuple[str, ...]:
    """List every phrase of a plan: a node's is its number, then come the words."""
    return (*node_words(num_nodes), *(f" {word}" for word in _WORDS))


@chex.dataclass(frozen=True)
class Memory:
    """What the explorer knows.

    Attributes:
        known: the edges seen.
        explored: nodes whose neighbours are all known.
        first_seen: number of the visit that was a node's first; ``NOWHERE`` for none.
        last: the node it was at; ``NOWHERE`` before the first.
        visits: nodes walked to, the start included.
        goal: the node at the edge of the known it goes to; ``NOWHERE`` for none.
        returns: how often it came from new ground to visited ground.
        returning: it is on visited ground since the last return.
    """

    known: Bool[Array, "*axes N N"]
    explored: Bool[Array, "*axes N"]
    first_seen: Int[Array, "*axes N"]
    last: Int[Array, "*axes"]
    visits: Int[Array, "*axes"]
    goal: Int[Array, "*axes"]
    returns: Int[Array, "*axes"]
    returning: Bool[Array, "*axes"]


@chex.dataclass(frozen=True)
class Ways:
    """The shortest ways from where the explorer is, over the edges it knows.

    Attributes:
        steps: length of the way; N where none is known.
        via: the node before the last on it.
    """

    steps: Int[Array, " N"]
    via: Int[Array, " N"]


def blank_memory(num_nodes: int) -> Memory:
    """Know nothing."""
    zero, none = jnp.int32(0), jnp.int32(NOWHERE)
    return Memory(
        known=jnp.zeros((num_nodes, num_nodes), bool),
        explored=jnp.zeros(num_nodes, bool),
        first_seen=jnp.full(num_nodes, NOWHERE, jnp.int32),
        last=none,
        visits=zero,
        goal=none,
        returns=zero,
        returning=jnp.array(False),
    )


def find_ways(edges: Bool[Array, "N N"], start: Int[Array, ""]) -> Ways:
    """Search breadth first."""
    num_nodes = edges.shape[0]
    here = jnp.arange(num_nodes) == start
    steps = jnp.where(here, 0, num_nodes).astype(jnp.int32)
    via = jnp.full(num_nodes, NOWHERE, jnp.int32)

    def widen(length: Int[Array, ""], ways: tuple[Array, Array]):
        steps, via = ways
        last = steps == length - 1
        new = beside(last, edges) & (steps == num_nodes)
        nearer = jnp.argmax(edges & last[:, None], axis=0).astype(jnp.int32)
        return jnp.where(new, length, steps), jnp.where(new, nearer, via)

    steps, via = jax.lax.fori_loop(1, num_nodes, widen, (steps, via))
    return Ways(steps=steps, via=via)


def way_to(ways: Ways, goal: Int[Array, ""]) -> Int[Array, " N"]:
    """List the nodes of the way to ``goal``, the first step first, then ``NOWHERE``."""
    num_nodes = ways.steps.shape[0]
    way = jnp.full(num_nodes, NOWHERE, jnp.int32)

    def step_back(_: Array, carry: tuple[Array, Array]):
        way, node = carry
        place = ways.steps[node] - 1  # -1 at the start itself: dropped
        way = way.at[jnp.where(place < 0, num_nodes, place)].set(node, mode="drop")
        return way, jnp.where(place < 0, node, ways.via[node])

    return jax.lax.fori_loop(0, num_nodes, step_back, (way, goal))[0]


def explore(
    memory: Memory, seen: PogsView, k_hops: int
) -> tuple[Memory, Int[Array, " N"]]:
    """Take in what is seen and choose the way on.

    Args:
        memory: of the episode so far.
        seen: what there is to see now.
        k_hops: how far that is.

    Returns:
        The memory, and the way: the next node first, ``NOWHERE`` behind the goal.
    """
    memory = _take_in(memory, seen)
    ways = find_ways(memory.known, seen.current)
    memory = dataclasses.replace(
        memory, explored=memory.explored | (ways.steps < k_hops)
    )
    met = jnp.any(memory.known, axis=1)
    edge = met & ~memory.explored
    nearest = jnp.argmin(jnp.where(edge, ways.steps, 2 * met.shape[0]))
    kept = (memory.goal >= 0) & ~memory.explored[memory.goal]
    goal = jnp.where(kept, memory.goal, nearest)
    goal = jnp.where(met[seen.target], seen.target, goal).astype(jnp.int32)
    return dataclasses.replace(memory, goal=goal), way_to(ways, goal)


def _take_in(memory: Memory, seen: PogsView) -> Memory:
    """Add what is seen, and the visit where the player has moved."""
    here = seen.current
    moved = memory.last != here
    visited = memory.first_seen[here] >= 0
    first = jnp.where(visited, memory.first_seen[here], memory.visits)
    return dataclasses.replace(
        memory,
        known=memory.known | seen.edges,
        first_seen=memory.first_seen.at[here].set(first),
        last=here,
        visits=memory.visits + moved.astype(jnp.int32),
        returns=memory.returns
        + (moved & visited & ~memory.returning).astype(jnp.int32),
        returning=jnp.where(moved, visited, memory.returning),
    )


@dataclasses.dataclass(frozen=True)
class PogsExplorer:
    """The explorer with a memory as an `Expert`; its goal is a node."""

    num_nodes: int
    k_hops: int
    styles: tuple[str, ...] = ("plain",)

    @property
    def goal_names(self) -> tuple[str, ...]:
        """The nodes, by their labels."""
        return tuple(str(node) for node in range(self.num_nodes))

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase a plan can contain."""
        return plan_phrases(self.num_nodes)

    def init(self) -> Memory:
        """Know nothing."""
        return blank_memory(self.num_nodes)

    def act(
        self, key: PRNGKeyArray, memory: Memory, state: PogsState
    ) -> tuple[Memory, Int[Array, ""], Intent]:
        """Look, remember, and choose a way."""
        del key  # it has no doubts
        seen = view(state, self.k_hops)
        memory, way = explore(memory, seen, self.k_hops)
        plan = say_plan(memory, seen, way, self.k_hops)
        return memory, way[0], Intent(goal=memory.goal, facts=plan)

    def say(self, key: PRNGKeyArray, intent: Intent, style: Int[Array, ""]) -> Phrases:
        """Say what was thought out on the way; there is only one wording."""
        del key, style
        return intent.facts


def say_plan(
    memory: Memory, seen: PogsView, way: Int[Array, " N"], k_hops: int
) -> Phrases:
    """Say what is explored, where to go, and why."""
    num_nodes = way.shape[0]

    def say(words: str) -> Int[Array, " words"]:
        return jnp.array([num_nodes + _WORDS.index(word) for word in words.split()])

    in_sight = jnp.any(seen.edges, axis=1)
    found = memory.goal == seen.target
    unfound = jnp.where(in_sight[memory.goal], say("nearest open"), say("dead end"))
    remembered = jnp.concatenate(
        [
            say("visited"),
            _visited(memory.first_seen),
            say(", open"),
            _newest_first(_open_nodes(memory, k_hops), memory.first_seen),
            say(","),
        ]
    )
    words = jnp.concatenate(
        [
            remembered,
            jnp.where(found, say("target seen"), unfound),
            say(", go"),
            _tellable(way, in_sight | (memory.first_seen >= 0)),
        ]
    )
    return Phrases(ids=jnp.maximum(words, 0).astype(jnp.int32), mask=words >= 0)


def _visited(first_seen: Int[Array, " N"]) -> Int[Array, " N"]:
    """List the newest visited nodes, the oldest of them first, then ``NOWHERE``."""
    visited = first_seen >= 0
    order = jnp.argsort(jnp.where(visited, first_seen, jnp.iinfo(jnp.int32).max))
    place, count = jnp.arange(order.shape[0]), jnp.sum(visited)
    said = (place < count) & (place >= count - VISITED)
    return jnp.where(said, order, NOWHERE)


def _open_nodes(memory: Memory, k_hops: int) -> Bool[Array, " N"]:
    """Find the visited nodes nearest to something known but unexplored."""
    num_nodes = memory.first_seen.shape[0]
    visited = memory.first_seen >= 0
    owner = jnp.where(visited, jnp.arange(num_nodes), NOWHERE)
    for _ in range(k_hops):
        handed = jnp.max(jnp.where(memory.known, owner[:, None], NOWHERE), axis=0)
        owner = jnp.where(owner >= 0, owner, handed)
    edge = jnp.any(memory.known, axis=1) & ~memory.explored
    owned = jnp.where(edge, owner, NOWHERE)
    return jnp.any(owned[:, None] == jnp.arange(num_nodes)[None, :], axis=0)


def _newest_first(
    nodes: Bool[Array, " N"], first_seen: Int[Array, " N"]
) -> Int[Array, " most"]:
    """List up to ``OPEN`` nodes by their first visit, then ``NOWHERE``."""
    order = jnp.argsort(jnp.where(nodes, -first_seen, 1))[:OPEN]
    return jnp.where(nodes[order], order, NOWHERE)


def _tellable(way: Int[Array, " N"], nodes: Bool[Array, " N"]) -> Int[Array, " most"]:
    """Cut the way at the first node that is not one of ``nodes``, or at ``WAY``."""
    way = way[:WAY]
    return jnp.where(jnp.cumprod(nodes[way] & (way >= 0)) > 0, way, NOWHERE)


@dataclasses.dataclass(frozen=True)
class PogsWanderer:
    """A random walker: the reference for what memory and planning are worth.

    Attributes:
        seeks: it goes to the target when it sees it.
        avoids: it takes neighbours it has not been at, if there are any.
    """

    num_nodes: int
    k_hops: int
    seeks: bool
    avoids: bool
    phrases: tuple[str, ...] = ("",)
    styles: tuple[str, ...] = ("silent",)
    goal_names: tuple[str, ...] = ("none",)

    def init(self) -> Bool[Array, " N"]:
        """Remember no visit."""
        return jnp.zeros(self.num_nodes, bool)

    def act(
        self, key: PRNGKeyArray, memory: Bool[Array, " N"], state: PogsState
    ) -> tuple[Bool[Array, " N"], Int[Array, ""], Intent]:
        """Take a neighbour by chance, unless there is a better one."""
        seen = view(state, self.k_hops)
        visited = memory.at[seen.current].set(True)
        choice = seen.edges[seen.current]
        if self.avoids:
            new = choice & ~visited
            choice = jnp.where(jnp.any(new), new, choice)
        draw = jnp.where(choice, jax.random.uniform(key, choice.shape), -1.0)
        action = jnp.argmax(draw).astype(jnp.int32)
        if self.seeks:
            ways = find_ways(seen.edges, seen.current)
            known = ways.steps[seen.target] < self.num_nodes
            action = jnp.where(known, way_to(ways, seen.target)[0], action)
        return visited, action, Intent(goal=jnp.zeros((), jnp.int32), facts=())

    def say(self, key: PRNGKeyArray, intent: Intent, style: Int[Array, ""]) -> Phrases:
        """Say nothing."""
        del key, intent, style
        return Phrases(ids=jnp.zeros(1, jnp.int32), mask=jnp.zeros(1, bool))


def make_pogs_expert(config: EnvConfig, skill: ExpertConfig) -> PogsExplorer:
    """Make the explorer for the worlds of ``config``.

    Raises:
        ValueError: it is asked to be worse than it can be.
    """
    if skill != ExpertConfig():
        raise ValueError(
            "expert: the explorer of pogs knows one way to play; leave out errors, "
            "dawdling and unknown_goals (evaluate.arms has players without a memory)"
        )
    return PogsExplorer(num_nodes=config.pogs.nodes, k_hops=config.pogs.k_hops)


def make_pogs_references(config: EnvConfig) -> dict[str, Expert]:
    """Make the players that say what memory is worth, by name."""
    sizes: dict[str, Any] = {
        "num_nodes": config.pogs.nodes,
        "k_hops": config.pogs.k_hops,
    }
    return {
        "explorer": PogsExplorer(**sizes),
        "avoider": PogsWanderer(**sizes, seeks=True, avoids=True),
        "seeker": PogsWanderer(**sizes, seeks=True, avoids=False),
    }
