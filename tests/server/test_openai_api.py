"""server/openai.py through OpenAI's own client and by hand; the truth is an engine that no server has touched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from answers import events, problem
from live_server import TEMPLATE, LiveServer

from sapwood.engine.async_engine import Engine
from sapwood.request import MAX_N, ChatPrompt

PROMPT = "Once upon a time"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me of Lily."}]
SAMPLED = {"temperature": 1.0, "seed": 7}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(stories: LiveServer) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False, timeout=60) as transport:
        yield openai.OpenAI(api_key="any", base_url=f"{stories.url}/v1", max_retries=0, http_client=transport)


def complete(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0} | body)


def chat(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 4, "temperature": 0} | body)


# --- completions


def test_a_completion(client: openai.OpenAI, truth: Engine) -> None:
    want = truth.generate(PROMPT, {"temperature": 0, "max_new_tokens": 30})
    answer = client.completions.create(model="stories260K", prompt=PROMPT, temperature=0, max_tokens=30)
    assert answer.object == "text_completion"
    assert answer.model == "stories260K"
    assert answer.id.startswith("cmpl-")
    assert len(answer.choices) == 1
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (want.text, "length", 0, None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == want.usage.prompt_tokens
    assert answer.usage.completion_tokens == want.usage.completion_tokens == 30
    assert answer.usage.total_tokens == want.usage.prompt_tokens + 30


def test_sixteen_tokens_are_a_completions_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="stories260K", prompt=PROMPT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_streamed_completion(client: openai.OpenAI, truth: Engine) -> None:
    want = truth.generate(PROMPT, {"max_new_tokens": 30, **SAMPLED})
    chunks = list(
        client.completions.create(
            model="stories260K",
            prompt=PROMPT,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLED,
        )
    )
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == want.text
    assert [chunk.choices[0].finish_reason for chunk in texts[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (want.usage.prompt_tokens, 30)


@pytest.mark.parametrize("prompt", [[1, 403, 407], [PROMPT, "Tim had"], [[1, 403], [1, 5, 6]], [PROMPT, [1, 403]]])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_form(prompt: Any, stream: bool, http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(prompt, {"max_new_tokens": 12, "n": 2, **SAMPLED})
    response = complete(http, prompt=prompt, max_tokens=12, n=2, stream=stream, **SAMPLED)
    texts = dict.fromkeys(range(len(want)), "")
    for body in events(response) if stream else [response.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {i: output.text for i, output in enumerate(want)}
    assert len(set(texts.values())) == len(texts)  # choices differ, and no prompt got another's
    if not stream:
        # A prompt counts once, however many choices it has.
        prompts = {output.index: output.usage.prompt_tokens for output in want}
        assert response.json()["usage"]["prompt_tokens"] == sum(prompts.values())
        assert response.json()["usage"]["completion_tokens"] == 12 * len(want)


def test_ten_thousand_prompts(http: httpx.Client, truth: Engine) -> None:
    prompts = [[1, 300 + i % 200] for i in range(10_000)]
    answer = complete(http, prompt=prompts, max_tokens=1).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(10_000))
    want = [output.text for output in truth.generate(prompts[:200], {"temperature": 0, "max_new_tokens": 1})]
    assert [choice["text"] for choice in answer["choices"]] == want * 50
    assert answer["usage"]["prompt_tokens"] == 20_000


@pytest.mark.parametrize("stream", [False, True])
def test_echo(stream: bool, http: httpx.Client, truth: Engine) -> None:
    prompts = [PROMPT, [1, 403, 407]]
    want = [PROMPT, "<s> Once upon"]
    for i, output in enumerate(truth.generate(prompts, {"temperature": 0, "max_new_tokens": 5})):
        want[i] += output.text
    response = complete(http, prompt=prompts, max_tokens=5, echo=True, stream=stream)
    texts = ["", ""]
    for body in events(response) if stream else [response.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == want


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(stream: bool, http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(PROMPT, {"temperature": 0, "max_new_tokens": 8, "return_logprob": True})
    response = complete(http, max_tokens=8, logprobs=0, stream=stream)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    text = ""
    for body in events(response) if stream else [response.json()]:
        text += body["choices"][0]["text"]
        for name, values in found.items():
            values += body["choices"][0]["logprobs"][name]
    assert found["token_logprobs"] == want.logprobs
    # The chosen token alone, as in vLLM.
    assert found["top_logprobs"] == [{t: p} for t, p in zip(found["tokens"], want.logprobs, strict=True)]
    assert "".join(found["tokens"]) == text == want.text
    assert all(text.startswith(t, at) for t, at in zip(found["tokens"], found["text_offset"], strict=True))


def test_log_probabilities_that_are_not_reported(http: httpx.Client) -> None:
    for body in ({"logprobs": 1}, {"logprobs": -1}, {"logprobs": 2**70}):
        assert "alternatives" in problem(complete(http, **body), 400, "logprobs", "unsupported")
    assert "the prompt's" in problem(complete(http, logprobs=0, echo=True), 400, "logprobs", "unsupported")
    assert problem(chat(http, logprobs=True, top_logprobs=1), 400, "top_logprobs", "unsupported")
    assert chat(http, logprobs=True, top_logprobs=0).status_code == 200


# --- chat


def test_a_chat_completion(client: openai.OpenAI, truth: Engine) -> None:
    want = truth.generate(MESSAGES, {"temperature": 0, "max_new_tokens": 30})
    answer = client.chat.completions.create(
        model="stories260K",
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=30,
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
    )
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == (want.text, "length", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == want.usage.prompt_tokens
    assert answer.usage.completion_tokens == 30


def test_a_streamed_chat_completion(client: openai.OpenAI, truth: Engine) -> None:
    want = truth.generate(MESSAGES, {"max_new_tokens": 25, **SAMPLED})
    chunks = list(
        client.chat.completions.create(
            model="stories260K",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=25,
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLED,
        )
    )
    first, *deltas, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in deltas)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == want.text
    assert len(deltas) == 25  # an event a token
    assert [chunk.choices[0].finish_reason for chunk in deltas] == [None] * 24 + ["length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 25
    assert last.usage.prompt_tokens == want.usage.prompt_tokens


async def test_the_asynchronous_client(stories: LiveServer, truth: Engine) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as transport:
        client = openai.AsyncOpenAI(api_key="any", base_url=f"{stories.url}/v1", max_retries=0, http_client=transport)

        async def ask(seed: int) -> str:
            text = ""
            async for chunk in await client.chat.completions.create(
                model="stories260K",
                messages=MESSAGES,  # type: ignore[arg-type]
                max_tokens=20,
                temperature=1,
                seed=seed,
                stream=True,
            ):
                text += chunk.choices[0].delta.content or ""
            return text

        texts = await asyncio.gather(*(ask(seed) for seed in range(16)))
        whole = await client.completions.create(model="stories260K", prompt=PROMPT, temperature=0, max_tokens=5)
        assert [model.id async for model in client.models.list()] == ["stories260K"]
    want = truth.generate(
        [MESSAGES] * 16, [{"max_new_tokens": 20, "seed": seed, "temperature": 1} for seed in range(16)]
    )
    assert texts == [output.text for output in want]
    assert whole.choices[0].text == truth.generate(PROMPT, {"temperature": 0, "max_new_tokens": 5}).text


def test_without_a_limit_a_chat_may_fill_the_context(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": MESSAGES, "temperature": 0, "ignore_eos": True}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


@pytest.mark.parametrize("stream", [False, True])
def test_choices(stream: bool, http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(MESSAGES, {"max_new_tokens": 10, "n": 3, **SAMPLED})
    response = chat(http, max_tokens=10, n=3, stream=stream, **SAMPLED)
    texts = dict.fromkeys(range(3), "")
    roles = dict.fromkeys(range(3), 0)
    for body in events(response) if stream else [response.json()]:
        for choice in body["choices"]:
            message = choice["delta" if stream else "message"]
            texts[choice["index"]] += message["content"]
            roles[choice["index"]] += "role" in message
    assert texts == {i: output.text for i, output in enumerate(want)}
    assert set(roles.values()) == {1}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(stream: bool, http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(MESSAGES, {"temperature": 0, "max_new_tokens": 8, "return_logprob": True})
    response = chat(http, max_tokens=8, logprobs=True, stream=stream)
    entries = []
    for body in events(response) if stream else [response.json()]:
        if body["choices"][0]["logprobs"] is not None:
            entries += body["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == want.logprobs
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == want.text
    assert "".join(entry["token"] for entry in entries) == want.text
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_parts_of_text(http: httpx.Client, truth: Engine) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "of Lily."}]
    want = truth.generate([{"role": "user", "content": "Tell me\nof Lily."}], {"temperature": 0, "max_new_tokens": 9})
    answer = chat(http, messages=[{"role": "user", "content": parts}], max_tokens=9).json()
    assert answer["choices"][0]["message"]["content"] == want.text
    assert answer["usage"]["prompt_tokens"] == want.usage.prompt_tokens
    # Nulls as clients send them back: a message's refusal, a content that is not there.
    echoed = [{"role": "user", "content": parts, "name": None, "tool_calls": None, "refusal": None}]
    assert chat(http, messages=echoed, max_tokens=9).json()["choices"] == answer["choices"]
    assert chat(http, messages=[{"role": "assistant", "content": None, "tool_calls": []}]).status_code == 200


BAD_MESSAGES = {
    "none": ([], "messages", "not empty"),
    "text": ("Hi", "messages", "Expected `array`"),
    "no object": (["Hi"], "messages[0]", "Expected `object`"),
    "no role": ([{"content": "Hi"}], "messages", "messages[0] must be an object with a string 'role'"),
    "a number's role": ([{"role": 5, "content": "Hi"}], "messages", "messages[0] must be"),
    "a number": ([{"role": "user", "content": 5}], "messages", "messages[0].content must be a string"),
    "an object": ([{"role": "user", "content": {}}], "messages", "messages[0].content must be a string"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "messages",
        "content[0]: this model takes text",
    ),
    "a bare part": ([{"role": "user", "content": ["Hi"]}], "messages", "content[0]: this model takes text"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "messages", "text must be a string"),
    "a list for a type": ([{"role": "user", "content": [{"type": []}]}], "messages", "content[0]: this model"),
    "tool calls": ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages", "tool calls"),
    "a function call": ([{"role": "assistant", "function_call": {"name": "f"}}], "messages", "tool calls"),
}


@pytest.mark.parametrize(("messages", "param", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_messages_that_cannot_be_shown(
    messages: Any, param: str, message: str, stream: bool, http: httpx.Client
) -> None:
    assert message in problem(chat(http, messages=messages, stream=stream), 400, param)


def test_the_last_message_continued(http: httpx.Client, truth: Engine) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Once upon a time, there"}]
    want = truth.generate(
        ChatPrompt(messages=begun, continue_final_message=True), {"temperature": 0, "max_new_tokens": 12}
    )
    answer = chat(http, messages=begun, continue_final_message=True, max_tokens=12).json()
    assert answer["choices"][0]["message"]["content"] == want.text
    assert answer["choices"][0]["message"]["content"].startswith(" was ")
    assert answer["usage"]["prompt_tokens"] == want.usage.prompt_tokens
    assert "continue_final_message" in problem(
        chat(http, messages=[{"role": "user", "content": ""}], continue_final_message=True), 400, "messages"
    )


def test_the_generation_prompt_left_out(http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(
        ChatPrompt(messages=MESSAGES, add_generation_prompt=False), {"temperature": 0, "max_new_tokens": 5}
    )
    answer = chat(http, add_generation_prompt=False, max_tokens=5).json()
    assert answer["choices"][0]["message"]["content"] == want.text
    assert answer["usage"]["prompt_tokens"] == want.usage.prompt_tokens < chat(http).json()["usage"]["prompt_tokens"]


def test_variables_of_the_template(serve_stories: Callable[..., LiveServer], tmp_path: Path) -> None:
    template = tmp_path / "kind.jinja"
    template.write_text("{{ bos_token }}{% if mood is defined %}{{ mood }} {% endif %}{{ messages[0].content }}")
    http = serve_stories(chat_template=str(template)).client
    body = {"messages": [{"role": "user", "content": "Once"}]}
    plain = http.post("/tokenize", json=body).json()["tokens"]
    kind = http.post("/tokenize", json=body | {"chat_template_kwargs": {"mood": "Happy"}}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": plain}).json()["text"] == "<s> Once"
    assert http.post("/detokenize", json={"tokens": kind}).json()["text"] == "<s> Happy Once"
    usage = chat(http, **body, chat_template_kwargs={"mood": "Happy"}).json()["usage"]
    assert usage["prompt_tokens"] == len(kind)


@pytest.mark.parametrize("name", ["self", "messages", "tools", "add_generation_prompt", "continue_final_message"])
@pytest.mark.parametrize("route", [CHAT, "/tokenize"])
def test_names_that_are_no_variables_of_a_template(name: str, route: str, http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: True}}
    assert repr(name) in problem(http.post(route, json=body), 400, "chat_template_kwargs")


def test_a_template_that_objects(serve_stories: Callable[..., LiveServer], tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}x")
    http = serve_stories(chat_template=str(template)).client
    assert "begin with the user" in problem(chat(http), 400, "messages")
    assert "begin with the user" in problem(chat(http, stream=True), 400, "messages")


def test_a_model_without_a_template(serve_stories: Callable[..., LiveServer]) -> None:
    http = serve_stories(chat_template=None).client
    assert "no 'default' one" in problem(chat(http), 400, "messages")
    assert http.post("/tokenize", json={"messages": MESSAGES}).status_code == 400
    assert complete(http).status_code == 200


# --- sampling


def test_a_seed_names_an_answer(http: httpx.Client, truth: Engine) -> None:
    texts = []
    for seed in (7, 7, 8, -1, 2**64 - 1):
        answer = complete(http, max_tokens=20, temperature=1, seed=seed).json()
        texts.append(answer["choices"][0]["text"])
        want = truth.generate(PROMPT, {"temperature": 1, "seed": seed % 2**64, "max_new_tokens": 20})
        assert texts[-1] == want.text
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]  # OpenAI's seeds are signed


def test_without_a_seed_answers_differ(http: httpx.Client) -> None:
    texts = {complete(http, max_tokens=30, temperature=1).json()["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "stop", [" little", ["girl named", "zzz"], ["ere was a little gi", "e w"], [", t"] + ["z"] * 63]
)
def test_stop_strings(stop: Any, stream: bool, http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(PROMPT, {"temperature": 0, "max_new_tokens": 40, "stop": stop})
    response = complete(http, max_tokens=40, stop=stop, stream=stream)
    bodies = events(response) if stream else [response.json()]
    assert "".join(body["choices"][0]["text"] for body in bodies) == want.text
    last = bodies[-1]["choices"][0]
    assert (last["finish_reason"], last["matched_stop"]) == ("stop", want.matched_stop)
    assert want.matched_stop in ([stop] if isinstance(stop, str) else stop)


def test_fields_beyond_openais_reach_the_engine(http: httpx.Client, truth: Engine) -> None:
    for theirs, ours in (
        ({"top_k": 1}, {"top_k": 1}),
        ({"min_p": 0.9}, {"min_p": 0.9}),
        ({"top_p": 0.05}, {"top_p": 0.05}),
        ({"stop_token_ids": [261]}, {"stop_token_ids": [261]}),
        ({"stop_token_ids": [261], "min_tokens": 6}, {"stop_token_ids": [261], "min_new_tokens": 6}),
        ({"ignore_eos": True, "max_tokens": 200}, {"ignore_eos": True, "max_new_tokens": 200}),
        ({"skip_special_tokens": False, "max_tokens": 400}, {"skip_special_tokens": False, "max_new_tokens": 400}),
    ):
        want = truth.generate(PROMPT, {"max_new_tokens": 20, **SAMPLED, **ours})
        choice = complete(http, **{"max_tokens": 20, **SAMPLED, **theirs}).json()["choices"][0]
        assert choice["text"] == want.text, theirs
        assert choice["finish_reason"] == want.finish_reason
        assert choice["matched_stop"] == want.matched_stop


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": MAX_N + 1}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 2**70}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"priority": 2**31 + 1}, "priority"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [[1], [512]]}, "prompt"),
        ({"prompt": [512], "echo": True}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.0]}, "prompt[0]"),
        ({"prompt": ["a", 5], "echo": True}, "prompt[1]"),
        ({"prompt": MESSAGES}, "prompt[0]"),
        ({"prompt": None}, "prompt"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_values_out_of_range(body: dict[str, Any], param: str, stream: bool, http: httpx.Client) -> None:
    if param == "stream_options" and stream:
        assert complete(http, stream=True, **body).status_code == 200
    else:
        assert problem(complete(http, stream=stream, **body), 400, param)


def test_a_chats_fields_are_named_as_it_names_them(http: httpx.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": MESSAGES, name: 0}
        assert problem(http.post(CHAT, json=body), 400, name).startswith(f"{name} must be >= 1")
    body = {"messages": MESSAGES, "max_tokens": 4, "max_completion_tokens": 5}
    assert "differ" in problem(http.post(CHAT, json=body), 400, "max_completion_tokens")
    assert http.post(CHAT, json=body | {"max_completion_tokens": 4}).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("body", [{"temperature": 1e308}, {"temperature": -0.0}, {"max_tokens": 2**63}, {"stop": []}])
def test_values_at_the_edge(body: dict[str, Any], http: httpx.Client) -> None:
    assert complete(http, **body).status_code == 200


def test_more_tokens_than_the_context_has(http: httpx.Client) -> None:
    answer = complete(http, max_tokens=2**70, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 512
    full = complete(http, prompt=[5] * 511, max_tokens=100).json()
    assert full["usage"]["completion_tokens"] == 1
    assert full["choices"][0]["finish_reason"] == "length"


# "x " is two tokens: 1800 characters are encoded on the loop, 3800 in a worker thread.
@pytest.mark.parametrize("length", [900, 1900])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(length: int, stream: bool, http: httpx.Client) -> None:
    text = "x " * length
    tokens = http.post("/tokenize", json={"prompt": text}).json()["count"]
    message = problem(complete(http, prompt=text, stream=stream), 400, "prompt")
    assert f"{tokens} tokens" in message
    assert "512" in message
    long_chat = [{"role": "user", "content": text}]
    message = problem(chat(http, messages=long_chat, stream=stream), 400, "messages")
    assert "512" in message
    both = complete(http, prompt=["Once", text], stream=stream)
    if both.status_code == 200:  # the other prompt's first token was out before the worker had counted
        assert stream and length == 1900
        assert "512" in events(both)[-1]["error"]["message"]
    else:
        assert problem(both, 400, "prompt")
    assert problem(complete(http, prompt=[5] * 512, stream=stream), 400, "prompt")


# --- the cache, usage, streams


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI, stories: LiveServer) -> None:
    stories.call(stories.service.engine.flush_cache)
    prompt = [1, *range(300, 360)]

    def cached(**extra: Any) -> int:
        answer = client.completions.create(
            model="stories260K", prompt=prompt, max_tokens=1, temperature=0, extra_body=extra
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens == 61
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() == 48  # three pages of sixteen: the last token is always computed
    assert cached(cache_salt="another tenant's") == 0
    assert cached(cache_salt="another tenant's") == 48
    stories.call(stories.service.engine.flush_cache)
    # The first choice pays for the prompt, its others find it: what was cached is what was there before.
    for stream in (False, True):
        response = complete(
            stories.client,
            prompt=[1, *range(400, 460)],
            n=4,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        usage = (events(response)[-1] if stream else response.json())["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == (48 if stream else 0)


def test_usage_in_every_event(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for body in (
        events(complete(http, stream=True, stream_options=options)),
        events(chat(http, stream=True, stream_options=options)),
    ):
        counts = [event["usage"]["completion_tokens"] for event in body]
        assert counts == sorted(counts)
        assert counts[-1] == 4
        assert body[-1]["choices"] == []
        assert len({event["usage"]["prompt_tokens"] for event in body}) == 1
    without = events(complete(http, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" not in event for event in without)
    assert all("usage" not in event for event in events(complete(http, stream=True)))


def test_the_clients_id_is_the_answers(http: httpx.Client) -> None:
    for name in ("rid", "request_id"):
        response = complete(http, **{name: "my-id_1"})
        assert response.json()["id"] == response.headers["x-request-id"] == "my-id_1"
        assert {event["id"] for event in events(complete(http, stream=True, **{name: "my-id_1"}))} == {"my-id_1"}
    assert complete(http).json()["id"] != complete(http).json()["id"]


def test_lone_line_separators_do_not_break_events(http: httpx.Client) -> None:
    """U+2028, carriage returns and line breaks in a text stay inside their event's JSON."""
    texts = ["a\u2028b", "a\rb", "a\n\ndata: [DONE]\n\nb", "a\0b"]
    streamed = ["", "", "", ""]
    for event in events(complete(http, prompt=texts, echo=True, stream=True)):
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    whole = [choice["text"] for choice in complete(http, prompt=texts, echo=True).json()["choices"]]
    assert streamed == whole
    assert all(whole[i].startswith(text) for i, text in enumerate(texts))


