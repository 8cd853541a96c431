"""Which worlds the lanes play, and from which keys all that happens in them derives.

A world is made from its seed alone, and so is the key of the episode played in it: but
for how sums round, an episode is the same in whichever lane, batch or round it is
played.
"""

import collections
import dataclasses
from collections.abc import Iterator
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxplan.core.mesh import LANES, WHOLE, settle
from jaxplan.core.specs import spec_tree
from jaxplan.envs.base import State, TextEnv

ENTRIES = 16  # columns of a schedule, or a multiple: all share one compiled program
_EPISODES, _WORLDS = 0, 1
_WORLDS_AT_ONCE = 32  # generating a world takes memory, too


@chex.dataclass(frozen=True)
class Schedule:
    """Which episodes a lane plays, in order: entry e of lane b is column e of row b.

    Attributes:
        worlds: ready-made worlds, stacked.
        world: index into ``worlds``.
        seed: the number all randomness of the episode derives from.
        mode: plan mode, see ``jaxplan.plan.grammar.start``.
        entries: how many columns count; a lane that has played them stops. A negative
            number lets the lane go round and round.
    """

    worlds: State
    world: Int[Array, "B E"]
    seed: Int[Array, "B E"]
    mode: Int[Array, "B E"]
    entries: Int[Array, " B"]


SCHEDULE_SPECS = spec_tree(
    Schedule, worlds=WHOLE, world=LANES, seed=LANES, mode=LANES, entries=LANES
)


def episode_key(seed: Int[Array, ""] | int) -> PRNGKeyArray:
    """The key of all that happens in an episode once its world stands."""
    return jax.random.fold_in(jax.random.key(_EPISODES), seed)


@partial(jax.jit, static_argnames="env")
def make_worlds(env: TextEnv, seeds: Int[Array, " N"]) -> State:
    """Make one world from each seed, stacked."""
    key = jax.random.key(_WORLDS)
    return jax.lax.map(
        lambda seed: env.reset(jax.random.fold_in(key, seed)),
        seeds,
        batch_size=_WORLDS_AT_ONCE,
    )


def settle_schedule(schedule: Schedule) -> Schedule:
    """Give a schedule the shape and the place that all have, so that programs fit all.

    Columns are added, up to a multiple of ``ENTRIES``; a lane that goes round and
    round may meet its first episodes more often than the others.
    """
    more = -schedule.world.shape[1] % ENTRIES

    def widen(columns: Array) -> Array:
        return jnp.pad(columns, ((0, 0), (0, more)), mode="wrap") if more else columns

    wide = dataclasses.replace(
        schedule,
        world=widen(schedule.world),
        seed=widen(schedule.seed),
        mode=widen(schedule.mode),
    )
    return settle(wide, SCHEDULE_SPECS)


