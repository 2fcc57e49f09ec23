"""The named tools of the corpus: a JSON schema, a user's wish, its arguments, a result, a reply."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from jaxserve.demo.words import Split, city, item, person

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "array", "items": {"type": "string"}}
DONE = {"status": "ok"}


@dataclass(frozen=True)
class Use:
    """One use of a tool: what the user says, the right call, what comes back, what to say then."""

    wish: str
    arguments: Mapping[str, Any]
    result: Mapping[str, Any]
    reply: str


@dataclass(frozen=True)
class Tool:
    """A tool with its OpenAI-style description and a maker of uses."""

    name: str
    description: str
    properties: Schema
    required: tuple[str, ...]
    make_use: Callable[[Random, Split], Use]

    def spec(self) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": self.properties,
            "required": list(self.required),
        }
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


def enum(*values: str) -> Schema:
    """The schema of a string out of a few."""
    return {"type": "string", "enum": list(values)}


def some_items(rng: Random, split: Split, low: int = 1, high: int = 3) -> list[str]:
    """Different items."""
    count = rng.randint(low, high)
    found: list[str] = []
    while len(found) < count:
        word = item(rng, split)
        if word not in found:
            found.append(word)
    return found


def listing(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _weather(rng: Random, split: Split) -> Use:
    place, unit = city(rng, split), rng.choice(("", "", "celsius", "fahrenheit"))
    ask = rng.choice(
        ("What is the weather in {}", "How is the weather in {}", "Weather in {}",
         "Tell me the weather in {}", "Is it warm in {}", "Do I need a coat in {}")
    )  # fmt: skip
    wish = ask.format(place) + (f" in {unit}" if unit else "") + rng.choice(("?", "?", "", " now?"))
    arguments = {"city": place, "unit": unit} if unit else {"city": place}
    degrees, sky = rng.randint(-9, 99), rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy"))
    result = {"temperature": degrees, "sky": sky}
    return Use(wish, arguments, result, f"It is {degrees} degrees and {sky} in {place}.")


def _timer(rng: Random, split: Split) -> Use:
    minutes, label = rng.randint(1, 120), rng.choice(("", item(rng, split)))
    ask = rng.choice(("Set a timer for {} minutes", "Start a timer of {} minutes",
                      "Wake me in {} minutes", "Please time {} minutes"))  # fmt: skip
    wish = ask.format(minutes) + (f" for the {label}." if label else ".")
    arguments = {"minutes": minutes, "label": label} if label else {"minutes": minutes}
    return Use(wish, arguments, DONE, f"The timer is set to {minutes} minutes.")


def _message(rng: Random, split: Split) -> Use:
    to, thing, hour = person(rng, split), item(rng, split), rng.randint(1, 23)
    text = rng.choice((f"I bring the {thing}", f"I will be there at {hour}",
                       f"thanks for the {thing}", f"please buy {thing}"))  # fmt: skip
    ask = rng.choice(("Tell {to}: {text}", "Send {to} the message: {text}",
                      "Write to {to}: {text}"))  # fmt: skip
    wish = ask.format(to=to, text=text)
    return Use(wish, {"to": to, "text": text}, DONE, f"I sent the message to {to}.")


def _flights(rng: Random, split: Split) -> Use:
    start, end, count = city(rng, split), city(rng, split), rng.choice((0, 0, rng.randint(2, 9)))
    ask = rng.choice(("Find a flight from {} to {}", "I want to fly from {} to {}",
                      "Show flights from {} to {}", "Is there a plane from {} to {}"))  # fmt: skip
    wish = ask.format(start, end) + (f" for {count} people." if count else ".")
    arguments: dict[str, Any] = {"origin": start, "destination": end}
    if count:
        arguments["passengers"] = count
    price, hour = rng.randint(50, 900), rng.randint(0, 23)
    reply = f"There is a flight from {start} to {end} at {hour} for {price} euros."
    return Use(wish, arguments, {"hour": hour, "price": price}, reply)


def _currency(rng: Random, split: Split) -> Use:
    names = {"EUR": "euros", "USD": "dollars", "GBP": "pounds", "JPY": "yen"}
    source, target = rng.sample(list(names), 2)
    amount = rng.randint(1, 2000)
    ask = rng.choice(("Convert {} {} to {}.", "How much is {} {} in {}?",
                      "Change {} {} into {}."))  # fmt: skip
    wish = ask.format(amount, names[source], names[target])
    arguments = {"amount": amount, "from": source, "to": target}
    value = rng.randint(1, 3000)
    reply = f"{amount} {names[source]} are {value} {names[target]}."
    return Use(wish, arguments, {"value": value}, reply)


def _cart(rng: Random, split: Split) -> Use:
    things = some_items(rng, split, 1, 4)
    ask = rng.choice(("Add {} to my cart.", "Put {} on the shopping list.", "I need {}.",
                      "Please buy {}."))  # fmt: skip
    wish = ask.format(listing(things))
    return Use(wish, {"items": things}, {"count": len(things)}, f"I added {listing(things)}.")


def _event(rng: Random, split: Split) -> Use:
    title = f"{item(rng, split)} {rng.choice(('meeting', 'party', 'lesson', 'talk'))}"
    day, hour = rng.choice(("Monday", "Tuesday", "Friday", "Sunday")), rng.randint(7, 22)
    ask = rng.choice(("Plan a {t} on {d} at {h}.", "Put the {t} in my calendar, {d} at {h}.",
                      "Create an event: {t}, {d}, {h} o'clock."))  # fmt: skip
    wish = ask.format(t=title, d=day, h=hour)
    arguments = {"title": title, "when": {"day": day, "hour": hour}}
    return Use(wish, arguments, DONE, f"The {title} is on {day} at {hour}.")


def _music(rng: Random, split: Split) -> Use:
    genre = rng.choice(("jazz", "rock", "folk", "techno"))
    volume = rng.choice((0, rng.randint(1, 10)))
    ask = rng.choice(("Play some {}", "I want to hear {}", "Put on {} music"))
    wish = ask.format(genre) + (f" at volume {volume}." if volume else ".")
    arguments: dict[str, Any] = {"genre": genre}
    if volume:
        arguments["volume"] = volume
    return Use(wish, arguments, DONE, f"Here is some {genre}.")


def _table(rng: Random, split: Split) -> Use:
    place, people, hour = city(rng, split), rng.randint(1, 12), rng.randint(11, 22)
    ask = rng.choice(("Book a table in {c} for {p} people at {h}.",
                      "I need a table for {p} in {c} at {h}."))  # fmt: skip
    wish = ask.format(c=place, p=people, h=hour)
    arguments = {"city": place, "people": people, "hour": hour}
    return Use(wish, arguments, DONE, f"A table for {people} in {place} is booked.")


def _translate(rng: Random, split: Split) -> Use:
    text, language = " ".join(some_items(rng, split)), rng.choice(("French", "German", "Spanish"))
    ask = rng.choice(('Translate "{t}" to {l}.', 'What is "{t}" in {l}?', 'Say "{t}" in {l}.'))
    wish = ask.format(t=text, l=language)
    return Use(wish, {"text": text, "language": language}, DONE, f"Here it is in {language}.")


def _light(rng: Random, split: Split) -> Use:
    room, on = rng.choice(("kitchen", "bedroom", "bathroom", "office")), rng.random() < 0.5
    level = rng.randint(1, 100) if on and rng.random() < 0.5 else 0
    word = "on" if on else "off"
    ask = rng.choice(("Turn {w} the light in the {r}", "Switch the {r} light {w}"))
    wish = ask.format(w=word, r=room) + (f" at {level} percent." if level else ".")
    arguments: dict[str, Any] = {"room": room, "on": on}
    if level:
        arguments["brightness"] = level
    return Use(wish, arguments, DONE, f"The {room} light is {word}.")


def _note(rng: Random, split: Split) -> Use:
    text, pinned = " ".join(some_items(rng, split, 2, 4)), rng.random() < 0.3
    wish = f"{rng.choice(('Note this', 'Write down', 'Save a note'))}: {text}"
    wish += " (pin it)" if pinned else ""
    return Use(wish, {"text": text, "pinned": pinned}, DONE, "The note is saved.")


def _time(rng: Random, split: Split) -> Use:
    place, hour = city(rng, split), rng.randint(0, 23)
    ask = rng.choice(("What time is it in {}?", "Tell me the time in {}."))
    return Use(ask.format(place), {"city": place}, {"hour": hour}, f"It is {hour} in {place}.")


def _pizza(rng: Random, split: Split) -> Use:
    size, toppings = rng.choice(("small", "large")), some_items(rng, split)
    wish = f"Order a {size} pizza with {listing(toppings)}."
    return Use(wish, {"size": size, "toppings": toppings}, DONE, f"A {size} pizza is on its way.")


def _rate(rng: Random, split: Split) -> Use:
    title, stars = item(rng, split), rng.randint(1, 5)
    wish = f"Rate the film {title} with {stars} stars."
    return Use(wish, {"title": title, "stars": stars}, DONE, f"You gave {title} {stars} stars.")


_WHEN: Schema = {
    "type": "object",
    "properties": {"day": STRING, "hour": INTEGER},
    "required": ["day", "hour"],
}
_MONEY = enum("EUR", "USD", "GBP", "JPY")
TRAIN_TOOLS = (
    Tool("get_weather", "Get the weather of a city",
         {"city": STRING, "unit": enum("celsius", "fahrenheit")}, ("city",), _weather),
    Tool("set_timer", "Set a timer", {"minutes": INTEGER, "label": STRING}, ("minutes",), _timer),
    Tool("send_message", "Send a message to a person",
         {"to": STRING, "text": STRING}, ("to", "text"), _message),
    Tool("search_flights", "Search flights",
         {"origin": STRING, "destination": STRING, "passengers": INTEGER},
         ("origin", "destination"), _flights),
    Tool("convert_currency", "Convert money",
         {"amount": INTEGER, "from": _MONEY, "to": _MONEY}, ("amount", "from", "to"), _currency),
    Tool("add_to_cart", "Add items to the cart", {"items": STRINGS}, ("items",), _cart),
    Tool("create_event", "Put an event in the calendar",
         {"title": STRING, "when": _WHEN}, ("title", "when"), _event),
    Tool("play_music", "Play music",
         {"genre": enum("jazz", "rock", "folk", "techno"), "volume": INTEGER}, ("genre",), _music),
    Tool("book_table", "Book a table in a restaurant",
         {"city": STRING, "people": INTEGER, "hour": INTEGER},
         ("city", "people", "hour"), _table),
    Tool("translate", "Translate a text",
         {"text": STRING, "language": enum("French", "German", "Spanish")},
         ("text", "language"), _translate),
    Tool("set_light", "Switch a light",
         {"room": enum("kitchen", "bedroom", "bathroom", "office"), "on": BOOLEAN,
          "brightness": INTEGER}, ("room", "on"), _light),
    Tool("save_note", "Save a note",
         {"text": STRING, "pinned": BOOLEAN}, ("text", "pinned"), _note),
)  # fmt: skip
HELD_OUT_TOOLS = (
    Tool("get_time", "Get the time in a city", {"city": STRING}, ("city",), _time),
    Tool("order_pizza", "Order a pizza",
         {"size": enum("small", "large"), "toppings": STRINGS}, ("size", "toppings"), _pizza),
    Tool("rate_film", "Rate a film",
         {"title": STRING, "stars": INTEGER}, ("title", "stars"), _rate),
)  # fmt: skip
