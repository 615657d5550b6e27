"""Streamed text = whole text = the bytes the model said, through HTTP, however tokens and stops cut characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from answers import events
from live_server import LiveServer
from scripted_engine import say, scripted_engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from sapwood.engine.tokenizer import Tokenizer

SAID = (
    "🦙",
    "🦙🦜🦩🦚 and 👍🏽",
    "👩‍👩‍👧‍👦🏳️‍🌈🇪🇺",
    "日本語のテキスト、中文和한국어",
    "naïve café — e\u0301 नमस्ते",
    "line\r\n\n\tand\u2028more\x00\x7f",
    ' "quoted" \\ <0x41> <pad> data: [DONE]\n\n',
    "𝔘𝔫𝔦 ﷺ \ufffd \U0010ffff",
    "plain",
)
# Bytes that are no text: pieces of characters, cut off or out of place.
BROKEN = (
    b"ab\xf0\x9f\xa6",
    b"\xf0\x9f\xa6\x99\xf0\x9f",
    b"\x99\xa6 x \xff\xfe",
    b"\xe6\x97x\xe6\x97\xa5",
    b"\xed\xa0\x80\xc0\x80",
    b"\xf0\x9f\xf0\x9f\xa6\x99",
)
# Stops that only begin to match: what was held back for them must come out after all.
NEVER = ("🦙🦜🦩🦚 and 👍🏽!", "🇪🇺🇪🇺")
STOPS = (None, "🦜", "\u200d", "語の", "\u0301", "DONE", "n", "\ufffd", *NEVER)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "{{ messages[0].content }}"


class Script:
    """A server whose model says given ids. answers: letter -> (ids it says, their bytes)."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        # The byte tokens come first in every family; a piece of one byte would do as well.
        byte_ids: dict[bytes, int] = {}
        for i in range(self.tokenizer.vocab_size):
            if i not in self.tokenizer.special_ids:
                byte_ids.setdefault(self.tokenizer.token_bytes(i), i)
        lists = []
        for data in [text.encode() for text in SAID] + list(BROKEN):
            lists.append([byte_ids[data[k : k + 1]] for k in range(len(data))])
        for text in SAID:
            lists.append(self.tokenizer.encode(text, add_special_tokens=False))
        lists.append([i for ids in lists[-3:] for i in ids])
        self.answers: Mapping[str, tuple[list[int], bytes]] = {
            letter: (ids, b"".join(map(self.tokenizer.token_bytes, ids)))
            for letter, ids in zip(LETTERS, lists, strict=False)
        }
        assert len(self.answers) == len(lists)
        script = {tuple(self.prompt(letter)): ids for letter, (ids, _) in self.answers.items()}
        engine, config = scripted_engine(
            say(script, eos),
            self.tokenizer,
            vocab_size=self.tokenizer.num_ids,
            eos=eos,
            chat_template=str(template),
        )
        self.server = LiveServer(engine, config)

    def prompt(self, letter: str) -> list[int]:
        return self.tokenizer.encode(letter, add_special_tokens=False)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer (GPT-2's kind), some of whose merges end inside a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SAID, "🦙🦜🦩🦚" * 3, "日本語中文" * 3], trainer)
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


@pytest.fixture(scope="module", params=["byte-level BPE", "byte fallback"])
def script(
    request: pytest.FixtureRequest, byte_level: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Script]:
    folder = byte_level if request.param == "byte-level BPE" else request.getfixturevalue("stories_dir")
    template = tmp_path_factory.mktemp("template") / "bare.jinja"
    template.write_text(TEMPLATE)
    script = Script(folder, template)
    yield script
    script.server.close()


class Reply:
    """One answer: the text of every event, and what ended it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.end: Any = None


def completions(script: Script, stream: bool, **body: Any) -> list[Reply]:
    """What /v1/completions says to each prompt, all in one call."""
    body |= {"prompt": [script.prompt(letter) for letter in script.answers], "max_tokens": 500, "stream": stream}
    replies = [Reply() for _ in script.answers]
    response = script.server.client.post("/v1/completions", json=body)
    for event in events(response) if stream else [response.json()]:
        for choice in event["choices"]:
            replies[choice["index"]].texts.append(choice["text"])
            replies[choice["index"]].end = choice.get("matched_stop")
    return replies


def chat(script: Script, stream: bool, **body: Any) -> list[Reply]:
    """What /v1/chat/completions says to each prompt, in calls of their own side by side."""

    def ask(letter: str) -> Reply:
        given = body | {"messages": [{"role": "user", "content": letter}], "stream": stream}
        response = script.server.client.post("/v1/chat/completions", json=given)
        reply = Reply()
        for event in events(response) if stream else [response.json()]:
            (choice,) = event["choices"]
            reply.texts.append(choice["delta" if stream else "message"]["content"])
            reply.end = choice.get("matched_stop")
        assert choice["finish_reason"] == "stop"
        return reply

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, script.answers))


def generate(script: Script, stream: bool, **params: Any) -> list[Reply]:
    """What /generate says to each prompt, all in one call; its events hold the text so far."""
    body = {
        "input_ids": [script.prompt(letter) for letter in script.answers],
        "sampling_params": params | {"max_new_tokens": 500},
        "stream": stream,
    }
    replies = [Reply() for _ in script.answers]
    response = script.server.client.post("/generate", json=body)
    for event in events(response) if stream else [one | {"index": i} for i, one in enumerate(response.json())]:
        reply = replies[event["index"]]
        before = "".join(reply.texts)
        assert event["text"].startswith(before)
        reply.texts.append(event["text"].removeprefix(before))
        reply.end = (event["meta_info"]["finish_reason"] or {}).get("matched")
    return replies


@pytest.mark.parametrize(
    ("ask", "stop"),
    # Chat's calls cost ten times as much as a list's: some stops must do.
    [(ask, stop) for ask in (completions, generate) for stop in STOPS]
    + [(chat, stop) for stop in (None, "🦜", *NEVER)],
    ids=lambda value: value.__name__ if callable(value) else ascii(value),
)
def test_streamed_is_whole_is_said(ask: Callable[..., list[Reply]], stop: str | None, script: Script) -> None:
    body = {"stop": stop} if stop is not None else {}
    num_cut = 0
    for whole, streamed, (_, data) in zip(
        ask(script, False, **body), ask(script, True, **body), script.answers.values(), strict=True
    ):
        text = data.decode("utf-8", "replace")
        at = text.find(stop) if stop is not None else -1
        num_cut += at >= 0
        assert "".join(streamed.texts) == "".join(whole.texts) == (text if at < 0 else text[:at])
        assert streamed.end == whole.end == (script.tokenizer.eos_token_id if at < 0 else stop)
    assert (num_cut > 0) is (stop not in (None, *NEVER))


def test_a_character_comes_with_the_token_that_completes_it(script: Script) -> None:
    for reply, (ids, _) in zip(completions(script, True), script.answers.values(), strict=True):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        want = [decoder.decode(script.tokenizer.token_bytes(i)) for i in ids]
        assert reply.texts == [*want, decoder.decode(b"", final=True)]  # an event a token; the last is the end's


def test_several_choices_are_not_mixed_up(script: Script) -> None:
    prompts = [script.prompt(letter) for letter in script.answers]
    want = [data.decode("utf-8", "replace") for _, data in script.answers.values() for _ in range(2)]
    body = {"prompt": prompts, "n": 2, "max_tokens": 500, "stream": True}
    texts = [""] * len(want)
    for event in events(script.server.client.post("/v1/completions", json=body)):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == want


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_name_bytes(stream: bool, script: Script) -> None:
    for letter, (_, data) in script.answers.items():
        body = {"messages": [{"role": "user", "content": letter}], "logprobs": True, "stream": stream}
        response = script.server.client.post("/v1/chat/completions", json=body)
        entries = []
        for event in events(response) if stream else [response.json()]:
            entries += (event["choices"][0]["logprobs"] or {"content": []})["content"]
        *said, _ = entries  # the end token is counted, and not part of the text
        assert bytes(byte for entry in said for byte in entry["bytes"]) == data
