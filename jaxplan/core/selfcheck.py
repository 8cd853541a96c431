"""A start-up check that this JAX computes what it is told to.

jax 0.10.2 silently builds wrong worlds on CPU: of a vmapped product that is summed, it
repeats the results of the first eight in the batch (jax#39103). Two small programs
tell, in under a second, whatever the release is called.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_ALLOWED = "install jax>=0.10.1,!=0.10.2,!=0.11.0,<0.13"
_REFUSED = {
    "0.10.2": "silently miscomputes on CPU (jax#39103)",
    "0.11.0": "fails on reshapes of sharded arrays (jax#39309)",
}


def check_jax() -> None:
    """Refuse a JAX that is known, or found here, to compute wrong results.

    Raises:
        RuntimeError: naming the version, the issue and what to install.
    """
    check_version(jax.__version__)
    with jax.default_matmul_precision("highest"):  # a GPU's default is a coarser one
        _check_results()


def _check_results() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(32_769, 3)).astype(np.float32)
    check_equal(squared_norms(rows), (rows**2).sum(1), "a vmapped product")
    corners = draw.normal(size=(32, 5, 5, 2)).astype(np.float32)
    offsets = draw.normal(size=(64, 64, 2)).astype(np.float32)
    cells = corners.repeat(16, axis=1).repeat(16, axis=2)
    products = (cells[:, :-16, :-16] + cells[:, 16:, :-16]) * offsets
    check_equal(noise(corners, offsets), products.sum(-1), "a batch of noise")


def check_version(version: str) -> None:
    """Refuse the releases with a defect that concerns this program.

    Raises:
        RuntimeError: naming the defect.
    """
    if version in _REFUSED:
        raise RuntimeError(f"jax {version} {_REFUSED[version]}; {_ALLOWED}")


def check_equal(
    got: Float[Array, "*shape"], expected: Float[np.ndarray, "*shape"], name: str
) -> None:
    """Refuse a JAX whose result is not NumPy's.

    Raises:
        RuntimeError: naming the version, the backend and how much is wrong.
    """
    wrong = ~np.isclose(np.asarray(got), expected, rtol=1e-4, atol=1e-4)
    if wrong.any():
        raise RuntimeError(
            f"jax {jax.__version__} miscomputes on {jax.default_backend()}: "
            f"{wrong.sum():,} of {wrong.size:,} entries of {name} are wrong, as in "
            f"jax#39103; {_ALLOWED}"
        )


@jax.jit
def squared_norms(rows: Float[Array, "rows 3"]) -> Float[Array, " rows"]:
    """The program of jax#39103: a vmapped matrix-vector product, squared and summed."""
    matrix = jnp.eye(3)
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


@jax.jit
def noise(
    corners: Float[Array, "grids 5 5 2"], offsets: Float[Array, "64 64 2"]
) -> Float[Array, "grids 64 64"]:
    """The part of Craftax' Perlin noise in which worlds meet the defect."""

    def ramps(corners: Float[Array, "5 5 2"]) -> Float[Array, "64 64"]:
        # the factors in this order: in the other one 0.10.2 computes right results
        cells = corners.repeat(16, 0).repeat(16, 1)
        left, right = cells[:-16, :-16], cells[16:, :-16]
        return jnp.sum(offsets * left, axis=2) + jnp.sum(offsets * right, axis=2)

    return jax.vmap(ramps)(corners)
