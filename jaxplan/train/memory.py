"""What every device will hold, told before anything is allocated.

Tensors that last, such as parameters and caches, are counted from their declarations
and the sharding rules, for meshes larger than any machine at hand. What a program needs
in between is mostly what the backward pass finds of the forward pass: that is traced
with the shapes of one device's share, and nothing is compiled.
``jaxplan.train.memory_compiled`` asks the compiler, where the devices exist.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxplan.config.schema import ModelConfig, RunConfig
from jaxplan.core.mesh import AnyMesh, abstract_mesh, num_shards, shardings_of
from jaxplan.core.specs import abstract_tensors, spec_tree
from jaxplan.models.heads import chunk_tokens
from jaxplan.models.llama import forward
from jaxplan.models.params import llama_specs, split_trained
from jaxplan.models.visibility import TokenMeta
from jaxplan.rollout.segment import empty_turns
from jaxplan.train.optim import make_optimizer, make_ppo_optimizer
from jaxplan.train.ppo_loop import abstract_play
from jaxplan.train.setting import Setting, check_division
from jaxplan.train.sft import Segments
from jaxplan.train.state import abstract_learner, with_shardings

STAGES = ("sft", "rollout", "ppo update")
# Copies of a chunk's logits that are alive at one time: log-probabilities, their
# exponentials and gradients; in PPO, of the grammar's two factors and of entropies.
_LOGITS = 4
_LOGITS_OF_PPO = 8
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device by stage and part.

    Attributes:
        mesh: sizes of its axes.
        resident: what lies there while a stage's program runs, but is none of its
            arguments.
        program: arguments, results and intermediate values of the program.
    """

    mesh: dict[str, int]
    resident: dict[str, dict[str, int]]
    program: dict[str, dict[str, int]]

    def total(self, stage: str) -> int:
        """Of all parts."""
        return sum(self.resident[stage].values()) + self.of_program(stage)

    def of_program(self, stage: str) -> int:
        """Of what the compiler knows of."""
        return sum(self.program[stage].values())

    @property
    def peak(self) -> int:
        """Of the largest stage."""
        return max(self.total(stage) for stage in STAGES)


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays that know their sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def plan_memory(setting: Setting) -> MemoryPlan:
    """Estimate what each device will hold in the training stages.

    Args:
        setting: the run; its devices need not exist.

    Raises:
        ValueError: the mesh does not divide the run.
    """
    config = setting.config
    mesh = abstract_mesh(config.mesh)
    check_division(setting, mesh)
    shards = num_shards(mesh)
    lanes = config.rollout.num_lanes // shards
    play = abstract_play(setting, mesh)
    lasting = {stage: _lasting_bytes(setting, mesh, stage) for stage in ("sft", "ppo")}
    actor = _spec_bytes(setting.specs_of("ppo").llama, mesh)
    worlds = {
        "worlds and lanes": held_bytes(play),
        "language": sum(leaf.nbytes for leaf in jax.tree.leaves(setting.language)),
    }
    segment = held_bytes(play["carry"].stream) + lanes * _turn_bytes(config)
    batch = config.sft.batch_segments // shards
    minibatch = lanes // config.ppo.num_minibatches
    segments = {"segments": len(dataclasses.fields(Segments)) * batch * _row(config)}
    return MemoryPlan(
        mesh=dict(mesh.shape),
        resident={
            "sft": {},
            "rollout": lasting["ppo"]
            | {"parameters": lasting["ppo"]["parameters"] - actor},
            "ppo update": worlds | {"worlds and lanes": held_bytes(play)},
        },
        program={
            "sft": lasting["sft"]
            | segments
            | _update_bytes(
                setting, mesh, "sft", batch, 0, max_targets(config), _LOGITS
            ),
            "rollout": {"parameters": actor}
            | worlds
            | {"segments": segment}
            | _rollout_bytes(setting, mesh, lanes),
            "ppo update": lasting["ppo"]
            | {"segments": 2 * segment}
            | _update_bytes(
                setting,
                mesh,
                "ppo",
                minibatch,
                lanes,
                _decisions(config),
                _LOGITS_OF_PPO,
            ),
        },
    )


