"""What a rollout needs before it can start: the language, and sizes that fit."""

import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import PlanConfig, RolloutConfig
from jaxplan.envs.base import TextEnv
from jaxplan.envs.guided import GuidedEnv
from jaxplan.plan.grammar import (
    TEXT,
    TEXT_FIRST,
    Grammar,
    check_start,
    check_turns,
    make_grammar,
)
from jaxplan.rollout.rounds import Language
from jaxplan.text.phrases import PhraseTable, make_phrase_table
from jaxplan.text.tokenizer import Tokenizer


def make_language(tokenizer: Tokenizer, env: TextEnv, plan: PlanConfig) -> Language:
    """Compile a world's words, its actions and the plan grammar for one tokenizer.

    Raises:
        ValueError: the ids of a text would not be those of its parts, wherever phrases,
            markers, plans and actions meet; see ``make_phrase_table``,
            ``make_grammar`` and ``check_turns``. Or a plan may not have the words of
            the world's guide.
    """
    names = env.action_names
    endings, beginnings = _edges(env.phrases)
    check_turns(tokenizer, names, plan, endings, beginnings)
    wordings = [env.instructions + told for told in _price_tags(plan.prices)]
    for wording in wordings:
        check_start(tokenizer, tokenizer.address(wording), beginnings)
    prompts = [tokenizer.encode_prompt(wording) for wording in wordings]
    lengths = [len(prompt) for prompt in prompts]
    rows = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    grammar, advice = make_grammar(tokenizer, names, plan), None
    if isinstance(env, GuidedEnv):
        advice = make_phrase_table(tokenizer, env.guide.phrases)
        _check_advice(env.guide.phrases, advice, grammar, plan)
    return Language(
        grammar=grammar,
        table=make_phrase_table(tokenizer, env.phrases),
        prompts=jnp.asarray(rows),
        prompt_lengths=jnp.array(lengths, jnp.int32),
        advice=advice,
    )


def _check_advice(
    phrases: tuple[str, ...], table: PhraseTable, grammar: Grammar, plan: PlanConfig
) -> None:
    """See that a plan may consist of the guide's phrases, and begin with any of them.

    A lane that is dictated what the grammar refuses would never finish its turn.
    """
    legal, rows = np.asarray(grammar.legal), np.asarray(table.tokens)
    for phrase, row, length in zip(phrases, rows, table.lengths.tolist(), strict=True):
        if length > plan.budget:
            raise ValueError(
                f"plan.budget={plan.budget} is too small for the expert's phrase "
                f"{phrase!r}, which takes {length} tokens"
            )
        ids = row[:length]
        if not (legal[TEXT, ids].all() and legal[TEXT_FIRST, ids[:1]].all()):
            raise ValueError(
                f"the expert's phrase {phrase!r} is no plan text to this tokenizer: "
                "take another, or leave 'scripted-K' and 'prompted-K' out of "
                "evaluate.modes"
            )


def _price_tags(prices: tuple[float, ...]) -> list[str]:
    """What the prompt ends with, once for each price; without prices, nothing."""
    return [f"\n\nA plan token costs {price:.12g}." for price in prices] or [""]


def _edges(phrases: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The phrases an observation may end with, and those it may begin with.

    Worlds that end their observations with a line break or ``>`` always do; where one
    ends otherwise, any word could be the last, and none is tried. Those that begin them
    with a line break always do; of others any phrase may. One stands for all that end,
    or begin, with the same two characters.
    """
    endings = [phrase for phrase in phrases if phrase.endswith((">", "\n"))]
    endings = [phrase for phrase in endings if phrase.strip("\n")]
    beginnings = [phrase for phrase in phrases if phrase.startswith("\n")]
    last = {phrase[-2:]: phrase for phrase in endings}
    first = {phrase[:2]: phrase for phrase in beginnings or phrases}
    return list(last.values()), list(first.values())


def longest_turn(tokenizer: Tokenizer, env: TextEnv, plan: PlanConfig) -> int:
    """Tokens of the longest turn the grammar allows."""
    encode = tokenizer.encode_inside
    tags = len(encode(plan.open)) + len(encode(plan.close))
    action = max(len(encode(name)) for name in env.action_names)
    return tags + plan.budget + action


def check_sizes(
    language: Language, config: RolloutConfig, plan: PlanConfig, turn_tokens: int
) -> None:
    """Refuse a segment too small for one turn and all it can see.

    Raises:
        ValueError: with the numbers, and what to change.
    """
    observation = config.observation_tokens
    longest_phrase = int(np.max(language.table.lengths))
    if longest_phrase > observation:
        raise ValueError(
            f"rollout.observation_tokens={observation} is too small: a single phrase "
            f"takes {longest_phrase} tokens"
        )
    writable = config.rounds * (1 + config.decode_steps)
    if writable < turn_tokens:
        raise ValueError(
            f"rollout.rounds={config.rounds} with decode_steps={config.decode_steps} "
            f"write at most {writable} tokens in a segment, but the longest turn has "
            f"{turn_tokens} (plan.budget={plan.budget}), and a turn that is not "
            "finished starts again: take more rounds or a smaller budget"
        )
    prompt = language.prompts.shape[1]
    action = turn_tokens - plan.budget
    seen = (config.history - 1) * (observation + action) + plan.budget + action
    needed = prompt + seen + observation + turn_tokens + observation
    if needed > config.segment_tokens:
        raise ValueError(
            f"rollout.segment_tokens={config.segment_tokens} is too small for one "
            f"turn: prompt {prompt} + what stays visible {seen} (rollout.history="
            f"{config.history} turns and a plan) + observation {observation} + turn "
            f"{turn_tokens} + next observation {observation} = {needed} tokens; make "
            "segments longer, or history, plan.budget or observation_tokens smaller"
        )
