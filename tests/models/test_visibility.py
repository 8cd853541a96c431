import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxplan.models.visibility import (
    NO_PLAN,
    PADDING_EPISODE,
    PROMPT_EPISODE,
    TokenMeta,
    visible,
)
from tests.fakes import random_stream

visible_jit = jax.jit(visible, static_argnums=2)

TOKENS = st.tuples(
    st.integers(0, 6),
    st.sampled_from([PADDING_EPISODE, PROMPT_EPISODE, 1, 2]),
    st.integers(0, 4),
    st.sampled_from([NO_PLAN, 1, 2, 3]),
    st.integers(0, 3),
)


def meta_of(rows):
    columns = np.asarray(rows, np.int32).T
    names = ("position", "episode", "turn", "plan", "active_plan")
    return TokenMeta(
        **{
            name: jnp.asarray(column)
            for name, column in zip(names, columns, strict=True)
        }
    )


def sees(query, key, history):
    q_position, q_episode, q_turn, _, active_plan = query
    k_position, k_episode, k_turn, k_plan, _ = key
    if k_position > q_position or k_episode == PADDING_EPISODE:
        return False
    if k_episode == PROMPT_EPISODE:
        return True
    if k_episode != q_episode:
        return False
    if k_plan != NO_PLAN:
        return k_plan >= active_plan
    return q_turn - k_turn < history


@given(
    st.lists(TOKENS, min_size=5, max_size=5),
    st.lists(TOKENS, min_size=7, max_size=7),
    st.integers(1, 4),
)
def test_visibility_is_the_rule_spelled_out(queries, keys, history):
    expected = [[sees(query, key, history) for key in keys] for query in queries]
    actual = visible_jit(meta_of(queries), meta_of(keys), history)
    np.testing.assert_array_equal(actual, expected)


def test_the_old_plan_is_seen_until_the_new_one_is_closed():
    observation, old, new = (0, 1, 3, NO_PLAN, 1), (1, 1, 3, 1, 1), (2, 1, 9, 2, 1)
    action = (3, 1, 9, NO_PLAN, 2)
    rows = meta_of([observation, old, new, action])
    expected = [
        [True, False, False, False],
        [True, True, False, False],
        [False, True, True, False],  # turn 3 is history, its plan is not
        [False, False, True, True],
    ]
    np.testing.assert_array_equal(visible(rows, rows, 4), expected)


def test_a_batch_is_its_rows():
    _, meta = random_stream(np.random.default_rng(0), 3, 40)
    together = visible(meta, meta, 2)
    for row in range(3):
        one = jax.tree.map(lambda values, row=row: values[row], meta)
        np.testing.assert_array_equal(together[row], visible(one, one, 2))
