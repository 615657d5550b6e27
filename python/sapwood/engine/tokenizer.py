"""Text to token ids, and what each id says in bytes.

Receives prompts (text or chat messages) from engine/async_engine.py and hands it token ids for engine/scheduler.py;
engine/detokenizer.py asks it what an id says. Backed by the `tokenizers` library or by `sentencepiece`
(engine/tokenizer_backends.py); neither is imported before a tokenizer is loaded, and `transformers` never is.

Whether BOS is added is the file's own word, as in HF transformers: tokenizer.json's post-processor, or add_bos_token of
tokenizer_config.json for SentencePiece (default true: the Llama and Mistral convention).
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sapwood.chat.template import ChatTemplate, read_templates
from sapwood.engine.tokenizer_backends import Backend, HuggingFace, SentencePiece, special_tokens
from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.models.hub import resolve_model_dir
from sapwood.request import ChatPrompt

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model")


class TokenTable:
    """id -> text of one tokenizer, for one choice of skip_special_tokens; shared by its detokenizers.

    `texts` holds the ids whose bytes are whole characters, filled when first met: a table of 150,000 ids made at
    start-up would cost more than most requests. Thread safety: entries are written whole and never change.
    """

    __slots__ = ("_skip_special_tokens", "_tokenizer", "texts")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self.texts: dict[int, str] = {}
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def bytes_of(self, token_id: int) -> bytes:
        """The id's bytes (none for a special token that is skipped). Raises InvalidRequest for an id out of range."""
        skip = self._skip_special_tokens and token_id in self._tokenizer.special_ids
        data = b"" if skip else self._tokenizer.token_bytes(token_id)
        try:
            self.texts[token_id] = data.decode()
        except UnicodeDecodeError:
            pass  # a piece of a character: engine/detokenizer.py puts it together with its neighbours
        return data


