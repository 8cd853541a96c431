"""POGS once more, by the original's definitions, on a networkx graph."""

import dataclasses

import networkx as nx
import numpy as np


@dataclasses.dataclass
class Game:
    """One episode."""

    graph: nx.Graph
    current: int
    target: int
    k_hops: int
    max_steps: int
    steps: int = 0
    refused: bool = False
    over: bool = False

    def __post_init__(self):
        self.moves = [self.current]  # where it was, without refused actions

    def step(self, action):
        """Play; return reward, terminated, truncated, backtracks, invalid moves."""
        self.steps += 1
        self.refused = action not in self.graph.neighbors(self.current)
        reward = -1.0 if self.refused else 0.0
        backtracks = 0
        if not self.refused:
            self.current = action
            self.moves.append(action)
            backtracks = int(len(self.moves) > 2 and action == self.moves[-3])
        found = not self.refused and self.current == self.target
        if found:
            reward = 100.0
        late = self.steps >= self.max_steps and not found
        self.over = found or late
        return reward, found, late, backtracks, int(self.refused)

    def seen(self):
        """The edges among all nodes within ``k_hops``."""
        near = nx.single_source_shortest_path_length(
            self.graph, self.current, cutoff=self.k_hops
        )
        return self.graph.subgraph(near)

    def text(self):
        """What BALROG's wrapper makes of it."""
        seen = self.seen()
        lines = [f"node: {n}, neighbors: {sorted(seen[n])}\n" for n in sorted(seen)]
        text = "".join(lines)
        text += f"\ncurrent node: {self.current}, target node: {self.target}"
        return f"\n{text}\nInvalid Move!" if self.refused else f"\n{text}"


class Explorer:
    """gym-pogs' explorer with a memory; among equals it takes the lowest label."""

    def __init__(self, k_hops):
        self.k_hops = k_hops
        self.known = nx.Graph()
        self.explored, self.walk = set(), []
        self.goal, self.returns, self.returning = None, 0, False

    def act(self, game):
        here = game.current
        visited = here in self.walk
        if not self.walk or self.walk[-1] != here:
            self.returns += visited and not self.returning
            self.returning = visited
            self.walk.append(here)
        self.known.add_edges_from(game.seen().edges)
        self.far = nx.single_source_shortest_path_length(self.known, here)
        self.explored |= {n for n, hops in self.far.items() if hops < self.k_hops}
        edge = sorted(set(self.known) - self.explored)
        if game.target in self.known:
            self.goal = game.target
        elif self.goal is None or self.goal in self.explored:
            self.goal = min(edge, key=lambda node: self.far[node])
        self.way = nx.shortest_path(self.known, here, self.goal)[1:]
        return self.way[0]

    def plan(self, game):
        """The words for it, from the definitions in ``pogs_expert``."""
        seen, visited = set(game.seen()), list(dict.fromkeys(self.walk))
        told = []
        for node in self.way[:4]:
            if node not in seen and node not in visited:
                break
            told.append(node)
        go = ["go", *told]
        owners = set()
        for node in set(self.known) - self.explored:
            ways = nx.single_source_shortest_path_length(self.known, node)
            owners.add(min(visited, key=ways.__getitem__))
        newest = sorted(owners, key=visited.index, reverse=True)[:3]
        why = "nearest open" if self.goal in seen else "dead end"
        why = "target seen" if self.goal == game.target else why
        words = ["visited", *visited[-24:], ", open", *newest, ",", why, ",", *go]
        return " ".join(map(str, words))


def game_of(world, state):
    """The same game; ``state`` is one world on the host."""
    graph = nx.from_numpy_array(np.asarray(state.tree))
    return Game(
        graph=graph,
        current=int(state.current),
        target=int(state.target),
        k_hops=world.k_hops,
        max_steps=world.max_steps,
    )
