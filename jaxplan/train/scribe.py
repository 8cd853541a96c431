"""Writing trajectories down: from what happened, step by step, to rows of a dataset.

Whoever played, the rows are made from the world itself: the texts, the rewards and the
achievements. Only what was said comes from the player.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jaxplan.config.schema import CollectConfig
from jaxplan.envs.base import TextEnv
from jaxplan.rollout.schedule import make_worlds
from jaxplan.rollout.scripted import RandomPlayer, Script, play_scripted
from jaxplan.text.phrases import Ragged, make_phrase_table, ragged, spell
from jaxplan.text.tokenizer import Tokenizer

# What is drawn for a trajectory, each from a chance of its own.
WORLD, EVERY, STYLE, DROWSY, TAKES_OVER = (), (1,), (2,), (3,), (4,)

RELAY_SEED = 2**20  # added to the seed, so that a relay meets worlds of its own


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where is played, and how it is written down.

    Attributes:
        env: the world; a Llama's or a server's ends after ``config.steps``.
        tokenizer: of the student.
        config: of the collection.
        seed: of the run; worlds, styles and K derive from it and a trajectory's number.
        observation_tokens: room for an observation, as in the rollout.
        plan_tokens: room for a plan: the grammar's budget.
        other_texts: the same world in further text levels, by their names.
    """

    env: TextEnv
    tokenizer: Tokenizer
    config: CollectConfig
    seed: int
    observation_tokens: int
    plan_tokens: int
    other_texts: dict[str, TextEnv] = dataclasses.field(default_factory=dict)

    @property
    def describers(self) -> tuple[TextEnv, ...]:
        """The world in every text that is written down."""
        return (self.env, *self.other_texts.values())

    def chance(self, number: int, purpose: tuple[int, ...]) -> np.random.Generator:
        """What is random about trajectory ``number``, for one purpose."""
        return np.random.default_rng([self.seed, number, *purpose])

    def world_seeds(self, first: int) -> np.ndarray:
        """World seeds of a batch; below 2**30, where no evaluation panel lies."""
        numbers = range(first, first + self.config.lanes)
        chances = [self.chance(number, WORLD) for number in numbers]
        return np.array([c.integers(2**24, 2**30) for c in chances], np.int32)

    def plan_turns(self, number: int) -> tuple[int, int]:
        """K of a trajectory, and the turn of its first plan."""
        chance, (low, high) = self.chance(number, EVERY), self.config.plan_every
        every = int(chance.integers(low, high + 1))
        return every, int(chance.integers(every)) if self.config.random_phase else 0

    def style(self, number: int, known: tuple[str, ...]) -> str:
        """How a trajectory words its plans."""
        styles = self.config.styles or known[:1]
        return styles[int(self.chance(number, STYLE).integers(len(styles)))]


@dataclasses.dataclass(frozen=True)
class RecordedTurn:
    """What a player did in a turn.

    Attributes:
        plan: its plan; empty without one.
        action: number of the action.
        learn: False where the action is not to be imitated.
    """

    plan: str
    action: int
    learn: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Speech:
    """What every phrase of a speaker is made of."""

    tokens: Ragged
    letters: Ragged


def make_speech(tokenizer: Tokenizer, phrases: tuple[str, ...]) -> Speech:
    """Token ids, proven to concatenate, and letters."""
    table = make_phrase_table(tokenizer, phrases)
    lengths, rows = np.asarray(table.lengths), np.asarray(table.tokens)
    within = np.arange(rows.shape[1]) < lengths[:, None]
    tokens = Ragged(rows[within], np.append(0, lengths.cumsum()))
    return Speech(tokens=tokens, letters=_letters(phrases))


def _letters(phrases: tuple[str, ...]) -> Ragged:
    return ragged([list(phrase.encode()) for phrase in phrases], np.uint8)


