"""From what the scripted Craftax player is after to the sentence that says it.

Every brace of a wording is a slot: a few places that hold words, or none. The slots of
an intent are filled once; a wording is then only a list of where each of its words
comes from. So all styles are one gather on the device, and which style and wording is
spoken is data.
"""

import dataclasses
import string

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.envs.base import Intent, Phrases
from jaxplan.envs.craftax_expert_map import look_up
from jaxplan.envs.craftax_goals import Goal
from jaxplan.envs.craftax_plan_words import (
    COUNTED,
    DARKNESS,
    HEADS,
    NEAR_TABLE,
    ON_THE_SPOT,
    OUTCOMES,
    PURPOSES,
    SOUGHT,
    STYLES,
)
from jaxplan.envs.craftax_view import (
    CENTRE,
    ITEM_NAMES,
    TILE,
    VIEW_COLUMNS,
    VIEW_ROWS,
    VITAL_NAMES,
)
from jaxplan.envs.craftax_words import OFFSETS, offset_word

FARTHEST = 31  # a plan says 31 for what is farther
STYLE_NAMES = tuple(STYLES)
GOAL_NAMES = tuple(goal.name.lower() for goal in Goal)
# Why a goal is wanted: one of the vitals, the night, or what the goal is good for.
BY_DARKNESS, BY_PURPOSE = len(VITAL_NAMES), len(VITAL_NAMES) + 1

_ABSENT = -1
_GRAMMAR = "explore for at table until light , then north south west east"
# What a slot has room for; those without room are conditions only.
_SLOTS = {
    "do": 3,  # the goal, where it is not explored for
    "goal": 3,  # the goal in any case
    "done": 3,  # what there is once it is reached
    "then": 3,  # the goal after it
    "then_done": 3,
    "after": 3,  # and the one after that
    "after_done": 3,
    "table": 2,  # for what is done beside one
    "place": 4,  # of a known target
    "heading": 2,  # in which to explore for an unknown one
    "sought": 1,  # what is looked for
    "stop": 2,  # the stop condition that the observation will show
    "held": 1,  # how many of the counted thing there are
    "item": 1,  # the counted thing
    "more": 1,  # how many are missing
    "why": 7,  # the reason
    "seen": 0,  # what is sought is in view
    "known": 0,  # it is on the map, out of view
    "bench": 0,  # the target is a place beside a table
    "beside": 0,  # it is some other place
    "here": 0,  # there is nowhere to go
    "uncounted": 0,  # nothing is counted
}


def _terse_phrases() -> tuple[str, ...]:
    """The words of the short style: single tokens of the shipped tokenizer."""
    numbers = (str(number) for number in range(1, FARTHEST + 1))
    texts = (*HEADS.values(), *COUNTED.values(), *SOUGHT.values())
    offsets = (offset_word(*offset) for offset in OFFSETS)
    words = " ".join((*numbers, _GRAMMAR, *texts, *offsets)).split()
    return tuple(f" {word}" for word in dict.fromkeys(words))


def _literals(clause: str) -> str:
    return " ".join(text for text, *_ in string.Formatter().parse(clause))


def _all_phrases() -> tuple[str, ...]:
    texts = (*OUTCOMES.values(), *PURPOSES.values(), DARKNESS, *VITAL_NAMES, "is", "0")
    clauses = [
        _literals(clause)
        for wordings in STYLES.values()
        for wording in wordings
        for clause in wording
    ]
    words = " ".join((*texts, *clauses)).split()
    return tuple(dict.fromkeys([*PLAN_PHRASES, *(f" {word}" for word in words)]))


PLAN_PHRASES = _terse_phrases()
STYLE_PHRASES = _all_phrases()  # the terse ones first
_ID = {phrase.strip(): index for index, phrase in enumerate(STYLE_PHRASES)}
_NUMBERS = np.array([_ID[str(number)] for number in range(FARTHEST + 1)])
_IN_VIEW = np.full((VIEW_ROWS, VIEW_COLUMNS), _ABSENT)  # by row and column of the view
for _row, _column in OFFSETS:
    _cell = _row + CENTRE[0], _column + CENTRE[1]
    _IN_VIEW[_cell] = _ID[offset_word(_row, _column).strip()]


def _words(texts: dict, width: int) -> np.ndarray:
    """Texts as rows of phrase ids over all goals, absent at the end."""
    table = np.full((len(Goal), width), _ABSENT)
    for goal, text in texts.items():
        for column, word in enumerate(text.split()):
            table[goal, column] = _ID[word]
    return table


_HEAD_TABLE = _words(HEADS, _SLOTS["do"])
_OUTCOME_TABLE = _words(OUTCOMES, _SLOTS["done"])
_PURPOSE_TABLE = _words(PURPOSES, _SLOTS["why"])
_COUNTED_TABLE = _words(COUNTED, 1)[:, 0]
_SOUGHT_TABLE = _words(SOUGHT, 1)[:, 0]
_NEAR_TABLE_TABLE = np.array([goal in NEAR_TABLE for goal in Goal])
_SPOT_TABLE = np.array([goal in ON_THE_SPOT for goal in Goal])
# Where in (inventory, vitals) the counted thing of a goal stands.
_SUPPLIES = (*ITEM_NAMES, *VITAL_NAMES)
_SUPPLY_TABLE = np.array(
    [_SUPPLIES.index(COUNTED[goal]) if goal in COUNTED else _ABSENT for goal in Goal]
)


