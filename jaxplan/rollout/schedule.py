"""Which worlds the lanes play, and from which keys all that happens in them derives.

A world is made from its seed alone, and so is the key of the episode played in it: an
episode is the same in whichever lane, batch or round it is played.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
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


def panel_schedule(
    worlds: State,
    seeds: Int[Array, " N"],
    modes: Int[Array, " M"],
    num_lanes: int,
) -> Schedule:
    """Every world in every mode, once: N x M episodes over the lanes.

    A lane plays the same worlds in all modes, one after the other, and lanes start with
    different modes, so that all lanes have about the same work and every batch mixes
    all modes. Episode e of the panel is world ``e // M`` in mode ``e % M``; where the
    lanes do not divide N, some play fewer worlds.

    Args:
        worlds: one for each seed.
        seeds: of the panel.
        modes: plan modes.
        num_lanes: lanes of the rollout.
    """
    num_worlds, num_modes = seeds.shape[0], modes.shape[0]
    per_lane = -(-num_worlds // num_lanes)
    lane = jnp.arange(num_lanes)[:, None, None]
    place = jnp.arange(per_lane)[None, :, None]
    turn = jnp.arange(num_modes)[None, None, :]
    world = jnp.broadcast_to(place * num_lanes + lane, (num_lanes, per_lane, num_modes))
    mode = jnp.broadcast_to(modes[(turn + lane) % num_modes], world.shape)
    worlds_of_lane = jnp.sum(world[:, :, 0] < num_worlds, axis=1)
    inside = jnp.minimum(world, num_worlds - 1).reshape(num_lanes, -1)
    return Schedule(
        worlds=worlds,
        world=inside.astype(jnp.int32),
        seed=seeds[inside].astype(jnp.int32),
        mode=mode.reshape(num_lanes, -1).astype(jnp.int32),
        entries=(worlds_of_lane * num_modes).astype(jnp.int32),
    )


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
