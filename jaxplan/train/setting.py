"""What the stages of a run share: its setting, its agents, and when to give up."""

import dataclasses
import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxplan.config.schema import RunConfig
from jaxplan.core.mesh import (
    AnyMesh,
    check_tensors,
    make_mesh,
    num_shards,
    shardings_of,
)
from jaxplan.core.specs import abstract_tensors
from jaxplan.envs.base import TextEnv
from jaxplan.io.stopping import StopRequest
from jaxplan.io.weights import load_agent, load_llama, stage_specs
from jaxplan.models.params import AgentParams, LlamaParams
from jaxplan.rollout.rounds import Language
from jaxplan.train.optim import Learner, bad_leaves
from jaxplan.train.state import (
    with_shardings,
)

_MAX_SKIPPED = 3  # updates in a row that may be lost to a gradient that is not finite
_GROWTH = 2**31 - 1  # no iteration has this number


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both stages work with.

    Attributes:
        config: the run.
        run_dir: its directory.
        env: the world.
        language: the tokenizer's tables.
        vocab_size: of the tokenizer.
        turn_tokens: tokens of the longest turn.
        stop: asked between two updates.
    """

    config: RunConfig
    run_dir: Path
    env: TextEnv
    language: Language
    vocab_size: int
    turn_tokens: int
    stop: StopRequest

    def checkpoints(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.run_dir / "checkpoints" / stage

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return make_mesh(self.config.mesh)

    @property
    def specs(self) -> AgentParams:
        """A declaration for every tensor that the run begins with."""
        return self.specs_of("start")

    def specs_of(self, stage: str) -> AgentParams:
        """A declaration for every tensor of the agent that a stage trains."""
        return stage_specs(self.config, self.vocab_size, stage)

    @property
    def growth_key(self) -> jax.Array:
        """What is drawn after the start, adapters and a critic, is drawn with this."""
        return jax.random.fold_in(jax.random.key(self.config.seed), _GROWTH)


def check_mesh(setting: Setting) -> None:
    """Refuse a mesh that does not divide what it is to split.

    Raises:
        ValueError: with the numbers, and what to change.
    """
    check_division(setting, setting.mesh)


def check_division(setting: Setting, mesh: AnyMesh) -> None:
    """``check_mesh`` for devices that need not be there."""
    config = setting.config
    for stage in ("sft", "ppo"):
        check_tensors(setting.specs_of(stage), mesh)
    shards = num_shards(mesh)
    parts = f"mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}"
    minibatches = config.ppo.num_minibatches
    if config.rollout.num_lanes % (shards * minibatches):
        raise ValueError(
            f"rollout.num_lanes={config.rollout.num_lanes} is not divisible by "
            f"{parts} x ppo.num_minibatches={minibatches}"
        )
    if _plays_in_collect(config) and config.collect.lanes % shards:
        raise ValueError(
            f"collect.lanes={config.collect.lanes} is not divisible by {parts}, and a "
            "Llama plays in them"
        )
    if config.sft.batch_segments % shards:
        raise ValueError(
            f"sft.batch_segments={config.sft.batch_segments} is not divisible by "
            f"{parts}"
        )


def _plays_in_collect(config: RunConfig) -> bool:
    """Whether lanes of a collection are played by a Llama, as teacher or student."""
    return config.collect.teacher == "llama" or config.sft.relay.episodes > 0


def load_policy(setting: Setting, stage: str) -> AgentParams:
    """The agent a finished stage left."""
    specs = setting.specs_of(stage)
    target = with_shardings(abstract_tensors(specs), shardings_of(specs, setting.mesh))
    return load_agent(setting.run_dir, stage, target)


def load_player(setting: Setting, stage: str) -> LlamaParams:
    """What plays of the agent a finished stage left."""
    specs = setting.specs_of(stage).llama
    target = with_shardings(abstract_tensors(specs), shardings_of(specs, setting.mesh))
    return load_llama(setting.run_dir, stage, target)


def raise_if_lost(learner: Learner, name: str) -> None:
    """Stop when updates keep failing, and say where the numbers went wrong."""
    if int(learner.skipped) < _MAX_SKIPPED:
        return
    raise FloatingPointError(
        f"{name}: {_MAX_SKIPPED} updates in a row had a gradient that is not finite, "
        f"at last in {bad_leaves(learner)}; the last checkpoint is good: lower the "
        "learning rate and resume"
    )
