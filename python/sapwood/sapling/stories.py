"""Short children's stories put together from our own sentences: a hero wants something, meets a trouble, gets help.

They give the model modern, simple English with one thread from beginning to end, which the old books of the corpus do
not, and they are what it tells when it is asked for a story.
"""

from __future__ import annotations

from random import Random
from typing import Final

from sapwood.sapling.facts import FIRST_NAMES

_KINDS: Final = "cat dog mouse rabbit bear fox duck frog owl hedgehog squirrel rabbit bird kitten puppy lamb".split()
# None begins with a vowel: they all follow "a".
_TRAITS: Final = "little small brave shy kind clever curious lazy funny gentle young happy".split()
_PLACES: Final = (
    ("in a small house near the forest", "forest"),
    ("under an old oak tree", "garden"),
    ("by a quiet river", "river"),
    ("on a farm with red barns", "farm"),
    ("in a village by the sea", "beach"),
    ("at the foot of a green hill", "hill"),
    ("near a blue lake", "lake"),
    ("in a warm nest of leaves", "forest"),
)  # fmt: skip
_WANTS: Final = (
    ("a red ball", "it was round and bright"),
    ("a blue kite", "it could fly so high"),
    ("an apple from the tall tree", "it looked sweet and red"),
    ("a new friend", "it was sometimes lonely to play alone"),
    ("a shiny stone", "it looked like a star"),
    ("a warm coat", "winter was coming"),
    ("a big cake", "it was a birthday"),
    ("a song to sing", "singing made everyone happy"),
    ("a boat made of wood", "the water was so blue"),
    ("a yellow flower", "it smelled like spring"),
)  # fmt: skip
_WEATHER: Final = (
    "One sunny morning", "One cold morning", "One day", "One windy afternoon", "One evening", "On a bright spring day",
    "One rainy day",
)  # fmt: skip
_TROUBLES: Final = (
    ("it began to rain, and the wind blew very hard", "The rain stopped, and the sun came out again"),
    ("{he} lost the way and did not know how to get home", "Soon they found the path that went home"),
    ("{he} fell into a deep hole and could not get out", "With a long branch they climbed out of the hole"),
    ("a big stone stood in the middle of the path", "Together they pushed, and the big stone rolled away"),
    ("it got dark, and {he} was afraid", "The moon came up, and the night was not dark any more"),
    ("the bridge over the river was broken", "They put a long log over the water and walked across"),
    (
        "{he} could not reach it, because it was too high",
        "One stood on the back of the other, and so they could reach it",
    ),
)
_FEELINGS: Final = ("sad", "a little afraid", "tired and sad", "worried", "very quiet")
_WORDS: Final = (
    '"Do not worry," said {helper}. "I will help you."',
    '"Why are you sad?" asked {helper}. "Let me help you."',
    '"Do not cry," said {helper}. "Two are stronger than one."',
    '"I know what to do," said {helper}. "Come with me."',
)
_ENDINGS: Final = (
    "{hero} got what {he} wanted, and they shared it.",
    "{hero} was so happy that {he} danced all the way home.",
    "{hero} said thank you, and they had tea and cake together.",
    "{hero} laughed, and {helper} laughed too.",
    "That night {hero} slept well and dreamed of the next day.",
)
_MORALS: Final = (
    "From that day on, they were best friends.",
    "And {hero} learned that it is good to ask for help.",
    "And {hero} never forgot how good it is to have a friend.",
    "And they lived happily ever after.",
    "And {hero} learned that being kind makes everyone happy.",
    "After that, they played together every day.",
)


def story(random: Random, kind: str | None = None) -> str:
    """A story of about a hundred words in three paragraphs; its hero is a `kind` (an animal) where one is named."""
    kind = kind or random.choice(_KINDS)
    hero, helper_name = random.sample(FIRST_NAMES, 2)
    he = random.choice(("he", "she"))
    helper_kind = random.choice([k for k in _KINDS if k != kind])
    helper = f"{helper_name} the {helper_kind}"
    home, place = random.choice(_PLACES)
    want, why = random.choice(_WANTS)
    trouble, solved = random.choice(_TROUBLES)
    trait, helper_trait = random.sample(_TRAITS, 2)
    opening = random.choice(
        ("Once upon a time there was", "Once there was", "There once was", "Once upon a time there lived")
    )
    names = {"hero": hero, "he": he, "helper": helper_name}
    paragraphs = (
        f"{opening} a {trait} {kind} named {hero}. {hero} lived {home}. More than anything, "
        f"{hero} wanted {want}, because {why}.",
        f"{random.choice(_WEATHER)} {hero} went to the {place} to look for it. But then "
        f"{trouble.format(**names)}. {hero} sat down and was {random.choice(_FEELINGS)}. "
        f"Then a {helper_trait} {helper_kind} came by. It was {helper}. {random.choice(_WORDS).format(**names)}",
        f"So they went on together. {solved}. {random.choice(_ENDINGS).format(**names)} "
        f"{random.choice(_MORALS).format(**names)}",
    )
    return "\n\n".join(paragraphs)
