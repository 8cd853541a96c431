"""The teacher's trajectories: a scripted expert plays, and says its plan every K turns.

K is drawn once for each trajectory, as in the paper (K ~ U[2, 12], arXiv:2509.03581,
section 4). Turns in which the player sleeps are not asked for and not written down;
what they earn belongs to the turn before.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import CollectConfig
from jaxplan.core.processes import agree, is_first
from jaxplan.envs.base import Expert, Phrases, TextEnv
from jaxplan.io.datasets import DatasetWriter
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.rollout.schedule import make_worlds
from jaxplan.rollout.scripted import Trajectories, play_scripted
from jaxplan.text.phrases import PhraseTable, make_phrase_table, pack, phrases_text
from jaxplan.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who plays where, and how it is written down.

    Attributes:
        env: the world.
        expert: the player.
        tokenizer: of the student.
        observation_tokens: room for an observation, as in the rollout.
        plan_tokens: room for a plan: the grammar's budget.
    """

    env: TextEnv
    expert: Expert
    tokenizer: Tokenizer
    observation_tokens: int
    plan_tokens: int


@partial(jax.jit, static_argnames="capacity")
def _pack_all(table: PhraseTable, phrases: Phrases, capacity: int):
    packed = jax.vmap(jax.vmap(lambda one: pack(table, one, capacity)))(phrases)
    return packed[0], packed[1]


def collect(
    directory: Path,
    teacher: Teacher,
    config: CollectConfig,
    seed: int,
    about: dict[str, str],
    progress: Callable[[int, int], None],
    stop: StopRequest,
) -> dict[str, Any]:
    """Write ``config.episodes`` trajectories, going on where a killed run stopped.

    Args:
        directory: of the dataset.
        teacher: who plays.
        config: how much, and with how much noise.
        seed: of the run: worlds, noise and K derive from it.
        about: written into every shard, see ``DatasetWriter``.
        progress: is told the episodes done and the turns written so far.
        stop: asked between two batches of episodes.

    Returns:
        The dataset's card; nothing in any process but the first.

    Raises:
        Stopped: someone asked; whole batches are kept.
    """
    writer = None
    if is_first():  # it plays alone; the others only learn when to stop
        writer = DatasetWriter(directory, about, shard_episodes=config.lanes)
    tables = (
        make_phrase_table(teacher.tokenizer, teacher.env.phrases),
        make_phrase_table(teacher.tokenizer, teacher.expert.phrases),
    )
    turns = 0
    done = agree(writer.episodes if writer else 0)
    for first in range(done, config.episodes, config.lanes):
        if writer:
            numbers = np.arange(first, min(first + config.lanes, config.episodes))
            for columns in _play(teacher, config, seed, numbers, tables):
                writer.add_episode(columns)
                turns += len(columns["step"])
        progress(min(first + config.lanes, config.episodes), turns)
        if stop.requested:
            raise Stopped
    return writer.close() if writer else {}


def _play(
    teacher: Teacher,
    config: CollectConfig,
    seed: int,
    numbers: np.ndarray,
    tables: tuple[PhraseTable, PhraseTable],
) -> Iterator[dict[str, Any]]:
    """The turns of trajectories; all batches are of one size, the last one, too."""
    first = int(numbers[0])
    seeds = jnp.asarray(
        _episode_seeds(seed, np.arange(first, first + config.lanes)), jnp.int32
    )
    played = play_scripted(
        make_worlds(teacher.env, seeds),
        seeds,
        env=teacher.env,
        player=teacher.expert,
        steps=config.steps,
        noise=config.action_noise,
    )
    written = _write_down(played, teacher, tables)
    for number, columns in zip(numbers.tolist(), written, strict=False):
        yield _speak_every(columns, *_plan_turns(config, seed, number))


def _episode_seeds(seed: int, numbers: np.ndarray) -> np.ndarray:
    """World seeds of trajectories; below 2**30, where no evaluation panel lies."""
    return np.array(
        [np.random.default_rng([seed, n]).integers(2**24, 2**30) for n in numbers],
        np.int32,
    )


def _plan_turns(config: CollectConfig, seed: int, number: int) -> tuple[int, int]:
    """Draw K, and the turn of the first plan."""
    chance = np.random.default_rng([seed, number, 1])
    low, high = config.plan_every
    every = int(chance.integers(low, high + 1))
    return every, int(chance.integers(every)) if config.random_phase else 0


def _write_down(
    played: Trajectories, teacher: Teacher, tables: tuple[PhraseTable, PhraseTable]
):
    """The columns of every lane's turns, with a plan in each of them."""
    observed = _pack_all(tables[0], played.observation, teacher.observation_tokens)
    planned = _pack_all(tables[1], played.plan, teacher.plan_tokens)
    host = jax.device_get((played, observed, planned))
    for lane in range(played.action.shape[1]):
        yield _columns(jax.tree.map(lambda array, i=lane: array[:, i], host), teacher)


def _columns(host: tuple[Any, Any, Any], teacher: Teacher) -> dict[str, Any]:
    played, observed, planned = host
    step = np.flatnonzero(played.alive & ~played.passive)
    unlocked = np.cumsum(played.events.sum(axis=-1))
    actions = played.action[step]
    names = teacher.env.action_names
    ids = [np.asarray(teacher.tokenizer.encode(name), np.int32) for name in names]
    return {
        "step": step.astype(np.int32),
        "observation": _texts(teacher.env.phrases, played.observation, step),
        "plan": _texts(teacher.expert.phrases, played.plan, step),
        "action": [names[action] for action in actions],
        "action_id": actions.astype(np.int16),
        "learn": ~played.noisy[step],
        "reward": np.add.reduceat(played.reward, step).astype(np.float32),
        "achievements": np.append(unlocked[step[1:] - 1], unlocked[-1]).astype(
            np.int32
        ),
        "observation_tokens": _rows(observed, step),
        "plan_tokens": _rows(planned, step),
        "action_tokens": [ids[action] for action in actions],
    }


def _texts(names: tuple[str, ...], phrases: Phrases, step: np.ndarray) -> list[str]:
    ids, mask = np.asarray(phrases.ids), np.asarray(phrases.mask)
    return [phrases_text(names, ids[i], mask[i]) for i in step]


def _rows(packed: tuple[np.ndarray, np.ndarray], step: np.ndarray) -> list[np.ndarray]:
    tokens, lengths = packed
    return [tokens[i, : lengths[i]] for i in step]


def _speak_every(
    columns: dict[str, Any], every: int, first_plan: int
) -> dict[str, Any]:
    """Keep the plan of every ``every``-th turn, from turn ``first_plan`` on."""
    silent = np.zeros(0, np.int32)
    turns = range(len(columns["step"]))
    speaks = [turn % every == first_plan for turn in turns]
    return columns | {
        "plan": [
            text if speak else ""
            for text, speak in zip(columns["plan"], speaks, strict=True)
        ],
        "plan_tokens": [
            ids if speak else silent
            for ids, speak in zip(columns["plan_tokens"], speaks, strict=True)
        ],
    }


def to_json(config: Any) -> str:
    """A config section as JSON, for the shard's metadata."""
    return json.dumps(dataclasses.asdict(config))
