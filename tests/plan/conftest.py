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

ACTIONS = ("Noop", "Move West", "Move East", "Make Wood Sword", "Make Wood Pickaxe")
TEXT = -1  # in a template: any token of plan text


@dataclasses.dataclass(frozen=True)
class Language:
    """A grammar, and the slow truth about it: all turns there are, as templates."""

    tokenizer: Tokenizer
    grammar: Grammar
    opening: list[int]
    closing: list[int]
    actions: list[list[int]]
    text: list[int]

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
                plans.append(opening + [(TEXT, Span.PLAN)] * length + closing)
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
                legal |= set(self.text) if token == TEXT else {token}
        return legal

    def matching(self, turns, written: list[int]):
        """List the turns that begin with what is written."""
        return [
            turn
            for turn in turns
            if len(written) <= len(turn)
            and all(
                token == wanted[0] or (wanted[0] == TEXT and token in self.text)
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


@pytest.fixture(scope="session", params=["one token", "several tokens"])
def language(request, tmp_path_factory) -> Language:
    if request.param == "one token":
        tokenizer = load_tokenizer("shipped")
    else:
        tokenizer = _several_pieces(tmp_path_factory.mktemp("several"))
    text = []
    for token in range(tokenizer.vocab_size):
        written = tokenizer.text_of(token)
        if written and written.isprintable() and not {"<", ">"} & set(written):
            text.append(token)
    return Language(
        tokenizer=tokenizer,
        grammar=make_grammar(tokenizer, ACTIONS, PlanConfig()),
        opening=tokenizer.encode(PlanConfig().open),
        closing=tokenizer.encode(PlanConfig().close),
        actions=[tokenizer.encode(name) for name in ACTIONS],
        text=text,
    )
