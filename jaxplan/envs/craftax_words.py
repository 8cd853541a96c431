"""What the text levels of Craftax-Classic share: numbering phrases, finding tiles.

A text level is a `Describer`: a fixed list of phrases and a function from what the
player sees to phrase numbers. Every slot of a description has its place, and a mask
says which are spoken, so nothing is sorted on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8, Shaped

from jaxplan.envs.base import Phrases
from jaxplan.envs.craftax_view import CENTRE, VIEW_COLUMNS, VIEW_ROWS, PlayerView

# The cells around the player in BALROG's order: columns west to east, in a column
# north to south. Every "first found" below means this order.
OFFSETS = tuple(
    (row - CENTRE[0], column - CENTRE[1])
    for column in range(VIEW_COLUMNS)
    for row in range(VIEW_ROWS)
    if (row, column) != CENTRE
)
DISTANCES = np.abs(np.array(OFFSETS)).sum(1)  # steps, without diagonals
_CELLS = np.array(OFFSETS) + np.array(CENTRE)
# Nearer sorts first, and of equally near cells the one found first.
_NEARNESS = DISTANCES * len(OFFSETS) + np.arange(len(OFFSETS))
_NOWHERE = _NEARNESS.max() + 1


def offset_word(row: int, column: int) -> str:
    """Say where a cell of the view lies in one word, such as `` 3n2w``."""
    north_south = f"{abs(row)}{'n' if row < 0 else 's'}" if row else ""
    west_east = f"{abs(column)}{'w' if column < 0 else 'e'}" if column else ""
    return f" {north_south}{west_east}"


@dataclass(frozen=True)
class Describer:
    """One text level.

    Attributes:
        phrases: every phrase a description can contain.
        max_phrases: no description has more; the farthest things are left out.
        instructions: the text that opens a context.
        describe: from what the player sees to the numbers of phrases.
    """

    phrases: tuple[str, ...]
    max_phrases: int
    instructions: str
    describe: Callable[[PlayerView], Phrases]


class PhraseBook:
    """Numbers phrases while the tables of a text level are built, at import."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, texts: Any) -> np.ndarray:
        """Number an array of texts (any nesting); equal texts share their number."""
        number = self._numbers
        flat = [number.setdefault(text, len(number)) for text in np.ravel(texts)]
        return np.array(flat, np.int32).reshape(np.shape(texts))

    @property
    def phrases(self) -> tuple[str, ...]:
        """All texts so far, the index is the number."""
        return tuple(str(text) for text in self._numbers)


def around(view: Shaped[Array, "7 9"]) -> Shaped[Array, "62"]:
    """List the cells of a view in the order of `OFFSETS`, without the player's."""
    return view[_CELLS[:, 0], _CELLS[:, 1]]


def nearest(
    cells: Int8[Array, "62"], kinds: tuple[int, ...]
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """Find the nearest cell of each kind of tile, ties to the first found.

    Returns:
        Its index into `OFFSETS` (0 if there is none), and whether there is one.
    """
    is_kind = cells[None, :] == np.array(kinds, np.int8)[:, None]
    nearness = jnp.where(is_kind, _NEARNESS[None, :], _NOWHERE).min(1)
    seen = nearness < _NOWHERE
    return jnp.where(seen, nearness % len(OFFSETS), 0), seen


def keep_nearest(
    index: Int[Array, " K"], shown: Bool[Array, " K"], count: Int[Array, ""] | int
) -> Bool[Array, " K"]:
    """Keep the ``count`` nearest of some different cells, all if there are fewer."""
    nearness = jnp.where(shown, jnp.asarray(_NEARNESS)[index], _NOWHERE)
    rank = (nearness[None, :] < nearness[:, None]).sum(1)
    return shown & (rank < count)
