import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.core.lifted import overall_max

COUNTS = jnp.array([[[3, 1], [4, 1]], [[5, 9], [2, 6]]])


def test_the_largest_of_all_members_is_everyones():
    assert overall_max(COUNTS[0]) == 4
    lifted = jax.jit(jax.vmap(jax.vmap(overall_max)))
    np.testing.assert_array_equal(lifted(COUNTS), np.full((2, 2), 9))


def test_a_loop_with_it_has_one_length_for_all():
    def idle(counts):
        return jax.lax.fori_loop(0, overall_max(counts), lambda _, n: n + 1, 0)

    np.testing.assert_array_equal(jax.vmap(idle)(COUNTS), [9, 9])
    lifted = str(jax.make_jaxpr(jax.vmap(idle))(COUNTS))
    assert "i32[2] = while" not in lifted, "it was carried for each member"