@chex.dataclass(frozen=True)
class PlanFacts:
    """What the words of a plan are made of, besides the goal.

    Attributes:
        amount: the count that ends the goal; 0 where none does.
        later: the two goals after it.
        offset: rows south and columns east to the target.
        target_tile: what is known to be there; unknown means exploring.
        supplies: the inventory, then the vitals.
        reason: index of a vital, ``BY_DARKNESS`` or ``BY_PURPOSE``.
    """

    amount: Int[Array, ""]
    later: Int[Array, "2"]
    offset: Int[Array, "2"]
    target_tile: Array
    supplies: Int[Array, "16"]
    reason: Int[Array, ""]


def say_plan(
    key: PRNGKeyArray, intent: Intent, style: Int[Array, ""], short_places: bool
) -> Phrases:
    """Say a plan in one of the wordings of a style.

    Args:
        key: of the choice of the wording.
        intent: what the player is after.
        style: index into ``STYLE_NAMES``.
        short_places: point at what is in view with the very word that the ``compact``
            text has for its place, so that it can be copied.
    """
    slots = _fill(intent.goal, intent.facts, short_places)
    words = jnp.concatenate([slots[name] for name in _SLOTS if _SLOTS[name]])
    present = jnp.stack([_is_there(slots[name]) for name in _SLOTS])
    words = jnp.concatenate([words, jnp.arange(len(STYLE_PHRASES)), -jnp.ones(1, int)])
    drawn = jax.random.randint(key, (), 0, look_up(_BOOK.count, style))
    wording = look_up(_BOOK.first, style) + drawn
    ids = words[look_up(_BOOK.source, wording)]
    spoken = (present[None, :] | ~jnp.asarray(_BOOK.needs)).all(axis=1)
    mask = (ids >= 0) & spoken[look_up(_BOOK.clause, wording)]
    return Phrases(ids=jnp.maximum(ids, 0).astype(jnp.int32), mask=mask)


def _is_there(slot: Array) -> Bool[Array, ""]:
    """A slot without words is its own condition."""
    return (slot >= 0).any() if slot.ndim else slot


def _fill(goal: Int[Array, ""], facts: PlanFacts, short: bool) -> dict[str, Array]:
    """Every slot of the wordings, absent words as -1."""
    south, east = facts.offset
    seeks = look_up(_SOUGHT_TABLE, goal) >= 0
    exploring = (facts.target_tile == TILE["invalid"]) & seeks
    on_spot = look_up(_SPOT_TABLE, goal)
    bench = look_up(_NEAR_TABLE_TABLE, goal)
    going = ~exploring & ~on_spot & ((south != 0) | (east != 0))
    in_view = _is_in_view(south, east)
    then, after = facts.later
    leads_on = then != goal
    leads_far = leads_on & (after != then) & (after != goal)
    head, outcome = look_up(_HEAD_TABLE, goal), look_up(_OUTCOME_TABLE, goal)
    return {
        "do": _if(~exploring, head),
        "goal": head,
        "done": outcome,
        "then": _if(leads_on, look_up(_HEAD_TABLE, then)),
        "then_done": _if(leads_on, look_up(_OUTCOME_TABLE, then)),
        "after": _if(leads_far, look_up(_HEAD_TABLE, after)),
        "after_done": _if(leads_far, look_up(_OUTCOME_TABLE, after)),
        "table": _if(bench, jnp.array([_ID["at"], _ID["table"]])),
        "place": _if(going, _place(south, east, in_view & short)),
        "heading": _if(exploring, _heading(south, east)),
        "sought": look_up(_SOUGHT_TABLE, goal)[None],
        "why": _why(goal, facts),
        "seen": going & seeks & in_view,
        "known": going & seeks & ~in_view,
        "bench": going & bench,
        "beside": going & ~bench & ~seeks,
        "here": ~going & ~exploring,
        **_counting(goal, facts),
    }


def _if(condition: Array, words: Array) -> Array:
    return jnp.where(condition, words, _ABSENT)


def _number(value: Array) -> Array:
    return look_up(_NUMBERS, jnp.clip(value, 0, FARTHEST))


def _is_in_view(south: Array, east: Array) -> Bool[Array, ""]:
    return (jnp.abs(south) <= CENTRE[0]) & (jnp.abs(east) <= CENTRE[1])


def _directions(south: Array, east: Array) -> tuple[Array, Array]:
    """The words for two signed offsets; absent for 0."""
    sides = jnp.array([_ID["north"], _ABSENT, _ID["south"]])
    others = jnp.array([_ID["west"], _ABSENT, _ID["east"]])
    return sides[jnp.sign(south) + 1], others[jnp.sign(east) + 1]


