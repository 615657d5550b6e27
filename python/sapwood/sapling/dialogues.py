"""Chats made from templates of our own and from facts: what the model learns to answer.

train.py asks `Dialogues.conversations` for as many as it wants; corpus.py supplies the facts that come from data
(`Knowledge`). The same seed and knowledge give the same chats. One question has one right answer wherever there is one,
so that greedy decoding does not fall between several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from random import Random
from typing import Final

from sapwood.sapling import facts
from sapwood.sapling.smalltalk import OUT_OF_SCOPE, REFUSALS, SMALL_TALK, SYSTEM_PROMPTS, TOPICS
from sapwood.sapling.stories import story

Turn = tuple[str, str]  # what the user says, what the model answers
Skill = Callable[[Random], Turn]
Message = dict[str, str]  # {"role": ..., "content": ...}, as in a chat request


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """Facts from the corpus; any of them may be empty.

    capitals      country -> its capital
    continents    country -> its continent
    definitions   noun -> what WordNet says it is
    small_talk    phrasings, and the answer to all of them
    """

    capitals: dict[str, str] = dataclasses.field(default_factory=dict)
    continents: dict[str, str] = dataclasses.field(default_factory=dict)
    definitions: dict[str, str] = dataclasses.field(default_factory=dict)
    small_talk: tuple[tuple[tuple[str, ...], str], ...] = ()


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0].lower() in "aeiou" and not noun.startswith(("uni", "use", "Euro")) else f"a {noun}"


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop, unless it ends in some other mark."""
    text = text[:1].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def pick(random: Random, choices: str) -> str:
    """One of the choices, which are separated by |."""
    return random.choice(choices.split("|"))


_LEADS: Final = (
    "can you tell me ",
    "please tell me ",
    "tell me ",
    "do you know ",
    "hey, ",
    "hi, ",
    "so, ",
    "ok, ",
    "hello, ",
    "I want to know ",
)


def phrase(random: Random, question: str) -> str:
    """The question as somebody may type it: with or without capitals, a question mark, a lead, a please, a slip."""
    bare = question.rstrip("?.! ")
    text, mark = bare, question[len(bare) :].strip() or "?"
    if random.random() < 0.14:
        lead = random.choice(_LEADS)
        text = lead + (text if text.startswith("I ") else text[:1].lower() + text[1:])
    if random.random() < 0.06:
        text += random.choice((" please", ", please", " now", " for me"))
    style = random.random()
    if style < 0.62:
        text = text[:1].upper() + text[1:]
    elif style < 0.9:
        text = text.lower() if random.random() < 0.5 else text
    elif style < 0.93:
        text = text.upper()
    text = text.replace("what is", "what's", 1) if random.random() < 0.12 else text
    text = text.replace("What is", "What's", 1) if random.random() < 0.12 else text
    if random.random() < 0.03 and len(text) > 8:  # a slip of the fingers: two letters swapped
        at = random.randrange(1, len(text) - 2)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    ending = random.random()
    return text + (mark if ending < 0.68 else "" if ending < 0.92 else random.choice((".", "!", " ?", "??")))


