"""Small tokenizers of the kinds that Llamas come with, trained on the worlds' words."""

import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxplan.envs.craftax_classic import ACTION_NAMES, TEXTS
from jaxplan.envs.craftax_plans import PLAN_PHRASES, STYLE_PHRASES
from jaxplan.text.tokenizer import Tokenizer, load_tokenizer

# How Llama 3 cuts text before merging.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SentencePiece never joins letters with anything else while it trains.
_OF_ONE_KIND = r"▁?\p{L}+|▁?[^\p{L}▁]+|▁+"
_LETTERS = (
    'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>=_/.,:;!?-()"'
)
_TEXTS = [
    *TEXTS["compact"].phrases,
    *TEXTS["balrog"].phrases,
    *TEXTS["balrog"].instructions.split("\n"),
    *PLAN_PHRASES,
    *STYLE_PHRASES,
    *(f"\n<plan> find wood</plan>\n{name} </plan>\n\n" for name in ACTION_NAMES),
    *(f" {letter}" for letter in _LETTERS),
    *["a.\n\n b>\n", "<html>a.</html>\n <p>b</p>"] * 9,
]


def llama3_like(folder: Path, special: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE behind Llama 3's regular expression."""
    return _written(_llama3_like(), folder, special)


def llama2_like(folder: Path, special: tuple[str, ...] = ()) -> Tokenizer:
    """SentencePiece's BPE: spaces are letters, and what has none falls back to bytes.

    A line break has no letter, and nothing cuts words before merging.
    """
    return _written(_llama2_like(), folder, special)


KINDS = {"like Llama 3": llama3_like, "like Llama 2": llama2_like}


@functools.cache
def _llama3_like() -> str:
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    return bpe.to_str()


@functools.cache
def _llama2_like() -> str:
    bpe = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    kinds = pre_tokenizers.Split(tokenizers.Regex(_OF_ONE_KIND), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([spaces, kinds])
    own = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=own, show_progress=False
    )
    bpe.train_from_iterator([s for t in _TEXTS for s in t.split("\n")], trainer)
    bpe.pre_tokenizer = spaces
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spec = json.loads(bpe.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are ordinary pieces
    return json.dumps(spec)


def _written(content: str, folder: Path, special: tuple[str, ...]) -> Tokenizer:
    bpe = tokenizers.Tokenizer.from_str(content)
    added = [tokenizers.AddedToken(name, normalized=False) for name in special]
    bpe.add_special_tokens(added)
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))
