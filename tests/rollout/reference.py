"""The rollout once more, in plain Python and token by token: one lane at a time.

It is told which tokens the model said, and says everything else: what the worlds did,
what stands in the stream around these tokens and what is known of each, which turns and
episodes there were, and what the next segment begins with.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.core.roles import Role, Span
from jaxplan.models.visibility import NO_PLAN, PROMPT_EPISODE, TokenMeta, visible
from jaxplan.text.phrases import phrases_text

FIELDS = ("token", "role", "span", "sampled", "turn", "episode", "plan", "active_plan")


@dataclasses.dataclass
class Row:
    """One token of a stream."""

    token: int
    role: int
    span: int
    sampled: bool
    turn: int
    episode: int
    plan: int
    active_plan: int


@dataclasses.dataclass
class Slot:
    """One turn of a segment; ``complete`` once it is over."""

    start: int
    number: int
    complete: bool = False
    reward: float = 0.0
    discount: float = 0.0
    plan_tokens: int = 0
    planned: bool = False
    action: int = 0


@dataclasses.dataclass
class Account:
    """One episode, as in ``EpisodeStats``."""

    task_return: float = 0.0
    events: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2, bool))
    gusts: int = 0
    env_steps: int = 0
    turns: int = 0
    plans: int = 0
    plan_tokens: int = 0


@dataclasses.dataclass
class End:
    """One finished episode, as in ``EpisodeEnd``, and the round it ended in."""

    round: int
    terminated: bool
    entry: int
    account: Account


@dataclasses.dataclass
class Words:
    """What a turn is made of, as ids."""

    opening: list[int]
    closing: list[int]
    actions: list[list[int]]
    budget: int

    def read(self, said: Sequence[int]) -> list[Span]:
        """Tell what each token of a turn, whole or not, is."""
        spans: list[Span] = []
        if said[:1] == self.opening[:1]:
            spans += [Span.TAG] * len(self.opening)
            while len(spans) < len(said) and said[len(spans)] != self.closing[0]:
                spans.append(Span.PLAN)
            spans += [Span.TAG] * len(self.closing)
        spans += [Span.ACTION] * len(said)
        return spans[: len(said)]

    def action_said(self, said: Sequence[int]) -> list[int]:
        return [
            token
            for token, span in zip(said, self.read(said), strict=True)
            if span == Span.ACTION
        ]

    def had_choice(self, said: Sequence[int], mode: int, episode_turn: int) -> bool:
        """Tell whether another token than the last could have been said."""
        span, before = self.read(said)[-1], list(said[:-1])
        if not before and mode == 0:
            return True
        if span == Span.PLAN:
            return True
        if span == Span.TAG:
            first_piece_of_closing = said[-1] == self.closing[0] and Span.PLAN in [
                *self.read(before)[-1:]
            ]
            return (
                first_piece_of_closing
                and self.read(said).count(Span.PLAN) < self.budget
            )
        action = self.action_said(before)
        options = {a[len(action)] for a in self.actions if a[: len(action)] == action}
        return len(options) > 1


class Reference:
    """One lane."""

    def __init__(self, setting, schedule, lane: int) -> None:
        self.env, self.config = setting.env, setting.rollout
        self.gamma, self.turn_tokens = setting.gamma, setting.turn_tokens
        self.tokenizer, self.words = setting.tokenizer, setting.words
        self.entries = int(schedule.entries[lane])
        self.seeds = np.asarray(schedule.seed[lane])
        self.modes = np.asarray(schedule.mode[lane])
        self.worlds = [
            jax.tree.map(lambda leaf, w=w: leaf[w], schedule.worlds)
            for w in np.asarray(schedule.world[lane])
        ]
        self.env_step = setting.env_step
        self.chunks = [self.config.prefill_tokens] + [1] * self.config.decode_steps
        self.entry = self.turn = self.plan = self.active_plan = 0
        self.live, self.ended, self.asleep = True, True, False
        self.said: list[int] = []
        prompt = self.tokenizer.encode(self.env.instructions)
        self.rows = [
            Row(t, Role.PROMPT, Span.NONE, False, 0, PROMPT_EPISODE, NO_PLAN, 0)
            for t in prompt
        ]

    def segment(self, stream: Sequence[int]) -> None:
        """Play one segment; ``rows``, ``slots``, ``ends`` then tell what happened."""
        self.stream = stream
        self.slots = [Slot(len(self.rows), self.turn)]
        self.ends: list[End] = []
        self.unread = 1  # the last token of the prefix
        self.env_steps = self.encoded = 0
        for number in range(self.config.rounds):
            self._observe(number, closing=False)
            for chunk in self.chunks:
                self._say(chunk)
        self._observe(self.config.rounds, closing=True)

    def carry_over(self) -> list[Row]:
        """Go on to the next segment; returns what it begins with."""
        names = ("episode", "turn", "plan", "active_plan")
        columns = {name: [getattr(row, name) for row in self.rows] for name in names}
        now = (0 if self.ended else self.entry, self.turn, NO_PLAN, self.active_plan)
        keys = _meta(position=range(len(self.rows)), **columns)
        query = _meta(
            position=[len(self.rows)],
            **{name: [number] for name, number in zip(names, now, strict=True)},
        )
        seen = np.asarray(visible(query, keys, self.config.history))[0].copy()
        count = len(self.said)
        self.cut_off = bool(count) and not self.ended and self.live
        if self.cut_off:
            seen[-count:] = False  # a turn that is not over starts again
            self.said, self.plan = [], self.active_plan
        self.rows = [
            row
            if row.role == Role.PROMPT
            else dataclasses.replace(row, role=Role.CARRIED, sampled=False)
            for row, kept in zip(self.rows, seen, strict=True)
            if kept
        ]
        return list(self.rows)

    def _room(self) -> int:
        return self.config.segment_tokens - len(self.rows)

    def _observe(self, number: int, closing: bool) -> None:
        waiting = self.ended and self._room() >= self.config.observation_tokens
        began = self._act(number, closing)
        if waiting or self.ended_in_death:
            self._begin_episode()
            began = True
        if self.live and began:
            self._begin_turn()

    def _act(self, number: int, closing: bool) -> bool:
        """Step the world if it is time; returns whether the turn is over."""
        self.ended_in_death = False
        ready = self._is_finished()
        if not self.live or self.ended or not (self.asleep or ready):
            return False
        spans = self.words.read(self.said)
        said = self.words.action_said(self.said)
        action = self.words.actions.index(said) if ready else 0
        key = jax.random.fold_in(jax.random.key(0), self.seed)
        key = jax.random.fold_in(jax.random.fold_in(key, 0), self.account.env_steps)
        step = self.env_step(key, self.world, jnp.int32(action))
        self.world = step.state
        over = bool(step.terminated) or bool(step.truncated)
        self.asleep = bool(self.env.passive(step.state)) and not over
        slot, account = self.slots[-1], self.account
        slot.reward += self.gamma**self.slept * float(step.reward)
        self.slept += 1
        self.env_steps += 1
        account.task_return += float(step.reward)
        account.events |= np.asarray(step.events)
        account.gusts += int(step.counts["gusts"])
        account.env_steps += 1
        account.turns += not self.asleep
        if not self.asleep or closing:
            slot.complete, slot.action = True, action if ready else -1
            slot.discount = 0.0 if step.terminated else self.gamma**self.slept
            slot.plan_tokens = spans.count(Span.PLAN)
            slot.planned = Span.TAG in spans
            account.plans += slot.planned
            account.plan_tokens += slot.plan_tokens
            self.active_plan = self.plan
        if over:
            end = End(number, bool(step.terminated), self.entry - 1, account)
            self.ends.append(end)
        self.ended_in_death = bool(step.terminated)
        self.ended = bool(step.truncated)
        return slot.complete

    def _begin_episode(self) -> None:
        self.live = self.entries < 0 or self.entry < self.entries
        self.ended = not self.live
        if not self.live:
            return
        column = self.entry % len(self.seeds)
        self.entry += 1
        self.world, self.seed = self.worlds[column], int(self.seeds[column])
        self.mode = int(self.modes[column])
        self.episode_turn = -1
        self.active_plan = self.plan
        self.account = Account()

    def _begin_turn(self) -> None:
        self.turn += 1
        self.episode_turn += not self.asleep  # sleep is no turn of its own
        self.slept = 0
        self.said = []
        seen = jax.device_get(self.env.describe(self.world))
        for token in self.tokenizer.encode(
            phrases_text(self.env.phrases, seen.ids, seen.mask)
        ):
            self._append(token, Role.OBSERVATION, Span.NONE, False)
        self.slots.append(Slot(len(self.rows), self.turn))

    def _say(self, chunk: int) -> None:
        read = min(chunk, self.unread)
        self.encoded += read
        self.unread -= read
        if not read or self.unread or not self.live or self.ended or self.asleep:
            return
        if self._is_finished():
            return
        needed = self.turn_tokens + self.config.observation_tokens
        if not self.said and self._room() < needed:
            return
        self.said.append(int(self.stream[len(self.rows)]))
        span = self.words.read(self.said)[-1]
        role = Role.ACTION if span == Span.ACTION else Role.PLAN
        sampled = self.words.had_choice(self.said, self.mode, self.episode_turn)
        if len(self.said) == 1:
            role = Role.DECIDE
            self.plan += span == Span.TAG
        self._append(self.said[-1], role, span, sampled)

    def _is_finished(self) -> bool:
        return self.words.action_said(self.said) in self.words.actions

    def _append(self, token: int, role: Role, span: Span, sampled: bool) -> None:
        in_plan = span in (Span.TAG, Span.PLAN)
        closed = self.said[-len(self.words.closing) :] == self.words.closing
        self.unread += 1
        old = in_plan and not (closed and span == Span.TAG)
        self.rows.append(
            Row(
                token=token,
                role=role,
                span=span,
                sampled=sampled,
                turn=self.turn,
                episode=self.entry,
                plan=self.plan if in_plan else NO_PLAN,
                active_plan=self.active_plan if old else self.plan,
            )
        )


def _meta(**columns: Sequence[int]) -> TokenMeta:
    return TokenMeta(
        **{name: jnp.array(values, jnp.int32) for name, values in columns.items()}
    )
