"""The libraries behind engine/tokenizer.py: `tokenizers` for tokenizer.json, `sentencepiece` for tokenizer.model.

Each is imported when a file of its kind is opened. engine/tokenizer.py checks ids and texts before they come here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from sapwood.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as HfTokenizer

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS: Final = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
METASPACE: Final = "\u2581"  # SentencePiece's visible space


class Backend(Protocol):
    """What Tokenizer needs from a library. `to_bytes` maps a piece to its bytes in the middle of a text; None where the
    decoder looks at a token's neighbours, so that no such map exists."""

    vocab_size: int
    special_ids: frozenset[int]
    bos_id: int | None  # where the tokenizer's own file names them
    eos_id: int | None
    to_bytes: Callable[[str], bytes] | None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def piece(self, token_id: int) -> str | None: ...
    def id_of(self, piece: str) -> int | None: ...


class HuggingFace(Backend):
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        try:
            library: HfTokenizer = Library.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InvalidRequest(f"tokenizer: cannot read {file}: {error}", "tokenizer") from None
        # A file may carry the truncation and padding of somebody's training run; a prompt is never cut silently.
        library.no_truncation()
        library.no_padding()
        # As in HF: tokens named by tokenizer_config.json alone are added, and its special ones are special.
        for token_id, spec in sorted(_added_tokens(config).items()):
            if library.token_to_id(spec["content"]) is None and token_id == _size(library):
                added = AddedToken(**{k: spec[k] for k in ADDED_TOKEN_FIELDS if k in spec})
                (library.add_special_tokens if spec.get("special") else library.add_tokens)([added])
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        for content in special_tokens(config).values():
            if content not in known and library.token_to_id(content) is not None:
                library.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        self._library = library
        self.vocab_size = _size(library)
        self.special_ids = frozenset(i for i, t in library.get_added_tokens_decoder().items() if t.special)
        self.bos_id = self.eos_id = None  # the file does not say; the configs do
        decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else None
        self.to_bytes = piece_decoder(decoder)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch entry with one text: the only one that leaves out the offsets and lets other threads run.
        return self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # Left out here: tokenizers 0.23 keeps special tokens that are declared "normalized": true (Llama 2's).
        kept = [i for i in ids if i not in self.special_ids] if skip_special_tokens else ids
        return self._library.decode(kept, skip_special_tokens=False)

    def piece(self, token_id: int) -> str | None:
        return self._library.id_to_token(token_id)

    def id_of(self, piece: str) -> int | None:
        return self._library.token_to_id(piece)


