"""Who is credited with what: the estimators a run may choose by name.

``turn`` and ``smdp`` are the formulation (ppo.md, section 3). The others are what other
frameworks do (section 9), kept for comparison; of their recursions only the credit
differs: all of them bootstrap where a segment ends inside an episode, and all are
whitened over turns. What they call an episode's return is, here, what an episode
earned inside the segment, and their group is the batch.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import PpoConfig
from jaxplan.core.roles import Span
from jaxplan.rollout.lanes import TurnEnd
from jaxplan.train.advantages import Nodes, normalise, stream_gae, turn_gae

_HIGH_LEVEL_GAMMA = 0.95  # RAGEN's, between turns
_CONFIDENCE_SHARPNESS = 2.0  # CoPO's k


@chex.dataclass(frozen=True)
class Play:
    """A segment, as far as credit goes.

    Attributes:
        counted: sampled tokens of complete turns.
        position: of these tokens in the stream.
        slot: of the turn each of them belongs to.
        log_prob: behaviour log-probability.
        is_action: the token is part of an action.
        token_values: at the sampled tokens.
        starts: stream position of each turn's first generated token.
        end: how turns ended.
        rewards: net of all costs, by turn.
        values: of the state each turn starts from.
        span: of every token in the stream.
    """

    counted: Bool[Array, "B M"]
    position: Int[Array, "B M"]
    slot: Int[Array, "B M"]
    log_prob: Float[Array, "B M"]
    is_action: Bool[Array, "B M"]
    token_values: Float[Array, "B M"]
    starts: Int[Array, "B H"]
    end: TurnEnd
    rewards: Float[Array, "B H"]
    values: Float[Array, "B H"]
    span: Int[Array, "B S"]

    @property
    def size(self) -> int:
        """Length of the stream."""
        return self.span.shape[1]


@chex.dataclass(frozen=True)
class Credit:
    """Unnormalised advantages: of sampled tokens, and of turns where they start.

    Attributes:
        tokens: one for each sampled token.
        turns: one for each turn; of token estimators only where nothing was sampled.
    """

    tokens: Float[Array, "B M"]
    turns: Float[Array, "B H"]


def of_turn(per_turn: Array, slot: Int[Array, "B M"]) -> Array:
    """What holds of a token's turn."""
    return jnp.take_along_axis(per_turn, slot, axis=1)


def per_slot(
    values: Float[Array, "B M"], slot: Int[Array, "B M"], slots: int
) -> Float[Array, "B H"]:
    """Sum over the tokens of each turn."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], slots)).at[rows, slot].add(values)


def plan_tokens_answered_for(
    span: Int[Array, "B S"],
    position: Int[Array, "B M"],
    slot: Int[Array, "B M"],
    starts: Int[Array, "B H"],
) -> Int[Array, "B M"]:
    """Plan-text tokens from each sampled token to the next one of its turn.

    A forced one is so credited to the last sampled token before it in its turn, or to
    the first one if there is none before it.
    """
    size = span.shape[1]
    text = jnp.cumsum(span == Span.PLAN, axis=1, dtype=jnp.int32)
    before = jnp.pad(text, ((0, 0), (1, 0)))  # [B, S + 1]: those before a position
    following = jnp.roll(starts, -1, axis=1).at[:, -1].set(0)
    turn_end = of_turn(jnp.where(following > 0, following, size), slot)
    same = slot[:, 1:] == slot[:, :-1]
    same &= position[:, 1:] > position[:, :-1]  # else the slot behind holds no token
    is_first = jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    begin = jnp.where(is_first, of_turn(starts, slot), position)
    end = jnp.where(is_last, turn_end, jnp.roll(position, -1, axis=1))
    return of_turn(before, end) - of_turn(before, begin)


def _extreme(play: Play, last: bool) -> Bool[Array, "B M"]:
    """Whether a sampled token is the first, or the last, of its turn."""
    rows = jnp.arange(play.slot.shape[0])[:, None]
    far = jnp.full(play.starts.shape, -1 if last else play.size, jnp.int32)
    own = jnp.where(play.counted, play.position, -1 if last else play.size)
    place = far.at[rows, play.slot]
    extreme = place.max(own) if last else place.min(own)
    return play.counted & (play.position == of_turn(extreme, play.slot))


def _silent(play: Play) -> Bool[Array, "B H"]:
    """Complete turns in which nothing was sampled, asleep or fully injected."""
    spoken = per_slot(play.counted.astype(jnp.float32), play.slot, play.starts.shape[1])
    return play.end.complete & (spoken == 0)


def _terminated(play: Play) -> Bool[Array, "B H"]:
    return play.end.discount == 0


def _on_stream(
    play: Play, tokens: Float[Array, "B M"], turns: Float[Array, "B H"]
) -> Float[Array, "B S"]:
    """Numbers at sampled tokens, at silent turns and at boundaries."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    width = play.size + 1  # a turn may start right behind the stream
    at_token = jnp.where(play.counted, play.position, width)
    alone = _silent(play) | ~play.end.complete
    at_turn = jnp.where(alone & (play.starts > 0), play.starts, width)
    stream = jnp.zeros((tokens.shape[0], width))
    stream = stream.at[rows, at_turn].set(turns, mode="drop")
    return stream.at[rows, at_token].set(tokens, mode="drop")


