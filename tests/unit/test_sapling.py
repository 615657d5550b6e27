"""The demo model's scripts: the chats they make, the corpus they read, the tokenizer and a training of seconds."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sapwood.chat.template import ChatTemplate
from sapwood.sapling import MODEL_DIR, NAME, corpus, facts
from sapwood.sapling.dialogues import Dialogues, Knowledge, Message, article, phrase
from sapwood.sapling.smalltalk import OUT_OF_SCOPE, PERSONA, REFUSALS, SMALL_TALK
from sapwood.sapling.stories import story

KNOWLEDGE = Knowledge(
    capitals={"France": "Paris", "United States": "Washington", "Japan": "Tokyo"},
    continents={"France": "Europe"},
    definitions={"ladder": "a set of steps", "dog": "metal supports for logs"},
    small_talk=((("How goes it?", "You ok?"), "I am fine, thank you."),),
)


def chats(seed: int, count: int, knowledge: Knowledge = KNOWLEDGE) -> list[list[Message]]:
    return list(itertools.islice(Dialogues(knowledge).conversations(seed), count))


def exchanges(seed: int, count: int, knowledge: Knowledge = KNOWLEDGE) -> list[tuple[str, str]]:
    """(question, answer) of that many chats."""
    found = []
    for chat in chats(seed, count, knowledge):
        spoken = [message["content"] for message in chat if message["role"] != "system"]
        found.extend(zip(spoken[::2], spoken[1::2], strict=True))
    return found


def test_the_package_names_the_model_and_its_folder() -> None:
    assert NAME == "sapling"
    assert MODEL_DIR.is_absolute() and MODEL_DIR.parent.name == "sapling"


# Chats.
def test_a_seed_gives_the_same_chats() -> None:
    assert chats(5, 200) == chats(5, 200)
    assert chats(5, 200) != chats(6, 200)
    reordered = Knowledge(
        dict(reversed(KNOWLEDGE.capitals.items())), KNOWLEDGE.continents, KNOWLEDGE.definitions, KNOWLEDGE.small_talk
    )
    assert chats(5, 200, reordered) == chats(5, 200)


def test_chats_alternate_and_say_something() -> None:
    lengths = set()
    for chat in chats(1, 2000):
        roles = [message["role"] for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() and "{" not in message["content"] for message in chat)
        lengths.add(len(turns) // 2)
    assert {1, 2, 3, 4, 8} <= lengths


def test_sums_are_right() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    found = [re.fullmatch(r"(\d+) ([+x-]) (\d+) = (\d+)", answer) for _, answer in exchanges(2, 3000)]
    sums = [match.groups() for match in found if match]
    assert {sign for _, sign, _, _ in sums} == set("+-x") and len(sums) > 300
    for a, sign, b, result in sums:
        assert operations[sign](int(a), int(b)) == int(result)


def test_numbers_and_days_follow_each_other() -> None:
    days = {f"{b} comes after {a}." for a, b in itertools.pairwise([*facts.DAYS, facts.DAYS[0]])}
    months = {f"{b} comes after {a}." for a, b in itertools.pairwise([*facts.MONTHS, facts.MONTHS[0]])}
    after = {answer for _, answer in exchanges(3, 6000) if " comes after " in answer}
    numbers = {answer for answer in after if answer[0].isdigit()}
    assert after - numbers == days | months
    for answer in numbers:
        b, a = re.findall(r"\d+", answer)
        assert int(b) == int(a) + 1


def test_facts_come_from_the_knowledge_and_only_from_there() -> None:
    answers = {answer for _, answer in exchanges(4, 6000)}
    assert "The capital of Japan is Tokyo." in answers and "Tokyo is the capital of Japan." in answers
    assert "The capital of the United States is Washington." in answers
    assert "A ladder is a set of steps." in answers
    # What the tables explain is not explained a second time.
    assert "A dog is metal supports for logs." not in answers
    assert not [a for _, a in exchanges(4, 2000, Knowledge()) if a.startswith("The capital of")]


def test_a_name_that_was_said_is_remembered() -> None:
    asked = 0
    for chat in chats(6, 2000):
        for at, message in enumerate(chat):
            if match := re.fullmatch(r"Your name is (\w+)\.", message["content"]):
                asked += 1
                assert match[1].lower() in " ".join(m["content"].lower() for m in chat[: at - 1])
    assert asked > 100


def test_opposites_and_tables_do_not_contradict_themselves() -> None:
    asked: dict[str, set[str]] = {}
    for _, answer in exchanges(7, 20_000):
        if match := re.fullmatch(r"The opposite of ([\w-]+) is ([\w-]+)\.", answer):
            asked.setdefault(match[1], set()).add(match[2])
    assert len(asked) > 100 and not {word: said for word, said in asked.items() if len(said) > 1}
    phrasings = [question for questions, _ in facts.TRIVIA for question in questions.split("|")]
    assert len(phrasings) == len(set(phrasings))
    assert not set(phrasings) & set(OUT_OF_SCOPE)
    assert all(intent.questions and intent.answers and intent.weight > 0 for intent in SMALL_TALK)


def test_what_it_does_not_know_it_says() -> None:
    answers = dict(exchanges(8, 5000))
    asked = [question for question in answers if "quantum physics" in question.lower()]
    assert asked and {answers[question] for question in asked} <= set(REFUSALS)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("cat", "a cat"), ("apple", "an apple"), ("Egg", "an Egg"), ("unicorn", "a unicorn"), ("European", "a European")],
)
def test_articles(noun: str, expected: str) -> None:
    assert article(noun) == expected


def test_a_phrase_keeps_its_words() -> None:
    random = Random(0)
    phrased = [phrase(random, "what color is the sky") for _ in range(500)]
    assert len(set(phrased)) > 30
    near = [p for p in phrased if "sky" in p.lower() and "color" in p.lower()]
    assert len(near) > 450  # the others have a slip


def test_a_story_is_about_whom_it_should_be() -> None:
    random = Random(0)
    told = {story(random, "owl") for _ in range(200)}
    assert len(told) > 190
    for text in told:
        match = re.search(r" an? \w+ owl named (\w+)\.", text)
        assert match and text.count(match[1]) >= 4
        assert len(text.split("\n\n")) == 3 and "{" not in text
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text)


# The corpus.
def write(folder: Path, source: str, records: list[dict[str, Any]]) -> None:
    with gzip.open(folder / f"{source}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_absent_sources_are_skipped_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert corpus.prose(tmp_path) == []
        assert corpus.knowledge(tmp_path, []) == Knowledge()
    for source in corpus.SOURCES:
        assert f"{source} is skipped: no file {tmp_path / source}.jsonl.gz" in caplog.text


def test_a_corpus_is_read(tmp_path: Path) -> None:
    book = "CHAPTER I\n\nThe “little” mouse\nlived in a _small_ burrow.\n\n[Illustration]\n\nShort\n\n" + "\n\n".join(
        f"She saw a burrow number {i} and went on." for i in range(400)
    )
    write(
        tmp_path,
        "gutenberg_books",
        [{"title": "A Mouse", "text": book}, {"title": "War and Peace", "text": "It is left out, all of it." * 9}],
    )
    write(
        tmp_path,
        "cc0_fact_lists",
        [
            {"path": "data/foods/tea.json", "data": {"tea": []}},
            {
                "path": "data/geography/countries_with_capitals.json",
                "data": {"countries": [{"name": "United States Of America", "capital": "Washington"}]},
            },
        ],
    )
    write(
        tmp_path,
        "country_facts",
        [{"country": "United States", "continent": "North America"}, {"country": "Atlantis", "continent": "Sea"}],
    )
    senses = [
        {"words": ["burrow"], "pos": "n", "definition": "a hole (in the ground); a home", "lex": "noun.object"},
        {"words": ["mouse"], "pos": "n", "definition": "a rodent", "lex": "noun.animal"},
        {"words": ["mouse"], "pos": "n", "definition": "a device", "lex": "noun.artifact"},
    ]
    write(tmp_path, "wordnet_definitions", senses)
    theirs, ours = PERSONA[0]
    small_talk = [
        {"persona": "friendly", "questions": ["You ok?", "Are you naked?", "My name?"], "answer": theirs + " at all."},
        {"persona": "witty", "questions": ["You there?"], "answer": theirs},
        {"persona": "friendly", "questions": ["Left or right?"], "answer": "An answer that Sapling has none for."},
    ]  # fmt: skip
    write(tmp_path, "chitchat_qna", small_talk)

    documents = corpus.prose(tmp_path)
    assert len(documents) == 3
    assert documents[0].startswith('The "little" mouse lived in a small burrow.\n\nShe saw a burrow number 0')
    assert corpus.knowledge(tmp_path, documents) == Knowledge(
        capitals={"United States": "Washington"},
        continents={"United States": "North America"},
        definitions={"burrow": "a hole"},
        small_talk=((("You ok?",), ours),),
    )


def test_the_real_corpus(data_dir: Path) -> None:
    folder = data_dir / "tiny_corpus"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the demo model's corpus")
    documents = corpus.prose(folder)
    assert 5_000_000 < sum(map(len, documents)) < 12_000_000
    known = corpus.knowledge(folder, documents)
    assert known.capitals["France"] == "Paris" and len(known.capitals) > 150
    assert known.continents["Japan"] == "Asia" and len(known.definitions) > 150 and len(known.small_talk) > 50
    assert set(facts.FAMOUS_COUNTRIES) <= set(known.capitals)
    # Each source's licence is the one the corpus gives.
    rows = [line.split(" | ") for line in (folder / "LICENSES.md").read_text("utf-8").splitlines() if " | " in line]
    licences = {row[0].removeprefix("permissive/"): row[4] for row in rows}
    for source, (licence, _, _) in corpus.SOURCES.items():
        assert licence.split()[0] == licences[source].split()[0]


# Tokenizer, batches and training; torch and tokenizers are not needed for serving.
@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch = pytest.importorskip("torch", reason="training needs torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is slower on several
    folder = tmp_path_factory.mktemp("corpus")
    random = Random(0)
    write(folder, "gutenberg_books", [{"title": "t", "text": "\n\n".join(story(random) for _ in range(120))}])
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("tokenizers")
    from sapwood.sapling.tokenizer import train_tokenizer

    random = Random(0)
    return train_tokenizer([*(story(random) for _ in range(50)), "123456 " * 99], 600)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "日本語のテキスト 中文 한국어",
        "👩‍👩‍👧‍👦 🤖é\u0301",
        " \n\n\ttabs  and   spaces ",
        "\x00\x01\x7f\x80ÿ",
        "مرحبا",
    ],
)
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_byte_is_in_the_alphabet_and_digits_stand_alone(tokenizer: Any) -> None:
    for code in (*range(0x110000 - 0x800, 0x110000), *range(0x3000)):
        if not tokenizer.encode(chr(code)).ids:
            pytest.fail(f"U+{code:04X} has no tokens")
    assert [len(token) for token in tokenizer.encode("123456").tokens] == [1] * 6
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi.\nHow are you?"},
    {"role": "user", "content": "assistant\nFine"},
    {"role": "assistant", "content": "Good."},
]


def test_rendering_is_what_the_chat_template_makes() -> None:
    pytest.importorskip("tokenizers")
    from sapwood.sapling.tokenizer import CHAT_TEMPLATE, render

    template = ChatTemplate({"default": CHAT_TEMPLATE}, {})
    assert render(CHAT) == template.render(CHAT, add_generation_prompt=False)
    assert template.render(CHAT[:2]).endswith("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")


def test_only_what_the_assistant_says_has_a_loss(tokenizer: Any) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    from sapwood.sapling.network import IGNORED
    from sapwood.sapling.train import encode_chat

    ids, targets = encode_chat(tokenizer, CHAT)
    assert len(ids) == len(targets)
    assert all(target in (IGNORED, following) for target, following in zip(targets, ids[1:], strict=False))
    counted = tokenizer.decode([target for target in targets if target != IGNORED], skip_special_tokens=False)
    assert counted == "Hi.\nHow are you?<|im_end|>Good.<|im_end|>"


def test_orthogonal_keeps_directions_and_evens_sizes() -> None:
    torch = pytest.importorskip("torch", reason="training needs torch")
    from sapwood.sapling.muon import orthogonal

    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 16)):
        matrix = torch.randn(shape)
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonal(matrix)
        assert result.shape == matrix.shape
        # In the matrix's own singular directions it is diagonal, with values near 1.
        inside = left.T @ result @ right.T
        values = inside.diagonal()
        torch.testing.assert_close(inside, torch.diag(values), atol=1e-4, rtol=0)
        assert 0.3 < values.min() and values.max() < 1.3 and values.std() < (sizes / sizes.max()).std() + 0.2


def test_a_training_of_seconds(small_corpus: Path, tmp_path: Path) -> None:
    """The loss falls, a resumed run goes on where the first ended, the export is complete and loads."""
    torch = pytest.importorskip("torch", reason="training needs torch")
    from sapwood.sapling.network import Shape
    from sapwood.sapling.train import Plan, train

    plan = Plan(
        steps=8, vocab_size=600, tokenizer_chats=100, passes=1, pass_tokens=512, widths=(32, 64, 256), chat_first=0.5
    )
    shape = Shape(0, 32, 64, 2, 4, 2, max_position_embeddings=256)
    work, out = tmp_path / "work", tmp_path / "out"
    first = train(small_corpus, work, out, plan, shape)
    assert first.step == 8 and first.tokens > 0 and first.progress == 1
    files = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json training.json"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())

    longer = Plan(**{**vars(plan), "steps": 24})
    second = train(small_corpus, work, out, longer, shape, resume=True)
    assert second.step == 24 and second.tokens > first.tokens
    assert [entry["step"] for entry in second.history] == [8, 24]
    for kind in ("prose", "chat"):
        start = torch.log(torch.tensor(float(second.model.shape.vocab_size))).item()
        assert second.history[1][kind] < second.history[0][kind] < start
    assert json.loads((out / "training.json").read_text())["steps"] == 24

    pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    from sapwood import Engine, SamplingParams

    with Engine(out, dtype="float32") as engine:
        prompt = second.tokenizer.encode("Once upon a time").ids
        output = engine.generate([prompt], SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True))[0]
    ids = torch.tensor([prompt])
    rounded = second.model.bfloat16().float()  # as exported
    for token in output.token_ids:
        logits = rounded(ids)[0, -1]
        assert logits[token] > logits.max() - 1e-4
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


def test_sigterm_ends_the_training_with_an_export(small_corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    from sapwood.sapling import train as training
    from sapwood.sapling.network import Shape

    class Terminated(training.Trainer):
        """Is sent the signal in its third step."""

        def _rate(self, progress: float) -> float:
            if self.step == 2:
                signal.raise_signal(signal.SIGTERM)
            return super()._rate(progress)

    plan = training.Plan(steps=1000, vocab_size=600, tokenizer_chats=50, passes=1, pass_tokens=512, widths=(64, 256))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Trainer", Terminated)
        shape = Shape(0, 16, 32, 1, 2, 1, max_position_embeddings=256)
        trainer = training.train(small_corpus, tmp_path / "work", tmp_path / "out", plan, shape)
    assert trainer.step == 3
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "work" / "checkpoint.pt").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_corpus_without_prose_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    from sapwood.sapling.network import Shape
    from sapwood.sapling.train import Plan, main, train

    with pytest.raises(SystemExit, match=r"corpus must be a folder with gutenberg_books\.jsonl\.gz, got .*no prose"):
        train(tmp_path, tmp_path / "work", tmp_path / "out", Plan(), Shape(0))
    with pytest.raises(SystemExit):
        main(["--corpus", str(tmp_path / "nowhere")])
