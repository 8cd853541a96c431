"""The only door to the tokenizer library: any ``tokenizer.json`` becomes plain ids.

Loading reads one local file, never the network, and runs no code that comes with it.
What it promises beyond the library is the exact text of every single token, which the
plan grammar needs to know which tokens may stand in a plan, and the ids of a text that
stands inside another: SentencePiece puts a space before the first word of all, which a
phrase in the middle must not have.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool

SHIPPED = Path(__file__).parent / "data" / "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A loaded ``tokenizer.json``; two are equal when their files are.

    Attributes:
        sha256: hash of the file, to be written beside whatever holds its ids.
        texts: the text of every id, see ``text_of``.
        pad_id: the id that fills unused places; it is masked wherever it stands.
        backend: the library's own object.
        inside: the same without the space that some put before the first word.
        address: how a context opens with a text; the text alone, or a chat template.
    """

    sha256: str
    texts: tuple[str, ...] = dataclasses.field(repr=False, compare=False)
    pad_id: int = dataclasses.field(compare=False)
    backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    inside: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    address: Callable[[str], str] = dataclasses.field(
        default=str, repr=False, compare=False
    )

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return len(self.texts)

    def fill_up(self, vocab_size: int | None) -> "Tokenizer":
        """Add ids without text, for a model that has room for more ids than these.

        Raises:
            ValueError: the model has fewer.
        """
        if vocab_size is None:
            return self
        if vocab_size < self.vocab_size:
            raise ValueError(
                f"model.vocab_size={vocab_size}, but the tokenizer has "
                f"{self.vocab_size} ids: take the tokenizer that belongs to the model, "
                "with text.tokenizer"
            )
        unused = ("",) * (vocab_size - self.vocab_size)
        return dataclasses.replace(self, texts=self.texts + unused)

    def encode(self, text: str) -> list[int]:
        """Turn a whole text into ids, without the tokens a document begins with."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Turn the text that opens a context into ids, as the model is addressed."""
        return self.encode(self.address(text))

    def encode_inside(self, text: str) -> list[int]:
        """Turn a text into ids that stands behind another, where a cut is."""
        return self.inside.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into ids that stand behind others, on all cores."""
        encoded = self.inside.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_words(self, text: str) -> list[list[int]]:
        """``encode_inside``, grouped by the words that tokens never reach across."""
        encoding = self.inside.encode(text, add_special_tokens=False)
        numbered = zip(encoding.word_ids, encoding.ids, strict=True)
        words = itertools.groupby(numbered, key=lambda pair: pair[0])
        return [[token for _, token in word] for _, word in words]

    def may_follow(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Tell for each (before, text) whether their ids are those of the two joined.

        Args:
            pairs: ``before`` opens the stream; it is not empty.
        """
        firsts, texts = zip(*pairs, strict=True) if pairs else ((), ())
        joined = self.backend.encode_batch(
            ["".join(pair) for pair in pairs], add_special_tokens=False
        )
        before = self.backend.encode_batch(list(firsts), add_special_tokens=False)
        after = self.encode_batch(texts)
        return [
            whole.ids == first.ids + last
            for whole, first, last in zip(joined, before, after, strict=True)
        ]

    def may_span(self, left: str, right: str) -> bool:
        """Tell whether any token could hold the end of one text and the next's begin.

        Where none could, no merge ever crosses the place, whatever is around it.
        """
        return bool(self._neighbours[left.encode()[-1], right.encode()[0]])

    @functools.cached_property
    def _neighbours(self) -> Bool[np.ndarray, "256 256"]:
        """Which byte stands behind which in the text of some token."""
        found = np.zeros((256, 256), bool)
        for text in self.texts:
            values = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
            found[values[:-1], values[1:]] = True
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Undo ``encode``; special tokens are written out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """Return the exact text of one token; empty for a special token.

        Bytes that are only a part of a character come as lone surrogates (PEP 383),
        so that joining the texts of ids and encoding with ``surrogateescape`` gives
        exactly the bytes these ids stand for.
        """
        return self.texts[token]


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from the local disk.

    Args:
        name: ``shipped``, the path of a ``tokenizer.json``, or of a folder with one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is not a tokenizer.json this project can use.
    """
    path = find_tokenizer(name)
    content = path.read_bytes()
    try:
        spec = json.loads(content)
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"text.tokenizer: {path} is not a valid tokenizer.json ({error}); "
            "it may be damaged: fetch or build it again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        sha256=hashlib.sha256(content).hexdigest(),
        texts=_token_texts(path, spec, backend.get_vocab(with_added_tokens=True)),
        pad_id=_pad_id(spec),
        backend=backend,
        inside=_without_first_space(backend),
    )


def find_tokenizer(name: str) -> Path:
    """Find the ``tokenizer.json`` behind a name; see ``load_tokenizer``."""
    if name == "shipped":
        path = SHIPPED
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"text.tokenizer: {path} does not exist (given: {name!r}); give 'shipped', "
            "the path of a tokenizer.json, or a folder that holds one"
        )
    return path


def _without_first_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make the tokenizer that puts no space before the first word; often the same."""
    spec = json.loads(backend.to_str())
    changed = copy.deepcopy(spec)
    for name, part in (
        ("normalizer", "normalizers"),
        ("pre_tokenizer", "pretokenizers"),
    ):
        if changed[name] is None:
            continue
        steps = changed[name].get(part, [changed[name]])
        kept = [step for step in steps if step["type"] != "Prepend"]
        for step in kept:
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
        changed[name] = {"type": "Sequence", part: kept} if kept else None
    return (
        backend
        if changed == spec
        else tokenizers.Tokenizer.from_str(json.dumps(changed))
    )


def _pad_id(spec: dict[str, Any]) -> int:
    """Find the token made for padding; 0 where there is none, as it is masked."""
    pads = [t for t in spec["added_tokens"] if t["special"] and "pad" in t["content"]]
    return pads[0]["id"] if pads else 0


def _token_texts(
    path: Path, spec: dict[str, Any], vocab: dict[str, int]
) -> tuple[str, ...]:
    to_bytes = _piece_to_bytes(path, spec)
    texts = [""] * (max(vocab.values()) + 1)
    for piece, token in vocab.items():
        texts[token] = to_bytes(piece).decode("utf-8", "surrogateescape")
    for added in spec["added_tokens"]:
        texts[added["id"]] = "" if added["special"] else added["content"]
    return tuple(texts)


def _piece_to_bytes(path: Path, spec: dict[str, Any]) -> Callable[[str], bytes]:
    """Choose how the vocabulary spells bytes, from the decoder in the file."""
    decoder: dict[str, Any] = spec["decoder"] or {"type": "none"}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if "Metaspace" in kinds or any(step.get("content") == " " for step in steps):
        return _metaspace_bytes
    raise ValueError(
        f"text.tokenizer: {path} has a decoder of the kind {kinds}; only "
        "ByteLevel and Metaspace tokenizers spell text exactly"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Map the printable stand-ins of byte-level BPE to bytes (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    if all(char in _BYTE_OF for char in piece):
        return bytes(_BYTE_OF[char] for char in piece)
    return piece.encode()


def _metaspace_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
