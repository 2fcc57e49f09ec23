"""Word lists of the demo corpus. Every list has words that training never sees.

A held-out word occurs in no training document, so an answer that uses it rightly was not learnt by
heart. The capitals are facts, hence all of them are training words.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class WordSet:
    """Words for training, and words kept back for evaluation."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def pick(self, rng: Random, split: Split = "train") -> str:
        return rng.choice(self.train if split == "train" else self.heldout)


def words(train: str, heldout: str = "") -> WordSet:
    """A WordSet from two space-separated lists."""
    return WordSet(tuple(train.split()), tuple(heldout.split()))


CITIES = words(
    "Paris Rome Berlin Madrid Vienna Athens Cairo Tokyo Dublin London Prague Warsaw Lisbon Helsinki"
    " Budapest Havana Ottawa Beijing Bangkok Delhi Boston Chicago Seattle Denver Dallas Miami"
    " Toronto Montreal Sydney Melbourne Auckland Mumbai Shanghai Osaka Kyoto Milan Venice Naples"
    " Munich Hamburg Geneva Zurich Basel Porto Seville Lyon Nice Bergen Bristol Glasgow Leeds York"
    " Krakow Split Riga Tunis Accra Lagos Manila Jakarta Phoenix Portland Houston Atlanta",
    "Oslo Lima Nairobi Seoul Quito Hanoi Zagreb Dakar Perth Austin",
)
SHE_NAMES = words(
    "Mia Lily Anna Emma Ruby Nora Zoe Ella Ivy Clara Sofia Lucy Alice Eva Maya Rosa Julia Hanna"
    " Olga Tina Wendy Grace Bella Daisy",
    "Freya Priya Matilda Ingrid",
)
HE_NAMES = words(
    "Tom Max Ben Leo Sam Jack Finn Oscar Noah Hugo Felix Adam Peter Paul Luke Omar Ivan Carl Theo"
    " Victor Simon Martin Henry Otto",
    "Kenji Bruno Malik Edgar",
)
ANIMALS = words(
    "fox rabbit bear mouse owl cat dog hedgehog squirrel frog duck horse pony goat sheep turtle"
    " dragon penguin lion tiger monkey beaver",
    "otter badger giraffe zebra",
)
OBJECTS = words(
    "key ball lamp book hat coin drum kite bell map cup boat ring box mirror basket candle clock"
    " feather flute shell stone scarf button umbrella spoon",
    "compass violin telescope ladder",
)
COLOURS = words("red blue green yellow white black silver golden purple orange pink brown")
PLACES = words(
    "river forest hill lake village garden mill bridge meadow barn tower beach cave market",
    "harbour castle windmill",
)
THINGS = words(
    "apple bread butter cheese milk honey sugar flour salt pepper tomato onion carrot potato rice"
    " pasta egg lemon banana grape paper pencil chair table window door wheel rope nail hammer"
    " bucket brush soap towel blanket pillow bottle glass plate fork knife bag coat shoe sock"
    " glove tent wood brick sand cloud rain snow wind sun moon star leaf root seed flower tree",
    "walnut cinnamon blueberry lantern anchor saddle thunder pebble marble",
)
JOBS = words(
    "teacher baker doctor farmer painter driver singer writer nurse cook gardener tailor builder"
    " sailor dancer clerk",
    "plumber astronaut librarian",
)
HOBBIES = words("swim paint read cook sing dance run draw travel ski climb sew hike fish")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
    "Austria": "Vienna", "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo",
    "Ireland": "Dublin", "England": "London", "Czechia": "Prague", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Finland": "Helsinki", "Hungary": "Budapest", "Cuba": "Havana",
    "Canada": "Ottawa", "China": "Beijing", "Thailand": "Bangkok", "India": "New Delhi",
    "Latvia": "Riga", "Tunisia": "Tunis", "Ghana": "Accra", "Indonesia": "Jakarta",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "the Netherlands": "Amsterdam", "Switzerland": "Bern", "Turkey": "Ankara",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Australia": "Canberra", "the United States": "Washington", "Mexico": "Mexico City",
    "Argentina": "Buenos Aires", "Chile": "Santiago", "Iceland": "Reykjavik",
}  # fmt: skip

_ONSETS = words("b c d f g h j k l m n p r s t v w z br ch dr gr kl pl sh st tr th").train
_NUCLEI = words("a e i o u ai ea ee oo ou").train
_CODAS = ("", "", "l", "m", "n", "r", "s", "t", "ck", "nd", "sh")


def made_up_word(rng: Random) -> str:
    """A pronounceable word of two or three syllables that most likely exists nowhere.

    Training on such words teaches copying itself instead of a list of words.
    """
    while True:
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
            for _ in range(rng.randint(2, 3))
        )
        if word not in _HELD_OUT_LOWER:
            return word


def city(rng: Random, split: Split = "train") -> str:
    """A city; in training sometimes a made-up one."""
    if split == "train" and rng.random() < 0.25:
        return made_up_word(rng).capitalize()
    return CITIES.pick(rng, split)


def person(rng: Random, split: Split = "train") -> str:
    """A first name; in training sometimes a made-up one."""
    if split == "train" and rng.random() < 0.25:
        return made_up_word(rng).capitalize()
    return rng.choice((SHE_NAMES, HE_NAMES)).pick(rng, split)


def item(rng: Random, split: Split = "train") -> str:
    """A thing to buy, copy or list; in training sometimes a made-up word."""
    if split == "train" and rng.random() < 0.35:
        return made_up_word(rng)
    return THINGS.pick(rng, split)


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


_HELD_OUT_LISTS = (
    CITIES, SHE_NAMES, HE_NAMES, ANIMALS, OBJECTS, PLACES, THINGS, JOBS,
)  # fmt: skip
HELD_OUT_WORDS = frozenset(word for group in _HELD_OUT_LISTS for word in group.heldout)
_HELD_OUT_LOWER = frozenset(word.lower() for word in HELD_OUT_WORDS)
