"""Two languages for every test of the grammar: markers as one token, and as several."""

import dataclasses

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxplan.config.schema import PlanConfig
from jaxplan.core.roles import Span
from jaxplan.plan.grammar import Grammar, make_grammar
from jaxplan.text.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers import KINDS

ACTIONS = ("Noop", "Move West", "Move East", "Make Wood Sword", "Make Wood Pickaxe")
TEXT = -1  # in a template: any token of plan text
FIRST = -2  # in a template: any that a plan may begin with


@dataclasses.dataclass(frozen=True)
class Language:
    """A grammar, and the slow truth about it: all turns there are, as templates."""

    tokenizer: Tokenizer
    grammar: Grammar
    opening: list[int]
    closing: list[int]
    actions: list[list[int]]
    text: list[int]
    first: list[int]

    @property
    def tables(self) -> Grammar:
        """The automaton as arrays of the host."""
        return jax.device_get(self.grammar)

    def turns(self, mode: str, budget: int) -> list[list[tuple[int, Span, int]]]:
        """List every turn as (token or TEXT, its span, the turn's action)."""
        plans = [[]] if mode != "plan" else []
        if mode != "act":
            for length in range(1, budget + 1):
                opening = [(token, Span.TAG) for token in self.opening]
                closing = [(token, Span.TAG) for token in self.closing]
                text = [(FIRST, Span.PLAN)] + [(TEXT, Span.PLAN)] * (length - 1)
                plans.append(opening + text + closing)
        return [
            [
                (token, kind, action)
                for token, kind in plan + [(piece, Span.ACTION) for piece in pieces]
            ]
            for plan in plans
            for action, pieces in enumerate(self.actions)
        ]

    def may_follow(self, turns, written: list[int]) -> set[int]:
        """List the legal tokens after those already written, by trying every turn."""
        legal = set()
        for turn in self.matching(turns, written):
            if len(turn) > len(written):
                token = turn[len(written)][0]
                legal |= self.standing_for(token)
        return legal

    def standing_for(self, token: int) -> set[int]:
        """What a place in a template stands for."""
        return set({TEXT: self.text, FIRST: self.first}.get(token, [token]))

    def matching(self, turns, written: list[int]):
        """List the turns that begin with what is written."""
        return [
            turn
            for turn in turns
            if len(written) <= len(turn)
            and all(
                token in self.standing_for(wanted[0])
                for token, wanted in zip(written, turn, strict=False)
            )
        ]


def _several_pieces(folder) -> Tokenizer:
    """Train a small BPE that knows neither markers nor actions."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Move Make Wood plan find wood"] * 9, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


# A name of a language, the kind of tokenizer, the markers, and its special tokens.
TAGS = ("<plan>", "</plan>")
RESERVED = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
LANGUAGES = {
    "one token": (None, TAGS, ()),
    "several tokens": (None, TAGS, ()),
    "Llama 3, pieces": ("like Llama 3", ("<plan>", " </plan>\n"), ()),
    "Llama 3, added": ("like Llama 3", TAGS, TAGS),
    "Llama 2, pieces": ("like Llama 2", ("<plan>", " </plan>\n"), ()),
    "Llama 2, reserved": ("like Llama 2", RESERVED, RESERVED),
}


@pytest.fixture(scope="session", params=LANGUAGES)
def language(request, tmp_path_factory) -> Language:
    kind, markers, special = LANGUAGES[request.param]
    folder = tmp_path_factory.mktemp("language")
    if kind:
        tokenizer = KINDS[kind](folder, special)
    elif request.param == "one token":
        tokenizer = load_tokenizer("shipped")
    else:
        tokenizer = _several_pieces(folder)
    plan = PlanConfig(open=markers[0], close=markers[1])
    opening, closing = map(tokenizer.encode_inside, markers)
    text, first = [], []
    for token in range(tokenizer.vocab_size):
        written = tokenizer.text_of(token)
        printable = written and written.isprintable() and not {"<", ">"} & set(written)
        if not printable:
            continue
        before, own = plan.open + written, tokenizer.encode_inside(written)
        behind = tokenizer.encode(before + plan.close)
        if behind != tokenizer.encode(before) + closing or token == closing[0]:
            continue
        text.append(token)
        if tokenizer.encode(before) == tokenizer.encode(plan.open) + own:
            first.append(token)
    return Language(
        tokenizer=tokenizer,
        grammar=make_grammar(tokenizer, ACTIONS, plan),
        opening=opening,
        closing=closing,
        actions=[tokenizer.encode_inside(name) for name in ACTIONS],
        text=text,
        first=first,
    )