def stage_optimizers(config: RunConfig) -> dict[str, Any]:
    """The optimizers of a run by stage, whatever the number of updates."""
    return {
        "sft": make_optimizer(config.sft.optimizer, 1),
        "ppo": make_ppo_optimizer(config.ppo),
    }


def _spec_bytes(specs: Any, mesh: AnyMesh) -> int:
    """Bytes of declared tensors on one device."""
    return held_bytes(
        with_shardings(abstract_tensors(specs), shardings_of(specs, mesh))
    )


def _lasting_bytes(setting: Setting, mesh: AnyMesh, stage: str) -> dict[str, int]:
    """What lasts from update to update; a reference shares what does not learn."""
    specs = setting.specs_of(stage)
    learning, frozen = split_trained(specs)
    optimizer = stage_optimizers(setting.config)[stage]
    learner = held_bytes(abstract_learner(learning, optimizer, mesh))
    begun = setting.specs_of({"sft": "start", "ppo": "sft"}[stage]).llama
    own = _spec_bytes(begun, mesh) - _spec_bytes(frozen.llama, mesh)
    return {
        "parameters": _spec_bytes(specs, mesh),
        "optimizer": learner - _spec_bytes(learning, mesh),
    } | ({"reference": own} if wants_reference(setting.config, stage) else {})


def wants_reference(config: RunConfig, stage: str) -> bool:
    """Tell whether a stage keeps the weights that it began with."""
    return stage == "ppo" or bool(config.sft.kl_coef or config.sft.measure_kl)


def _row(config: RunConfig) -> int:
    return config.rollout.segment_tokens * 4


def _turn_bytes(config: RunConfig) -> int:
    turns = jax.eval_shape(lambda: empty_turns(1, config.rollout.rounds + 2))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(turns))


def _decisions(config: RunConfig) -> int:
    return config.rollout.rounds * (1 + config.rollout.decode_steps)


def max_targets(config: RunConfig) -> int:
    """Tokens with a loss in a segment; without observations, as many as PPO has."""
    length = config.rollout.segment_tokens
    every = config.sft.observation_weight > 0
    return length if every else min(length, _decisions(config))


def _share(model: ModelConfig, mesh: AnyMesh) -> ModelConfig:
    """The part of a layer that one device of the axis ``model`` computes."""
    parts = mesh.shape["model"]
    return dataclasses.replace(
        model,
        heads=model.heads // parts,
        kv_heads=model.kv_heads // parts,
        ffn_width=model.ffn_width // parts,
    )


def _vocab_share(setting: Setting, mesh: AnyMesh) -> int:
    parts = mesh.shape["model"]
    whole = setting.vocab_size % parts
    return setting.vocab_size if whole else setting.vocab_size // parts