class Scribe:
    """Turns trajectories into the columns of a dataset; make one, use it for all.

    Attributes:
        desk: where it works.
        cut_plans: plans that had more tokens than there was room for.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.cut_plans = 0
        self._seen = make_speech(desk.tokenizer, desk.env.phrases)
        self._others = {
            level: _letters(env.phrases) for level, env in desk.other_texts.items()
        }
        names = desk.env.action_names
        self._action_ids = [np.asarray(i) for i in desk.tokenizer.encode_batch(names)]

    def account(self) -> dict[str, Any]:
        """What is to be told at the end."""
        return {"cut_plans": self.cut_plans}

    def steps(self, number: int, played: Any) -> np.ndarray:
        """The env steps of a trajectory that are turns: awake, and some asleep."""
        config = self.desk.config
        drowsy = self.desk.chance(number, DROWSY).random(config.steps) < config.sleeping
        return np.flatnonzero(played.alive & (~played.passive | drowsy))

    def columns(self, played: Any, step: np.ndarray, style: str) -> dict[str, Any]:
        """All columns but those of plans and goals.

        Args:
            played: ``Trajectories`` of one lane, on the host.
            step: its turns, of ``steps``.
            style: how its plans are worded.
        """
        actions, names = played.action[step], self.desk.env.action_names
        advised = played.advised[step]
        unlocked = np.cumsum(played.events.sum(axis=-1))
        ids = [self._action_ids[action] for action in actions]
        columns = {
            "step": step.astype(np.int32),
            "style": [style] * len(step),
            "action": [names[action] for action in actions],
            "action_id": actions.astype(np.int16),
            "advice": [
                names[better] if better != action else ""
                for better, action in zip(advised, actions, strict=True)
            ],
            "learn": np.ones(len(step), bool),
            "asleep": played.passive[step],
            "reward": np.add.reduceat(played.reward, step).astype(np.float32),
            "achievements": np.append(unlocked[step[1:] - 1], unlocked[-1]).astype(
                np.int32
            ),
            "action_tokens": ids if self.desk.config.token_ids else [[]] * len(step),
        }
        main, *others = played.observations
        columns |= self._observed(main.ids[step], main.mask[step])
        for level, seen in zip(self._others, others, strict=True):
            letters, _ = spell(self._others[level], seen.ids[step], seen.mask[step])
            columns[f"observation_{level}"] = _strings(letters)
        return columns

    def _observed(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, pa.Array]:
        letters, _ = spell(self._seen.letters, ids, mask)
        tokens, _ = spell(self._seen.tokens, ids, mask, self.desk.observation_tokens)
        return {
            "observation": _strings(letters),
            "observation_tokens": self._lists(tokens),
        }

    def phrased_plans(
        self, speech: Speech, ids: np.ndarray, mask: np.ndarray, speaks: np.ndarray
    ) -> dict[str, pa.Array]:
        """The columns of plans made of phrases; empty in the turns without one.

        Args:
            speech: of the player.
            ids: phrases of the plans, one row a plan.
            mask: which of them are spoken.
            speaks: the turns in which a plan is said.
        """
        letters, _ = spell(speech.letters, ids, mask)
        tokens, cut = spell(speech.tokens, ids, mask, self.desk.plan_tokens)
        self.cut_plans += cut
        place = np.append(0, np.cumsum(speaks))
        letters = dataclasses.replace(letters, offsets=letters.offsets[place])
        tokens = dataclasses.replace(tokens, offsets=tokens.offsets[place])
        return {"plan": _strings(letters), "plan_tokens": self._lists(tokens)}

    def written_plans(self, plans: list[str]) -> dict[str, Any]:
        """The columns of plans in anybody's words."""
        ids = self.desk.tokenizer.encode_batch(plans)
        room = self.desk.plan_tokens
        self.cut_plans += sum(len(row) > room for row in ids)
        return {
            "plan": plans,
            "plan_tokens": self._lists(ragged([row[:room] for row in ids], np.int32)),
        }

    def recite(
        self, first: int, recordings: list[list[RecordedTurn]], styles: list[str]
    ) -> list[dict[str, Any]]:
        """The columns of trajectories that others played, from their actions.

        The worlds are played again, so what is written down is what was seen.

        Args:
            first: number of the first trajectory.
            recordings: their turns.
            styles: how their plans are worded.
        """
        desk, steps = self.desk, self.desk.config.steps
        actions = np.zeros((desk.config.lanes, steps), np.int32)
        for row, turns in zip(actions, recordings, strict=False):
            row[: len(turns)] = [turn.action for turn in turns]
        seeds = jnp.asarray(desk.world_seeds(first))
        script = Script(
            actions=jnp.asarray(actions), turns=jnp.full(len(actions), steps)
        )
        played = jax.device_get(
            play_scripted(
                make_worlds(desk.env, seeds),
                seeds,
                env=desk.env,
                player=RandomPlayer(num_actions=len(desk.env.action_names)),
                steps=steps,
                describers=desk.describers,
                script=script,
            )
        )
        columns = []
        for lane, (turns, style) in enumerate(zip(recordings, styles, strict=True)):
            own: Any = jax.tree.map(lambda array, i=lane: array[:, i], played)
            step = self.steps(first + lane, own)
            # Asleep the next turn is not there yet, or never comes.
            number = np.minimum(own.turn[step], len(turns) - 1)
            of_step, awake = [turns[turn] for turn in number], ~own.passive[step]
            said = [t.plan * bool(w) for t, w in zip(of_step, awake, strict=True)]
            columns.append(
                self.columns(own, step, style)
                | self.written_plans(said)
                | {"learn": np.array([turn.learn for turn in of_step], bool)}
                | {"goal": [""] * len(step), "advice": [""] * len(step)}
            )
        return columns

    def _lists(self, rows: Ragged) -> pa.Array:
        if not self.desk.config.token_ids:
            rows = Ragged(rows.values[:0], np.zeros_like(rows.offsets))
        offsets = pa.array(rows.offsets, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(rows.values, pa.int32()))


def _strings(letters: Ragged) -> pa.Array:
    offsets = pa.py_buffer(letters.offsets.astype(np.int32))
    return pa.StringArray.from_buffers(
        len(letters.offsets) - 1, offsets, pa.py_buffer(letters.values)
    )
