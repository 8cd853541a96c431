import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxplan.models.tensor_files import (
    INDEX,
    check_tensors,
    read_tensor,
    write_shards,
)

SHAPES = {
    "top": (5, 3),
    **{f"model.layers.{i}.up": (4, 2) for i in range(12)},
    **{f"model.layers.{i}.bias": (4,) for i in range(12)},
}


def tensors(dtype="float32"):
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(jnp.dtype(dtype))
        for name, shape in SHAPES.items()
    }


def problems_of(folder):
    with pytest.raises(ValueError, match="the tensors do not fit") as error:
        check_tensors(folder, SHAPES)
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**6, 200, 1])
def test_the_library_reads_what_is_written(tmp_path, dtype, shard_bytes):
    values = tensors(dtype)
    write_shards(tmp_path, SHAPES, iter(values.values()), dtype, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    if shard_bytes == 10**6:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / INDEX).exists()
        weight_map = dict.fromkeys(SHAPES, "model.safetensors")
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
        weight_map = index["weight_map"]
    for file in files:
        for name, tensor in load_file(file).items():
            assert weight_map.pop(name) == file.name
            np.testing.assert_array_equal(tensor, values[name])
            assert tensor.dtype == values[name].dtype
    assert not weight_map
    where = check_tensors(tmp_path, SHAPES)
    assert where.keys() == SHAPES.keys()
    np.testing.assert_array_equal(read_tensor(where["top"], "top"), values["top"])


def test_every_misfit_is_on_one_line_for_all_layers(tmp_path):
    values = tensors()
    for i in (0, 1, 2, 5):
        del values[f"model.layers.{i}.up"]
    values["model.layers.3.bias"] = np.zeros(5, np.float32)
    values["model.layers.4.bias"] = np.zeros(4, np.float64)
    values["model.layers.7.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    values["lm_head"] = np.zeros(2, np.float32)
    save_file(values, tmp_path / "model.safetensors")
    assert sorted(line.strip() for line in problems_of(tmp_path)) == [
        "lm_head: not a tensor of this model (model.safetensors)",
        "model.layers.3.bias: shape (5,), expected (4,)",
        "model.layers.4.bias: dtype F64; only F32, BF16, F16 are read",
        "model.layers.{0-2,5}.up: missing, expected (4, 2)",
    ]


def test_a_tensor_in_two_files_is_found_with_and_without_an_index(tmp_path):
    values = tensors()
    write_shards(tmp_path, SHAPES, iter(values.values()), "float32", 300)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file({**load_file(first), **dict([*values.items()][-1:])}, first)
    last = "model.layers.11.bias"
    twice = f"{last}: there twice, in model-00001-of-00003.safetensors and"
    assert len(problems_of(tmp_path)) == 1
    assert twice in problems_of(tmp_path)[0]
    (tmp_path / INDEX).unlink()
    assert len(problems_of(tmp_path)) == 1
    assert twice in problems_of(tmp_path)[0]


def test_an_index_that_disagrees_with_the_files_is_found(tmp_path):
    write_shards(tmp_path, SHAPES, iter(tensors().values()), "float32", 300)
    index = json.loads((tmp_path / INDEX).read_text())
    moved, forgotten = "top", "model.layers.0.up"
    index["weight_map"][moved] = "model-00002-of-00003.safetensors"
    del index["weight_map"][forgotten]
    index["weight_map"]["model.layers.1.up"] = "model-00009.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    save_file(tensors(), tmp_path / "model.safetensors")
    lines = [line.strip() for line in problems_of(tmp_path)]
    one = "model-00001-of-00003.safetensors"
    for line in (
        "model.safetensors: not in the index",
        "model-00009.safetensors: in the index, but not in the folder",
        f"top: in {one}, the index says model-00002-of-00003.safetensors",
        f"model.layers.0.up: in {one}, but not in the index",
        f"model.layers.1.up: in {one}, the index says model-00009.safetensors",
    ):
        assert line in lines
    assert len(lines) == 5


def test_what_cannot_be_read_is_told_and_not_raised(tmp_path):
    assert "model*.safetensors: there is none" in problems_of(tmp_path)[0]
    (tmp_path / "model.safetensors").write_bytes(b"nonsense" * 4)
    assert "model.safetensors: cannot be read" in problems_of(tmp_path)[0]
    (tmp_path / INDEX).write_text("[]")
    assert f"{INDEX}: not an index" in problems_of(tmp_path)[0]
