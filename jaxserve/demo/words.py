"""Word lists of the demo corpus. Every list has words that training never sees.

A held-out word occurs in no training document, so an answer that uses it rightly was not learnt by
heart. The capitals are facts, hence all of them are training words.
"""

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class WordSet:
    """Words for training, and words kept back for evaluation."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def pick(self, rng: Random, split: Split = "train") -> str:
        """A word of the split; a set without held-out words always gives training words."""
        return rng.choice(self.heldout if split == "heldout" and self.heldout else self.train)


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
# Whole words to copy, and the quarry of made-up ones; no list above depends on them.
ENGLISH = words(
    "above across action advice against ahead almost alphabet ancient angle angry animal ankle"
    " answer artist asleep autumn avenue awake balance balloon bamboo banner barrel battle beard"
    " beauty because before begin behave believe belt beyond bicycle blossom bottom bounce branch"
    " breath breeze bright broken bronze bubble buffalo cabin camel campus canyon captain carpet"
    " castaway cattle cedar century chance chapter cheap cherry chimney chorus circle citizen"
    " classic climate clover cluster coast cobweb coffee comet common complex copper coral corner"
    " cotton cousin cradle crayon cricket crystal culture curious current curtain cushion cycle"
    " damage danger daughter decide degree delight desert detail diamond dinner distant doctrine"
    " dolphin double dream eagle early earth easy echo effort eight elbow electric elephant eleven"
    " emerald empty energy engine enjoy enough equal evening exact example exotic explain express"
    " fabric factory family famous fashion fathom favour fence fiction figure finger flight fluffy"
    " forget fortune fountain freedom fresh friendly frozen future galaxy gallop gather gentle"
    " giant ginger glacier gossip gravel guitar gymnast habit handle happy hazel healthy heavy"
    " helmet history hollow honest horizon hover humble hundred hunter husband iceberg idea igloo"
    " imagine inch indigo insect inside invite iron island ivory jacket jaguar jelly jigsaw jolly"
    " jungle junior justice kayak kernel kettle kidney kingdom kitten knight koala label language"
    " laugh lavender lawyer leather legend lettuce level liberty light linen liquid lizard lobster"
    " logic lucky lumber magic magnet maple margin mathematics matter mellow memory message metal"
    " midnight million minute mischief modern moment monument mosaic mountain muscle museum music"
    " mystery narrow nation nature needle neighbour nephew network nickel nimble noble north notice"
    " number nutmeg oak object ocean october often olive opera opinion orbit orchard organ ostrich"
    " outside oxygen oyster paddle palace panther parade parrot passion patient pattern peaceful"
    " peach pearl peculiar pelican people perfect phrase physics piano pickle picture pilgrim pilot"
    " pioneer pirate planet plastic pocket poem polite popcorn portrait powder practice precious"
    " prince problem promise proud puddle pumpkin puppet purchase puzzle pyramid quality quarter"
    " queen quick quiet quilt quiz rabble radar raven razor reason recipe record region relax"
    " remember rescue rhythm ribbon riddle rocket rooster rough royal rubber rumble safari salmon"
    " satchel saucer scatter school science scissors season second secret serious seven shadow"
    " shallow shelter shiver shoulder shuffle signal silence simple sister sketch skill sleepy"
    " slipper smooth snail social soldier sparrow special spider spiral spring square stable"
    " station steady sticky storm strange student subject sudden suitcase summer sunset surprise"
    " swallow sweater symbol system tadpole talent target taxi teapot temple tender theatre theory"
    " thimble thirteen thousand thread thrill through ticket tidy timber tiny tissue toast tobacco"
    " together tonight topic tornado tractor traffic treasure triangle tribute trumpet tulip tunnel"
    " turnip twelve twist ugly under unicorn union universe upright useful valley vanilla vapour"
    " vegetable velvet village vision visit volcano voyage waffle wagon walrus wander warrior"
    " weather wedding whale whisper widow wild willow winter wisdom wonder wooden worry wrinkle"
    " yacht yawn yellowish yesterday yoghurt young zero zigzag zipper zone"
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


def _syllables(rng: Random) -> str:
    """Something pronounceable."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
        for _ in range(rng.randint(2, 3))
    )


def _pieces(rng: Random) -> str:
    """Parts of training words put together: they spell as English does."""
    word = ""
    for _ in range(rng.choice((2, 2, 3))):
        source, size = rng.choice(_QUARRY), rng.randint(1, 6)
        start = rng.randrange(max(1, len(source) - size + 1))
        word += source[start : start + size]
    return word


def _letters(rng: Random) -> str:
    """Any letters in any order."""
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 8)))


def made_up_word(rng: Random) -> str:
    """A word that most likely exists nowhere.

    Training on such words teaches copying itself, with every token next to every other, instead of
    a list of words. Syllables alone would not: they use too few of the tokens.
    """
    while True:
        word = rng.choices((_syllables, _pieces, _letters), (3, 6, 2))[0](rng)
        if len(word) > 2 and word not in KEPT_BACK:
            return word


def pick_or_make_up(rng: Random, group: WordSet, split: Split, share: float) -> str:
    """A word of the group; in training a made-up one at the given share."""
    if split == "train" and rng.random() < share:
        return made_up_word(rng)
    return group.pick(rng, split)


def city(rng: Random, split: Split = "train") -> str:
    """A city; in training often a made-up one."""
    if split == "train" and rng.random() < 0.45:
        return made_up_word(rng).capitalize()
    return CITIES.pick(rng, split)


def person(rng: Random, split: Split = "train") -> str:
    """A first name; in training often a made-up one."""
    if split == "train" and rng.random() < 0.45:
        return made_up_word(rng).capitalize()
    return rng.choice((SHE_NAMES, HE_NAMES)).pick(rng, split)


def item(rng: Random, split: Split = "train") -> str:
    """A thing to buy, copy or list; in training often any word, or a made-up one."""
    if split == "train" and rng.random() < 0.2:
        return ENGLISH.pick(rng)
    return pick_or_make_up(rng, THINGS, split, 0.55)


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


_HELD_OUT_LISTS = (
    CITIES, SHE_NAMES, HE_NAMES, ANIMALS, OBJECTS, PLACES, THINGS, JOBS,
)  # fmt: skip
HELD_OUT_WORDS = frozenset(word for group in _HELD_OUT_LISTS for word in group.heldout)
# What no made-up word may be: the held-out words, also those of made-up tools (tools.py).
KEPT_BACK = frozenset(word.lower() for word in HELD_OUT_WORDS) | set(
    words("passport journal battery hotel author weight time pizza film stars toppings").train
)
_QUARRY = tuple(
    word.lower() for group in (*_HELD_OUT_LISTS, COLOURS, HOBBIES, ENGLISH) for word in group.train
)
