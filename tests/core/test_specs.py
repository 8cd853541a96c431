import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.core.specs import TensorSpec, abstract_tensors, init_tensors

normal = jax.nn.initializers.normal(1.0)


def test_every_axis_needs_a_name():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\('width',\)"):
        TensorSpec((2, 3), ("width",), normal)


def test_a_spec_tree_becomes_tensors_of_the_declared_shapes_and_dtypes():
    specs = {
        "a": TensorSpec((2, 3), ("width", "heads"), normal),
        "b": (TensorSpec((4,), ("width",), jax.nn.initializers.ones, jnp.bfloat16),),
        "absent": None,
    }
    tensors = init_tensors(jax.random.key(0), specs)
    assert abstract_tensors(specs) == jax.eval_shape(lambda: tensors)
    assert (tensors["b"][0] == 1).all()


def test_equal_specs_start_from_different_draws():
    spec = TensorSpec((8,), ("width",), normal)
    first, second = init_tensors(jax.random.key(0), (spec, spec))
    assert not np.array_equal(first, second)