def one_episode_schedule(
    worlds: State, seeds: Int[Array, " B"], modes: Int[Array, " B"]
) -> Schedule:
    """World b once, in lane b, in its own mode."""
    lanes = seeds.shape[0]
    return Schedule(
        worlds=worlds,
        world=jnp.arange(lanes, dtype=jnp.int32)[:, None],
        seed=seeds[:, None].astype(jnp.int32),
        mode=modes[:, None].astype(jnp.int32),
        entries=jnp.ones(lanes, jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class EpisodeList:
    """Episodes that are to be played once each, in whichever lane.

    Attributes:
        worlds: ready-made worlds, stacked.
        world: of each episode, index into ``worlds``.
        seed: of each episode, as in ``Schedule``.
        mode: of each episode, likewise.
    """

    worlds: State
    world: np.ndarray
    seed: np.ndarray
    mode: np.ndarray

    def __len__(self) -> int:
        return len(self.seed)


def every_world_in_every_mode(
    worlds: State, seeds: Int[Array, " N"], modes: Int[Array, " M"]
) -> EpisodeList:
    """List N x M episodes: number e is world ``e // M`` in mode ``e % M``."""
    world = np.repeat(np.arange(len(seeds), dtype=np.int32), len(modes))
    return EpisodeList(
        worlds=worlds,
        world=world,
        seed=np.asarray(seeds, np.int32)[world],
        mode=np.tile(np.asarray(modes, np.int32), len(seeds)),
    )


class Dealer:
    """Deals a list of episodes out to lanes while they play (host).

    Who dies early is given more. Lanes are dealt several episodes in advance as long as
    there are many left, so that short ones leave no lane idle, and one at last. The
    long lives at the end can be played in fewer lanes, which cost less.
    """

    def __init__(self, episodes: EpisodeList, num_lanes: int, fewer: int = 0) -> None:
        """Deal the first episodes: number b is the first of lane b.

        Args:
            episodes: to be played.
            num_lanes: how many lanes play them.
            fewer: how many go on at last, when no others have anything to play; 0 to
                go on with all.
        """
        self._episodes = episodes
        self._fewer = fewer
        self._left = collections.deque(range(len(episodes)))
        self._dealt: list[list[int]] = [[] for _ in range(num_lanes)]
        self._done = np.zeros(num_lanes, int)
        self._deal()

    def schedule(self) -> Schedule:
        """What is dealt now."""
        number = np.zeros((len(self._dealt), ENTRIES), int)
        for row, dealt in zip(number, self._dealt, strict=True):
            first = max(0, len(dealt) - ENTRIES)
            for entry in range(first, len(dealt)):
                row[entry % ENTRIES] = dealt[entry]
        episodes = self._episodes
        return Schedule(
            worlds=episodes.worlds,
            world=jnp.asarray(episodes.world[number]),
            seed=jnp.asarray(episodes.seed[number]),
            mode=jnp.asarray(episodes.mode[number]),
            entries=jnp.array([len(dealt) for dealt in self._dealt], jnp.int32),
        )

    def schedules(self) -> Iterator[Schedule]:
        """What is dealt at the time of asking, until it is time for fewer lanes."""
        while not self._fewer or len(self._playing()) > self._fewer:
            yield self.schedule()

    def narrow(self) -> np.ndarray:
        """Say which lanes go on alone; the first is one of them, for it is watched."""
        playing = self._playing()
        idle = [lane for lane in range(len(self._dealt)) if lane not in playing]
        lanes = np.array(playing + idle)[: self._fewer]
        self._dealt = [self._dealt[lane] for lane in lanes]
        self._done, self._fewer = self._done[lanes], 0
        return lanes

    def _playing(self) -> list[int]:
        """The first lane, and all others with something left to play."""
        dealt = np.array([len(dealt) for dealt in self._dealt])
        return [0, *(1 + np.flatnonzero((dealt > self._done)[1:])).tolist()]

    def collect(self, lanes: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Take back episodes that ended, and deal the next.

        Args:
            lanes: of each of them, the lane.
            entries: and which of the lane's episodes it was.

        Returns:
            Their numbers in the list.
        """
        numbers = [
            self._dealt[lane][entry]
            for lane, entry in zip(lanes.tolist(), entries.tolist(), strict=True)
        ]
        np.add.at(self._done, lanes, 1)
        self._deal()
        return np.array(numbers, int)

    def _deal(self) -> None:
        share = len(self._left) // (2 * len(self._dealt))
        for wanted in range(1, min(max(share, 1), ENTRIES) + 1):
            for dealt, done in zip(self._dealt, self._done, strict=True):
                if self._left and len(dealt) - done < wanted:
                    dealt.append(self._left.popleft())


def training_schedule(
    worlds: State,
    key: PRNGKeyArray,
    mode: Int[Array, ""] | int,
    num_lanes: int,
    entries: int = ENTRIES,
) -> Schedule:
    """Worlds drawn from a pool for every lane, without end.

    Args:
        worlds: the pool.
        key: of the draw; a new one for every iteration.
        mode: plan mode of all episodes.
        num_lanes: lanes of the rollout.
        entries: columns of the schedule, far more than a lane plays in a segment.
    """
    pool = jax.tree.leaves(worlds)[0].shape[0]
    world_key, seed_key = jax.random.split(key)
    shape = (num_lanes, entries)
    return Schedule(
        worlds=worlds,
        world=jax.random.randint(world_key, shape, 0, pool, jnp.int32),
        seed=jax.random.randint(seed_key, shape, 0, 2**31 - 1, jnp.int32),
        mode=jnp.full(shape, mode, jnp.int32),
        entries=jnp.full(num_lanes, -1, jnp.int32),
    )
