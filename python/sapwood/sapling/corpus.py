"""Reads the training corpus: a folder of gzip-compressed JSON lines, into prose and into the facts dialogues.py uses.

The folder is described by its own LICENSES.md; the model card (card.py) repeats the attributions of `SOURCES`, which
are those that are read here. A source that is absent is skipped with a logged reason, since each adds something of its
own and none is needed by the others.
"""

from __future__ import annotations

import collections
import gzip
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sapwood.sapling.dialogues import Knowledge
from sapwood.sapling.smalltalk import PERSONA

log = logging.getLogger(__name__)

# file stem: (licence, where it comes from, what is taken from it)
SOURCES: Final = {
    "gutenberg_books": (
        "public domain in the USA",
        "Project Gutenberg, by way of GITenberg",
        "the text of 25 books, most of them for children",
    ),
    "chitchat_qna": (
        "MIT",
        "microsoft/botframework-cli, the friendly persona",
        "the many ways people say the same thing",
    ),
    "country_facts": ("MIT", "samayo/country-json", "the continent of each country"),
    "cc0_fact_lists": ("CC0-1.0", "dariusk/corpora", "the capital of each country"),
    "wordnet_definitions": (
        "CC-BY-4.0 and WordNet License",
        "globalwordnet/english-wordnet, after Princeton WordNet",
        "definitions of common nouns with one meaning",
    ),
}
# Too long or too far from simple English for so small a model.
_LEFT_OUT: Final = frozenset({"War and Peace", "Pride and Prejudice"})
_STRAIGHT: Final = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "_": None, "—": " - ", "\u00a0": " ", "\ufeff": None}
)
_UNSUITABLE: Final = re.compile(
    r"\b(sex\w*|fart|poop|pee|porn|naked|nude|hell|damn|shit|fuck\w*|ass|asshole|bitch|suck\w*|stupid|idiot|kill|die|dead|gay|"
    r"lesbian|straight|hot|horny|kiss|bed|virgin|drunk|drugs?|hitler|nazi|race|racist|religio\w+|god|jesus|allah|democrat|"
    r"republican|trump|obama|clinton|politic\w*|fat|ugly|hate|editorial|freaking|crap|vomit|puke|bowels)\b",
    re.IGNORECASE,
)
_NOUN_FIELDS: Final = frozenset(
    {"noun.artifact", "noun.animal", "noun.plant", "noun.person", "noun.object", "noun.location"}
)
_NAMES: Final = {
    "United States Of America": "United States", "The Netherlands": "Netherlands", "The Philippines": "Philippines",
    "Congo Democratic Republic": "Democratic Republic of Congo",
}  # fmt: skip
_TITLES: Final = (
    "chapter",
    "contents",
    "illustration",
    "produced by",
    "transcriber",
    "project gutenberg",
    "***",
    "copyright",
)


def records(folder: Path, source: str) -> Iterator[dict[str, Any]]:
    """The records of <folder>/<source>.jsonl.gz; none, and a warning, where there is no such file."""
    path = folder / f"{source}.jsonl.gz"
    if not path.is_file():
        log.warning("%s is skipped: no file %s", source, path)
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def paragraphs(text: str) -> list[str]:
    """A book's paragraphs: hard line breaks undone, quotes straightened, headings and verse-like scraps left out."""
    found = []
    for block in re.split(r"\n\s*\n", text.translate(_STRAIGHT)):
        line = " ".join(block.split())
        prose = len(line) >= 20 and line[-1] in ".!?\"'" and not line.isupper() and not line.startswith(("[", "*", "|"))
        if prose and not line.lower().startswith(_TITLES):
            found.append(line)
    return found


def prose(folder: Path) -> list[str]:
    """Documents of a few pages each, a blank line between paragraphs."""
    documents = []
    for book in records(folder, "gutenberg_books"):
        if book["title"] in _LEFT_OUT:
            continue
        part: list[str] = []
        for paragraph in paragraphs(book["text"]):
            part.append(paragraph)
            if sum(map(len, part)) > 6000:
                documents.append("\n\n".join(part))
                part = []
        if part:
            documents.append("\n\n".join(part))
    return documents


def knowledge(folder: Path, documents: list[str]) -> Knowledge:
    """The facts; which nouns are common is counted in `documents`."""
    capitals = _capitals(folder)
    continents = {
        r["country"]: r["continent"]
        for r in records(folder, "country_facts")
        if r["country"] in capitals and r.get("continent")
    }
    return Knowledge(capitals, continents, _definitions(folder, documents), _small_talk(folder))


def _capitals(folder: Path) -> dict[str, str]:
    for record in records(folder, "cc0_fact_lists"):
        if record["path"].endswith("countries_with_capitals.json"):
            rows = next(value for value in record["data"].values() if isinstance(value, list))
            return {_NAMES.get(row["name"], row["name"]): row["capital"] for row in rows if row.get("capital")}
    return {}


def _definitions(folder: Path, documents: list[str], most: int = 400) -> dict[str, str]:
    """The `most` most frequent nouns that have one sense, so that its definition is the one that is meant."""
    senses: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for record in records(folder, "wordnet_definitions"):
        for word in record["words"]:
            senses[word].append(record)
    # After an article: a verb's form that happens to be some rare noun too ("shook") is not counted.
    counts = collections.Counter(
        word for text in documents for word in re.findall(r"\b(?:an?|the|my|his) ([a-z]+)\b", text)
    )
    defined: dict[str, str] = {}
    for word, count in counts.most_common():
        if count < 3 or len(defined) == most:
            break
        if len(senses[word]) != 1 or len(word) < 3:
            continue
        [sense] = senses[word]
        meaning = sense["definition"].split(";")[0].split(" (")[0].strip()
        countable = meaning.startswith(("a ", "an ", "any ", "someone ", "the "))
        fits = sense["pos"] == "n" and sense["lex"] in _NOUN_FIELDS and countable and len(meaning) < 100
        if fits and not _UNSUITABLE.search(f"{meaning} {word}"):
            defined[word] = meaning
    return defined


def _small_talk(folder: Path) -> tuple[tuple[tuple[str, ...], str], ...]:
    """(phrasings, Sapling's answer) of every group of the chitchat corpus's questions that PERSONA has an answer to."""
    found = []
    for record in records(folder, "chitchat_qna"):
        answers = [ours for theirs, ours in PERSONA if record["answer"].startswith(theirs)]
        questions = tuple(
            q.translate(_STRAIGHT)
            for q in record["questions"]
            if len(q) < 70 and not _UNSUITABLE.search(q) and "name" not in q.lower()
        )
        if record["persona"] == "friendly" and answers and questions:
            found.append((questions, answers[0]))
    return tuple(found)
