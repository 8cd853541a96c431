import os
import random
import resource
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jaxplan.io.checkpoints import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointNotSavedError,
    fingerprint,
    latest_step,
    load_checkpoint,
    save_checkpoint,
    save_once,
    sweep_unfinished,
)


@chex.dataclass(frozen=True)
class Carry:
    weights: Float[Array, "a b"]
    keys: PRNGKeyArray
    nested: dict


def example(seed=0, width=8):
    key = jax.random.key(seed)
    return Carry(
        weights=jax.random.normal(key, (16, width)),
        keys=jax.random.split(key, 3),
        nested={
            "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
            "bytes": jnp.arange(7, dtype=jnp.int8),
            "flags": jnp.array([True, False]),
            "count": jnp.int32(seed),
            "empty": jnp.zeros((0, 2)),
            "list": (jnp.ones(1), [jnp.array([jnp.nan, -0.0, jnp.inf])]),
            "fast": jax.random.key(3, impl="rbg"),
        },
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def largest_file(folder):
    files = [f for f in folder.rglob("*") if f.is_file()]
    return max(files, key=lambda f: f.stat().st_size)


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    info = {"best": 0.5, "name": "é", 10: 1, 9: 2}
    save_checkpoint(tmp_path / "c", 7, example(), info)
    for target in (abstract(example(1)), example(1)):
        state, found = load_checkpoint(tmp_path / "c", 7, target)
        assert_same_bits(state, example())
        assert found == {"best": 0.5, "name": "é", "10": 1, "9": 2}
    np.testing.assert_array_equal(
        jax.random.normal(state.keys[1], (3,)),
        jax.random.normal(example().keys[1], (3,)),
    )


def test_the_newest_steps_are_kept_and_the_newest_is_loaded(tmp_path):
    assert latest_step(tmp_path) is None
    for step in (2, 10, 9, 30):
        save_checkpoint(tmp_path, step, example(step), {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "30"]
    assert latest_step(tmp_path) == 30
    state, info = load_checkpoint(tmp_path, None, abstract(example()))
    assert info == {"step": 30}
    assert_same_bits(state, example(30))


def test_only_the_owner_may_read_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "c", 0, example(), {})
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


def test_a_state_sharded_over_devices_loads_onto_another_mesh(tmp_path):
    def spread(shape, axes):
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))
        return NamedSharding(mesh, PartitionSpec(*axes))

    array = jnp.arange(64.0).reshape(8, 8)
    saved = {"w": jax.device_put(array, spread((8,), ("x",)))}
    save_checkpoint(tmp_path, 0, saved, {})
    other = spread((2, 4), ("x", "y"))
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other)}
    state, _ = load_checkpoint(tmp_path, 0, target)
    assert state["w"].sharding == other
    np.testing.assert_array_equal(state["w"], array)


def test_every_differing_leaf_is_listed_and_nothing_is_loaded(tmp_path):
    save_checkpoint(tmp_path, 3, example(), {})
    other = example()
    nested = dict(other.nested)
    nested["half"] = nested["half"].astype(jnp.float32)
    nested["renamed"] = nested.pop("count")
    nested["fast"] = jax.random.key(0)
    target = other.replace(nested=nested, weights=jnp.zeros((16, 4)))
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint(tmp_path, None, target)
    message = str(caught.value)
    for line in (
        "weights: saved float32[16, 8], wanted float32[16, 4]",
        "nested.half: saved bfloat16[5], wanted float32[5]",
        "nested.count: saved int32[], wanted missing",
        "nested.renamed: saved missing, wanted int32[]",
        "nested.fast: saved key<rbg>[], wanted key<fry>[]",
    ):
        assert line in message
    assert "5 of 11 leaves" in message
    assert len(message.splitlines()) == 7
    assert latest_step(tmp_path) == 3


def test_a_part_is_loaded_as_if_it_were_all(tmp_path):
    learner = {"params": example(1), "params_too": jnp.ones(3)}
    save_checkpoint(tmp_path, 1, {"learner": learner, "pool": jnp.zeros(4)}, {"at": 1})
    target = abstract(example())
    loaded, info = load_checkpoint(tmp_path, None, target, part="learner.params")
    assert_same_bits(loaded, example(1))
    assert info == {"at": 1}
    target = abstract(example(width=9))
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint(tmp_path, 1, target, part="learner.params")
    assert "1 of 10 leaves differ" in str(caught.value)
    assert "learner.params.weights: saved float32[16, 8], wan" in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "header", "flip"])