class Dialogues:
    """Makes chats. Each method below `conversations` is a skill: a question in some phrasing, and its answer."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._know = knowledge
        # Sorted, so that the same facts in another order give the same chats.
        self._capitals = sorted(knowledge.capitals.items())
        self._continents = sorted(knowledge.continents.items())
        known = {*facts.ANIMALS, *facts.THINGS, *facts.STUFF}
        self._definitions = sorted((noun, said) for noun, said in knowledge.definitions.items() if noun not in known)
        # How often each skill comes up, relative to the others.
        weights: list[tuple[float, Skill]] = [
            (20, self.small_talk),
            (6, self.out_of_scope),
            (7, self.trivia),
            (3, self.story),
            (3, self.joke),
            (10, self.addition),
            (4, self.subtraction),
            (1.5, self.multiplication),
            (3, self.counting),
            (2, self.next_number),
            (2, self.compare_numbers),
            (4, self.opposite),
            (3, self.plural),
            (2, self.past),
            (4, self.color),
            (1, self.mix),
            (3, self.day),
            (2, self.month),
            (4, self.sound),
            (4, self.animal),
            (3, self.thing),
            (4, self.members),
            (4, self.is_a),
            (3, self.bigger),
            (3, self.spell),
            (2, self.echo),
            (3, self.introduction),
        ]
        if self._capitals:
            weights.append((6, self.capital))
        if self._continents:
            weights.append((2, self.continent))
        if self._definitions:
            weights.append((4, self.definition))
        if knowledge.small_talk:
            weights.append((9, self.corpus_small_talk))
        opposites: dict[str, str] = {}
        for one, other in facts.OPPOSITES:
            opposites.setdefault(one, other)
            opposites.setdefault(other, one)
        self._opposites = sorted(opposites.items())
        self._skills = [skill for _, skill in weights]
        self._weights = [weight for weight, _ in weights]

    def conversations(self, seed: int) -> Iterator[list[Message]]:
        """Chats without end: one to four exchanges, at times more, a fifth of them with a system message."""
        random = Random(seed)
        while True:
            turns: list[Turn] = []
            if random.random() < 0.14:
                turns.extend(self._memory(random))
            wanted = random.choices((1, 2, 3, 4, 8), (58, 20, 12, 8, 2))[0]
            while len(turns) < wanted:
                turns.append(random.choices(self._skills, self._weights)[0](random))
            messages: list[Message] = []
            if random.random() < 0.2:
                messages.append({"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
            for question, answer in turns:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            yield messages

    def _memory(self, random: Random) -> list[Turn]:
        """The user says a name, and asks for it later."""
        name = random.choice(facts.FIRST_NAMES)
        first = self.introduction(random, name)
        between = [random.choices(self._skills, self._weights)[0](random)] if random.random() < 0.4 else []
        between = [turn for turn in between if "name" not in turn[0].lower()]
        ask = phrase(random, pick(random, "what is my name|do you remember my name|who am I|what's my name"))
        return [first, *between, (ask, f"Your name is {name}.")]

    # Small talk.
    def small_talk(self, random: Random) -> Turn:
        intent = random.choices(SMALL_TALK, [intent.weight for intent in SMALL_TALK])[0]
        question = phrase(random, random.choice(intent.questions))
        return question, random.choice(intent.answers)

    def corpus_small_talk(self, random: Random) -> Turn:
        questions, answer = random.choice(self._know.small_talk)
        return phrase(random, random.choice(questions)), answer

    def introduction(self, random: Random, name: str = "") -> Turn:
        name = name or random.choice(facts.FIRST_NAMES)
        said = pick(
            random, "my name is {}.|I am {}.|I'm {}.|hi, I am {}.|hello, my name is {}.|call me {}.|hi! I'm {}!"
        )
        answer = random.choice(("Nice to meet you, {}!", "Hello, {}! Nice to meet you.")).format(name)
        return sentence(said.format(name)) if random.random() < 0.7 else said.format(name).lower(), answer

    def out_of_scope(self, random: Random) -> Turn:
        if random.random() < 0.5:
            question = random.choice(OUT_OF_SCOPE)
        else:
            pattern = pick(
                random,
                "explain {}|what do you think about {}|tell me about {}|how does {} work|who invented {}|"
                "write an essay about {}|what is the history of {}|can you explain {}|"
                "give me a summary of {}",
            )
            question = pattern.format(random.choice(TOPICS))
        return phrase(random, question), random.choice(REFUSALS)

    def joke(self, random: Random) -> Turn:
        ask = (
            "tell me a joke",
            "do you know a joke",
            "can you tell me a joke",
            "make me laugh",
            "say something funny",
            "another joke",
            "tell me something funny",
            "tell me another joke",
            "joke please",
            "do you know any jokes",
        )
        return phrase(random, random.choice(ask) + "."), random.choice(facts.JOKES)

    def story(self, random: Random) -> Turn:
        if random.random() < 0.4:
            kind = random.choice(("cat", "dog", "mouse", "rabbit", "bear", "fox", "duck", "frog", "owl", "bird"))
            ask = pick(
                random,
                "tell me a story about {}|can you tell me a story about {}|write a story about {}|"
                "a story about {}|tell a short story about {}",
            )
            return phrase(random, ask.format(article(kind)) + "."), story(random, kind)
        ask = pick(
            random,
            "tell me a story|tell me a short story|can you tell me a story|write a story|tell a story|"
            "do you know a story|I want to hear a story|write a short story|another story|"
            "tell me a bedtime story",
        )
        return phrase(random, ask + "."), story(random)

    def echo(self, random: Random) -> Turn:
        words = random.sample([*facts.THINGS, *facts.ANIMALS, *facts.COLORS], random.choice((1, 1, 2, 3)))
        said = random.choice(
            (" ".join(words), pick(random, "hello|hello world|I like cake|good morning|yes|banana"), words[0])
        )
        form = pick(random, "say {}|repeat after me: {}|say the word {}|please say {}|say '{}'|repeat \"{}\"")
        return phrase(random, form.format(said) + "."), sentence(said)

    # Knowledge.
    def trivia(self, random: Random) -> Turn:
        questions, answer = random.choice(facts.TRIVIA)
        return phrase(random, random.choice(questions.split("|"))), answer

    def capital(self, random: Random) -> Turn:
        known = [country for country in facts.FAMOUS_COUNTRIES if country in self._know.capitals]
        if known and random.random() < 0.6:
            country = random.choice(known)
            capital = self._know.capitals[country]
        else:
            country, capital = random.choice(self._capitals)
        the = f"the {country}" if country.startswith("United") or country in ("Netherlands", "Philippines") else country
        if random.random() < 0.2:
            form = pick(
                random,
                "{} is the capital of which country|which country has the capital {}|what country is {} the capital of",
            )
            return phrase(random, form.format(capital)), f"{capital} is the capital of {the}."
        form = random.choice(
            ("what is the capital of {}",) * 4
            + (
                "what is the capital city of {}",
                "capital of {}",
                "which city is the capital of {}",
                "name the capital of {}",
                "{} capital",
                "what city is the capital of {}",
            )
        )
        return phrase(random, form.format(the)), f"The capital of {the} is {capital}."

    def continent(self, random: Random) -> Turn:
        country, continent = random.choice(self._continents)
        form = pick(
            random,
            "where is {}|on which continent is {}|which continent is {} in|what continent is {} in|"
            "in which part of the world is {}",
        )
        return phrase(random, form.format(country)), f"{country} is in {continent}."

    def definition(self, random: Random) -> Turn:
        noun, meaning = random.choice(self._definitions)
        form = pick(random, "what is {a}|what does {n} mean|define {n}|what is the meaning of {n}|what is {a}")
        return phrase(random, form.format(a=article(noun), n=noun)), sentence(f"{article(noun)} is {meaning}")

    def thing(self, random: Random) -> Turn:
        if random.random() < 0.35:
            name = random.choice(list(facts.STUFF))
            form = pick(random, "what is {}|what is {}|do you know what {} is|define {}|explain {}|tell me about {}")
            return phrase(random, form.format(name)), sentence(f"{name} is {facts.STUFF[name]}")
        name = random.choice(list(facts.THINGS))
        form = pick(
            random, "what is {}|what is {}|what is {}|do you know what {} is|tell me what {} is|explain what {} is"
        )
        return phrase(random, form.format(article(name))), sentence(f"{article(name)} is {facts.THINGS[name]}")

    def sound(self, random: Random) -> Turn:
        animal = random.choice([a for a, about in facts.ANIMALS.items() if about[0]])
        form = random.choice(
            (
                "what sound does {a} make",
                "what does {a} say",
                "what noise does {a} make",
                "how does {a} sound",
                "what sound do {n}s make"
                if animal not in ("sheep", "mouse", "goose", "wolf", "monkey")
                else "what sound does {a} make",
            )
        )
        answer = sentence(f"{article(animal)} says {facts.ANIMALS[animal][0]}")
        return phrase(random, form.format(a=article(animal), n=animal)), answer

    def animal(self, random: Random) -> Turn:
        animal = random.choice(list(facts.ANIMALS))
        _, baby, legs, home, food, about = facts.ANIMALS[animal]
        a = article(animal)
        arms = animal == "octopus"
        match random.randrange(5):
            case 0:
                form = pick(
                    random, "what is a baby {n} called|what do you call a baby {n}|what is the name of a baby {n}"
                )
                answer = (
                    f"a baby {animal} is called {article(baby)}"
                    if not baby.startswith("baby")
                    else f"it is called a {baby}"
                )
            case 1:
                form = random.choice(("how many legs does {a} have", "how many legs has {a}"))
                number = facts.NUMBERS[legs] if legs else "no"
                answer = f"{a} has {number} {'arms' if arms else 'legs'}"
            case 2:
                form = random.choice(("where does {a} live", "where can I find {a}", "what is the home of {a}"))
                answer = f"{a} lives {home}"
            case 3:
                form = random.choice(("what does {a} eat", "what food does {a} like", "what can I give {a} to eat"))
                answer = f"{a} eats {food}"
            case _:
                form = pick(
                    random, "what is {a}|what is {a}|what is {a}|tell me about {a}|do you know what {a} is|describe {a}"
                )
                answer = f"{a} is {about}"
        return phrase(random, form.format(a=a, n=animal)), sentence(answer)

    def color(self, random: Random) -> Turn:
        thing = random.choice(list(facts.COLORS))
        color = facts.COLORS[thing]
        name = f"the {thing}" if thing in facts.THE_ONLY else thing if thing in facts.UNCOUNTED else article(thing)
        spelled = random.choice(("color", "color", "colour"))
        if random.random() < 0.25:
            other = random.choice([c for c in facts.KINDS["color"] if c != color])
            asked = random.choice((color, other))
            verdict = f"Yes, {name} is {color}." if asked == color else f"No, {name} is {color}."
            return phrase(random, f"is {name} {asked}"), verdict
        form = pick(
            random, "what {c} is {t}|what {c} is {t}|what is the {c} of {t}|which {c} is {t}|what {c} does {t} have"
        )
        return phrase(random, form.format(c=spelled, t=name)), sentence(f"{name} is {color}")

    def mix(self, random: Random) -> Turn:
        one, two, mixed = random.choice(facts.MIXES)
        if random.random() < 0.5:
            one, two = two, one
        form = pick(
            random,
            "what color do you get when you mix {} and {}|what do {} and {} make|"
            "what color is {} and {} mixed|mix {} and {}",
        )
        return phrase(random, form.format(one, two)), sentence(f"{one} and {two} make {mixed}")

    def day(self, random: Random) -> Turn:
        return self._cycle(random, facts.DAYS, "day")

    def month(self, random: Random) -> Turn:
        if random.random() < 0.35:
            at = random.randrange(12)
            month, days = facts.MONTHS[at], facts.MONTH_DAYS[at]
            leap = ", and 29 in a leap year" if days == 28 else ""
            return phrase(random, f"how many days does {month} have"), f"{month} has {days} days{leap}."
        return self._cycle(random, facts.MONTHS, "month")

    def _cycle(self, random: Random, names: list[str], unit: str) -> Turn:
        at = random.randrange(len(names))
        if random.random() < 0.65:
            form = random.choice(
                (
                    f"what {unit} comes after {{}}",
                    f"which {unit} comes after {{}}",
                    "what comes after {}",
                    f"what is the {unit} after {{}}",
                    f"which {unit} follows {{}}",
                )
            )
            return phrase(random, form.format(names[at])), f"{names[(at + 1) % len(names)]} comes after {names[at]}."
        form = random.choice(
            (
                f"what {unit} comes before {{}}",
                f"which {unit} comes before {{}}",
                "what comes before {}",
                f"what is the {unit} before {{}}",
            )
        )
        return phrase(random, form.format(names[at])), f"{names[at - 1]} comes before {names[at]}."

    # Words.
    def opposite(self, random: Random) -> Turn:
        one, other = random.choice(self._opposites)
        form = random.choice(
            ("what is the opposite of {}",) * 3
            + (
                "opposite of {}",
                "what word is the opposite of {}",
                "give me the opposite of {}",
                "the opposite of {} is",
            )
        )
        return phrase(random, form.format(one)), sentence(f"the opposite of {one} is {other}")

    def plural(self, random: Random) -> Turn:
        one, many = random.choice(facts.PLURALS)
        form = pick(
            random,
            "what is the plural of {}|what is the plural of {}|plural of {}|"
            "what is the plural form of {}|one {}, two|how do you say more than one {}",
        )
        return phrase(random, form.format(one)), sentence(f"the plural of {one} is {many}")

    def past(self, random: Random) -> Turn:
        now, then = random.choice(facts.PAST)
        form = random.choice(("what is the past tense of {}", "past tense of {}", "what is the past of {}"))
        return phrase(random, form.format(now)), sentence(f"the past tense of {now} is {then}")

    def spell(self, random: Random) -> Turn:
        short = [
            w for w in (*facts.ANIMALS, *facts.THINGS, *facts.COLORS, *facts.FIRST_NAMES) if w.isalpha() and len(w) < 7
        ]
        word = random.choice(short)
        form = pick(random, "how do you spell {}|spell {}|can you spell {}|spell the word {}|how is {} spelled")
        return phrase(random, form.format(word)), f"{word[:1].upper()}{word[1:]} is spelled {'-'.join(word.lower())}."

    def members(self, random: Random) -> Turn:
        kind = random.choice(list(facts.KINDS))
        members = facts.KINDS[kind]
        count = random.choice((1, 2, 3, 3, 3))
        many = {
            "country": "countries",
            "piece of clothing": "pieces of clothing",
            "part of the body": "parts of the body",
        }.get(kind, kind + "s")
        word = facts.NUMBERS[count] if random.random() < 0.7 else str(count)
        chosen = random.sample(members, count)
        if count == 1:
            form = random.choice(("name {}", "give me an example of {}", "tell me {}", "name one {n}"))
            return phrase(random, form.format(article(kind), n=kind) + "."), sentence(chosen[0])
        form = pick(
            random, "name {c} {k}|name {c} {k}|list {c} {k}|tell me {c} {k}|give me {c} {k}|can you name {c} {k}"
        )
        listed = ", ".join(chosen[:-1]) + " and " + chosen[-1]
        return phrase(random, form.format(c=word, k=many) + "."), sentence(listed)

    def is_a(self, random: Random) -> Turn:
        kind = random.choice(list(facts.KINDS))
        name = random.choice(facts.KINDS[kind])
        asked = kind if random.random() < 0.5 else random.choice(list(facts.KINDS))
        bare = kind in facts.UNARTICLED
        subject = name if bare else article(name)
        also = name in facts.KINDS[asked] or (kind, asked) in (("bird", "animal"), ("insect", "animal"))
        question = f"is {subject} {article(asked)}"
        if also:
            return phrase(random, question), f"Yes, {subject} is {article(asked)}."
        return phrase(random, question), f"No, {subject} is {article(kind)}."

    def bigger(self, random: Random) -> Turn:
        small, large = sorted(random.sample(range(len(facts.BY_SIZE)), 2))
        pair = [facts.BY_SIZE[small], facts.BY_SIZE[large]]
        a, b = (article(name) for name in random.sample(pair, 2))
        bigger, smaller = article(pair[1]), article(pair[0])
        if random.random() < 0.5:
            form = pick(random, "which is bigger, {} or {}|what is bigger, {} or {}|which animal is bigger, {} or {}")
            return phrase(random, form.format(a, b)), sentence(f"{bigger} is bigger than {smaller}")
        if random.random() < 0.4:
            form = random.choice(("which is smaller, {} or {}", "what is smaller, {} or {}"))
            return phrase(random, form.format(a, b)), sentence(f"{smaller} is smaller than {bigger}")
        verdict = f"Yes, {a} is bigger than {b}." if a == bigger else f"No, {a} is smaller than {b}."
        return phrase(random, f"is {a} bigger than {b}"), verdict

    # Numbers.
    def addition(self, random: Random) -> Turn:
        top = random.choice((5, 5, 10, 10, 20))
        a, b = random.randint(0, top), random.randint(0, top)
        return self._sum(random, a, b, "+", ("plus", "and"), a + b)

    def subtraction(self, random: Random) -> Turn:
        b, rest = random.randint(0, 10), random.randint(0, 10)
        return self._sum(random, b + rest, b, "-", ("minus",), rest)

    def multiplication(self, random: Random) -> Turn:
        a, b = random.randint(1, 10), random.randint(1, 10)
        return self._sum(random, a, b, random.choice(("*", "x")), ("times",), a * b)

    def _sum(self, random: Random, a: int, b: int, sign: str, words: tuple[str, ...], result: int) -> Turn:
        if random.random() < 0.2 and max(a, b) <= 20:
            question = f"what is {facts.NUMBERS[a]} {random.choice(words)} {facts.NUMBERS[b]}"
        else:
            written = random.choice(
                (f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {random.choice(words)} {b}")
            )
            question = random.choice(("what is {}", "what is {}", "{}", "how much is {}", "calculate {}", "{} ="))
            question = question.format(written)
        shown = "x" if sign == "*" else sign
        return phrase(random, question), f"{a} {shown} {b} = {result}"

    def counting(self, random: Random) -> Turn:
        top = random.choice((3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 12, 15, 20))
        named = random.choice((str(top), facts.NUMBERS[top]))
        if random.random() < 0.15:
            form = random.choice(("count down from {}", "count backwards from {}"))
            return phrase(random, form.format(named) + "."), ", ".join(str(i) for i in range(top, 0, -1)) + "."
        form = pick(
            random,
            "count to {}|can you count to {}|count from 1 to {}|count from one to {}|please count to {}|count up to {}",
        )
        return phrase(random, form.format(named) + "."), ", ".join(str(i) for i in range(1, top + 1)) + "."

    def next_number(self, random: Random) -> Turn:
        n = random.randint(0, 99)
        if random.random() < 0.7:
            form = pick(
                random,
                "what comes after {}|what number comes after {}|which number comes after {}|"
                "what is the number after {}",
            )
            return phrase(random, form.format(n)), f"{n + 1} comes after {n}."
        form = random.choice(("what comes before {}", "what number comes before {}", "which number comes before {}"))
        return phrase(random, form.format(n + 1)), f"{n} comes before {n + 1}."

    def compare_numbers(self, random: Random) -> Turn:
        a, b = random.sample(range(random.choice((10, 20, 100))), 2)
        if random.random() < 0.7:
            form = pick(
                random,
                "which is bigger, {} or {}|what is bigger, {} or {}|which number is larger, {} or {}|"
                "is {} bigger than {}",
            )
            answer = f"{max(a, b)} is bigger than {min(a, b)}."
            if form.startswith("is"):
                answer = f"Yes, {answer}" if a > b else f"No, {answer}"
            return phrase(random, form.format(a, b)), answer
        form = random.choice(("which is smaller, {} or {}", "what is smaller, {} or {}"))
        return phrase(random, form.format(a, b)), f"{min(a, b)} is smaller than {max(a, b)}."
