"""A model behind an OpenAI-compatible server as teacher: many episodes at once.

The conversation is that of BALROG and of arXiv:2509.03581: instructions, the last
observations with what was answered, one plan at most, and in the current turn the
prompt that asks for a plan, for an action, or leaves the choice.

Answers cost money, so each is in a journal before the world moves on. A collection that
was stopped, or whose budget is spent, plays its journals again and goes on in the
middle of an episode.
"""

import asyncio
import dataclasses
import importlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import EndpointConfig, PlanConfig
from jaxplan.envs.base import TextEnv
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.plan.prompts import ACT, NEVER, planning_prompt
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.text.phrases import phrases_text
from jaxplan.train.llama_teacher import prompt_of
from jaxplan.train.scribe import Desk, RecordedTurn, Scribe

_DEFAULT = 0  # the action played where an answer names none, as in BALROG
_INVALID = "Your previous output did not contain a valid action."


class EndpointError(ValueError):
    """The server cannot be used, or must not be used any further."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server said in a turn, as it stands in the journal.

    Attributes:
        text: the whole answer.
        tokens: asked and answered.
    """

    text: str
    tokens: int


def read_answer(
    text: str, plan: PlanConfig, action_names: tuple[str, ...]
) -> tuple[str, int | None]:
    """Take an answer apart.

    Args:
        text: the answer.
        plan: markers of plans.
        action_names: of the world.

    Returns:
        The plan, empty without one, as the grammar allows it: one line of printable
        text without angle brackets. And the action, None where none is named.
    """
    inside = re.escape(plan.open) + "(.*?)" + re.escape(plan.close)
    found = re.search(inside, text, re.DOTALL)
    rest = re.sub(inside, " ", text, flags=re.DOTALL)
    words = " ".join(re.sub(r"[<>]", " ", found[1] if found else "").split())
    said = "".join(letter for letter in words if letter.isprintable())
    names = sorted(action_names, key=len, reverse=True)
    choice = "|".join(re.escape(name) for name in names)
    actions = re.findall(rf"\b({choice})\b", rest, re.IGNORECASE)
    if not actions:
        return said, None
    lower = [name.lower() for name in action_names]
    return said, lower.index(actions[-1].lower())


