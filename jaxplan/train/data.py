"""From a dataset on disk to packed segments in memory, trained on and held out."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jaxplan.config.schema import PlanConfig, RolloutConfig
from jaxplan.io.datasets import ragged
from jaxplan.rollout.rounds import Language
from jaxplan.text.tokenizer import Tokenizer
from jaxplan.train.packing import Packer, TurnTokens
from jaxplan.train.sft import Segments


@dataclasses.dataclass(frozen=True)
class SegmentData:
    """All segments of one split (host).

    Attributes:
        fields: an array [segments, tokens] for each field of ``Segments``.
        max_targets: the most tokens with a loss in any segment.
    """

    fields: dict[str, np.ndarray]
    max_targets: int

    def __len__(self) -> int:
        return self.fields["token"].shape[0]

    def batch(self, indices: np.ndarray) -> Segments:
        """The segments of these indices, on the device."""
        return Segments(**{k: jnp.asarray(v[indices]) for k, v in self.fields.items()})


def load_segments(
    table: pa.Table,
    tokenizer: Tokenizer,
    language: Language,
    plan: PlanConfig,
    rollout: RolloutConfig,
    held_out: float,
    seed: int,
) -> tuple[SegmentData, SegmentData]:
    """Pack a dataset's episodes; a share of them is held out.

    Args:
        table: of ``read_dataset``.
        tokenizer: the one its ids belong to.
        language: prompt and grammar.
        plan: markers around plans.
        rollout: sizes of a segment, as it will be played.
        held_out: share of episodes that are not trained on, at least one.
        seed: of the choice.

    Raises:
        ValueError: there are not two episodes, or a turn does not fit.
    """
    episodes = _episodes(table, tokenizer, plan)
    if len(episodes) < 2:
        raise ValueError(
            f"dataset: {len(episodes)} episodes cannot be split into training and "
            "held-out ones; collect at least 2 (collect.episodes)"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(episodes))
    apart = min(max(1, round(held_out * len(episodes))), len(episodes) - 1)
    return (
        _pack([episodes[i] for i in order[apart:]], language, rollout),
        _pack([episodes[i] for i in order[:apart]], language, rollout),
    )


def _episodes(
    table: pa.Table, tokenizer: Tokenizer, plan: PlanConfig
) -> list[list[TurnTokens]]:
    opening, closing = tokenizer.encode(plan.open), tokenizer.encode(plan.close)
    columns = [
        _slices(table, name)
        for name in ("observation_tokens", "plan_tokens", "action_tokens")
    ]
    learn = table["learn"].to_numpy()
    episode = table["episode"].to_numpy()
    episodes: dict[int, list[TurnTokens]] = {}
    for number, learnt, seen, planned, acted in zip(
        episode.tolist(), learn.tolist(), *columns, strict=True
    ):
        text = [*opening, *planned, *closing] if planned else []
        turn = TurnTokens(
            observation=seen,
            generated=[*text, *acted],
            plan_length=len(text),
            learn_action=learnt,
        )
        episodes.setdefault(number, []).append(turn)
    return list(episodes.values())


def _slices(table: pa.Table, name: str) -> Iterator[Sequence[int]]:
    tokens, offsets = ragged(table, name)
    flat, edges = tokens.tolist(), offsets.tolist()
    return (flat[a:b] for a, b in itertools.pairwise(edges))


def _pack(
    episodes: list[list[TurnTokens]], language: Language, rollout: RolloutConfig
) -> SegmentData:
    packer = Packer(
        language.grammar,
        np.asarray(language.prompt).tolist(),
        rollout.segment_tokens,
        rollout.history,
    )
    for turns in episodes:
        packer.add(turns)
    fields = packer.finish()
    return SegmentData(
        fields=fields, max_targets=int(fields["learn"].sum(axis=1).max(initial=1))
    )