def _update_bytes(
    setting: Setting,
    mesh: AnyMesh,
    stage: str,
    rows: int,
    scored: int,
    targets: int,
    copies: int,
) -> dict[str, int]:
    """Gradients and intermediate values of an update on ``rows`` streams a device.

    The most is held where the backward pass begins, with a chunk of logits, or within
    its first layer, of which it computes again what it needs.
    """
    config, model = setting.config, _share(setting.config.model, mesh)
    kept = partial(
        _kept_bytes,
        rows=rows,
        length=config.rollout.segment_tokens,
        history=config.rollout.history,
    )

    def kept_by_a_layer(remat: str) -> int:  # and not by all of them together
        one, two = (dataclasses.replace(model, layers=n, remat=remat) for n in (1, 2))
        return kept(two) - kept(one)

    again = kept_by_a_layer("none") - kept_by_a_layer(model.remat)
    learning, _ = split_trained(setting.specs_of(stage))
    critic = config.ppo.critic if stage == "ppo" else None
    width = min(targets, max(1, _chunk(setting) // (rows * num_shards(mesh))))
    logits = copies * rows * width * _vocab_share(setting, mesh) * 4
    activations = kept(model) + (kept(_share(critic, mesh)) if critic else 0)
    gradients = _spec_bytes(learning, mesh)
    # Before the first step all lanes are scored at once, attention and all.
    scoring = scored * model.heads * config.rollout.segment_tokens**2 * 4
    return {
        "gradients": gradients,
        "weights to compute with": _working_bytes(setting, mesh),
        "activations": activations,
        "temp": max(again, logits, scoring - gradients - activations),
    }


def _chunk(setting: Setting) -> int:
    return chunk_tokens(abstract_tensors(setting.specs.llama))


def _working_bytes(setting: Setting, mesh: AnyMesh) -> int:
    """Copies of the weights, and of their gradients, in the compute dtype.

    With ``fsdp`` two layers at a time are gathered, and the head.
    """
    model = setting.config.model
    held = 0
    if model.compute_dtype != model.param_dtype:
        held += 2 * _llama_bytes(setting, mesh)
    if mesh.shape["fsdp"] > 1:
        gathered = AbstractMesh((1, 1, mesh.shape["model"]), mesh.axis_names)
        layers = _llama_bytes(setting, gathered, "layers")
        held += 2 * layers // model.layers
        held += _llama_bytes(setting, gathered) - layers
    return held


def _llama_bytes(setting: Setting, mesh: AnyMesh, part: str = "") -> int:
    """Bytes of a Llama, or a part of it, in the compute dtype."""
    model = setting.config.model
    model = dataclasses.replace(model, param_dtype=model.compute_dtype)
    specs = llama_specs(model, setting.vocab_size)
    specs = getattr(specs, part) if part else specs
    return _spec_bytes(specs, mesh)


@functools.cache
def _kept_bytes(model: ModelConfig, rows: int, length: int, history: int) -> int:
    """Bytes the backward pass finds of a forward pass, parameters aside."""
    params = abstract_tensors(llama_specs(model, vocab_size=2))
    numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    fields = (field.name for field in dataclasses.fields(TokenMeta))
    meta = spec_tree(TokenMeta, **dict.fromkeys(fields, numbers))

    def residuals(params, tokens, meta):
        def hidden(params):
            return forward(params, tokens, meta, model, history)

        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, numbers, meta).jaxpr
    weights = set(jaxpr.invars)
    weights |= {
        eqn.outvars[0]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "convert_element_type" and eqn.invars[0] in weights
    }
    kept = {var for var in jaxpr.outvars if var not in weights}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def _rollout_bytes(setting: Setting, mesh: AnyMesh, lanes: int) -> dict[str, int]:
    """Caches and intermediate values of a rollout with ``lanes`` lanes a device."""
    rollout, model = setting.config.rollout, _share(setting.config.model, mesh)
    size = np.dtype(jnp.dtype(model.compute_dtype)).itemsize
    whole = AbstractMesh((1, 1, mesh.shape["model"]), mesh.axis_names)
    # Layers are separated to decode; the rest is copied where it is not as it lies.
    part = "layers"
    if mesh.shape["fsdp"] > 1 or model.compute_dtype != model.param_dtype:
        part = ""
    tokens = lanes * rollout.segment_tokens
    heads = 2 * model.layers * model.kv_heads * model.head_dim * size
    chunk = lanes * rollout.prefill_tokens
    scores = chunk * model.heads * rollout.segment_tokens * 4
    streams = chunk * (2 * model.ffn_width + 4 * model.width) * size
    logits = _LOGITS * lanes * _vocab_share(setting, mesh) * 4
    return {
        "weights to compute with": _llama_bytes(setting, whole, part),
        "KV cache": tokens * (heads + 4 * len(dataclasses.fields(TokenMeta))),
        "temp": scores + streams + logits,
    }
