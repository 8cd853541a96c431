"""The one glossary of axis names; shapes and einsum strings use these letters.

Axes of the model are capital letters (lower case in einsum strings):

=====  ==========================================================
**B**  sequences of a batch; in a rollout, its lanes
**T**  query tokens
**C**  query tokens of one chunk appended to a cache
**S**  key positions: the length of a segment or of a cache
**D**  width of the residual stream
**F**  width of the feed-forward layer
**N**  query heads
**K**  key/value heads
**G**  query heads of one key/value head (N = K * G)
**R**  query rows of one key/value head: its G heads at T tokens
**H**  width of one head; **H2** is half of it: the rotated pairs
**L**  layers
**V**  vocabulary
**P**  phrases
**W**  tokens of one phrase
**Q**  states of the grammar
**E**  events of a world
=====  ==========================================================

Axes of the experiment are words (``steps``, ``envs``, ``turns``), so that T never
means both tokens and time. Tokens are batch-major, env steps are time-major.
"""
