"""The compiled loop: worlds step, describe themselves, and the model answers.

A segment is a prefix (the prompt and what the current turn can still see, encoded with
the current weights) and then rounds, a ``lax.scan`` of static length. In a round

1. lanes that have said their action step their world and append its description,
2. every lane's unread tokens are encoded in a chunk of ``prefill_tokens``, and its next
   token is sampled, unless there is more to read than a chunk holds,
3. ``decode_steps`` more tokens are sampled, one by one.

The first round reads the prefix before step 2, in as many chunks as it takes, and after
the last one step 1 comes once more: all in one scan, so that the compiler meets each
step once. A lane in the middle of a plan has nothing to do in step 1 and uses step 2
for one more token: nobody waits for it. Where no lane has anything unread, steps 2 and
3 are left out. Lanes never communicate, so every device of a mesh plays its own: what
is in sight of one program here is one device's share.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, RolloutConfig
from jaxplan.core.lifted import overall_max
from jaxplan.core.mesh import LANES, WHOLE, each_shard
from jaxplan.core.roles import Role
from jaxplan.core.specs import spec_tree
from jaxplan.envs.base import TextEnv
from jaxplan.envs.guided import GuidedEnv
from jaxplan.models.cache import Cache, extend, init_cache
from jaxplan.models.heads import lm_logits
from jaxplan.models.params import LlamaParams, cast_params, unstack_layers
from jaxplan.models.visibility import NO_PLAN
from jaxplan.plan import grammar as plan_grammar
from jaxplan.plan.grammar import Grammar
from jaxplan.rollout import lanes as lane_ops
from jaxplan.rollout.lanes import EpisodeEnd, Lane, init_lanes
from jaxplan.rollout.sample import sample_token
from jaxplan.rollout.schedule import SCHEDULE_SPECS, Schedule
from jaxplan.rollout.segment import (
    Segment,
    Turns,
    empty_turns,
    end_turn,
    start_turn,
)
from jaxplan.rollout.stream import (
    Stream,
    Tokens,
    append,
    carry_over,
    prompt_streams,
    unencoded,
)
from jaxplan.text.phrases import PhraseTable, pack


@chex.dataclass(frozen=True)
class Language:
    """How worlds and models speak: the arrays that depend on the tokenizer.

    Attributes:
        grammar: of turns.
        table: the phrases of the world.
        prompts: what opens a context, in as many wordings as there are prices of a plan
            token to be told, or in one; filled up at the end.
        prompt_lengths: tokens of each.
        advice: the phrases of the world's guide, if it has one.
    """

    grammar: Grammar
    table: PhraseTable
    prompts: Int[Array, "P prompt"]
    prompt_lengths: Int[Array, " P"]
    advice: PhraseTable | None = None

    def prompt(self, number: int) -> list[int]:
        """The ids of one wording (host)."""
        length = int(self.prompt_lengths[number])
        return np.asarray(self.prompts[number, :length]).tolist()

    def saying(self, number: int) -> "Language":
        """The same, where every lane is told wording ``number``."""
        return dataclasses.replace(
            self,
            prompts=jnp.broadcast_to(self.prompts[number], self.prompts.shape),
            prompt_lengths=jnp.broadcast_to(
                self.prompt_lengths[number], self.prompt_lengths.shape
            ),
        )


@chex.dataclass(frozen=True)
class Carry:
    """What lives on between segments; all of it goes into a checkpoint."""

    lanes: Lane
    stream: Stream  # the prefix of the next segment


@chex.dataclass(frozen=True)
class _Round:
    lanes: Lane
    stream: Stream
    turns: Turns
    cache: Cache
    dropped: Int[Array, " B"]
    env_steps: Int[Array, " B"]


def init_carry(
    env: TextEnv,
    language: Language,
    schedule: Schedule,
    key: Array,
    config: RolloutConfig,
) -> Carry:
    """Lanes without a world and streams with nothing but the prompt.

    Each wording is told to as many lanes in a row: minibatches, which deal lanes out
    one by one, then hold all of them.
    """
    wordings = language.prompts.shape[0]
    told = jnp.arange(config.num_lanes) * wordings // config.num_lanes
    return Carry(
        lanes=init_lanes(env, schedule, key, config.num_lanes),
        stream=prompt_streams(
            language.prompts[told], language.prompt_lengths[told], config.segment_tokens
        ),
    )


_SEGMENT_SPECS = spec_tree(
    Segment,
    stream=LANES,
    turns=LANES,
    episodes=PartitionSpec(None, *LANES),
    dropped_phrases=LANES,
    encoded_tokens=LANES,
    env_steps=LANES,
    token_slots=LANES,
)


@partial(
    jax.jit,
    static_argnames=(
        "env",
        "config",
        "model",
        "budget",
        "turn_tokens",
        "decide_explore",
    ),
)
def run_segment(
    params: LlamaParams,
    carry: Carry,
    language: Language,
    schedule: Schedule,
    gamma: Float[Array, ""] | float,
    *,
    env: TextEnv,
    config: RolloutConfig,
    model: ModelConfig,
    budget: int,
    turn_tokens: int,
    decide_explore: float = 0.0,
) -> tuple[Carry, Segment]:
    """Play ``config.rounds`` rounds in every lane.

    Args:
        params: the policy.
        carry: where the lanes stand.
        language: the tokenizer's tables.
        schedule: the episodes of every lane.
        gamma: discount per env step.
        env: the world.
        config: sizes of the rollout.
        model: sizes of the model.
        budget: plan-text tokens a turn may have.
        turn_tokens: tokens of the longest turn (``longest_turn``): a lane begins a turn
            only where this and one more observation fit.
        decide_explore: share of the decisions to plan that a fair coin makes.

    Returns:
        The carry of the next segment, and this one.
    """

    def play(policy, carry, language, schedule, gamma):
        return _Rollout(
            params=policy,
            language=language,
            schedule=schedule,
            gamma=gamma,
            env=env,
            config=config,
            model=model,
            budget=budget,
            turn_tokens=turn_tokens,
            decide_explore=decide_explore,
        ).run(carry)

    on_lanes = each_shard(
        play,
        in_specs=(WHOLE, LANES, WHOLE, SCHEDULE_SPECS, WHOLE),
        out_specs=(LANES, _SEGMENT_SPECS),
    )
    # Cast before it is gathered: the copy to decode with is whole but for ``model``.
    policy = cast_params(unstack_layers(params), model)
    return on_lanes(policy, carry, language, schedule, jnp.float32(gamma))


@dataclasses.dataclass(frozen=True)
class _Rollout:
    """The arguments of one segment, bound once; alive only while it is traced."""

    params: LlamaParams
    language: Language
    schedule: Schedule
    gamma: Float[Array, ""] | float
    env: TextEnv
    config: RolloutConfig
    model: ModelConfig
    budget: int
    turn_tokens: int
    decide_explore: float

    def run(self, carry: Carry) -> tuple[Carry, Segment]:
        cfg = self.config
        # The last token of the prefix is left to the first answer.
        prefix = carry.stream.cursor - 1
        play = partial(self._round, prefix=prefix)
        state, episodes = jax.lax.scan(
            play, self._begin(carry), jnp.arange(cfg.rounds + 1)
        )
        slots = cfg.rounds * (cfg.prefill_tokens + cfg.decode_steps)
        segment = Segment(
            stream=state.stream,
            turns=state.turns,
            episodes=episodes,
            dropped_phrases=state.dropped,
            encoded_tokens=state.cache.cursor - prefix,
            env_steps=state.env_steps,
            token_slots=jnp.full_like(prefix, slots),
        )
        return self._next_carry(state), segment

    def _begin(self, carry: Carry) -> _Round:
        """Nothing read yet, not even the prefix."""
        cfg, stream = self.config, carry.stream
        nothing = jnp.zeros_like(stream.cursor)
        num_lanes = nothing.shape[0]
        turns = empty_turns(num_lanes, cfg.rounds + 2)
        turns = dataclasses.replace(
            turns,
            start=turns.start.at[:, 0].set(stream.cursor),
            number=turns.number.at[:, 0].set(carry.lanes.turn),
        )
        return _Round(
            lanes=carry.lanes,
            stream=stream,
            turns=turns,
            cache=init_cache(
                self.model, num_lanes, cfg.segment_tokens, self.model.compute_dtype
            ),
            dropped=nothing,
            env_steps=nothing,
        )

    def _round(
        self, state: _Round, number: Int[Array, ""], prefix: Int[Array, " B"]
    ) -> tuple[_Round, EpisodeEnd]:
        """Observe and answer; the round after the last one only observes."""
        cfg, closing = self.config, number == self.config.rounds
        state, finished = self._observe(state, closing)
        chunks = -(-overall_max(prefix) // cfg.prefill_tokens)  # of the prefix
        chunks = jnp.where(number == 0, chunks, 0)

        def read(chunk: Int[Array, ""], state: _Round) -> _Round:
            limit = jnp.where(chunk < chunks, prefix, state.stream.cursor)
            return self._say(state, cfg.prefill_tokens, limit)

        def decode(_: Int[Array, ""], state: _Round) -> _Round:
            return self._say(state, 1, state.stream.cursor)

        def answer(_: Int[Array, ""], state: _Round) -> _Round:
            state = jax.lax.fori_loop(0, chunks + 1, read, state)
            return jax.lax.fori_loop(0, cfg.decode_steps, decode, state)

        # Who has read all that it may is silent until its world says more: when all
        # streams are full, or all lanes asleep, the model is not asked.
        unread = overall_max(state.stream.cursor - state.cache.cursor)
        # A loop of one iteration or none: a conditional would copy the cache.
        times = jnp.where(closing | (unread == 0), 0, 1)
        return jax.lax.fori_loop(0, times, answer, state), finished

    @jax.named_scope("observe")
    def _observe(
        self, state: _Round, closing: Bool[Array, ""]
    ) -> tuple[_Round, EpisodeEnd]:
        """Step the worlds that have an action to play, and describe them."""
        grammar, schedule = self.language.grammar, self.schedule
        fits = self._room(state) >= self.config.observation_tokens
        waiting = state.lanes.ended & fits  # for a world, since a round or more
        lanes, turn_end, episode_end = jax.vmap(
            lambda lane: lane_ops.act(lane, self.env, grammar, self.gamma, closing)
        )(state.lanes)
        played = lanes.stats.env_steps - state.lanes.stats.env_steps
        reset = waiting | episode_end.terminated
        rows = (schedule.world, schedule.seed, schedule.mode, schedule.entries)
        lanes = jax.vmap(lane_ops.begin_episode, in_axes=(0, 0, None, 0))(
            lanes, rows, schedule.worlds, reset
        )
        observed = lanes.live & (turn_end.complete | reset)
        lanes = jax.vmap(lane_ops.begin_turn, in_axes=(0, None, 0))(
            lanes, self.budget, observed
        )
        if isinstance(self.env, GuidedEnv):
            lanes = jax.vmap(lane_ops.take_advice, in_axes=(0, None, 0))(
                lanes, self.env, observed
            )
        stream, dropped = self._describe(state.stream, lanes, observed)
        turns = end_turn(state.turns, turn_end)
        turns = start_turn(turns, observed, stream.cursor, lanes.turn)
        state = dataclasses.replace(
            state,
            lanes=lanes,
            stream=stream,
            turns=turns,
            dropped=state.dropped + dropped,
            env_steps=state.env_steps + played,
        )
        return state, episode_end

    def _describe(
        self, stream: Stream, lanes: Lane, observed: Bool[Array, " B"]
    ) -> tuple[Stream, Int[Array, " B"]]:
        chunk = self.config.observation_tokens
        token, length, dropped = jax.vmap(
            lambda world: pack(self.language.table, self.env.describe(world), chunk)
        )(lanes.world)
        facts = Tokens(
            token=token,
            role=_fill(Role.OBSERVATION, token),
            span=jnp.zeros_like(token),
            state=jnp.zeros_like(token),
            sampled=jnp.zeros(token.shape, bool),
            log_prob=jnp.zeros(token.shape, jnp.float32),
            decide_log_prob=jnp.zeros(token.shape, jnp.float32),
            turn=_fill(lanes.turn[:, None], token),
            episode=_fill(lanes.entry[:, None], token),
            plan=_fill(NO_PLAN, token),
            active_plan=_fill(lanes.active_plan[:, None], token),
        )
        lost = jnp.where(observed, dropped, 0).astype(jnp.int32)
        return append(stream, facts, jnp.where(observed, length, 0)), lost

    @jax.named_scope("say")
    def _say(self, state: _Round, chunk: int, limit: Int[Array, " B"]) -> _Round:
        """Encode unread tokens, and let the lanes whose turn it is say one more.

        Args:
            state: of the round.
            chunk: tokens to encode at most.
            limit: where in the stream to stop reading; who has not read all is silent.
        """
        cfg, grammar = self.config, self.language.grammar
        unread = dataclasses.replace(state.stream, cursor=limit)
        tokens, meta, lengths = unencoded(unread, state.cache.cursor, chunk)
        hidden, cache = extend(
            self.params, state.cache, tokens, meta, lengths, self.model, cfg.history
        )
        last = jnp.maximum(lengths - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = lm_logits(self.params, hidden) / cfg.temperature
        lanes = state.lanes
        keys = jax.vmap(lane_ops.token_key)(lanes)
        draw = partial(sample_token, decide_explore=self.decide_explore)
        token, decide, which = jax.vmap(draw, in_axes=(0, None, 0, 0))(
            keys, grammar, logits, lanes.state
        )
        sampled = grammar.choice[lanes.state]
        if self.language.advice is not None:
            token, dictated = jax.vmap(
                lane_ops.dictate, in_axes=(0, None, None, None, 0)
            )(lanes, grammar, self.language.advice, self.budget, token)
            sampled &= ~dictated
            which = jnp.where(dictated, 0.0, which)
        read_all = state.cache.cursor + lengths == state.stream.cursor
        writing = self._may_write(state) & (lengths > 0) & read_all
        written, facts = jax.vmap(lane_ops.write, in_axes=(0, None, 0, 0))(
            lanes, grammar, token, writing
        )
        said = Tokens(
            token=token,
            role=grammar.role[lanes.state],
            span=facts["span"],
            state=lanes.state,
            sampled=sampled,
            log_prob=decide + which,
            decide_log_prob=decide,
            turn=lanes.turn,
            episode=lanes.entry,
            plan=facts["plan"],
            active_plan=facts["active_plan"],
        )
        said = jax.tree.map(lambda array: array[:, None], said)
        stream = append(state.stream, said, writing.astype(jnp.int32))
        return dataclasses.replace(
            state,
            lanes=written,
            stream=stream,
            cache=cache,
        )

    def _room(self, state: _Round) -> Int[Array, " B"]:
        return self.config.segment_tokens - state.stream.cursor

    def _may_write(self, state: _Round) -> Bool[Array, " B"]:
        lanes = state.lanes
        turn_tokens = self.turn_tokens + self.config.observation_tokens
        room = (lanes.generated > 0) | (self._room(state) >= turn_tokens)
        finished = jax.vmap(plan_grammar.is_finished, in_axes=(None, 0))(
            self.language.grammar, lanes.state
        )
        return lanes.live & ~lanes.ended & ~lanes.asleep & ~finished & room

    def _next_carry(self, state: _Round) -> Carry:
        lanes = state.lanes
        episode = jnp.where(lanes.ended, 0, lanes.entry)
        stream = carry_over(
            state.stream, lanes.turn, episode, lanes.active_plan, self.config.history
        )
        lanes = jax.vmap(lane_ops.restart_turn, in_axes=(0, None))(lanes, self.budget)
        return Carry(lanes=lanes, stream=stream)


def _fill(value: int | Array, like: Int[Array, "B C"]) -> Int[Array, "B C"]:
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), like.shape)
