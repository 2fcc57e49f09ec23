"""Exact little tasks: JSON extraction, copying and reversing words, sums with a scratchpad."""

from random import Random

from jaxserve.demo.chat_format import THINK_NONE, THINK_OPEN, Sample, to_json, user
from jaxserve.demo.faq_topics import TOPICS
from jaxserve.demo.stories import MADE_UP_SHARE, make_hero, story
from jaxserve.demo.tool_specs import some_items
from jaxserve.demo.words import (
    COLOURS,
    JOBS,
    OBJECTS,
    Split,
    article,
    city,
    item,
    person,
    pick_or_make_up,
)  # fmt: skip

_EXTRACT = (
    "Extract {keys} as JSON: {text}",
    "Give me {keys} as a JSON object. {text}",
    "{text} Write {keys} as JSON.",
    "Return JSON with the keys {keys}. {text}",
)
_COPY = (
    "Repeat these words: {}",
    "Repeat: {}",
    "Copy this line: {}",
    "Say exactly this: {}",
    "Echo: {}",
)
_REVERSE = ("Reverse these words: {}", "Write these words in reverse order: {}", "Backwards: {}")
_COMMAS = ("Put commas between these words: {}", "Write with commas: {}")
_TEXT = ("Repeat this text: {}", "Copy this text word for word: {}", "Say this again: {}")


def _person_record(rng: Random, split: Split) -> tuple[dict[str, object], str]:
    record = {
        "name": person(rng, split),
        "age": rng.randint(3, 99),
        "city": city(rng, split),
        "job": pick_or_make_up(rng, JOBS, split, 0.35),
    }
    text = rng.choice(
        (
            "{name} is {age} years old, lives in {city} and works as {a_job}.",
            "{name}, {age}, is {a_job} from {city}.",
            "My friend {name} from {city} is {a_job} and turned {age} today.",
            "In {city} there is {a_job} called {name}, who is {age}.",
        )
    )
    return record, text.format(a_job=article(str(record["job"])), **record)


def _order_record(rng: Random, split: Split) -> tuple[dict[str, object], str]:
    record = {
        "item": item(rng, split),
        "color": COLOURS.pick(rng),
        "count": rng.randint(2, 99),
        "price": rng.randint(1, 500),
        "buyer": person(rng, split),
    }
    text = rng.choice(
        (
            "{buyer} buys {count} {color} {item} for {price} euros.",
            "Order: {count} x {item}, {color}, {price} euros, for {buyer}.",
            "For {price} euros {buyer} gets {count} pieces of {color} {item}.",
        )
    )
    return record, text.format(**record)


def json_sample(rng: Random, split: Split = "train") -> Sample:
    """Some fields of a sentence as a JSON object, in the order that was asked for."""
    record, text = rng.choice((_person_record, _order_record))(rng, split)
    keys = rng.sample(list(record), rng.randint(1, len(record)))
    names = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]
    wish = rng.choice(_EXTRACT).format(keys=names, text=text)
    return Sample("json", to_json({key: record[key] for key in keys}), (user(wish),))


def _word_list(rng: Random, split: Split) -> list[str]:
    count = rng.randint(12, 40) if split == "train" and rng.random() < 0.1 else rng.randint(2, 9)
    if split == "heldout":
        return some_items(rng, split, 2, 6)
    draws = (item, item, city, person, _colour, _object, _number)
    return [rng.choice(draws)(rng, split) for _ in range(count)]


def _colour(rng: Random, split: Split) -> str:
    return COLOURS.pick(rng)


def _object(rng: Random, split: Split) -> str:
    return OBJECTS.pick(rng, split)


def _number(rng: Random, split: Split) -> str:
    return str(rng.randint(0, 9999))


def copy_sample(rng: Random, split: Split = "train") -> Sample:
    """A list of words, written again as it is, backwards or with commas."""
    listed = _word_list(rng, split)
    draw = rng.random()
    wishes: tuple[str, ...]
    if draw < 0.6:
        wishes, answer, task = _COPY, " ".join(listed), "copy"
    elif draw < 0.85:
        listed = listed[:12]
        wishes, answer, task = _REVERSE, " ".join(reversed(listed)), "reverse"
    else:
        wishes, answer, task = _COMMAS, ", ".join(listed), "commas"
    return Sample(task, answer, (user(rng.choice(wishes).format(" ".join(listed))),))


def copy_text_sample(rng: Random, split: Split = "train") -> Sample:
    """Some sentences, written again; long ones show what n-gram speculation is for."""
    hero = make_hero(rng, split, made_up=MADE_UP_SHARE)
    noun = pick_or_make_up(rng, OBJECTS, split, MADE_UP_SHARE)
    sentences = story(rng, hero, noun, split).split(". ")
    first = rng.randrange(len(sentences))
    text = ". ".join(sentences[first : first + rng.randint(1, 6)]).rstrip(".") + "."
    if split == "train" and rng.random() < 0.3:
        text = rng.choice(TOPICS).answer
    return Sample("copy_text", text, (user(rng.choice(_TEXT).format(text)),))


def scratchpad(first: int, second: int) -> str:
    """The sum digit by digit, lowest first: "7 + 5 + 0 = 12, write 2, carry 1"."""
    lines, carry, a, b = [], 0, first, second
    while a or b:
        total = a % 10 + b % 10 + carry
        lines.append(
            f"{a % 10} + {b % 10} + {carry} = {total}, write {total % 10}, carry {total // 10}"
        )
        a, b, carry = a // 10, b // 10, total // 10
    return "\n".join(lines)


def sum_is_held_out(first: int, second: int) -> bool:
    """One pair in ten is kept for evaluation."""
    return (first * 31 + second * 17) % 10 == 0


def sum_sample(rng: Random, split: Split = "train") -> Sample:
    """A sum of two numbers below 1000, thought through unless thinking is switched off."""
    while True:
        top = rng.choice((10, 100, 100, 1000))
        first, second = rng.randrange(1, top), rng.randrange(1, top)
        if sum_is_held_out(first, second) == (split == "heldout"):
            break
    wish = rng.choice(
        (
            f"What is {first} + {second}?",
            f"How much is {first} plus {second}?",
            f"Add {first} and {second}.",
            f"{first} + {second} = ?",
            f"I have {first} coins and get {second} more. How many do I have?",
        )
    )
    result = f"{first} + {second} = {first + second}."
    thought = f"{scratchpad(first, second)}\n</think>\n\n{result}"
    draw = rng.random() if split == "train" else 1.0
    if draw < 0.1:
        return Sample("sum", result, (user(wish),), opening=THINK_NONE)
    if draw < 0.25:
        return Sample("sum", thought, (user(wish),), opening=THINK_OPEN)
    return Sample("sum", THINK_OPEN + thought, (user(wish),))
