"""A Llama as teacher, in our own engine: told what to do, never trained for it.

Every trajectory has its prompt: the game's instructions and one of the planning styles.
How often it plans is not left to the prompt: the grammar forces it. What it does is
read from the segments, and played again to be written down.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxplan.config.schema import PlanConfig, RunConfig
from jaxplan.core.mesh import to_host
from jaxplan.models.params import AgentParams, LlamaParams
from jaxplan.plan.grammar import DYNAMIC, NEVER
from jaxplan.plan.prompts import DYNAMIC as DYNAMIC_PROMPT
from jaxplan.plan.prompts import NEVER as NEVER_PROMPT
from jaxplan.plan.prompts import planning_prompt, with_tags
from jaxplan.rollout.lanes import init_lanes
from jaxplan.rollout.play import play_segments
from jaxplan.rollout.rounds import Carry
from jaxplan.rollout.schedule import Schedule, make_worlds, one_episode_schedule
from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
from jaxplan.rollout.spoken import spoken_turns
from jaxplan.rollout.stream import prompt_streams
from jaxplan.train.scribe import Desk, RecordedTurn, Scribe


def prompt_of(desk: Desk, number: int, plan: PlanConfig) -> tuple[str, str]:
    """How a trajectory's teacher is asked to plan, and the name of that.

    Raises:
        ValueError: a style is none of the sixteen.
    """
    asked = desk.config.prompting
    if asked == "never":
        return NEVER_PROMPT, asked
    if asked == "dynamic":
        return with_tags(DYNAMIC_PROMPT, plan.open, plan.close), asked
    style = desk.style(number, ("",))
    return planning_prompt(style, plan.open, plan.close), style or "plan"


class LlamaTeacher:
    """Plays batches of trajectories with a Llama.

    Raises:
        ValueError: a style is unknown, or prompts and turns do not fit a segment.
    """

    def __init__(
        self,
        load: Callable[[], AgentParams],
        mesh: Mesh,
        config: RunConfig,
        desk: Desk,
    ) -> None:
        """Check that all prompts fit; the weights are loaded when first needed.

        Args:
            load: the weights, where they are to lie.
            mesh: the devices it plays on.
            config: shape of the model, the grammar's budget, and sizes of the rollout;
                a lane is a trajectory.
            desk: where it plays.
        """
        plan = config.plan
        self.scribe, self.together = Scribe(desk), True
        self._load, self._mesh, self._model = load, mesh, config.model
        self._params: LlamaParams | None = None
        self._plan = plan
        self._rollout = dataclasses.replace(config.rollout, num_lanes=desk.config.lanes)
        self._language = make_language(desk.tokenizer, desk.env, plan)
        self._turn_tokens = longest_turn(desk.tokenizer, desk.env, plan)
        for style in desk.config.styles:
            planning_prompt(style, plan.open, plan.close)
        numbers = range(desk.config.episodes + desk.config.lanes)
        texts = {self._text(number) for number in numbers}
        self._width = max(len(desk.tokenizer.encode_prompt(text)) for text in texts)
        longest = jnp.zeros((1, self._width), jnp.int32)
        language = dataclasses.replace(self._language, prompts=longest)
        check_sizes(language, self._rollout, plan, self._turn_tokens)

    def _text(self, number: int) -> str:
        prompt, _ = prompt_of(self.scribe.desk, number, self._plan)
        return f"{self.scribe.desk.env.instructions}\n\n{prompt}"

    def account(self) -> dict[str, Any]:
        """What is to be told at the end."""
        return self.scribe.account()

    def play(self, first: int) -> list[Any]:
        """Play until every lane has finished its one episode; segments on the host."""
        with jax.set_mesh(self._mesh):
            return self._play_on_mesh(first)

    def write_down(
        self, first: int, played: list[Any], wanted: int
    ) -> Iterator[dict[str, Any]]:
        """The columns of the first ``wanted`` trajectories of a batch."""
        desk = self.scribe.desk
        recordings, styles = [], []
        for lane, number in enumerate(range(first, first + wanted)):
            turns = spoken_turns(played, desk.tokenizer, entry=0, lane=lane)
            recordings.append(
                [RecordedTurn(f" {t.plan}" * bool(t.plan), t.action) for t in turns]
            )
            styles.append(prompt_of(desk, number, self._plan)[1])
        yield from self.scribe.recite(first, recordings, styles)

    def _play_on_mesh(self, first: int) -> list[Any]:
        if self._params is None:
            self._params = self._load().llama
        desk, rollout = self.scribe.desk, self._rollout
        schedule = self._schedule(first)
        segments, finished = [], 0
        for segment in play_segments(
            self._params,
            self._start(first, schedule),
            self._language,
            itertools.repeat(schedule),
            env=desk.env,
            config=rollout,
            model=self._model,
            budget=self._plan.budget,
            turn_tokens=self._turn_tokens,
        ):
            host: Any = to_host(segment)
            finished += int(host.episodes.finished.sum())
            segments.append(host)
            if finished == rollout.num_lanes:
                break
        return segments

    def _schedule(self, first: int) -> Schedule:
        desk, lanes = self.scribe.desk, self._rollout.num_lanes
        seeds = jnp.asarray(desk.world_seeds(first))
        fixed = {"never": NEVER, "dynamic": DYNAMIC}.get(desk.config.prompting)
        modes = [
            desk.plan_turns(number)[0] if fixed is None else fixed
            for number in range(first, first + lanes)
        ]
        worlds = make_worlds(desk.env, seeds)
        return one_episode_schedule(worlds, seeds, jnp.array(modes))

    def _start(self, first: int, schedule: Schedule) -> Carry:
        """Streams with a prompt each, and lanes that wait for their world."""
        lanes, encode = (
            self._rollout.num_lanes,
            self.scribe.desk.tokenizer.encode_prompt,
        )
        prompts = [encode(self._text(first + lane)) for lane in range(lanes)]
        rows = np.zeros((lanes, self._width), np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = prompt[: self._width]
        lengths = jnp.array([len(prompt) for prompt in prompts])
        env, segment_tokens = self.scribe.desk.env, self._rollout.segment_tokens
        return Carry(
            lanes=init_lanes(env, schedule, jax.random.key(0), lanes),
            stream=prompt_streams(jnp.asarray(rows), lengths, segment_tokens),
        )
