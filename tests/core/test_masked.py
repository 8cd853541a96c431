import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxplan.core.masked import masked_mean, masked_std, masked_sum

SHAPE = (3, 4)
ARRAYS = npst.arrays(np.float32, SHAPE, elements=st.floats(-1e3, 1e3, width=32))
MASKS = npst.arrays(np.bool_, SHAPE)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(masked_sum, np.ma.sum), (masked_mean, np.ma.mean), (masked_std, np.ma.std)],
)
def test_masked_statistics_are_those_of_numpy(ours, theirs, axis):
    jitted = jax.jit(ours, static_argnums=2)

    @given(ARRAYS, MASKS)
    def check(values, mask):
        expected = theirs(np.ma.array(values.astype(float), mask=~mask), axis)
        expected = np.ma.filled(expected, 0.0)
        actual = jitted(values, mask, axis)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-2)

    check()


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_std])
def test_what_does_not_count_may_be_anything(statistic):
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    mask = jnp.array([True, False, True, False])
    value, gradient = jax.value_and_grad(statistic)(values, mask)
    assert value == statistic(jnp.array([1.0, 3.0]), jnp.array([True, True]))
    assert jnp.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_std])
def test_nothing_that_counts_gives_zero_in_float32(statistic):
    result = statistic(jnp.ones(3, jnp.bfloat16), jnp.zeros(3, bool))
    assert result == 0
    assert result.dtype == jnp.float32
