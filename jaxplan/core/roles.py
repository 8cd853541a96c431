"""What a token is and how it is trained: two labelings that live side by side.

The role decides the treatment in the loss (ppo.md, section 1); the span says what a
generated token *is*. Spans partition the generated tokens of a turn into plan text,
tags and action.
"""

import enum


class Role(enum.IntEnum):
    """How a token is trained; only the last three are ever sampled."""

    PAD = 0
    PROMPT = 1
    CARRIED = 2
    OBSERVATION = 3
    DECIDE = 4
    PLAN = 5
    ACTION = 6


class Span(enum.IntEnum):
    """What a generated token is; ``NONE`` for everything not generated."""

    NONE = 0
    PLAN = 1
    TAG = 2
    ACTION = 3
