"""The host loop of SFT: dispatch, validate, log, save, stop, resume."""

import dataclasses
import operator
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxplan.core.mesh import num_shards
from jaxplan.io.checkpoints import save_checkpoint
from jaxplan.io.metrics import MetricsWriter
from jaxplan.io.progress import Progress
from jaxplan.io.stopping import Stopped
from jaxplan.io.weights import keep_frozen
from jaxplan.models.params import AgentParams, LlamaParams, join, split_trained
from jaxplan.train.data import SegmentData
from jaxplan.train.optim import Learner, make_optimizer
from jaxplan.train.setting import Setting, raise_if_lost
from jaxplan.train.sft import (
    batch_indices,
    sft_update,
    sft_validate,
    validation_metrics,
)
from jaxplan.train.state import (
    abstract_learner,
    begin_learner,
    resume,
    start_params,
    with_adapters,
)

_VALIDATION_BATCH = 16  # segments at least


def train_sft(
    setting: Setting,
    train: SegmentData,
    held_out: SegmentData,
    probe: Callable[[LlamaParams], dict[str, float]] | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Teach an agent to imitate; the final checkpoint is the primed policy.

    Args:
        setting: the run.
        train: segments to learn from.
        held_out: segments to validate on.
        probe: lets the student play and tells how it did, every ``sft.panel_every``
            updates.
        until: how many of all updates to have made in the end; by default all.

    Returns:
        Results of the stage: updates, and the last validation.

    Raises:
        Stopped: someone asked the run to stop; it resumes from the last update.
        ValueError: there are fewer segments than a batch holds.
    """
    config, sft = setting.config, setting.config.sft
    per_epoch = len(train) // sft.batch_segments
    if not per_epoch:
        raise ValueError(
            f"sft.batch_segments={sft.batch_segments}, but the dataset makes only "
            f"{len(train)} segments; collect more episodes or take smaller batches"
        )
    total = sft.updates or sft.epochs * per_epoch
    until = total if until is None else until
    optimizer = make_optimizer(sft.optimizer, total)

    learner, first, frozen, begun = _begin_sft(setting, optimizer, total)
    measuring = begun is not None and (sft.kl_coef or sft.measure_kl)
    measured = begun.llama if measuring else None
    reference = measured if sft.kl_coef else None
    slots = sft.batch_segments * config.rollout.segment_tokens
    tokens = slots * (1 - train.padding_share)
    validation: dict[str, float] = {}
    with (
        jax.set_mesh(setting.mesh),
        closing(MetricsWriter(setting.run_dir, "sft")) as writer,
        Progress("sft", total, done=first) as progress,
    ):
        writer.resume_from(first)
        for number in range(first, until):
            began = time.monotonic()
            batch = train.batch(
                batch_indices(len(train), sft.batch_segments, number, config.seed)
            )
            learner, metrics = sft_update(
                learner,
                reference,
                batch,
                optimizer=optimizer,
                max_targets=train.max_targets,
                config=sft,
                model=config.model,
                history=config.rollout.history,
                frozen=frozen,
            )
            row = {name: float(value) for name, value in metrics.items()}
            raise_if_lost(learner, "sft")
            row["sft/tokens_per_second"] = tokens / (time.monotonic() - began)
            done = number + 1
            if done % sft.validate_every == 0 or done == until:
                agent = join(learner.params, frozen)
                validation = _validate(setting, agent, measured, held_out)
                row |= validation
            if probe is not None and done % sft.panel_every == 0:
                row |= probe(join(learner.params, frozen).llama)
            writer.scalars(number, row)
            progress.update(
                done,
                loss=row["sft/loss"],
                accuracy=row["sft/accuracy_decide"],
                tokens_per_second=row["sft/tokens_per_second"],
            )
            stopping = setting.stop.requested and done < until
            if done % sft.checkpoint_every == 0 or done == until or stopping:
                save_checkpoint(setting.checkpoints("sft"), done, learner, row)
            if stopping:
                raise Stopped
    padding = train.padding_share
    return {"updates": total, "padding_share": padding, **validation}


def _begin_sft(
    setting: Setting, optimizer: optax.GradientTransformation, most: int
) -> tuple[Learner, int, AgentParams | None, AgentParams | None]:
    """The learner, the updates it has made, what it stands beside, and its start.

    The last two are None where nothing asks for them: then nobody keeps the start.
    ``most`` is how many updates there are to be.
    """
    config, mesh, specs = setting.config, setting.mesh, setting.specs_of("sft")
    learning, staying = split_trained(specs)

    def start() -> AgentParams:
        key = jax.random.key(config.seed)
        return start_params(key, config.model, setting.specs, mesh)

    def parts(agent: AgentParams) -> tuple[AgentParams, AgentParams]:
        llama = with_adapters(setting.growth_key, agent.llama, specs.llama, mesh)
        return split_trained(dataclasses.replace(agent, llama=llama))

    def begin() -> Learner:
        learns, _ = parts(start() if begun is None else begun)
        return begin_learner(learns, learning, optimizer, mesh)

    wanted = jax.tree.leaves(staying) or config.sft.kl_coef or config.sft.measure_kl
    begun = start() if wanted else None
    frozen = None if begun is None else parts(begun)[1]
    if frozen is not None:
        keep_frozen(setting.run_dir, frozen)
    target = abstract_learner(learning, optimizer, mesh)
    learner, first = resume(setting.checkpoints("sft"), target, begin, most)
    return learner, first, frozen, begun


def _validate(
    setting: Setting,
    params: AgentParams,
    start: LlamaParams | None,
    data: SegmentData,
) -> dict[str, float]:
    """Over all held-out tokens; what fills the last batch up does not count."""
    shards = num_shards(setting.mesh)
    size = -(-_VALIDATION_BATCH // shards) * shards
    sums: Any = None
    for first in range(0, len(data), size):
        indices = np.arange(first, first + size)
        batch, counted = data.batch(indices % len(data)), indices < len(data)
        own = sft_validate(
            params,
            start,
            batch,
            jnp.asarray(counted),
            max_targets=data.max_targets,
            model=setting.config.model,
            history=setting.config.rollout.history,
        )
        own = jax.tree.map(float, own)
        sums = own if sums is None else jax.tree.map(operator.add, sums, own)
    return validation_metrics(sums, start is not None)
