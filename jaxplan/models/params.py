"""The agent's tensors: what they are called, how long they are, how they start.

Containers are plain pytrees; ``agent_specs`` declares every tensor once. The copy that
learns is stored as ``model.param_dtype``, its norms and the value head as float32;
``cast_params`` makes the copy a program computes with.
"""

import dataclasses
import math
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxplan.config.schema import ModelConfig
from jaxplan.core.specs import TensorSpec, init_tensors, spec_tree
from jaxplan.models.lora import Adapters, adapter_specs

normal = jax.nn.initializers.normal
_Params = TypeVar("_Params")

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


@chex.dataclass(frozen=True)
class LayerParams:
    """One layer, or all of them stacked along a first axis L; biases may be None."""

    attention_norm: Float[Array, "*layers D"]
    query: Float[Array, "*layers D N H"]
    key: Float[Array, "*layers D K H"]
    value: Float[Array, "*layers D K H"]
    attention_out: Float[Array, "*layers N H D"]
    ffn_norm: Float[Array, "*layers D"]
    gate: Float[Array, "*layers D F"]
    up: Float[Array, "*layers D F"]
    down: Float[Array, "*layers F D"]
    query_bias: Float[Array, "*layers N H"] | None = None
    key_bias: Float[Array, "*layers K H"] | None = None
    value_bias: Float[Array, "*layers K H"] | None = None
    attention_out_bias: Float[Array, "*layers D"] | None = None
    gate_bias: Float[Array, "*layers F"] | None = None
    up_bias: Float[Array, "*layers F"] | None = None
    down_bias: Float[Array, "*layers D"] | None = None
    lora: Adapters | None = None


@chex.dataclass(frozen=True)
class LlamaParams:
    """A Llama; ``lm_head`` is None where the embedding serves as the head, too."""

    embed: Float[Array, "V D"]
    layers: LayerParams | tuple[LayerParams, ...]  # stacked, or one by one to decode
    final_norm: Float[Array, " D"]
    lm_head: Float[Array, "D V"] | None


@chex.dataclass(frozen=True)
class ValueParams:
    """The value head: two layers on a trunk's last hidden state."""

    hidden: Float[Array, "D D"]
    hidden_bias: Float[Array, " D"]
    out: Float[Array, " D"]
    out_bias: Float[Array, ""]


@chex.dataclass(frozen=True)
class AgentParams:
    """An agent; ``value`` is read off ``critic``, or off the actor where it is None."""

    llama: LlamaParams
    value: ValueParams
    critic: LlamaParams | None = None


def layer_specs(config: ModelConfig) -> LayerParams:
    """Declare the stacked layers; every projection keeps the scale of its input."""
    depth, width, ffn = config.layers, config.width, config.ffn_width
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    # The residual stream sums 2L outputs: they start smaller (GPT-2, section 2.3).
    residual = 1 / math.sqrt(2 * depth)
    from_width = normal(width**-0.5)

    def spec(init, **axes):
        dtype = jnp.float32 if init is ones else config.param_dtype  # ones: a norm
        return TensorSpec(
            (depth, *axes.values()), ("layers", *axes.keys()), init, dtype
        )

    def bias(wanted, **axes):
        return spec(zeros, **axes) if wanted else None

    attention, mlp = config.attention_bias, config.mlp_bias
    return spec_tree(
        LayerParams,
        attention_norm=spec(ones, width=width),
        query=spec(from_width, width=width, heads=heads, head_dim=head_dim),
        key=spec(from_width, width=width, kv_heads=kv_heads, head_dim=head_dim),
        value=spec(from_width, width=width, kv_heads=kv_heads, head_dim=head_dim),
        attention_out=spec(
            normal((heads * head_dim) ** -0.5 * residual),
            heads=heads,
            head_dim=head_dim,
            width=width,
        ),
        ffn_norm=spec(ones, width=width),
        gate=spec(from_width, width=width, ffn=ffn),
        up=spec(from_width, width=width, ffn=ffn),
        down=spec(normal(ffn**-0.5 * residual), ffn=ffn, width=width),
        query_bias=bias(attention, heads=heads, head_dim=head_dim),
        key_bias=bias(attention, kv_heads=kv_heads, head_dim=head_dim),
        value_bias=bias(attention, kv_heads=kv_heads, head_dim=head_dim),
        attention_out_bias=bias(attention, width=width),
        gate_bias=bias(mlp, ffn=ffn),
        up_bias=bias(mlp, ffn=ffn),
        down_bias=bias(mlp, width=width),
        lora=None,
    )


