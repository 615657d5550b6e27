"""The bundled demo model: transformers gives the engine's tokens, and the card's answers are the model's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from sapwood import Engine, SamplingParams
from sapwood.request import ChatPrompt
from sapwood.sapling import MODEL_DIR
from sapwood.sapling.card import GREETINGS, MAX_TOKENS, QUESTIONS, answers, card

MAX_BYTES = 12 * 2**20
PROMPTS = GREETINGS + QUESTIONS


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(MODEL_DIR, dtype="float32") as running:
        yield running


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_it_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    wanted = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert {*wanted.split()} <= set(files)
    assert 1_000_000 < sum(files.values()) <= MAX_BYTES


def test_the_chat_template_gives_the_same_ids(engine: Engine, hf_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello! 😀 日本 12345\n\n  indented"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What is 2 + 3?"},
    ]
    text = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert engine.tokenizer is not None
    assert list(engine.tokenizer.encode_chat(ChatPrompt(messages=messages))) == ids
    assert hf_tokenizer.decode(ids) == text


def test_transformers_gives_the_same_greedy_tokens(engine: Engine, hf_tokenizer: Any) -> None:
    """For every prompt of the card, in float32, up to and including the token that ends the answer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    outputs = engine.generate(
        [chat(prompt) for prompt in PROMPTS], SamplingParams(temperature=0.0, max_new_tokens=MAX_TOKENS)
    )
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = hf_tokenizer.apply_chat_template(chat(prompt), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([hf_tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
        assert output.token_ids == whole[0, ids.shape[1] :].tolist(), prompt


def test_the_decoder_that_was_trained_is_the_llama_that_is_exported(hf_tokenizer: Any) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from sapwood.sapling.network import IGNORED, Decoder, Shape

    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    shape = Shape(**{field.name: config[field.name] for field in dataclasses.fields(Shape)})
    ours = Decoder(shape)
    weights = load_file(MODEL_DIR / "model.safetensors")
    ours.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    ids = torch.tensor([hf_tokenizer("Once upon a time there was a little mouse. It lived by the river.")["input_ids"]])
    targets = torch.cat((ids[:, 1:], torch.full((1, 1), IGNORED)), dim=1)
    with torch.no_grad():
        reference = theirs(ids, labels=ids)
        torch.testing.assert_close(ours(ids), reference.logits, atol=1e-4, rtol=1e-4)
        total, count = ours.loss(ids, targets)
    assert count == ids.shape[1] - 1
    torch.testing.assert_close(total / count, reference.loss)


def test_the_card_says_what_the_engine_says() -> None:
    assert (MODEL_DIR / "README.md").read_text(encoding="utf-8") == card(MODEL_DIR, answers(MODEL_DIR))


def test_it_ends_its_greetings_by_itself(engine: Engine) -> None:
    outputs = engine.generate(
        [chat(prompt) for prompt in GREETINGS], SamplingParams(temperature=0.0, max_new_tokens=100)
    )
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert all(2 < len(output.text) < 300 for output in outputs)
