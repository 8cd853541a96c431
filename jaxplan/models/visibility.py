"""Which token sees which: one rule, used by the packed and by the cached way.

Visibility is a function of a few integers per token and never of where the token is
stored, so what was sampled with a cache is scored alike from the packed stream.
"""

import chex
import jax
from jaxtyping import Array, Bool, Int

PADDING_EPISODE = 0
PROMPT_EPISODE = -1  # visible to every episode of its segment
NO_PLAN = 2**30  # above every plan number: never superseded


@chex.dataclass(frozen=True)
class TokenMeta:
    """What visibility needs to know of a token, int32 each.

    Attributes:
        position: index in the lane's stream; also the rotary position.
        episode: 1, 2, ...; ``PADDING_EPISODE`` or ``PROMPT_EPISODE``.
        turn: number of the turn inside the run, increasing.
        plan: number of the plan whose text or tag this token is, else ``NO_PLAN``.
        active_plan: the oldest plan this token sees. While plan n is written it is
            n - 1, so the old plan stays in sight; from its close on it is n.
    """

    position: Int[Array, "*batch T"]
    episode: Int[Array, "*batch T"]
    turn: Int[Array, "*batch T"]
    plan: Int[Array, "*batch T"]
    active_plan: Int[Array, "*batch T"]


def visible(
    query: TokenMeta, key: TokenMeta, history: int
) -> Bool[Array, "*batch T S"]:
    """Tell for each pair whether the query token attends to the key token.

    Causal and of the same episode, and then: the prompt always, a plan until it is
    superseded, anything else for as long as its turn is recent. ::

        key     prompt  plan 1  turn 1  plan 2  turn 5  turn 6
        query   a token of turn 7 under plan 2, history 2
                  yes     no      no      yes     no      yes

    A padding token is seen by nobody. ``history`` counts the query's own turn, too.
    """
    q = jax.tree.map(lambda values: values[..., :, None], query)
    k = jax.tree.map(lambda values: values[..., None, :], key)
    causal = k.position <= q.position
    is_prompt = k.episode == PROMPT_EPISODE
    same_episode = (k.episode == q.episode) & (k.episode != PADDING_EPISODE)
    is_plan = k.plan != NO_PLAN
    active = is_plan & (k.plan >= q.active_plan)
    recent = ~is_plan & (q.turn - k.turn < history)
    return causal & (is_prompt | (same_episode & (active | recent)))