def llama_specs(config: ModelConfig, vocab_size: int) -> LlamaParams:
    """Declare a Llama's own tensors: a ``LlamaParams`` with a spec at each leaf."""
    width, dtype = config.width, config.param_dtype
    embed = TensorSpec((vocab_size, width), ("vocab", "width"), normal(0.02), dtype)
    init = normal(width**-0.5)
    head = TensorSpec((width, vocab_size), ("width", "vocab"), init, dtype)
    return spec_tree(
        LlamaParams,
        embed=embed,
        layers=layer_specs(config),
        final_norm=TensorSpec((width,), ("width",), ones),
        lm_head=None if config.tie_embeddings else head,
    )


def value_specs(config: ModelConfig) -> ValueParams:
    """Declare the value head; its last layer is zero, so all values start at 0."""
    width = config.width
    return spec_tree(
        ValueParams,
        hidden=TensorSpec((width, width), ("width", "hidden"), normal(width**-0.5)),
        hidden_bias=TensorSpec((width,), ("hidden",), zeros),
        out=TensorSpec((width,), ("hidden",), zeros),
        out_bias=TensorSpec((), (), zeros),
    )


def agent_specs(
    config: ModelConfig, vocab_size: int, critic: ModelConfig | None = None
) -> AgentParams:
    """Declare every tensor of an agent, adapters too, with a spec at each leaf.

    Args:
        config: of the actor.
        vocab_size: of the tokenizer; a critic may have room for more.
        critic: of the Llama that values are read off, if that is not the actor.
    """

    def adapted(config: ModelConfig, rows: int) -> LlamaParams:
        llama = llama_specs(config, rows)
        return replace_lora(llama, adapter_specs(config.lora, vars(llama.layers)))

    return spec_tree(
        AgentParams,
        llama=adapted(config, vocab_size),
        value=value_specs(critic or config),
        critic=adapted(critic, critic.vocab_size or vocab_size) if critic else None,
    )


def lora_of(llama: LlamaParams) -> Adapters | None:
    """The adapters of a stacked Llama, if it has any."""
    assert isinstance(llama.layers, LayerParams)
    return llama.layers.lora


def replace_lora(llama: LlamaParams, lora: Adapters | None) -> LlamaParams:
    """The same Llama, stacked, with these adapters."""
    layers = spec_tree(LayerParams, **(vars(llama.layers) | {"lora": lora}))
    return spec_tree(LlamaParams, **(vars(llama) | {"layers": layers}))


def split_trained(params: _Params) -> tuple[_Params, _Params]:
    """Part what learns from what does not; each has None where the other has a tensor.

    Of a Llama with adapters only these learn. What has none learns as a whole.
    """

    def is_llama(node: Any) -> bool:
        return isinstance(node, LlamaParams)

    def learns(node: Any) -> Any:
        whole = not is_llama(node) or lora_of(node) is None

        def in_adapter(path: Any) -> bool:
            return any(getattr(key, "name", None) == "lora" for key in path)

        return jax.tree.map_with_path(lambda path, _: whole or in_adapter(path), node)

    mask = jax.tree.map(learns, params, is_leaf=is_llama)
    trained = jax.tree.map(lambda kept, x: x if kept else None, mask, params)
    frozen = jax.tree.map(lambda kept, x: None if kept else x, mask, params)
    return trained, frozen


def join(trained: _Params, frozen: _Params | None) -> _Params:
    """Undo ``split_trained``; with None for ``frozen`` all is in ``trained``."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda ours, theirs: theirs if ours is None else ours,
        trained,
        frozen,
        is_leaf=lambda node: node is None,
    )


def init_params(key: PRNGKeyArray, config: ModelConfig, vocab_size: int) -> AgentParams:
    """Draw an agent from scratch."""
    return init_tensors(key, agent_specs(config, vocab_size))


def cast_params(params: LlamaParams, config: ModelConfig) -> LlamaParams:
    """Copy a Llama in its compute dtype; norm scales stay float32.

    Do it once per rollout: casting inside a decode loop costs a pass over all weights
    per token.
    """

    def cast(path, tensor):
        is_norm = path[-1].name.endswith("norm")
        return tensor if is_norm else tensor.astype(config.compute_dtype)

    return jax.tree.map_with_path(cast, params)


def unstack_layers(params: LlamaParams) -> LlamaParams:
    """Separate the stacked layers: the form to decode with.

    Do it once per rollout, outside the loop: a loop that slices stacked weights copies
    them at every token.
    """
    if isinstance(params.layers, tuple):
        return params
    depth = params.layers.attention_norm.shape[0]
    layers = tuple(
        jax.tree.map(lambda tensor, i=i: tensor[i], params.layers) for i in range(depth)
    )
    return dataclasses.replace(params, layers=layers)
