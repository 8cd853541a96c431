"""What the stages carry on: where each part of it lies, its beginning, its resumption.

State is made by one compiled program whose results are already split over the mesh, so
no device ever holds the whole of what it is to hold a part of; restored state is read
from disk straight to where it belongs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxplan.config.schema import ModelConfig
from jaxplan.core.mesh import WHOLE, AnyMesh, sharding_on, shardings_of
from jaxplan.core.specs import abstract_tensors, init_tensors, spec_tree
from jaxplan.io.checkpoints import latest_step, load_checkpoint
from jaxplan.models.adapter_files import load_adapters
from jaxplan.models.convert import load_hf_llama, load_value_head
from jaxplan.models.params import (
    AgentParams,
    LlamaParams,
    agent_specs,
    lora_of,
    replace_lora,
)
from jaxplan.train.optim import Learner, init_learner

PyTree = Any


def draw_params(key: PRNGKeyArray, specs: PyTree, mesh: Mesh) -> PyTree:
    """Draw every tensor of a spec tree, each device its own part."""
    draw = jax.jit(
        lambda key: init_tensors(key, specs), out_shardings=shardings_of(specs, mesh)
    )
    return draw(key)


def start_params(
    key: PRNGKeyArray, model: ModelConfig, specs: AgentParams, mesh: Mesh
) -> AgentParams:
    """The agent a run begins with: from ``model.weights``, or else from chance.

    A value head that does not come with the weights is drawn. Adapters come only with
    weights; see ``with_adapters``.

    Args:
        key: of what is drawn.
        model: the Llama, and where its weights are.
        specs: of an agent without adapters.
        mesh: where to.
    """
    if model.weights is None:
        return draw_params(key, specs, mesh)
    shardings, vocab_size = shardings_of(specs, mesh), specs.llama.embed.shape[0]
    llama = load_hf_llama(model.weights, model, vocab_size, shardings.llama)
    own = lora_of(agent_specs(model, vocab_size).llama)
    adapters = load_adapters(model.weights, model, shardings_of(own, mesh))
    head = load_value_head(model.weights, model)
    if head is None:
        head = draw_params(key, specs.value, mesh)
    place = jax.jit(lambda head: head, out_shardings=shardings.value)
    return AgentParams(llama=replace_lora(llama, adapters), value=place(head))


def with_adapters(
    key: PRNGKeyArray, llama: LlamaParams, specs: LlamaParams, mesh: Mesh
) -> LlamaParams:
    """The same Llama with the adapters it is to have: its own, or new ones.

    New ones change nothing yet. The tensors of the Llama itself are shared.
    """
    wanted = lora_of(specs)
    if wanted is None or lora_of(llama) is not None:
        return llama
    return replace_lora(llama, draw_params(key, wanted, mesh))


def reinforcible(
    key: PRNGKeyArray,
    primed: AgentParams,
    critic: ModelConfig | None,
    specs: AgentParams,
    mesh: Mesh,
) -> AgentParams:
    """A primed agent with all that PPO trains: adapters, and a critic of its own.

    Args:
        key: of what is drawn.
        primed: the agent; its tensors are shared.
        critic: the Llama that values are read off; None: the primed agent itself.
        specs: of the result.
        mesh: where to.
    """
    actor_key, critic_key, adapter_key = jax.random.split(key, 3)
    llama = with_adapters(actor_key, primed.llama, specs.llama, mesh)
    if critic is None or specs.critic is None:
        return AgentParams(llama=llama, value=primed.value)
    bare = replace_lora(specs.critic, None)
    own = start_params(
        critic_key,
        critic,
        spec_tree(AgentParams, llama=bare, value=specs.value, critic=None),
        mesh,
    )
    trunk = with_adapters(adapter_key, own.llama, specs.critic, mesh)
    return AgentParams(llama=llama, value=own.value, critic=trunk)


def learner_shardings(
    specs: PyTree, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> Learner:
    """Where a learner lies: moments like the tensors they belong to, counters whole."""
    params, whole = shardings_of(specs, mesh), sharding_on(mesh, WHOLE)

    def is_masked(moment: Any) -> bool:  # where another optimizer has the tensor
        return isinstance(moment, optax.MaskedNode)

    moments = optax.tree.map_params(
        optimizer,
        lambda moment, sharding: moment if is_masked(moment) else sharding,
        jax.eval_shape(optimizer.init, abstract_tensors(specs)),
        params,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    return spec_tree(
        Learner,
        params=params,
        opt_state=moments,
        skipped=whole,
        bad_leaves=jax.tree.map(lambda _: whole, params),
    )


def begin_learner(
    params: PyTree,
    specs: PyTree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Learner:
    """A learner before its first update, with a copy of ``params`` of its own."""

    def begin(params: PyTree) -> Learner:
        return init_learner(jax.tree.map(jnp.copy, params), optimizer)

    shardings = learner_shardings(specs, optimizer, mesh)
    return jax.jit(begin, out_shardings=shardings)(params)


def abstract_learner(
    specs: PyTree, optimizer: optax.GradientTransformation, mesh: AnyMesh
) -> Learner:
    """What a checkpoint of a learner holds, and where it is to go."""
    shapes = jax.eval_shape(
        lambda p: init_learner(p, optimizer), abstract_tensors(specs)
    )
    return with_shardings(shapes, learner_shardings(specs, optimizer, mesh))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Say of abstract arrays where they lie; ``shardings`` may be a prefix."""
    each = jax.tree.broadcast(shardings, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        each,
    )


def resume(
    directory: Path, target: PyTree, begin: Callable[[], PyTree], most: int
) -> tuple[PyTree, int]:
    """The newest good checkpoint and its step, or a beginning.

    Args:
        directory: of the stage's checkpoints.
        target: what is read, as shapes.
        begin: makes the state before the first step.
        most: how many steps the stage is to have.

    Raises:
        ValueError: it has more already.
    """
    done = latest_step(directory)
    if done is None:
        return begin(), 0
    if done > most:
        raise ValueError(
            f"{directory}: made {done} steps, and {most} are asked for; what is learnt "
            "is not taken back: ask for as many or more, or take another name"
        )
    state, _ = load_checkpoint(directory, None, target)
    return state, latest_step(directory) or 0