def test_a_damaged_newest_step_is_named_and_the_one_before_is_loaded(tmp_path, damage):
    save_checkpoint(tmp_path, 1, example(1), {"step": 1})
    save_checkpoint(tmp_path, 2, example(2), {"step": 2})
    victim = largest_file(tmp_path / "2" / "state")
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-20])
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "delete":
        victim.unlink()
    elif damage == "header":
        header = tmp_path / "2" / "_CHECKPOINT_METADATA"
        header.write_text(header.read_text().replace('"step": 2', '"step": 3'))
    else:
        flip_one_bit(tmp_path / "2", random.Random(0))
    target = abstract(example())
    with pytest.warns(UserWarning, match=r"/2: damaged.*2\.damaged-1"):
        state, info = load_checkpoint(tmp_path, None, target)
    assert info == {"step": 1}
    assert_same_bits(state, example(1))
    save_checkpoint(tmp_path, 2, example(3), {"step": 2})
    assert latest_step(tmp_path) == 2


def flip_one_bit(step_dir, chance):
    """Flip a bit of the weights' data, which is random and hence stored verbatim."""
    data = largest_file(step_dir / "state")
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle + chance.randrange(-20, 20)] ^= 1 << chance.randrange(8)
    data.write_bytes(content)


def test_every_flipped_bit_is_found(tmp_path):
    key = jax.random.key(0)
    tree = {"w": jax.random.bits(key, (4096,), jnp.uint32)}
    save_checkpoint(tmp_path, 0, tree, {})
    data = largest_file(tmp_path / "0" / "state")
    good = data.read_bytes()
    chance = random.Random(1)
    named = 0
    for _ in range(20):
        flip_one_bit(tmp_path / "0", chance)
        with pytest.raises(CheckpointDamagedError) as caught:
            load_checkpoint(tmp_path, 0, tree)
        named += str(caught.value).endswith("other bits than were saved in w")
        data.write_bytes(good)
    assert named == 20
    load_checkpoint(tmp_path, 0, tree)


def test_when_every_step_is_damaged_the_oldest_is_named_and_stays(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, example(step), {})
        largest_file(tmp_path / str(step) / "state").unlink()
    with (
        pytest.warns(UserWarning, match="/2: damaged"),
        pytest.raises(CheckpointDamagedError, match="/1: damaged"),
    ):
        load_checkpoint(tmp_path, None, abstract(example()))


def test_a_damaged_step_asked_for_by_number_is_an_error(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, example(step), {})
    largest_file(tmp_path / "2" / "state").unlink()
    with pytest.raises(CheckpointDamagedError, match="/2: damaged"):
        load_checkpoint(tmp_path, 2, abstract(example()))
    assert latest_step(tmp_path) == 2


def test_a_missing_step_is_an_error_that_says_which_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint; there are none"):
        load_checkpoint(tmp_path / "nowhere", None, abstract(example()))
    save_checkpoint(tmp_path, 4, example(), {})
    with pytest.raises(FileNotFoundError, match=r"of step 5; there are \[4\]"):
        load_checkpoint(tmp_path, 5, abstract(example()))


def test_a_step_is_not_saved_twice(tmp_path):
    save_checkpoint(tmp_path, 1, example(), {})
    with pytest.raises(FileExistsError, match="step 1 exists"):
        save_checkpoint(tmp_path, 1, example(), {})


def test_a_plain_python_leaf_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"leaf a\.b is a int"):
        save_checkpoint(tmp_path, 1, {"a": {"b": 3}}, {})