def _heading(south: Array, east: Array) -> Int[Array, "2"]:
    """One or two of the four directions."""
    north_south, east_west = _directions(south, east)
    slanted = jnp.abs(south) * 2 >= jnp.abs(east), jnp.abs(east) * 2 >= jnp.abs(south)
    return jnp.stack([_if(slanted[0], north_south), _if(slanted[1], east_west)])


def _place(south: Array, east: Array, in_one_word: Array) -> Int[Array, "4"]:
    """Distance and direction of the target: `` 3n2w``, or `` 3 north 2 west``."""
    north_south, east_west = _directions(south, east)
    steps = jnp.abs(jnp.stack([south, east]))
    numbers = _if(steps > 0, _number(steps))
    far = jnp.stack([numbers[0], north_south, numbers[1], east_west])
    row = jnp.clip(south + CENTRE[0], 0, VIEW_ROWS - 1)
    column = jnp.clip(east + CENTRE[1], 0, VIEW_COLUMNS - 1)
    near = jnp.full(4, _ABSENT).at[0].set(jnp.asarray(_IN_VIEW)[row, column])
    return jnp.where(in_one_word, near, far)


def _counting(goal: Int[Array, ""], facts: PlanFacts) -> dict[str, Array]:
    """The stop condition, what there is of it, and what is missing."""
    counted = look_up(_COUNTED_TABLE, goal)
    has = facts.supplies[look_up(_SUPPLY_TABLE, goal)]
    counts = (counted >= 0) & (facts.amount > 0)
    missing = facts.amount - has
    short = counts & (missing > 0)
    waiting = (goal == Goal.REST) & (facts.amount == 0)
    count = _if(counts, jnp.stack([_number(facts.amount), counted]))
    light = jnp.array([_ID["light"], _ABSENT])
    return {
        "stop": jnp.where(waiting, light, count),
        "held": _if(short, _number(has))[None],
        "item": _if(short, counted)[None],
        "more": _if(short, _number(missing))[None],
        "uncounted": ~short,
    }


def _why(goal: Int[Array, ""], facts: PlanFacts) -> Int[Array, " W"]:
    """A low vital, the night, or what the goal is good for."""
    width = _SLOTS["why"]
    vitals = np.array([_ID[name] for name in VITAL_NAMES])
    vital = jnp.minimum(facts.reason, len(VITAL_NAMES) - 1)
    level = facts.supplies[len(ITEM_NAMES) + vital]
    low = jnp.stack([look_up(vitals, vital), jnp.array(_ID["is"]), _number(level)])
    low = jnp.pad(low, (0, width - 3), constant_values=_ABSENT)
    night = np.array([_ID[word] for word in DARKNESS.split()])
    night = jnp.pad(night, (0, width - len(night)), constant_values=_ABSENT)
    purpose = look_up(_PURPOSE_TABLE, goal)
    other = jnp.where(facts.reason == BY_DARKNESS, night, purpose)
    return jnp.where(facts.reason < BY_DARKNESS, low, other)


@dataclasses.dataclass(frozen=True)
class _WordingBook:
    """All wordings of all styles as tables.

    Attributes:
        first: the first wording of each style.
        count: how many it has.
        source: where each word comes from: a place in the slots, then a phrase, then
            the one place that is always absent.
        clause: to which clause each word belongs.
        needs: by clause, the slots that must be there.
    """

    first: np.ndarray
    count: np.ndarray
    source: np.ndarray
    clause: np.ndarray
    needs: np.ndarray


def _compile(styles: dict[str, tuple[tuple[str, ...], ...]]) -> _WordingBook:
    names = tuple(_SLOTS)
    starts = np.cumsum([0, *_SLOTS.values()])
    nowhere = starts[-1] + len(STYLE_PHRASES)
    wordings = [wording for several in styles.values() for wording in several]
    needs: list[np.ndarray] = []
    rows: list[list[tuple[int, int]]] = []
    for wording in wordings:
        row: list[tuple[int, int]] = []
        for clause in wording:
            wanted = np.zeros(len(names), bool)
            for text, name, *_ in string.Formatter().parse(clause):
                row += [(starts[-1] + _ID[w], len(needs)) for w in text.split()]
                if name is not None:
                    slot = names.index(name)
                    wanted[slot] = True
                    places = range(starts[slot], starts[slot + 1])
                    row += [(place, len(needs)) for place in places]
            needs.append(wanted)
        rows.append(row)
    longest = max(len(row) for row in rows)
    filled = np.array([row + [(nowhere, 0)] * (longest - len(row)) for row in rows])
    counts = np.array([len(several) for several in styles.values()])
    return _WordingBook(
        first=np.cumsum(counts) - counts,
        count=counts,
        source=filled[..., 0],
        clause=filled[..., 1],
        needs=np.stack(needs),
    )


_BOOK = _compile(STYLES)