def _nodes(
    play: Play,
    token_rewards: Float[Array, "B M"],
    turn_rewards: Float[Array, "B H"],
    token_kernel: tuple[Array, Array],
    turn_kernel: tuple[Array, Array],
) -> Nodes:
    """The stream of a recursion; a kernel is (discount, trace)."""
    ones = play.counted.astype(jnp.float32)
    is_node = _on_stream(play, ones, _silent(play).astype(jnp.float32))
    marked = _on_stream(play, ones, jnp.ones_like(play.values))
    discount, trace = (
        _on_stream(play, *pair) for pair in zip(token_kernel, turn_kernel, strict=True)
    )
    return Nodes(
        node=is_node > 0,
        boundary=(marked > 0) & (is_node == 0),
        reward=_on_stream(play, token_rewards, turn_rewards),
        value=_on_stream(play, play.token_values, play.values),
        discount=discount,
        trace=trace,
    )


def _read(play: Play, stream: Float[Array, "B S"]) -> Credit:
    tokens = of_turn(stream, play.position)
    turns = of_turn(stream, play.starts)
    return Credit(
        tokens=jnp.where(play.counted, tokens, 0.0),
        turns=jnp.where(_silent(play), turns, 0.0),
    )


def turn(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """One advantage a turn, for all its sampled tokens."""
    advantages = turn_gae(
        play.rewards,
        play.end.discount,
        play.values,
        play.end.complete,
        config.gae_lambda,
    )
    tokens = jnp.where(play.counted, of_turn(advantages, play.slot), 0.0)
    return Credit(tokens=tokens, turns=advantages)


def smdp(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """A value at every sampled token, costs where they arise, no token discount."""
    last, end = _extreme(play, last=True), play.end
    called = _extreme(play, last=False) & of_turn(end.planned, play.slot)
    text = plan_tokens_answered_for(play.span, play.position, play.slot, play.starts)
    cost = plan_cost * text + config.call_cost * called
    reward = jnp.where(last, of_turn(end.reward, play.slot), 0.0) - cost
    discount = jnp.where(last, of_turn(end.discount, play.slot), 1.0)
    trace = discount * jnp.where(last, config.gae_lambda, config.gae_lambda_token)
    turn_kernel = (end.discount, end.discount * config.gae_lambda)
    nodes = _nodes(play, reward, play.rewards, (discount, trace), turn_kernel)
    return _read(play, stream_gae(nodes))


def _token_nodes(play: Play, config: PpoConfig) -> Nodes:
    """Every sampled token a step, the turn's net reward at its last one."""
    last, over = _extreme(play, last=True), _terminated(play)
    goes_on = ~(last & of_turn(over, play.slot))
    tokens, turns = (config.gamma * x.astype(jnp.float32) for x in (goes_on, ~over))
    kernels = [(gamma, gamma * config.gae_lambda) for gamma in (tokens, turns)]
    reward = jnp.where(last, of_turn(play.rewards, play.slot), 0.0)
    return _nodes(play, reward, play.rewards, *kernels)


def token_gae(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """Constant discounts from sampled token to sampled token (verl, AReaL)."""
    return _read(play, stream_gae(_token_nodes(play, config)))


def token_gae_through_obs(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """As ``token_gae``, each token in between a step of value 0 (OpenRLHF)."""
    nodes = _token_nodes(play, config)
    places = jnp.broadcast_to(jnp.arange(play.size + 1), nodes.node.shape)
    marked = jnp.where(nodes.node | nodes.boundary, places, play.size)
    following = jax.lax.cummin(marked, axis=1, reverse=True)
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=play.size)
    between = jnp.maximum(following - places - 1, 0)
    fading = (config.gamma * config.gae_lambda) ** between.astype(jnp.float32)
    faded = dataclasses.replace(
        nodes, discount=nodes.discount * fading, trace=nodes.trace * fading
    )
    return _read(play, stream_gae(faded))


def bilevel(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """First from reward to reward, then token by token up to each of them (RAGEN)."""
    nodes = _token_nodes(play, config)
    paid = nodes.node & (nodes.reward != 0)
    ends = nodes.node & (nodes.discount == 0)
    between = jnp.where(ends, 0.0, _HIGH_LEVEL_GAMMA)
    high = stream_gae(
        dataclasses.replace(
            nodes,
            node=paid,
            boundary=nodes.boundary | (ends & ~paid),
            value=jnp.where(ends & ~paid, 0.0, nodes.value),
            discount=between,
            trace=between * config.gae_lambda,
        )
    )
    low = dataclasses.replace(
        nodes,
        reward=jnp.where(paid, high + nodes.value, nodes.reward),
        discount=jnp.where(paid, 0.0, nodes.discount),
        trace=jnp.where(paid, 0.0, nodes.trace),
    )
    return _read(play, stream_gae(low))


def _episodes(play: Play) -> Int[Array, "B H"]:
    """A number for each turn's episode inside its lane."""
    ends = (~play.end.complete | _terminated(play)).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def _episode_returns(play: Play) -> tuple[Float[Array, "B H"], Bool[Array, "B H"]]:
    """What each episode earned, undiscounted, and which of the slots are episodes."""
    number, slots = _episodes(play), play.rewards.shape[1]
    earned = jnp.where(play.end.complete, play.rewards, 0.0)
    turns = per_slot(play.end.complete.astype(jnp.float32), number, slots)
    return per_slot(earned, number, slots), turns > 0


def row_return(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """Every turn alone, with its episode's return at its end (verl-agent)."""
    returns, _ = _episode_returns(play)
    returns = of_turn(returns, _episodes(play))
    last = _extreme(play, last=True)
    reward = jnp.where(last, of_turn(returns, play.slot), 0.0)
    gamma = jnp.where(last, 0.0, config.gamma)
    nothing = jnp.zeros_like(play.values)
    kernel = (gamma, gamma * config.gae_lambda)
    nodes = _nodes(play, reward, returns, kernel, (nothing, nothing))
    return _read(play, stream_gae(nodes))


def grpo(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """The episode's return, as a score in the batch's episodes; no critic."""
    returns, real = _episode_returns(play)
    score = normalise(returns, real, config.advantage_clip)
    turns = jnp.where(play.end.complete, of_turn(score, _episodes(play)), 0.0)
    tokens = jnp.where(play.counted, of_turn(turns, play.slot), 0.0)
    return Credit(tokens=tokens, turns=turns)


def confidence_weighted(play: Play, plan_cost: Array, config: PpoConfig) -> Credit:
    """``grpo``, times a weight that grows with the turn's least sure action token.

    As CoPO weighs (arXiv:2602.12662): exp(k c) with mean 1, where c is the least
    probability, stretched to [0, 1] over the group.
    """
    plain = grpo(play, plan_cost, config)
    rows = jnp.arange(play.slot.shape[0])[:, None]
    own = jnp.where(play.counted & play.is_action, play.log_prob, 0.0)
    least = jnp.exp(jnp.zeros_like(play.values).at[rows, play.slot].min(own))
    mask = play.end.complete & ~_silent(play)
    low = jnp.min(jnp.where(mask, least, 1.0))
    high = jnp.max(jnp.where(mask, least, 0.0))
    stretched = jnp.where(high > low, (least - low) / (high - low), 0.5)
    weight = jnp.where(mask, jnp.exp(_CONFIDENCE_SHARPNESS * stretched), 0.0)
    weight = weight * jnp.sum(mask) / jnp.maximum(jnp.sum(weight), 1e-8)
    return Credit(
        tokens=plain.tokens * of_turn(weight, play.slot), turns=plain.turns * weight
    )


ESTIMATORS: dict[str, Callable[[Play, Array, PpoConfig], Credit]] = {
    "turn": turn,
    "smdp": smdp,
    "token_gae": token_gae,
    "token_gae_through_obs": token_gae_through_obs,
    "bilevel": bilevel,
    "row_return": row_return,
    "grpo": grpo,
    "confidence_weighted": confidence_weighted,
}
BY_TURN = ("turn", "grpo", "confidence_weighted")  # values only where turns start
WITHOUT_CRITIC = ("grpo", "confidence_weighted")