def test_what_a_killed_save_left_is_no_step_and_is_swept(tmp_path):
    save_checkpoint(tmp_path, 1, example(), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "0.removed").mkdir()
    assert latest_step(tmp_path) == 1
    sweep_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_failed_save_leaves_the_older_step_and_no_rubbish(tmp_path):
    save_checkpoint(tmp_path, 1, example(), {})
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        with pytest.raises(CheckpointNotSavedError, match=r"step 2.*about 4 MiB"):
            save_checkpoint(tmp_path, 2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    load_checkpoint(tmp_path, None, abstract(example()))


def slow_fingerprint(array):
    def mix(word):
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    array = np.ascontiguousarray(array)
    width = {1: "u1", 2: "u2", 4: "u4", 8: "u4"}[array.dtype.itemsize]
    words = np.frombuffer(array.tobytes(), width).tolist()
    return sum(mix(w ^ mix(i + 1)) for i, w in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_the_fingerprint_is_the_sum_of_mixed_words(dtype):
    bits = jax.random.bits(jax.random.key(0), (3, 4, 5), jnp.uint32)
    array = (bits % 100).astype(dtype) if dtype == "bool" else bits.astype(dtype)
    assert int(jax.jit(fingerprint)(array)) == slow_fingerprint(np.asarray(array))


def test_the_fingerprint_sees_order_sign_of_zero_and_nan_payload():
    def of(*values):
        return int(fingerprint(jnp.array(values, jnp.float32)))

    assert of(1.0, 2.0) != of(2.0, 1.0)
    assert of(0.0) != of(-0.0)
    assert of(np.nan) == of(np.nan)


def test_the_fingerprint_does_not_depend_on_the_sharding():
    array = jax.random.normal(jax.random.key(0), (16, 8))
    alone = fingerprint(array)
    for shape, spec in (((8,), ("x",)), ((2, 4), ("x", "y")), ((2, 4), ("y", "x"))):
        axes = tuple(sorted(spec))
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))
        spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert int(jax.jit(fingerprint)(spread)) == int(alone)


def test_saving_and_loading_warn_of_nothing(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_checkpoint(tmp_path, 1, example(), {})
        load_checkpoint(tmp_path, None, abstract(example()))
    assert [str(w.message) for w in caught] == []
    assert os.listdir(tmp_path) == ["1"]


GOLDEN = Path(__file__).parent / "data" / "checkpoint_format_1"


def golden_state():
    return {
        "keys": jax.random.split(jax.random.key(7), 2),
        "layers": [
            {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7},
            {"w": jnp.array([1.5, -2.0], jnp.bfloat16)},
        ],
        "step": jnp.int32(5),
    }


def test_a_checkpoint_of_format_1_is_still_read():
    """When this fails after an upgrade of orbax, users lose their runs: pin it back.

    A new format gets a new folder, made by save_checkpoint(folder, 5, golden_state(),
    {"iteration": 5}), and this one goes when format 1 is given up.
    """
    state, info = load_checkpoint(GOLDEN, 5, abstract(golden_state()))
    assert_same_bits(state, golden_state())
    assert info == {"iteration": 5}


def test_importing_the_module_does_not_import_orbax():
    code = "import sys, jaxplan.io.checkpoints; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SAVE_WITHOUT_END = """
import sys
import jax, jax.numpy as jnp
from jaxplan.io.checkpoints import load_checkpoint, save_checkpoint, sweep_unfinished
directory = sys.argv[1]
sweep_unfinished(directory)
step, state = 0, {"w": jnp.zeros((1 << 18,))}
try:
    state, info = load_checkpoint(directory, None, state)
    step = info["step"]
except FileNotFoundError:
    pass
assert bool((state["w"] == step).all())
print("from", step, flush=True)
while True:
    step, state = step + 1, {"w": state["w"] + 1}
    save_checkpoint(directory, step, state, {"step": step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_no_acknowledged_step_is_lost_by_a_kill_at_any_moment(tmp_path):
    chance, acknowledged = random.Random(0), 0
    for _ in range(8):
        command = [sys.executable, "-c", SAVE_WITHOUT_END, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            begun_at = int(run.stdout.readline().split()[1])
            time.sleep(chance.uniform(0.02, 1.5))
            run.kill()
            steps = [int(line) for line in run.stdout.read().split()]
        assert begun_at in (acknowledged, acknowledged + 1)
        acknowledged = max(steps, default=begun_at)
    assert acknowledged > 8


def test_what_never_changes_is_saved_once_and_held_to(tmp_path):
    base = {"a": jnp.arange(3.0), "b": None}
    for _ in range(2):
        save_once(tmp_path, base)
    assert latest_step(tmp_path) == 0
    with pytest.raises(CheckpointMismatchError, match="other bits than now in a;"):
        save_once(tmp_path, {"a": base["a"] + 1, "b": None})
    with pytest.raises(CheckpointMismatchError, match=r"b: saved missing, wanted"):
        save_once(tmp_path, base | {"b": jnp.int32(1)})
    save_once(tmp_path / "none", {"a": None})
    assert not (tmp_path / "none").exists()
