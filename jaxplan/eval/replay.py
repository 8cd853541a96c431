"""One episode step by step: what was seen, planned and done, played once more.

Nothing is recorded while the agent plays but its tokens. An episode is a function of
its seed and its actions, so the frames come from playing the same actions again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxplan.envs.base import Drawn, State, TextEnv
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key
from jaxplan.rollout.spoken import SpokenTurn


@partial(jax.jit, static_argnames="env")
def _play_again(world: State, seed: Array, actions: Int[Array, " steps"], env: TextEnv):
    key = episode_key(seed)

    def one_step(world: State, at: tuple[Array, Array]):
        step, action = at
        result = env.step(world_key(key, step), world, action)
        facts = {
            "reward": result.reward,
            "events": result.events,
            "passive": env.passive(world),
            "over": result.terminated | result.truncated,
        }
        return result.state, (world, facts)

    return jax.lax.scan(one_step, world, (jnp.arange(actions.shape[0]), actions))[1]


def make_replay(
    arm: str, mode: str, seed: int, world: State, turns: list[SpokenTurn], env: TextEnv
) -> dict[str, Any]:
    """Play an episode's actions again and describe every step for the replay page.

    Args:
        arm: who played.
        mode: its plan mode.
        seed: of the episode.
        world: it began in.
        turns: what was said (``spoken_turns``).
        env: the world's rules.
    """
    worlds, facts, turn_of_step = _unfold(world, seed, turns, env)
    steps = len(turn_of_step)
    worlds = jax.tree.map(lambda leaf: leaf[:steps], worlds)
    drawing = env.draw(worlds) if isinstance(env, Drawn) else {}
    pictures = drawing.pop("frames", [{}] * steps)
    frames, plan, total = [], "", 0
    previous = -1
    for step, (turn, picture) in enumerate(zip(turn_of_step, pictures, strict=True)):
        spoken = turns[turn]
        new = turn != previous and spoken.plan != ""
        plan = spoken.plan if new else plan
        unlocked = [env.event_names[i] for i in np.flatnonzero(facts["events"][step])]
        total += len(unlocked)
        frames.append(
            picture
            | {
                "step": step,
                "reward": round(float(facts["reward"][step]), 4),
                "action": env.action_names[spoken.action],
                "plan": plan,
                "planned_now": new,
                "unlocked": unlocked,
                "achievements": total,
                "observation": spoken.observation if turn != previous else "",
            }
        )
        previous = turn
    return {
        "arm": arm,
        "mode": mode,
        "seed": seed,
        "action_names": list(env.action_names),
        "event_names": list(env.event_names),
        "frames": frames,
        **drawing,
    }


def _unfold(
    world: State, seed: int, turns: list[SpokenTurn], env: TextEnv
) -> tuple[State, dict[str, Any], list[int]]:
    """Find out which turn each env step belongs to: asleep, a turn lasts many steps.

    The episode is played with a guess of the actions; where the player turns out to be
    asleep the guess is put right and the episode is played again from the start.
    """
    limit = env.max_steps
    turn_of_step: list[int] = list(range(len(turns)))
    while True:
        actions = np.zeros(limit, np.int32)
        chosen = [turns[turn].action for turn in turn_of_step[:limit]]
        actions[: len(chosen)] = chosen
        worlds, played = _play_again(world, jnp.int32(seed), jnp.asarray(actions), env)
        facts = jax.device_get(played)
        corrected, turn = [], -1
        for step in range(limit):
            turn += not facts["passive"][step]
            if turn >= len(turns):
                break
            corrected.append(turn)
            if facts["over"][step]:
                break
        if corrected == turn_of_step:
            return worlds, facts, turn_of_step
        turn_of_step = corrected
