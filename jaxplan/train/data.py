"""From a dataset on disk to packed segments in memory, trained on and held out."""

import dataclasses
import gc
import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jaxplan.config.schema import PlanConfig, RolloutConfig, SftConfig
from jaxplan.core.roles import Role
from jaxplan.io.datasets import ragged
from jaxplan.rollout.rounds import Language
from jaxplan.text.tokenizer import Tokenizer
from jaxplan.train.packing import Packer, TurnTokens
from jaxplan.train.sft import Segments

_STEP = 32  # of the number of targets a segment has room for


@dataclasses.dataclass(frozen=True)
class SegmentData:
    """All segments of one split (host).

    Attributes:
        fields: an array [segments, tokens] for each field of ``Segments``.
        max_targets: at least as many as there are tokens with a loss in any segment.
    """

    fields: dict[str, np.ndarray]
    max_targets: int

    @property
    def padding_share(self) -> float:
        """Share of the tokens that stand for nothing."""
        return float((self.fields["role"] == Role.PAD).mean())

    def __len__(self) -> int:
        return self.fields["token"].shape[0]

    def __add__(self, other: "SegmentData") -> "SegmentData":
        """The segments of both."""
        fields = {
            name: np.concatenate([field, other.fields[name]])
            for name, field in self.fields.items()
        }
        return SegmentData(fields, max(self.max_targets, other.max_targets))

    def batch(self, indices: np.ndarray) -> Segments:
        """The segments of these indices, on the device."""
        return Segments(**{k: jnp.asarray(v[indices]) for k, v in self.fields.items()})


@contextmanager
def _no_garbage() -> Generator[None]:
    """Make millions of lists, none of them in a cycle, without looking for cycles.

    The collector would walk over all of them again and again: half of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_no_garbage()
def load_segments(
    table: pa.Table,
    tokenizer: Tokenizer,
    language: Language,
    plan: PlanConfig,
    rollout: RolloutConfig,
    sft: SftConfig,
    seed: int,
) -> tuple[SegmentData, SegmentData]:
    """Pack a dataset's episodes; a share of them is held out.

    Args:
        table: of ``read_dataset``.
        tokenizer: the one its ids belong to.
        language: prompts and grammar.
        plan: markers around plans.
        rollout: sizes of a segment, as it will be played.
        sft: the share of episodes held out, at least one, and what is learnt of them.
        seed: of the choice.

    Raises:
        ValueError: there are not two episodes, or a turn does not fit.
    """
    episodes = _episodes(table, tokenizer, plan, rollout)
    if len(episodes) < 2:
        raise ValueError(
            f"dataset: {len(episodes)} episodes cannot be split into training and "
            "held-out ones; collect at least 2 (collect.episodes)"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(episodes))
    apart = min(max(1, round(sft.held_out * len(episodes))), len(episodes) - 1)
    change = {"kept": _as_it_is, "stripped": _strip, "shuffled": _shuffle}[sft.plans]
    observations = sft.observation_weight > 0

    def pack(chosen: np.ndarray) -> SegmentData:
        own = change([episodes[i] for i in chosen], seed)
        return _pack(own, language, rollout, observations)

    return pack(order[apart:]), pack(order[:apart])


_Episodes = list[list[TurnTokens]]


def _as_it_is(episodes: _Episodes, seed: int) -> _Episodes:
    del seed
    return episodes


def _strip(episodes: _Episodes, seed: int) -> _Episodes:
    """Leave all plans out; observations and actions stay."""
    del seed
    return [[_with_plan(turn, []) for turn in turns] for turns in episodes]


def _shuffle(episodes: _Episodes, seed: int) -> _Episodes:
    """Exchange the plans of all turns that have one: same words, wrong situations."""
    plans = [turn.generated[: turn.plan_length] for turn in _planned(episodes)]
    order = iter(np.random.default_rng([seed, 4]).permutation(len(plans)))
    return [
        [_with_plan(turn, plans[next(order)]) if turn.plan_length else turn
         for turn in turns]
        for turns in episodes
    ]  # fmt: skip


def _planned(episodes: _Episodes) -> Iterator[TurnTokens]:
    return (turn for turns in episodes for turn in turns if turn.plan_length)


def _with_plan(turn: TurnTokens, plan: Sequence[int]) -> TurnTokens:
    action = turn.generated[turn.plan_length :]
    return dataclasses.replace(turn, generated=[*plan, *action], plan_length=len(plan))


def _episodes(
    table: pa.Table, tokenizer: Tokenizer, plan: PlanConfig, rollout: RolloutConfig
) -> _Episodes:
    opening, closing = map(tokenizer.encode_inside, (plan.open, plan.close))
    columns = [
        _slices(table, name)
        for name in ("observation_tokens", "plan_tokens", "action_tokens")
    ]
    learn, advice = table["learn"].to_numpy(), table["advice"].to_pylist()
    advised = {text: tokenizer.encode(text) for text in set(advice)}
    episode = table["episode"].to_numpy()
    episodes: dict[int, list[TurnTokens]] = {}
    for number, learnt, better, seen, planned, acted in zip(
        episode.tolist(), learn.tolist(), advice, *columns, strict=True
    ):
        # Texts of other tokenizers may be longer than the agent will ever see or say.
        text = [*opening, *planned[: plan.budget], *closing] if planned else []
        turn = TurnTokens(
            observation=seen[: rollout.observation_tokens],
            generated=[*text, *acted],
            plan_length=len(text),
            learn_action=learnt,
            advice=advised[better],
        )
        episodes.setdefault(number, []).append(turn)
    return list(episodes.values())


def _slices(table: pa.Table, name: str) -> Iterator[Sequence[int]]:
    tokens, offsets = ragged(table, name)
    flat, edges = tokens.tolist(), offsets.tolist()
    return (flat[a:b] for a, b in itertools.pairwise(edges))


def _pack(
    episodes: _Episodes, language: Language, rollout: RolloutConfig, observations: bool
) -> SegmentData:
    packer = Packer(
        language.grammar,
        [language.prompt(number) for number in range(len(language.prompts))],
        rollout.segment_tokens,
        rollout.history,
        observations,
    )
    for turns in episodes:
        packer.add(turns)
    fields = packer.finish()
    most = int(fields["learn"].sum(axis=1).max(initial=1))
    # In steps, so that more data seldom means another program.
    return SegmentData(fields=fields, max_targets=-(-most // _STEP) * _STEP)