class Tokenizer:
    """One model's tokenizer.

    vocab_size     ids the tokenizer knows: 0 .. vocab_size-1 (some may be unused)
    num_ids        ids the model may emit: vocab_size, or config.json's padded vocab_size where that is larger.
                   An id without a piece below num_ids says nothing (as in HF); beyond it is an error
    special_ids    ids that skip_special_tokens leaves out
    bos_token_id, eos_token_id   None where the model has none; eos_token_ids holds all end tokens of
                   generation_config.json besides
    Thread safety: all methods may be called from several threads.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        config, model_config, generation_config = config or {}, model_config or {}, generation_config or {}
        self._backend = backend
        self.vocab_size = backend.vocab_size
        text_config = model_config.get("text_config") or {}
        padded = model_config.get("vocab_size", text_config.get("vocab_size"))
        self.num_ids = max(self.vocab_size, padded if isinstance(padded, int) else 0)
        self.special_ids = backend.special_ids
        self.special_tokens = special_tokens(config)

        def ids(name: str, own: int | None) -> tuple[int, ...]:
            """The named token's id by tokenizer_config, then by generation_config, config and the tokenizer's file."""
            content = self.special_tokens.get(f"{name}_token")
            found = [None if content is None else backend.id_of(content)]
            for source in (generation_config, model_config, text_config):
                value = source.get(f"{name}_token_id")
                found += value if isinstance(value, list) else [value]
            found = [i for i in found if isinstance(i, int)] or [own]
            return tuple(dict.fromkeys(i for i in found if i is not None))

        self.bos_token_id = next(iter(ids("bos", backend.bos_id)), None)
        self.eos_token_ids = ids("eos", backend.eos_id)
        self.eos_token_id = next(iter(self.eos_token_ids), None)
        for name, token_id in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id)):
            # Templates write bos_token and eos_token; a bare tokenizer.model has no config that spells them.
            if name not in self.special_tokens and token_id is not None and (piece := backend.piece(token_id)):
                self.special_tokens[name] = piece
        self._chat = ChatTemplate(chat_templates or {}, self.special_tokens)
        # Of one character there is no inside to cut, and no turn ends with it.
        names = [piece for i in sorted(self.special_ids) if len(piece := backend.piece(i) or "") > 1]
        names.sort(key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._tables = (TokenTable(self, False), TokenTable(self, True)) if backend.to_bytes is not None else None

    @classmethod
    def load(cls, path_or_dir: str | os.PathLike[str], revision: str | None = None) -> Tokenizer:
        """Load from a directory in HF layout, a tokenizer.json or *.model file, or a hub id.

        Raises InvalidRequest (nothing there: lists what was looked for; corrupt file: names it) or MissingExtra.
        """
        # The library's thread pool would take cores from the compute threads, and warns after a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = Path(path_or_dir).expanduser()
        path = path if path.is_file() else resolve_model_dir(os.fspath(path_or_dir), revision, weights=False)
        folder = path.parent if path.is_file() else path
        file = path if path.is_file() else next((f for n in TOKENIZER_FILES if (f := folder / n).is_file()), None)
        if file is None:
            raise InvalidRequest(
                f"tokenizer: no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)}); "
                "give its directory with `tokenizer=`, or work on ids with skip_tokenizer_init=True",
                "tokenizer",
            )
        config = read_json(folder / "tokenizer_config.json")
        backend = SentencePiece(file, config) if file.suffix == ".model" else HuggingFace(file, config)
        return cls(
            backend,
            config=config,
            model_config=read_json(folder / "config.json"),
            generation_config=read_json(folder / "generation_config.json"),
            chat_templates=read_templates(folder, config),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled in the text become their ids, as in HF.

        Pass add_special_tokens=False for the output of `apply_chat_template`, which has its BOS already.
        Raises InvalidRequest when text is no string or holds lone surrogates (no UTF-8 exists for them).
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"prompt must be a string, got {type(text).__name__}", "prompt")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"prompt holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which is "
                "not text; decode the source as UTF-8",
                "prompt",
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, as the library decodes it: a decoder's rules for the start of a text apply.

        Text generated after a prompt is engine/detokenizer.py's: there a leading space stays.
        """
        return self._backend.decode([self._check(i) for i in ids], skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an id adds in the middle of a text; a special token's are its name.

        Raises InvalidRequest for an id out of range, UnsupportedModel where the decoder allows no such map.
        """
        to_bytes = self._backend.to_bytes
        if to_bytes is None:
            raise UnsupportedModel("tokenizer: its decoder joins tokens by their neighbours; one alone has no bytes")
        piece = self._backend.piece(self._check(token_id))
        return b"" if piece is None else to_bytes(piece)

    def table(self, skip_special_tokens: bool) -> TokenTable | None:
        """The shared id -> text table; None where the decoder is not one that maps tokens to bytes."""
        return None if self._tables is None else self._tables[bool(skip_special_tokens)]

    def encode_chat(self, chat: ChatPrompt) -> list[int]:
        """Token ids of chat messages. Raises InvalidRequest as apply_chat_template and encode do.

        A special token that a user, a tool or a system message spells stays text: nobody can end their turn and begin
        the assistant's by writing <|im_end|>. (HF, vLLM and SGLang let them.)
        """
        messages, cut = self._disarm(chat.messages)
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **chat.template_kwargs,
        )
        # The template writes the special tokens itself.
        parts = text.split(cut) if cut else [text]
        return [i for part in parts if part for i in self.encode(part, add_special_tokens=False)]

    def _disarm(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str]:
        """messages with a mark inside every special token that others than the assistant spell, and the mark: where the
        text is cut there, no special token is left. As they are, and "", where there is none.
        """
        spelled = self._special_pattern
        if spelled is None or not isinstance(messages, Sequence):
            return messages, ""
        found = {
            i: content
            for i, message in enumerate(messages)
            if isinstance(message, Mapping)
            and message.get("role") != "assistant"
            and isinstance(content := message.get("content"), str)
            and spelled.search(content)
        }
        if not found:
            return messages, ""
        written = json.dumps([dict(message) for message in messages], ensure_ascii=False, default=str)
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in written)  # of private use
        disarmed = {i: spelled.sub(lambda m: m[0][0] + mark + m[0][1:], content) for i, content in found.items()}
        return [
            {**message, "content": disarmed[i]} if i in disarmed else message for i, message in enumerate(messages)
        ], mark

    def set_chat_template(self, source: str) -> None:
        """Use this Jinja source in place of the checkpoint's own templates."""
        self._chat = ChatTemplate({"default": source}, self.special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat.exists

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Messages as the prompt text the model was trained on; chat/template.py has the rules."""
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **kwargs,
        )

    def _check(self, token_id: int) -> int:
        try:
            value = operator.index(token_id)
        except TypeError:
            raise InvalidRequest(f"token ids must be integers, got {token_id!r}", "token_ids") from None
        if not 0 <= value < self.num_ids:
            raise InvalidRequest(f"token id {value} is not in [0, {self.num_ids}), the vocabulary", "token_ids")
        return value


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, {} where there is no file. Raises InvalidRequest naming a file that holds none."""
    try:
        value = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"tokenizer: {file} is not valid JSON: {error}", "tokenizer") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"tokenizer: {file} must hold a JSON object, got {type(value).__name__}", "tokenizer")
    return value
