"""From turns to packed segments: the streams a rollout would have written (host).

A segment starts like one of the rollout: the prompt, then what the next turn can still
see of its episode (the active plan and the last turns) as carried context, then turns
until the segment is full. The next episode follows in the same segment; nothing leaks,
because visibility is a function of episode, turn and plan numbers.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxplan.core.roles import Role
from jaxplan.models.visibility import NO_PLAN, PROMPT_EPISODE
from jaxplan.plan import grammar as plan_grammar
from jaxplan.plan.grammar import Grammar

_FIELDS = (
    "token", "role", "learn", "turn", "episode", "plan", "active_plan", "target"
)  # fmt: skip
_PADDING = {"plan": NO_PLAN}
_NOTHING = -1  # no token


@dataclasses.dataclass(frozen=True)
class TurnTokens:
    """One turn of a trajectory, as ids.

    Attributes:
        observation: what was seen.
        generated: what the agent says: plan with its tags, or none, and the action.
        plan_length: how many of ``generated`` are plan and tags; 0 without a plan.
        learn_action: False where there is no action to imitate.
        advice: the action to imitate, where it is another than the one done.
    """

    observation: Sequence[int]
    generated: Sequence[int]
    plan_length: int
    learn_action: bool
    advice: Sequence[int] = ()


@dataclasses.dataclass(eq=False)
class _Piece:
    """Columns of a stretch of tokens, ``_FIELDS`` in order."""

    columns: list[list[int]] = dataclasses.field(
        default_factory=lambda: [[] for _ in _FIELDS]
    )

    def add(self, *row: int) -> None:
        for column, entry in zip(self.columns, row):  # noqa: B905 (the hot loop)
            column.append(entry)

    def extend(self, other: "_Piece") -> None:
        for column, more in zip(self.columns, other.columns, strict=True):
            column.extend(more)

    def carried(self) -> "_Piece":
        """The same tokens without a loss."""
        count = len(self)
        columns = [list(column) for column in self.columns]
        columns[_FIELDS.index("role")] = [int(Role.CARRIED)] * count
        columns[_FIELDS.index("learn")] = [0] * count
        return _Piece(columns)

    def visible_after(self, oldest_turn: int, newest_plan: int) -> "_Piece":
        """The tokens of turns from ``oldest_turn`` on, and of the newest plan."""
        rows = zip(*self.columns, strict=True)
        turn, plan = _FIELDS.index("turn"), _FIELDS.index("plan")
        kept = _Piece()
        for row in rows:
            recent = row[plan] == NO_PLAN and row[turn] > oldest_turn
            if recent or row[plan] == newest_plan:
                kept.add(*row)
        return kept

    def __len__(self) -> int:
        return len(self.columns[0])


class Packer:
    """Packs trajectories into segments; call ``add`` for each, then ``finish``."""

    def __init__(
        self,
        grammar: Grammar,
        prompts: Sequence[Sequence[int]],
        segment_tokens: int,
        history: int,
        learn_observations: bool = False,
    ) -> None:
        """Start with no segment.

        Args:
            grammar: the plan grammar, which knows the role of every generated token.
            prompts: ids that open a segment; segments take them in turn.
            segment_tokens: length of a segment.
            history: turns that stay visible.
            learn_observations: whether what is seen is learnt as well.
        """
        self._learn_observations = int(learn_observations)
        self._next_state = np.asarray(grammar.next_state).tolist()
        self._role = np.asarray(grammar.role).tolist()
        self._choice = np.asarray(grammar.choice).tolist()
        self._action = np.asarray(grammar.action).tolist()
        self._history = history
        self._size = segment_tokens
        self._prompts = [_Piece() for _ in prompts]
        for piece, prompt in zip(self._prompts, prompts, strict=True):
            for token in prompt:
                meta = (0, PROMPT_EPISODE, NO_PLAN, 0)
                piece.add(token, Role.PROMPT, 0, *meta, token)
        self._segments: list[np.ndarray] = []
        self._current = self._opened()
        self._turn = self._episode = self._plan = 0
        # Most turns say nothing but one of a few actions.
        self._told = functools.lru_cache(maxsize=4096)(self._tell)

    def add(self, turns: Iterable[TurnTokens]) -> None:
        """Append one episode.

        Raises:
            ValueError: a turn is not in the grammar, or is longer than a segment.
        """
        self._episode += 1
        recent: list[_Piece] = []  # the turns before, as far as the history goes
        planned: list[_Piece] = []  # the turn that wrote the newest plan
        for turn in turns:
            self._turn += 1
            plan = self._plan
            said = self._write(turn)
            if len(self._current) + len(said) > self._size:
                older = [piece for piece in planned if piece not in recent]
                self._flush([*older, *recent], plan)
            self._current.extend(said)
            if len(self._current) > self._size:
                raise ValueError(
                    f"rollout.segment_tokens={self._size} is too small: one turn with "
                    f"what it can see takes {len(self._current)} tokens; make segments "
                    "longer or rollout.history shorter"
                )
            recent = [*recent, said][max(0, len(recent) + 2 - self._history) :]
            planned = [said] if turn.plan_length else planned

    def _opened(self) -> _Piece:
        """A segment with nothing but its prompt."""
        opened = _Piece()
        opened.extend(self._prompts[len(self._segments) % len(self._prompts)])
        return opened

    def finish(self) -> dict[str, np.ndarray]:
        """All segments, [segments, tokens] for each field of a token."""
        if len(self._current) > len(self._opened()):
            self._flush([], 0)
        stacked = np.stack(self._segments)
        return dict(zip(_FIELDS, np.moveaxis(stacked, 1, 0), strict=True))

    def _write(self, turn: TurnTokens) -> _Piece:
        """The turn's tokens with all that is said of them."""
        before = self._plan
        self._plan += turn.plan_length > 0
        seen, said = len(turn.observation), len(turn.generated)
        role, learn, target = self._told(
            tuple(turn.generated),
            turn.plan_length,
            turn.learn_action,
            tuple(turn.advice),
        )
        in_plan, behind = turn.plan_length, said - turn.plan_length
        # Closed by its last tag, the plan is the active one from that on.
        opening = max(in_plan - 1, 0)
        columns = {
            "token": [*turn.observation, *turn.generated],
            "role": [int(Role.OBSERVATION)] * seen + role,
            "learn": [self._learn_observations] * seen + learn,
            "turn": [self._turn] * (seen + said),
            "episode": [self._episode] * (seen + said),
            "plan": [NO_PLAN] * seen + [self._plan] * in_plan + [NO_PLAN] * behind,
            "active_plan": [before] * (seen + opening)
            + [self._plan] * (said - opening),
            "target": [*turn.observation, *target],
        }
        return _Piece([columns[name] for name in _FIELDS])

    def _tell(
        self,
        generated: tuple[int, ...],
        plan_length: int,
        learn_action: bool,
        advice: tuple[int, ...],
    ) -> tuple[list[int], list[int], list[int]]:
        """Role, whether there is a loss, and target of each generated token."""
        plan, action = generated[:plan_length], generated[plan_length:]
        wanted = [*plan, *(advice or action), *[_NOTHING] * len(action)]
        targets = wanted[: len(generated)]
        roles, learns = [], []
        state, taught = plan_grammar.DECIDE, learn_action
        for place, (token, target) in enumerate(zip(generated, targets, strict=True)):
            in_plan = place < plan_length
            roles.append(self._role[state])
            learns.append(int(self._choice[state] and (in_plan or taught)))
            state = self._next_state[state][token]
            # Behind the first token that was said otherwise the advice goes on alone.
            taught = taught and token == target
        if self._action[state] < 0:
            raise ValueError(f"turn {list(generated)} is not in the plan grammar")
        return roles, learns, targets

    def _flush(self, seen: list[_Piece], plan: int) -> None:
        """Close the segment; begin the next with what the current turn can see.

        Args:
            seen: the turns that may be in sight, in order.
            plan: number of the newest plan.
        """
        rows = []
        for name, column in zip(_FIELDS, self._current.columns, strict=True):
            row = np.full(self._size, _PADDING.get(name, 0), np.int32)
            row[: len(column)] = column
            rows.append(row)
        self._segments.append(np.stack(rows))
        self._current = self._opened()
        for piece in seen:
            visible = piece.visible_after(self._turn - self._history, plan)
            self._current.extend(visible.carried())
