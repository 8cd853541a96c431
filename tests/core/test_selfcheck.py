import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.core.selfcheck import (
    check_equal,
    check_jax,
    check_version,
    noise,
    squared_norms,
)


def test_the_installed_jax_passes():
    check_jax()


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0"])
def test_defective_releases_are_refused_with_a_way_out(version):
    with pytest.raises(
        RuntimeError, match=rf"^jax {version} .*jax#39.*; install jax>="
    ):
        check_version(version)


@pytest.mark.parametrize("version", ["0.10.1", "0.11.1", "0.12.0.1"])
def test_sound_releases_are_accepted(version):
    check_version(version)


def test_one_wrong_entry_is_told_with_its_release():
    right = np.ones((2, 3), np.float32)
    check_equal(jnp.asarray(right), right, "a sum")
    wrong = jnp.asarray(right).at[1, 2].set(1.1)
    with pytest.raises(RuntimeError) as caught:
        check_equal(wrong, right, "a sum")
    assert f"jax {jax.__version__}" in str(caught.value)
    assert "1 of 6 entries of a sum" in str(caught.value)
    with pytest.raises(RuntimeError):
        check_equal(wrong.at[1, 2].set(jnp.nan), right, "a sum")


def test_the_two_programs_equal_their_unbatched_selves():
    draw = np.random.default_rng(1)
    rows = draw.normal(size=(32_769, 3)).astype(np.float32)
    norms = squared_norms(rows)
    one_by_one = np.stack([squared_norms(rows[i : i + 1])[0] for i in (0, 8, 32_768)])
    np.testing.assert_allclose(norms[jnp.array([0, 8, 32_768])], one_by_one, rtol=1e-5)

    corners = draw.normal(size=(32, 5, 5, 2)).astype(np.float32)
    offsets = draw.normal(size=(64, 64, 2)).astype(np.float32)
    looped = [noise(corners[i : i + 1], offsets)[0] for i in range(32)]
    np.testing.assert_allclose(noise(corners, offsets), np.stack(looped), atol=1e-5)
