"""Small stories from a grammar, in which hero, friend, object and colour stay the same."""

from dataclasses import dataclass
from random import Random

from jaxserve.demo.chat_format import Sample, user
from jaxserve.demo.words import (
    ANIMALS,
    COLOURS,
    HE_NAMES,
    OBJECTS,
    PLACES,
    SHE_NAMES,
    Split,
    article,
    pick_or_make_up,
)  # fmt: skip

_MOODS = ("little", "brave", "shy", "curious", "kind", "clever", "lazy", "cheerful", "old", "young")
_TIMES = ("morning", "day", "evening", "afternoon", "sunny day", "rainy day", "winter day")
OPENING = "Once upon a time"
CLOSING = "The end."


@dataclass(frozen=True)
class Hero:
    """Who a story is about."""

    name: str
    animal: str
    subject: str
    possessive: str


MADE_UP_SHARE = 0.4
"""How often a word that a training request gives is made up; the story has to copy it."""


def make_hero(
    rng: Random, split: Split = "train", other_than: str = "", made_up: float = 0.0
) -> Hero:
    """A hero whose name and animal come from the split, or in training are made up."""
    while True:
        she = rng.random() < 0.5
        name = pick_or_make_up(rng, SHE_NAMES if she else HE_NAMES, split, made_up)
        name = name[0].upper() + name[1:]
        if name != other_than:
            pronouns = ("she", "her") if she else ("he", "his")
            return Hero(name, pick_or_make_up(rng, ANIMALS, split, made_up), *pronouns)


def _find(rng: Random, hero: Hero, thing: str, place: str) -> list[str]:
    time = rng.choice(_TIMES)
    look = rng.choice(("lovely", "strange", "fine", "beautiful", "funny"))
    noun = thing.split()[-1]
    first = rng.choice(
        (
            f"One {time}, {hero.name} found {article(thing)} near the {place}.",
            f"One {time}, {hero.name} went to the {place} and saw {article(thing)}.",
            f"One {time}, {hero.subject} was walking to the {place}, and there lay "
            f"{article(thing)}.",
        )
    )
    second = rng.choice(
        (
            f'"What {article(look)} {noun}!" said {hero.name}.',
            f'"This {noun} must belong to somebody," said {hero.name}.',
            f"{hero.name} had never seen such {article(look)} {noun}.",
        )
    )
    return [first, second]


def _trouble(rng: Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    noun = thing.split()[-1]
    where = rng.choice(("under a tree", "behind a rock", "in the grass", "on the road"))
    lost = [
        f"{hero.name} showed the {noun} to {friend.name}, {hero.possessive} friend the "
        f"{friend.animal}.",
        f"But on the way home {hero.name} lost the {noun}.",
        f"{hero.name} was sad and looked for the {noun} all night.",
        f"At last {friend.name} found the {thing} {where} near the {place}.",
    ]
    shared = [
        f"On the way {hero.subject} met {friend.name} the {friend.animal}.",
        f'"May I have the {noun}?" asked {friend.name}.',
        f'"Let us share it," said {hero.name}.',
        f"So they played with the {thing} near the {place} until it was dark.",
    ]
    owner = [
        f"Then {friend.name} the {friend.animal} came along and looked very sad.",
        f'"I have lost my {noun}," said {friend.name}.',
        f'"Is it this {thing}?" asked {hero.name}.',
        f'"Yes!" cried {friend.name}, and they danced around the {place}.',
    ]
    return rng.choice((lost, shared, owner))


def story(rng: Random, hero: Hero, noun: str, split: Split = "train", episodes: int = 1) -> str:
    """A whole story; further episodes have further objects, the last sentence names the first."""
    thing = f"{COLOURS.pick(rng)} {noun}"
    home = PLACES.pick(rng, split)
    lines = [
        f"{OPENING} there was {article(rng.choice(_MOODS))} {hero.animal} named {hero.name}.",
        rng.choice(
            (
                f"{hero.name} lived in a small house by the {home}.",
                f"{hero.name} lived near the {home} with {hero.possessive} family.",
            )
        ),
    ]
    for episode in range(episodes):
        friend = make_hero(rng, split, other_than=hero.name)
        found = thing if episode == 0 else f"{COLOURS.pick(rng)} {OBJECTS.pick(rng, split)}"
        place = PLACES.pick(rng, split)
        lines += _find(rng, hero, found, place)
        lines += _trouble(rng, hero, friend, found, place)
        lines.append(f"From that day on {hero.name} and {friend.name} were good friends.")
    lines.append(f"And {hero.name} the {hero.animal} never forgot the {thing}. {CLOSING}")
    return " ".join(lines)


_REQUESTS = (
    "Tell me a story about {animal} named {name} and {noun}.",
    "Write a short story about {animal} called {name} who finds {noun}.",
    "Please tell a story. The hero is {animal} named {name}, and there is {noun} in it.",
    "I want a story with {noun} and {animal} named {name}.",
    "Make up a story about {name}, {animal}, and {noun}.",
)
_OPEN_REQUESTS = (
    "Tell me a story.",
    "Write a story.",
    "Tell me another story, please.",
    "Once upon a time",
    "Can you tell me a story?",
    "I would like to hear a story.",
)


def story_sample(rng: Random, split: Split = "train") -> Sample:
    """A story asked for in a chat; the hero and the object are given in the request."""
    if split == "train" and rng.random() < 0.1:
        text = story(rng, make_hero(rng), OBJECTS.pick(rng))
        return Sample("open_story", text, (user(rng.choice(_OPEN_REQUESTS)),))
    hero = make_hero(rng, split, made_up=MADE_UP_SHARE)
    noun = pick_or_make_up(rng, OBJECTS, split, MADE_UP_SHARE)
    wish = rng.choice(_REQUESTS).format(
        animal=article(hero.animal), name=hero.name, noun=article(noun)
    )
    episodes = 1
    if split == "train" and rng.random() < 0.1:
        wish, episodes = f"{wish} Make it long.", rng.randint(3, 6)
    text = story(rng, hero, noun, split, episodes)
    facts = {"name": hero.name, "animal": hero.animal, "noun": noun}
    return Sample("story" if episodes == 1 else "long_story", text, (user(wish),), facts=facts)


def raw_story_sample(rng: Random, split: Split = "train") -> Sample:
    """A story as plain text, short or long, to be continued from "Once upon a time"."""
    episodes = rng.choice((1, 1, 1, 2, 2, 3, 5, 8))
    text = story(rng, make_hero(rng, split), OBJECTS.pick(rng, split), split, episodes)
    return Sample("raw_story", text[len(OPENING) :], text=OPENING)
