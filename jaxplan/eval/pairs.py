"""Plan modes of one agent against each other, world by world.

All modes play the same worlds, and what a world asks for is the larger part of the
spread: two modes whose intervals overlap may differ in their differences.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxplan.eval.stats import bootstrap, show_interval

Pairs = dict[str, dict[str, dict[str, float | None]]]


def compare_modes(
    episodes: Mapping[str, Mapping[str, Any]], confidence: float
) -> Pairs:
    """Differences of achievements, the first mode's minus the second's.

    Args:
        episodes: of one agent by mode, see ``by_episode``; the same worlds for all.
        confidence: of the intervals, which are over worlds.

    Returns:
        By mode, and by every mode behind it: mean and interval.

    Raises:
        ValueError: the modes played different worlds.
    """
    worlds = [own["seed"] for own in episodes.values()]
    if any(other != worlds[0] for other in worlds):
        raise ValueError(f"the modes {', '.join(episodes)} played different worlds")
    unlocked = {
        mode: np.array([len(events) for events in own["unlocked"]], float)
        for mode, own in episodes.items()
    }
    pairs: Pairs = {mode: {} for mode in list(unlocked)[:-1]}
    for one, other in itertools.combinations(unlocked, 2):
        difference = unlocked[one] - unlocked[other]
        pairs[one][other] = bootstrap(difference, confidence).to_json()
    return pairs


def format_pairs(pairs: Mapping[str, Pairs]) -> str:
    """A Markdown table: by arm and mode, what it is ahead of the mode of a column."""
    modes = list(
        dict.fromkeys(o for own in pairs.values() for p in own.values() for o in p)
    )
    lines = [["arm", "achievements of", *(f"minus {mode}" for mode in modes)]]
    lines.append(["---"] * len(lines[0]))
    for arm, own in pairs.items():
        for mode, others in own.items():
            cells = [show_interval(others[o]) if o in others else "" for o in modes]
            lines.append([arm, mode, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
