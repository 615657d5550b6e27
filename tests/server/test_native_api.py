"""server/native.py: SGLang's /generate, /tokenize and /detokenize, against an engine that no server has touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import events, problem
from live_server import LiveServer

from sapwood.engine.async_engine import Engine
from sapwood.engine.detokenizer import detokenize

PROMPT = "Once upon a time"
IDS = [1, 403, 407, 261, 378]  # PROMPT's
GREEDY = {"temperature": 0, "max_new_tokens": 8}
SAMPLED = {"temperature": 1, "sampling_seed": 3, "max_new_tokens": 8}


def generate(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/generate", json={"sampling_params": GREEDY} | body)


@pytest.mark.parametrize("prompt", [{"text": PROMPT}, {"input_ids": IDS}], ids=["text", "input_ids"])
def test_one_prompt(prompt: dict[str, Any], http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(IDS, GREEDY)
    answer = generate(http, rid="r1", **prompt).json()
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert (answer["text"], answer["output_ids"]) == (want.text, want.token_ids)
    meta = answer["meta_info"]
    assert meta["id"] == "r1"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (5, 8)
    assert meta["e2e_latency"] > 0
    assert "output_token_logprobs" not in meta


@pytest.mark.parametrize(
    "prompt",
    [{"text": [PROMPT, "Tim had"]}, {"input_ids": [IDS, [1, 5]]}, {"text": [PROMPT]}],
    ids=["texts", "input_ids", "a list of one"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_list(prompt: dict[str, Any], stream: bool, http: httpx.Client, truth: Engine) -> None:
    (prompts,) = prompt.values()
    want = truth.generate(prompts, GREEDY)
    if stream:
        answers: dict[int, Any] = {}
        for event in events(generate(http, stream=True, **prompt)):
            answers[event["index"]] = event
        assert list(range(len(prompts))) == sorted(answers)
    else:
        answers = dict(enumerate(generate(http, **prompt).json()))
    assert [answers[i]["text"] for i in range(len(prompts))] == [output.text for output in want]
    assert [answers[i]["output_ids"] for i in range(len(prompts))] == [output.token_ids for output in want]


def test_a_stream_holds_the_text_so_far(http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(PROMPT, GREEDY | {"return_logprob": True})
    bodies = events(generate(http, text=PROMPT, stream=True, return_logprob=True))
    assert [body["output_ids"] for body in bodies] == [want.token_ids[: i + 1] for i in range(8)]
    assert all(later["text"].startswith(body["text"]) for body, later in zip(bodies, bodies[1:], strict=False))
    assert bodies[-1]["text"] == want.text
    assert [body["meta_info"]["completion_tokens"] for body in bodies] == list(range(1, 9))
    assert [body["meta_info"]["finish_reason"] for body in bodies[:-1]] == [None] * 7
    assert bodies[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    last = bodies[-1]["meta_info"]["output_token_logprobs"]
    assert [(entry[0], entry[1]) for entry in last] == list(zip(want.logprobs, want.token_ids, strict=True))
    assert len(bodies[0]["meta_info"]["output_token_logprobs"]) == 1
    assert "index" not in bodies[0]


def test_a_stream_of_what_is_new(serve_stories: Callable[..., LiveServer], truth: Engine) -> None:
    http = serve_stories(incremental_streaming_output=True).client
    want = truth.generate([PROMPT, "Tim had"], GREEDY | {"return_logprob": True})
    texts, ids, logprobs = ["", ""], [[], []], [[], []]  # type: ignore[var-annotated]
    for body in events(generate(http, text=[PROMPT, "Tim had"], stream=True, return_logprob=True)):
        texts[body["index"]] += body["text"]
        ids[body["index"]] += body["output_ids"]
        logprobs[body["index"]] += [entry[0] for entry in body["meta_info"]["output_token_logprobs"]]
    assert texts == [output.text for output in want]
    assert ids == [output.token_ids for output in want]
    assert logprobs == [output.logprobs for output in want]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_have_places_of_their_own(stream: bool, http: httpx.Client, truth: Engine) -> None:
    params: list[dict[str, Any]] = [SAMPLED | {"n": 3}, SAMPLED, SAMPLED | {"n": 2}]
    ours = [{"temperature": 1, "seed": 3, "max_new_tokens": 8, "n": p.get("n", 1)} for p in params]
    want = truth.generate([PROMPT, "Tim", PROMPT], ours)
    body = {"text": [PROMPT, "Tim", PROMPT], "sampling_params": params}
    if stream:
        found = {event["index"]: event["text"] for event in events(generate(http, stream=True, **body))}
    else:
        found = {i: answer["text"] for i, answer in enumerate(generate(http, **body).json())}
    assert found == {i: output.text for i, output in enumerate(want)}
    # One prompt's choices are a list, too.
    single = generate(http, text=PROMPT, sampling_params=params[0], stream=stream)
    texts = {event["index"]: event["text"] for event in events(single)} if stream else None
    assert (texts or dict(enumerate(answer["text"] for answer in single.json()))) == {i: found[i] for i in range(3)}


def test_each_prompt_may_have_its_own_sampling(http: httpx.Client) -> None:
    answer = generate(http, text=["Once", "Once"], sampling_params=[{"max_new_tokens": 2}, {"max_new_tokens": 5}])
    assert [len(one["output_ids"]) for one in answer.json()] == [2, 5]
    for params in ([], [GREEDY], [GREEDY] * 3):
        assert problem(generate(http, text=["Once", "Once"], sampling_params=params), 400, "sampling_params")
    assert problem(generate(http, text="Once", sampling_params=[GREEDY]), 400, "sampling_params")
    error = generate(http, text=["a", "b"], sampling_params=[{}, {"temperatur": 1}])
    assert "'temperature'" in problem(error, 400, "sampling_params[1].temperatur", "unknown_field")


def test_log_probabilities(http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(PROMPT, GREEDY | {"return_logprob": True})
    for with_text in (False, True):
        answer = generate(http, text=PROMPT, return_logprob=True, return_text_in_logprobs=with_text).json()
        found = answer["meta_info"]["output_token_logprobs"]
        assert [entry[0] for entry in found] == want.logprobs
        assert [entry[1] for entry in found] == want.token_ids
        assert "".join(entry[2] or "" for entry in found) == (want.text if with_text else "")
    # What sglang's own benchmark sends with it.
    extra = {"logprob_start_len": -1, "lora_path": "", "return_routed_experts": False, "top_logprobs_num": 0}
    assert generate(http, text=PROMPT, return_logprob=True, **extra).status_code == 200


def test_stops_are_told(http: httpx.Client, truth: Engine) -> None:
    for stop, matched in (({"stop": [" little", "x x"]}, " little"), ({"stop_token_ids": [376]}, 376)):
        want = truth.generate(PROMPT, {"temperature": 0, **stop})
        answer = generate(http, text=PROMPT, sampling_params={"temperature": 0, **stop}).json()
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
        assert answer["text"] == want.text
        streamed = events(generate(http, text=PROMPT, sampling_params={"temperature": 0, **stop}, stream=True))
        assert streamed[-1]["text"] == want.text
        assert streamed[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}


def test_defaults(http: httpx.Client, truth: Engine) -> None:
    want = truth.generate(PROMPT, {"ignore_eos": True})
    for params in ({"ignore_eos": True}, {"ignore_eos": True, "temperature": None, "max_tokens": None, "regex": None}):
        assert generate(http, text=PROMPT, sampling_params=params).json()["output_ids"] == want.token_ids
    assert len(want.token_ids) == 128  # SGLang's default
    assert http.post("/generate", json={"text": "Once", "sampling_params": None}).status_code == 200
    seeded = generate(http, text=PROMPT, sampling_params={"temperature": 1, "max_new_tokens": 20}).json()
    again = {"temperature": 1, "max_new_tokens": 20, "seed": seeded["meta_info"]["seed"]}
    assert generate(http, text=PROMPT, sampling_params=again).json()["text"] == seeded["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": None, "input_ids": None}, "text"),
        ({"text": []}, "text"),
        ({"text": 5}, "text"),
        ({"text": ["a", 5]}, "text[1]"),
        ({"text": "x " * 900}, "text"),
        ({"text": "x " * 1900}, "text"),
        ({"text": ["x " * 1900]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": "a"}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids[0]"),
        ({"input_ids": [1, True]}, "input_ids[1]"),
        ({"input_ids": ["a"]}, "input_ids[0]"),
        ({"input_ids": [[1], ["a"]]}, "input_ids[1]"),
        ({"input_ids": [{"role": "user", "content": "a"}]}, "input_ids[0]"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [512]}, "input_ids"),
        ({"input_ids": [2**80]}, "input_ids"),
        ({"input_ids": [5] * 512}, "input_ids"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": "a", "rid": "a\nb"}, "rid"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "return_logprob": 1}, "return_logprob"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": "5"}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_tokens": "5"}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"sampling_seed": 1.5}}, "sampling_params.sampling_seed"),
        ({"text": "a", "sampling_params": {"stop": [1]}}, "sampling_params.stop[0]"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": {"n": 10**9}}, "n"),
        ({"text": "a", "priority": "high"}, "priority"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_generated(body: dict[str, Any], param: str, stream: bool, http: httpx.Client) -> None:
    response = http.post("/generate", json={"stream": stream} | body)
    assert problem(response, 400, param)


@pytest.mark.parametrize("name", ["regex", "json_schema", "ebnf"])
def test_what_later_versions_can(name: str, http: httpx.Client) -> None:
    response = generate(http, text="a", sampling_params={name: "a"})
    assert problem(response, 400, f"sampling_params.{name}", "unsupported")


# --- tokens and text


def test_tokenize(http: httpx.Client, truth: Engine) -> None:
    assert truth.tokenizer is not None
    encode = truth.tokenizer.encode
    answer = http.post("/tokenize", json={"prompt": PROMPT, "model": "stories260K"}).json()
    assert answer == {"tokens": IDS, "count": 5, "max_model_len": 512}
    for text in ("", "日本語 🦙", "a\0b", "x " * 5000):
        answer = http.post("/v1/tokenize", json={"prompt": text}).json()
        assert answer["tokens"] == encode(text)
        assert answer["count"] == len(answer["tokens"])
    bare = http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
    assert bare["tokens"] == IDS[1:]
    several = http.post("/tokenize", json={"prompt": [PROMPT, ""], "return_token_strs": True}).json()
    assert several["tokens"] == [IDS, [1]]
    assert several["count"] == [5, 1]
    assert several["token_strs"] == [["<s>", " Once", " upon", " a", " time"], ["<s>"]]


def test_tokenize_messages(http: httpx.Client, truth: Engine) -> None:
    assert truth.tokenizer is not None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for options in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        text = truth.tokenizer.apply_chat_template(messages, **options)
        answer = http.post("/tokenize", json={"messages": messages, **options}).json()
        assert answer["tokens"] == truth.tokenizer.encode(text, add_special_tokens=False)
        assert answer["count"] == len(answer["tokens"])


def test_detokenize(http: httpx.Client) -> None:
    def text(**body: Any) -> Any:
        answer = http.post("/detokenize", json=body).json()
        assert set(answer) == {"text", "prompt"}  # SGLang's name, and vLLM's
        assert answer["text"] == answer["prompt"]
        return answer["text"]

    assert text(tokens=IDS) == "<s> Once upon a time"
    assert text(tokens=IDS, skip_special_tokens=True) == PROMPT
    assert text(tokens=[IDS, [], [403]]) == ["<s> Once upon a time", "", "Once"]
    assert text(tokens=[]) == ""
    llama = http.post("/tokenize", json={"prompt": "🦙"}).json()["tokens"]
    assert text(tokens=llama, skip_special_tokens=True) == "🦙"
    assert "\N{REPLACEMENT CHARACTER}" in text(tokens=llama[:-1])
    assert http.post("/v1/detokenize", json={"tokens": [403]}).json()["text"] == "Once"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a", 5]}, "prompt[1]"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": None}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.0]}, "tokens[0]"),
        ("/detokenize", {"tokens": [[1], 2]}, "tokens[1]"),
        ("/detokenize", {"tokens": [[1], [2.5]]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [[2**80]]}, "tokens"),
    ],
    ids=str,
)
def test_what_is_no_text_and_no_tokens(route: str, body: dict[str, Any], param: str, http: httpx.Client) -> None:
    assert problem(http.post(route, json=body), 400, param)


def test_round_trip_of_generated_tokens(http: httpx.Client, truth: Engine) -> None:
    assert truth.tokenizer is not None
    answer = generate(http, text=PROMPT, sampling_params=SAMPLED | {"max_new_tokens": 100}).json()
    assert detokenize(truth.tokenizer, answer["output_ids"]) == answer["text"]
    whole = http.post("/detokenize", json={"tokens": IDS + answer["output_ids"], "skip_special_tokens": True}).json()
    assert whole["text"] == PROMPT + answer["text"]


# --- without a tokenizer


def test_a_server_of_token_ids_alone(serve_stories: Callable[..., LiveServer], truth: Engine) -> None:
    http = serve_stories(skip_tokenizer_init=True, chat_template=None).client
    want = truth.generate(IDS, GREEDY)
    answer = generate(http, input_ids=IDS, return_logprob=True, return_text_in_logprobs=True).json()
    assert set(answer) == {"output_ids", "meta_info"}
    assert answer["output_ids"] == want.token_ids
    assert answer["meta_info"]["output_token_logprobs"][0][2] == f"token_id:{want.token_ids[0]}"
    assert events(generate(http, input_ids=IDS, stream=True))[-1]["output_ids"] == want.token_ids
    completion = http.post("/v1/completions", json={"prompt": IDS, "max_tokens": 2, "temperature": 0, "logprobs": 0})
    assert completion.json()["choices"][0]["text"] == ""
    assert completion.json()["usage"]["completion_tokens"] == 2
    for route, body, param in (
        ("/generate", {"text": "a"}, "text"),
        ("/generate", {"input_ids": [1], "sampling_params": {"stop": "a"}}, "stop"),
        ("/v1/completions", {"prompt": "a"}, "prompt"),
        ("/v1/completions", {"prompt": [1], "echo": True}, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "a"}, None),
        ("/detokenize", {"tokens": [1]}, None),
    ):
        assert "tokenizer" in problem(http.post(route, json=body), 400, param)