class SentencePiece(Backend):
    """tokenizer.model through the `sentencepiece` package (an extra).

    The library never reads control pieces out of a text; HF splits the text at them first, which chat templates need,
    so this does too. After a special token the dummy leading space is added again unless tokenizer_config.json says
    "legacy": false, as in HF's LlamaTokenizer.
    """

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise MissingExtra(
                f"tokenizer: {file} needs the sentencepiece package: pip install 'sapwood[sentencepiece]'"
            ) from None
        try:
            library: SentencePieceProcessor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise InvalidRequest(f"tokenizer: cannot read {file}: {error}", "tokenizer") from None
        self._library = library
        size = library.vocab_size()
        added = _added_tokens(config)
        self._pieces = {i: library.id_to_piece(i) for i in range(size)} | {i: t["content"] for i, t in added.items()}
        self._ids = {piece: i for i, piece in self._pieces.items()}
        self._bytes = frozenset(i for i in range(size) if library.is_byte(i))
        self.vocab_size = max(self._pieces) + 1
        named = (self._ids.get(content) for content in special_tokens(config).values())
        self.special_ids = frozenset(
            [i for i in range(size) if (library.is_control(i) or library.is_unknown(i)) and i not in added]
            + [i for i, token in added.items() if token.get("special")]
            + [i for i in named if i is not None]
        )
        split = sorted(self.special_ids | added.keys(), key=lambda i: -len(self._pieces[i]))
        self._split = re.compile("(" + "|".join(re.escape(self._pieces[i]) for i in split) + ")")
        self._strip_left = frozenset(t["content"] for t in added.values() if t.get("lstrip"))
        self._strip_right = frozenset(t["content"] for t in added.values() if t.get("rstrip"))
        self._legacy = config.get("legacy", True) is not False
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (library.bos_id(), library.eos_id()))
        self._head = [self.bos_id] if config.get("add_bos_token", True) and self.bos_id is not None else []
        self._tail = [self.eos_id] if config.get("add_eos_token", False) and self.eos_id is not None else []
        self._dummy_prefix = library.encode("a", out_type=str)[0].startswith(METASPACE)
        self.to_bytes = self._to_bytes

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        parts = self._split.split(text)  # text, special, text, special, ... text
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._ids[part])
                continue
            part = part.lstrip() if i and parts[i - 1] in self._strip_right else part
            part = part.rstrip() if i + 1 < len(parts) and parts[i + 1] in self._strip_left else part
            if part:
                ids += self._library.encode(part) if i == 0 or self._legacy else self._encode_inside(part)
        return self._head + ids + self._tail if add_special_tokens else ids

    def _encode_inside(self, text: str) -> list[int]:
        """Encode without the dummy leading space: behind an anchor that is then taken off again."""
        for anchor in ("\x02", "<unk>", "\n"):
            head, whole = self._library.encode(anchor), self._library.encode(anchor + text)
            if head and whole[: len(head)] == head:  # nothing of the text merged into the anchor
                return whole[len(head) :]
        return self._library.encode(text)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        kept = [i for i in ids if i in self._pieces and not (skip_special_tokens and i in self.special_ids)]
        text = b"".join(self._to_bytes(self._pieces[i]) for i in kept).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._dummy_prefix else text

    def piece(self, token_id: int) -> str | None:
        return self._pieces.get(token_id)

    def id_of(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def _to_bytes(self, piece: str) -> bytes:
        if self._ids.get(piece) in self._bytes:
            return bytes([int(piece[3:5], 16)])
        return piece.replace(METASPACE, " ").encode()


def piece_decoder(spec: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """piece -> bytes for a tokenizer.json decoder that treats every token after the first by itself, else None.

    Known: ByteLevel (GPT-2, Llama 3, Qwen, Falcon), Metaspace, and SentencePiece conversions (Replace, ByteFallback,
    Fuse, then a Strip that touches only the start of the text). Source: the behaviour of the `tokenizers` library.
    """
    if not spec:
        return None
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_decoder()
    if kinds == ["Metaspace"]:
        mark = steps[0].get("replacement", METASPACE)
        return lambda piece: piece.replace(mark, " ").encode()
    replacements = []
    while kinds and kinds[0] == "Replace":
        pattern = steps[0]["pattern"].get("String")
        if pattern is None:
            return None  # a regular expression
        replacements.append((pattern, steps[0]["content"]))
        steps, kinds = steps[1:], kinds[1:]
    if kinds not in (["ByteFallback", "Fuse", "Strip"], ["ByteFallback", "Fuse"], ["ByteFallback"]):
        return None
    if kinds[-1] == "Strip" and steps[-1]["stop"] != 0:
        return None
    byte_piece = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def decode(piece: str) -> bytes:
        for pattern, content in replacements:
            piece = piece.replace(pattern, content)
        match = byte_piece.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.encode()

    return decode


def _byte_level_decoder() -> Callable[[str], bytes]:
    """Undo GPT-2's map of bytes to printable characters: printable Latin-1 stands for itself, the other bytes, in
    ascending order, for U+0100, U+0101, ... A piece with any other character (an added token) is plain text."""
    byte_of = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    hidden = (b for b in range(256) if chr(b) not in byte_of)
    byte_of |= {chr(0x100 + n): b for n, b in enumerate(list(hidden))}

    def decode(piece: str) -> bytes:
        try:
            return bytes([byte_of[char] for char in piece])
        except KeyError:
            return piece.encode()

    return decode


def _size(library: HfTokenizer) -> int:
    # Ids may have gaps, so the count of tokens is not one more than the largest id.
    return max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> content; tokenizer_config.json has strings or {"content": ...}."""
    tokens = {name: config.get(name) for name in SPECIAL_NAMES}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str) and content}


def _added_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    decoder = config.get("added_tokens_decoder") or {}
    try:
        return {int(i): token for i, token in decoder.items() if isinstance(token["content"], str)}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InvalidRequest(
            'tokenizer: added_tokens_decoder of tokenizer_config.json must map ids to {"content": ...}', "tokenizer"
        ) from None
