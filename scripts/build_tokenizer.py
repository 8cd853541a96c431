"""Build the shipped tokenizer, or that of the probe worlds, from the project's words.

    python scripts/build_tokenizer.py [--out jaxplan/text/data/tokenizer.json]
    python scripts/build_tokenizer.py --probes [--out configs/experiments/...]

Byte-level BPE, so every text can be written; a word and the space before it are one
piece, so phrases may be concatenated. It is trained until every phrase of the
``compact`` texts and of the experts' plans is a single token. Markers and Craftax'
actions are tokens of their own that no lower-case text can contain. That of the probes
knows their words and no others: most of a tiny agent's time would go into a thousand
logits a token. The same words give the same file; a test holds the committed to that.
"""

import argparse
import itertools
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxplan.config.schema import PlanConfig
from jaxplan.envs.craftax_classic import ACTION_NAMES, TEXTS
from jaxplan.envs.craftax_plans import PLAN_PHRASES
from jaxplan.envs.pogs import compact as pogs_text
from jaxplan.envs.pogs_expert import plan_phrases as pogs_plan_phrases
from jaxplan.envs.pogs_graph import action_words
from jaxplan.envs.probes import Probe
from jaxplan.text.tokenizer import SHIPPED

SIZE = 1024  # of the vocabulary; larger by whole steps if the phrases need it
STEP = 64  # keeps the embedding a friendly shape for matrix units
PAD = "<pad>"  # id 0
WORD = r" ?[^\s]+|\s"
PROBES = Path("configs/experiments/estimators/tokenizer.json")
POGS_NODES = 32  # up to there a label is one token

# How often a text counts in training: phrases first, they have to become one token.
PHRASE_WEIGHT, TEXT_WEIGHT, ENGLISH_WEIGHT = 1000, 1, 1

# What a person, or another teacher, may want to say in a plan.
ENGLISH = """
a about above across add after again all along already also always an and animal any
area around as ask at attack avoid away back bad be because before begin behind below
beside best better between big block both bridge bring build but by call can careful
carry cave check choose clear close collect come complete corner cost count cover craft
cross danger dark day dead deep defend die dig direction distance do done down drink
during each early east eat edge empty end enemy energy enough enter even every explore
face far fast few fight fill find finish first five follow food for four free from full
gather get give go goal good ground grow guard half has have head heal health help here
hide high hit hold home how hunt hurt if in inside instead into iron is it item join
jump just keep kill know lake land last later leave left less let life light line little
live long look lose low make many map materials may mine mob more most mountain move
much must near nearest need never new next night no not now nothing of off on once one
only open or other out over pass path place plan plant player point position prepare
protect put quick rather reach ready rest return right river rock run safe same sand
save say search second see seek seven shelter shore should show side six sleep slow
small so some soon south stand start stay step steps still stone stop strong surround
survive switch take ten than that the them then there these they thing third this three
through till time to together too tools toward towards trap tree trees tunnel turn two
under unless until up upgrade use view wait wake walk wall want watch water way weak
well west what when where which while will with without wood work world yet you your
zombie zombies
"""


def main() -> None:
    """Write the tokenizer, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="by default where it is committed")
    parser.add_argument("--probes", action="store_true", help="that of the probes")
    args = parser.parse_args()
    out = args.out or (PROBES if args.probes else SHIPPED)
    tokenizer = build_probes() if args.probes else build()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


def build() -> tokenizers.Tokenizer:
    """Train the smallest vocabulary in which every phrase is a single token."""
    phrases = single_token_phrases()
    for size in itertools.count(SIZE, STEP):
        tokenizer = _train(phrases, size)
        encoded = tokenizer.encode_batch(phrases, add_special_tokens=False)
        if all(len(encoding.ids) == 1 for encoding in encoded):
            return tokenizer
    raise AssertionError("unreachable")


def single_token_phrases() -> list[str]:
    """List the phrases that have to be one token each."""
    craftax = TEXTS["compact"].phrases + PLAN_PHRASES
    pogs = pogs_text(POGS_NODES, k_hops=1).phrases + pogs_plan_phrases(POGS_NODES)
    return list(dict.fromkeys(craftax + pogs + action_words(POGS_NODES)))


def build_probes() -> tokenizers.Tokenizer:
    """Make a token of every word of the probes; anything else is padding."""
    marks = _own_tokens(Probe.action_names)
    words = [mark.content for mark in marks]
    words += [word.replace(" ", "Ġ") for word in (*Probe.phrases, Probe.instructions)]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = _spelling(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.add_special_tokens(marks)
    return tokenizer


def _train(phrases: list[str], size: int) -> tokenizers.Tokenizer:
    texts = [
        text
        for level in TEXTS.values()
        for text in (*level.phrases, level.instructions)
    ]
    corpus = (
        (phrases, PHRASE_WEIGHT),
        (texts, TEXT_WEIGHT),
        (_english(), ENGLISH_WEIGHT),
    )
    tokenizer = _spelling(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_own_tokens(ACTION_NAMES),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    repeated = (text for lines, weight in corpus for text in lines * weight)
    tokenizer.train_from_iterator(repeated, trainer)
    return tokenizer


def _spelling(model: models.Model) -> tokenizers.Tokenizer:
    """A tokenizer of words with the space before them, byte by byte."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _english() -> list[str]:
    return [f" {word}" for word in ENGLISH.split()]


def _own_tokens(action_names: tuple[str, ...]) -> list[tokenizers.AddedToken]:
    marks = [PAD, PlanConfig().open, PlanConfig().close]
    return [
        *(tokenizers.AddedToken(mark, normalized=False) for mark in marks),
        *(
            tokenizers.AddedToken(name, normalized=False, single_word=True)
            for name in action_names
        ),
    ]


if __name__ == "__main__":
    main()