class EndpointTeacher:
    """Plays batches of trajectories by asking a server.

    Raises:
        EndpointError: the ``openai`` package is not installed.
        ValueError: a style is unknown.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        plan: PlanConfig,
        desk: Desk,
        journals: Path,
        stop: StopRequest,
    ) -> None:
        """Check what can be checked without asking.

        Args:
            endpoint: the server.
            plan: markers of plans.
            desk: where it plays.
            journals: folder of the answers; they are kept.
            stop: asked before every request.
        """
        _import_openai()
        for style in desk.config.styles:
            planning_prompt(style, plan.open, plan.close)
        self.scribe, self.together = Scribe(desk), False
        self._endpoint, self._plan, self._stop = endpoint, plan, stop
        self._journals = journals
        journals.mkdir(parents=True, exist_ok=True)
        self.spent_tokens = sum(
            answer.tokens
            for path in journals.glob("*.jsonl")
            for answer in read_journal(path)
        )

    def account(self) -> dict[str, Any]:
        """What was paid, beside what was written."""
        return self.scribe.account() | {"spent_tokens": self.spent_tokens}

    def play(self, first: int) -> None:
        """Nothing is begun before it is written down."""
        del first

    def write_down(
        self, first: int, played: None, wanted: int
    ) -> Iterator[dict[str, Any]]:
        """Play the first ``wanted`` trajectories of a batch, and write them down.

        Raises:
            Stopped: someone asked; all answers are kept.
            EndpointError: the server fails, or the budget is spent.
        """
        del played
        desk = self.scribe.desk
        numbers = range(first, first + wanted)
        recordings = asyncio.run(self._play_all(numbers, desk.world_seeds(first)))
        styles = [prompt_of(desk, number, self._plan)[1] for number in numbers]
        yield from self.scribe.recite(first, recordings, styles)

    async def _play_all(
        self, numbers: range, seeds: np.ndarray
    ) -> list[list[RecordedTurn]]:
        openai = _import_openai()
        client = openai.AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=os.environ.get(self._endpoint.key_variable, "none"),
            timeout=self._endpoint.timeout_seconds,
            max_retries=self._endpoint.retries,
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._play_one(client, number, int(seed)))
                    for number, seed in zip(numbers, seeds, strict=False)
                ]
        except ExceptionGroup as group:
            first = group.exceptions[0]
            if not isinstance(first, openai.OpenAIError):
                raise first from group
            raise EndpointError(
                f"collect.endpoint.url={self._endpoint.url}: {first}; all answers are "
                "kept: mend it and run again"
            ) from first
        return [task.result() for task in tasks]

    async def _play_one(
        self, client: Any, number: int, seed: int
    ) -> list[RecordedTurn]:
        """One episode: what the journal knows already, then what the server says."""
        path = self._journals / f"{number:06d}.jsonl"
        known = read_journal(path)
        game = _Game(self.scribe.desk.env, seed)
        talk = _Conversation(self._plan, game.env, self._endpoint.history)
        turns: list[RecordedTurn] = []
        with path.open("a", encoding="utf-8") as journal:
            while not game.over:
                prompt = self._prompt(number, len(turns))
                messages = talk.ask(game.observe(), prompt)
                if len(turns) < len(known):
                    answer = known[len(turns)]
                else:
                    answer = await self._ask(client, messages)
                    _write(journal, answer)
                turns.append(
                    talk.hear(answer.text, may_plan=prompt not in (ACT, NEVER))
                )
                game.act(turns[-1].action)
        return turns

    def _prompt(self, number: int, turn: int) -> str:
        """What a turn is asked for; fixed frequencies switch the prompt by turn."""
        desk = self.scribe.desk
        acts = desk.config.prompting == "every" and turn % desk.plan_turns(number)[0]
        return ACT if acts else prompt_of(desk, number, self._plan)[0]

    async def _ask(self, client: Any, messages: list[dict[str, str]]) -> Answer:
        budget = self._endpoint.budget_tokens
        if self._stop.requested:
            raise Stopped
        if budget and self.spent_tokens >= budget:
            raise EndpointError(
                f"collect.endpoint.budget_tokens={budget} are spent "
                f"({self.spent_tokens:,}); all answers are kept: a larger budget and "
                "--resume go on from here"
            )
        response = await client.chat.completions.create(
            model=self._endpoint.model,
            messages=messages,
            max_tokens=self._endpoint.answer_tokens,
            temperature=self._endpoint.temperature,
        )
        tokens = response.usage.total_tokens if response.usage else 0
        self.spent_tokens += tokens
        return Answer(text=response.choices[0].message.content or "", tokens=tokens)


class _Game:
    """One episode in a world, step by step, from the keys that a rollout would use."""

    def __init__(self, env: TextEnv, seed: int) -> None:
        self.env, self.over = env, False
        worlds = make_worlds(env, jnp.array([seed], jnp.int32))
        self._world = jax.tree.map(lambda leaf: leaf[0], worlds)
        self._key, self._env_step = episode_key(seed), 0

    def observe(self) -> str:
        seen: Any = jax.device_get(_describe(self._world, env=self.env))
        return phrases_text(self.env.phrases, seen.ids, seen.mask)

    def act(self, action: int) -> None:
        """Play an action, and sleep on for as long as the world does not ask."""
        while True:
            self._world, over, asleep = _step(
                self._key,
                jnp.int32(self._env_step),
                self._world,
                jnp.int32(action),
                env=self.env,
            )
            self._env_step += 1
            self.over = bool(over)
            if self.over or not asleep:
                return


class _Conversation:
    """The messages of an episode: a window of turns, and the newest plan."""

    def __init__(self, plan: PlanConfig, env: TextEnv, history: int) -> None:
        self._tags, self._env, self._history = plan, env, history
        self._seen: list[str] = []
        self._turns: list[RecordedTurn] = []
        self._warn = False

    def ask(self, observation: str, prompt: str) -> list[dict[str, str]]:
        """The messages of the current turn; at its end stands what is asked for."""
        names = self._env.action_names
        default = f"{_INVALID} Defaulted to action: {names[_DEFAULT]}\n\n"
        warning = default if self._warn else ""
        self._seen.append(warning + observation.strip())
        first = max(0, len(self._seen) - self._history)
        planned = [i for i, turn in enumerate(self._turns) if turn.plan]
        newest = planned[-1] if planned else None
        messages = [{"role": "system", "content": self._env.instructions}]
        for number in range(first, len(self._turns)):
            turn = self._turns[number]
            plan = self._plan(turn) if number == newest else ""
            messages.append({"role": "user", "content": self._seen[number]})
            messages.append({"role": "assistant", "content": plan + names[turn.action]})
        question = f"{self._seen[-1]}\n\n{prompt}"
        if newest is not None and newest < first:  # it has left the window
            question = f"Previous plan:\n{self._turns[newest].plan}\n\n{question}"
        return [*messages, {"role": "user", "content": question}]

    def hear(self, text: str, may_plan: bool) -> RecordedTurn:
        """Take an answer for the current turn; a plan nobody asked for is dropped."""
        plan, action = read_answer(text, self._tags, self._env.action_names)
        plan = plan if may_plan else ""
        self._warn = action is None
        turn = RecordedTurn(
            plan=f" {plan}" if plan else "",
            action=_DEFAULT if action is None else action,
            learn=action is not None,
        )
        self._turns.append(turn)
        return turn

    def _plan(self, turn: RecordedTurn) -> str:
        return f"{self._tags.open}{turn.plan} {self._tags.close}\n"


def read_journal(path: Path) -> list[Answer]:
    """Read the whole answers of a journal; [] without one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):  # torn when the process was killed
        path.write_text("".join(whole), encoding="utf-8")
    return [Answer(**json.loads(line)) for line in whole]


def _write(journal: TextIO, answer: Answer) -> None:
    journal.write(json.dumps(dataclasses.asdict(answer)) + "\n")
    journal.flush()


def _import_openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise EndpointError(
            "collect.teacher=endpoint needs the package openai: "
            "pip install 'jaxplan[endpoint]'"
        ) from error


@partial(jax.jit, static_argnames="env")
def _describe(world: Any, *, env: TextEnv) -> Any:
    return env.describe(world)


@partial(jax.jit, static_argnames="env")
def _step(
    key: jax.Array, env_step: jax.Array, world: Any, action: jax.Array, *, env: TextEnv
) -> tuple[Any, jax.Array, jax.Array]:
    result = env.step(world_key(key, env_step), world, action)
    over = result.terminated | result.truncated
    return result.state, over, env.passive(result.state)
