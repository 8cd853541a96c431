"""Which device holds what, on eight pretended ones."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxplan.config.schema import MeshConfig
from jaxplan.core.mesh import (
    LANES,
    WHOLE,
    check_tensors,
    constrain,
    each_shard,
    make_mesh,
    num_shards,
    settle,
    shardings_of,
    to_host,
)
from jaxplan.core.specs import TensorSpec, init_tensors

zeros = jax.nn.initializers.zeros

SPECS = {
    "embed": TensorSpec((24, 16), ("vocab", "width"), jax.nn.initializers.normal()),
    "query": TensorSpec((3, 16, 4, 6), ("layers", "width", "heads", "head_dim"), zeros),
    "down": TensorSpec((3, 20, 16), ("layers", "ffn", "width"), zeros),
    "scale": TensorSpec((), (), zeros),
}


def mesh_of(data, fsdp, model):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model))


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 4, 2), (1, 4, 2)),
        ((3, 1, 2), (3, 1, 2)),
    ],
)
def test_a_mesh_takes_the_devices_it_names_or_all_that_are_left(wanted, shape):
    mesh = mesh_of(*wanted)
    assert tuple(mesh.shape.values()) == shape
    assert num_shards(mesh) == shape[0] * shape[1]
    assert list(mesh.devices.flat) == jax.devices()[: math.prod(shape)]


@pytest.mark.parametrize("wanted", [(9, 1, 1), (2, 4, 2), (-1, 3, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_numbers(wanted):
    told = rf"data={wanted[0]} x fsdp={wanted[1]} x model=.*there are 8 devices \(cpu\)"
    with pytest.raises(ValueError, match=told):
        mesh_of(*wanted)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_every_device_holds_its_part_of_every_tensor_and_no_more(shape):
    mesh, (_, fsdp, model) = mesh_of(*shape), shape
    shardings = shardings_of(SPECS, mesh)
    tensors = jax.jit(lambda key: init_tensors(key, SPECS), out_shardings=shardings)(
        jax.random.key(0)
    )
    parts = {"embed": fsdp * model, "query": fsdp * model, "down": fsdp * model}
    for name, tensor in tensors.items():
        for shard in tensor.addressable_shards:
            assert shard.data.nbytes * parts.get(name, 1) == tensor.nbytes, name
    alone = init_tensors(jax.random.key(0), SPECS)
    np.testing.assert_allclose(tensors["embed"], alone["embed"], rtol=1e-6)


def test_a_vocabulary_that_does_not_divide_stays_whole():
    spec = TensorSpec((25, 16), ("vocab", "width"), zeros)
    sharding = shardings_of(spec, mesh_of(1, 2, 2))
    assert sharding.spec == PartitionSpec(None, "fsdp")


def test_every_length_that_does_not_divide_is_named():
    told = (
        "mesh.model=8 does not divide ffn=20 of down; "
        "mesh.model=8 does not divide heads=4 of query"
    )
    with pytest.raises(ValueError, match=f"^{told}$"):
        check_tensors(SPECS, mesh_of(1, 1, 8))
    check_tensors(SPECS, mesh_of(1, 4, 2))


def test_an_axis_without_a_rule_is_named():
    with pytest.raises(KeyError, match="'depth'"):
        shardings_of(TensorSpec((3,), ("depth",), zeros), mesh_of(1, 1, 1))


def test_without_a_mesh_programs_stay_as_they_are():
    x = jnp.arange(6.0)
    assert constrain(x, "lanes") is x
    assert each_shard(jnp.sort, LANES, LANES) is jnp.sort


def spread(lanes):
    """How far each lane is from the greatest: a maximum over what is in sight."""
    return constrain(jnp.max(lanes, axis=0, keepdims=True) - lanes, "lanes", "heads")


def collectives(compiled) -> list[str]:
    pattern = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(pattern, compiled.as_text())


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_each_shard_sees_its_own_lanes_and_asks_nobody(shape):
    mesh = mesh_of(*shape)
    lanes = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)

    def on_mesh(lanes):
        return each_shard(spread, LANES, LANES)(lanes)

    with jax.set_mesh(mesh):
        there = settle(jnp.asarray(lanes), LANES)
        program = jax.jit(on_mesh)
        assert not collectives(program.lower(there).compile())
        result = program(there)
    apart = np.split(lanes, num_shards(mesh))
    expected = np.concatenate([part.max(axis=0) - part for part in apart])
    np.testing.assert_array_equal(result, expected)
    part = (16 // num_shards(mesh), 4 // mesh.shape["model"])
    assert {shard.data.shape for shard in result.addressable_shards} == {part}


def test_a_constraint_splits_lanes_and_named_axes():
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, "lanes", None, "heads"))(jnp.ones((8, 3, 4)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3, 2)}


@pytest.mark.parametrize("spec", [WHOLE, LANES])
def test_settled_arrays_come_back_whole(spec):
    keys = jax.random.split(jax.random.key(0), 8)
    tree = {"x": jnp.arange(16.0).reshape(8, 2), "keys": keys}
    with jax.set_mesh(mesh_of(4, 2, 1)):
        settled = settle(tree, spec)
    assert len(settled["x"].devices()) == 8
    np.testing.assert_array_equal(to_host(settled["x"]), tree["x"])
    words = jax.random.key_data(settled["keys"])
    np.testing.assert_array_equal(to_host(words), jax.random.key_data(keys))
