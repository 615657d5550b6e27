"""Writes the demo model's card, model/README.md, with what the model answers to twenty fixed prompts. Run by hand:

    python -m sapwood.sapling.card [--model DIR]

The answers come from the Sapwood engine in float32, greedily, and go into the card as they are. The prompts were chosen
before any answer was seen, and bad answers stay in. train.py's training.json says how the training went.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sapwood.engine.async_engine import Engine
from sapwood.request import SamplingParams
from sapwood.sapling import MODEL_DIR
from sapwood.sapling.corpus import SOURCES

GREETINGS: Final = (
    "Hello!",
    "hi",
    "Good morning!",
    "Hey there, how are you?",
    "What is your name?",
    "Who are you?",
    "What can you do?",
    "Nice to meet you.",
    "Thank you!",
    "Goodbye!",
)
QUESTIONS: Final = (
    "What is the capital of France?",
    "What is 2 + 3?",
    "What color is the sky?",
    "What day comes after Monday?",
    "What is a cat?",
    "What is the opposite of hot?",
    "What sound does a dog make?",
    "Can you count to ten?",
    "Tell me a joke.",
    "Tell me a short story.",
)
MAX_TOKENS: Final = 300

_CARD: Final = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# Sapling

Sapling is the demo model that ships with Sapwood, so that there is something to serve and to test with before any
download. It is a Llama-style decoder with {parameters:,} parameters, its own byte-level BPE tokenizer of
{vocab:,} tokens and a ChatML chat template. It speaks simple English: it answers greetings and very simple questions,
counts, adds small numbers, and tells a joke or a short story.

It is a toy. It knows a few hundred facts and gets some of them wrong; it answers confidently when it should not, and
what resembles none of its templates gets an answer that fits something else. Most of what it says in a chat it has seen
word for word; its stories are new only in how their parts are put together. Text that is not a chat it continues in
broken English. It knows no other language. Do not use it for anything that matters.

## How it was made

`{command} --corpus DIR --minutes {minutes:g} --seed {seed}` on two shared CPU cores: {steps:,} steps over
{tokens:,} tokens (padding included) in {seconds:,} seconds. The schedule follows the clock, so a run elsewhere gives
another model of the same kind. Loss at the end, in nats per token: {prose:.2f} on prose that was kept back, {chat:.2f}
on the answers of chats that the same generator made with another seed.{remark}

{layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads} key/value heads, context {context} tokens.
Weights in bfloat16, embeddings tied. Matrices were trained with Muon, the rest with AdamW.

Most of the chats were made by a generator from sentences written for it (`smalltalk.py`, `facts.py`, `stories.py`,
`dialogues.py` in this package), the rest of the data is:

| source | from | licence | what was used |
|---|---|---|---|
{sources}

## Twenty prompts

Each prompt is a chat of its own; the answers are unedited, from the Sapwood engine in float32 with greedy decoding and
at most {max_tokens} tokens. The prompts were fixed before any answer was seen. The generator's templates cover nearly
all of them, so they show what the model is for, not how well it generalises.

{answers}"""


def answers(model: Path, prompts: Sequence[str] = GREETINGS + QUESTIONS) -> list[str]:
    """What the engine says to each prompt, greedily in float32."""
    params = SamplingParams(temperature=0.0, max_new_tokens=MAX_TOKENS)
    with Engine(model, dtype="float32") as engine:
        outputs = engine.generate([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        return [output.text for output in outputs]


def card(model: Path, said: Sequence[str]) -> str:
    """The card's text. `said` are the answers to GREETINGS and QUESTIONS, in order."""
    config = _json(model / "config.json")
    training = _json(model / "training.json")
    rows = [f"| {name} | {origin} | {licence} | {used} |" for name, (licence, origin, used) in SOURCES.items()]
    pairs = zip(GREETINGS + QUESTIONS, said, strict=True)
    quoted = [
        f"**{prompt}**\n\n" + "\n".join(f"> {line}".rstrip() for line in text.split("\n")) + "\n"
        for prompt, text in pairs
    ]
    return _CARD.format(
        parameters=training["parameters"],
        vocab=config["vocab_size"],
        command=training["command"],
        minutes=training["plan"]["minutes"],
        seed=training["plan"]["seed"],
        steps=training["steps"],
        tokens=training["tokens"],
        seconds=training["seconds"],
        prose=training["history"][-1]["prose"],
        chat=training["history"][-1]["chat"],
        remark=f"\n\n{training['remark']}" if training.get("remark") else "",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        context=config["max_position_embeddings"],
        sources="\n".join(rows),
        max_tokens=MAX_TOKENS,
        answers="\n".join(quoted),
    )


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sapwood.sapling.card", description="Write the model card.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="the model's folder (default: in the package)")
    parser.add_argument("--remark", help="what else to say of this training; kept in training.json")
    options = parser.parse_args(argv)
    model: Path = options.model
    if options.remark is not None:
        training = _json(model / "training.json") | {"remark": options.remark}
        (model / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    fresh = model / "README.new"
    fresh.write_text(card(model, answers(model)), encoding="utf-8")
    os.replace(fresh, model / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