# --- models


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    model = client.models.retrieve("stories260K")
    assert (model.id, model.object, model.owned_by) == ("stories260K", "model", "sapwood")
    assert [model.id for model in client.models.list()] == ["stories260K"]
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_a_served_name_with_a_slash(serve_stories: Callable[..., LiveServer]) -> None:
    http = serve_stories(served_model_name="org/tales").client
    assert http.get("/v1/models/org/tales").json()["id"] == "org/tales"
    assert http.get("/v1/models/org%2Ftales").json()["id"] == "org/tales"
    assert complete(http, model="org/tales").json()["model"] == "org/tales"
    assert "'org/tales'" in problem(complete(http, model="tales"), 404, "model", "model_not_found")


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_another_model(route: str, http: httpx.Client) -> None:
    body = {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": MESSAGES}, "/tokenize": {"prompt": "x"}}
    data = body.get(route, {"tokens": [1]})
    for model in ("gpt-5", "", "STORIES260K", "stories260K "):
        for stream in ({}, {"stream": True}) if route in (COMPLETIONS, CHAT) else ({},):
            response = http.post(route, json=data | {"model": model} | stream)
            assert "stories260K" in problem(response, 404, "model", "model_not_found")


def test_the_openai_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="stories260K", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])


def test_a_working_template_is_the_one_of_the_settings(http: httpx.Client, truth: Engine) -> None:
    assert truth.tokenizer is not None
    tokens = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = truth.tokenizer.apply_chat_template(MESSAGES)
    assert text == "<s>system: Be kind.\nuser: Tell me of Lily.\nassistant:"
    assert tokens == truth.tokenizer.encode(text, add_special_tokens=False)
    assert "assistant:" in TEMPLATE


def test_json_is_what_a_client_gets(http: httpx.Client) -> None:
    for response in (complete(http), chat(http)):
        assert response.headers["content-type"] == "application/json"
        assert int(response.headers["content-length"]) == len(response.content)
        assert json.loads(response.content)["object"]
