"""Tool calls: named tools, made-up tools, wishes that need no tool, and answers to results.

Made-up tools (`find_report`, parameters drawn at random) are what teaches reading a schema; twelve
fixed tools alone would be learnt by heart.
"""

from random import Random
from typing import Any, NamedTuple

from jaxserve.demo.chat_format import Sample, tool_call_text, user
from jaxserve.demo.faq import faq_sample, unknown_sample
from jaxserve.demo.tool_specs import (
    BOOLEAN,
    DONE,
    HELD_OUT_TOOLS,
    INTEGER,
    STRING,
    STRINGS,
    TRAIN_TOOLS,
    Schema,
    Tool,
    Use,
    enum,
    listing,
    some_items,
)  # fmt: skip
from jaxserve.demo.words import (
    Split,
    WordSet,
    article,
    city,
    item,
    person,
    pick_or_make_up,
    words,
)

VERBS = words("find open create delete update check start stop list print copy archive")
NOUNS = words(
    "report ticket order album invoice project task song photo file page parcel budget contract"
    " machine camera server garden lesson query",
    "passport journal battery hotel",
)
_STRING_FIELDS = WordSet(("name", "owner", "city", "color", "kind", "reason", "key"), ("author",))
_INTEGER_FIELDS = WordSet(("id", "count", "year", "size", "days", "limit"), ("weight",))
_ARRAY_FIELDS = words("tags items parts")
_LEVELS = (("low", "high"), ("small", "medium", "large"), ("fast", "slow"), ("daily", "weekly"))
_NO_TOOL = "I have no tool for that."


class Field(NamedTuple):
    """A made-up parameter with a value, and how a user says it with and without its name."""

    name: str
    schema: Schema
    value: Any
    said: str
    bare: str


def _field(rng: Random, split: Split) -> Field:
    """A parameter of any kind."""
    kind = rng.choice(("string", "string", "integer", "integer", "enum", "boolean", "array"))
    if kind == "integer":
        name = pick_or_make_up(rng, _INTEGER_FIELDS, split, 0.3)
        number = rng.randint(0, 10 ** rng.randint(1, 4))
        said = rng.choice((f"{name} {number}", f"{name} {number}", f"{number} {name}"))
        return Field(name, INTEGER, number, said, str(number))
    if kind == "enum":
        levels = rng.choice(_LEVELS)
        name, value = rng.choice(("priority", "mode", "level")), rng.choice(levels)
        return Field(name, enum(*levels), value, f"{name} {value}", value)
    if kind == "boolean":
        name, on = rng.choice(("urgent", "private", "loud")), rng.random() < 0.5
        return Field(name, BOOLEAN, on, f"{name} {'yes' if on else 'no'}", "")
    if kind == "array":
        name, values = pick_or_make_up(rng, _ARRAY_FIELDS, split, 0.3), some_items(rng, split)
        return Field(name, STRINGS, values, f"{name} {listing(values)}", listing(values))
    name = pick_or_make_up(rng, _STRING_FIELDS, split, 0.3)
    value = rng.choice((city, item, person))(rng, split)
    return Field(name, STRING, value, f"{name} {value}", value)


def _clear_fields(used: list[Field], fields: dict[str, Field]) -> list[str]:
    """The parameters whose values, said without a name, can mean nothing else."""
    kinds = [field.schema for field in fields.values()]
    listed = any(field.schema == STRINGS for field in used)
    return [
        field.name
        for field in used
        if field.bare and kinds.count(field.schema) == 1 and not (listed and field.schema == STRING)
    ]


def _lookup_tool(rng: Random) -> Tool:
    """A made-up tool that tells something about a city, a person or a thing (training only)."""
    verb = rng.choice(("get", "find", "show", "check"))
    noun = pick_or_make_up(rng, NOUNS, "train", 0.6)
    name, draw, small = rng.choice(
        (("city", city, "in"), ("city", city, "of"), ("name", person, "of"), ("item", item, "of"))
    )

    def make_use(rng: Random, split: Split) -> Use:
        value = draw(rng, split)
        ask = rng.choice(
            (f"What is the {noun} {small} {value}?", f"What {noun} is it {small} {value}?",
             f"Tell me the {noun} {small} {value}.", f"{verb.capitalize()} the {noun} for {value}.",
             f"{noun.capitalize()} {small} {value}?", f"Which {noun} has {value}?")
        )  # fmt: skip
        return Use(ask, {name: value}, DONE, f"The {noun} is done.")

    return Tool(
        name=f"{verb}_{noun}",
        description=f"{verb.capitalize()} the {noun} {small} {article(name)}",
        properties={name: STRING},
        required=(name,),
        make_use=make_use,
    )


def made_up_tool(rng: Random, split: Split = "train") -> Tool:
    """A tool nobody has seen, whose use mentions all, or all but one optional, parameter."""
    if split == "train" and rng.random() < 0.2:
        return _lookup_tool(rng)
    verb = pick_or_make_up(rng, VERBS, split, 0.15)
    noun = pick_or_make_up(rng, NOUNS, split, 0.5)
    count = rng.randint(1, 4)
    fields: dict[str, Field] = {}
    while len(fields) < count:
        drawn = _field(rng, split)
        fields[drawn.name] = drawn
    names = list(fields)
    used = names[:-1] if count > 1 and rng.random() < 0.3 else names
    optional = names[-1:] if used != names or rng.random() < 0.3 else []

    def make_use(rng: Random, split: Split) -> Use:
        said = {name: fields[name].said for name in used}
        thing, clear = noun, _clear_fields([fields[name] for name in used], fields)
        enums = [name for name in clear if "enum" in fields[name].schema]
        if enums and len(used) > 1 and rng.random() < 0.4:
            thing = f"{fields[enums[0]].bare} {noun}"
            del said[enums[0]]
        others = [name for name in clear if name in said]
        if others and rng.random() < 0.4:
            name = rng.choice(others)
            said[name] = fields[name].bare
        opening = rng.choice(
            (f"Please {verb} the {thing} with", f"{verb.capitalize()} {article(thing)}:",
             f"{verb.capitalize()} {article(thing)} with", f"{verb.capitalize()} the {thing} for",
             f"I want to {verb} the {thing} with", f"Can you {verb} this {thing}?")
        )  # fmt: skip
        arguments = {name: fields[name].value for name in used}
        wish = f"{opening} {listing(list(said.values()))}" + rng.choice(("", "."))
        return Use(wish, arguments, DONE, f"The {noun} is done.")

    which = rng.choice((article(noun), f"the {noun}", f"one {noun}"))
    return Tool(
        name=f"{verb}_{noun}",
        description=f"{verb.capitalize()} {which}",
        properties={name: field.schema for name, field in fields.items()},
        required=tuple(name for name in names if name not in optional),
        make_use=make_use,
    )


def _choose(rng: Random, split: Split) -> Tool:
    if rng.random() < 0.5:
        return made_up_tool(rng, split)
    return rng.choice(TRAIN_TOOLS)


def _shelf(rng: Random, tool: Tool | None, split: Split) -> tuple[dict[str, Any], ...]:
    """The tools in the system turn: the right one, if any, between up to three others."""
    shelf = {tool.name: tool} if tool else {}
    for _ in range(rng.choice((0, 1, 1, 2, 3)) or int(tool is None)):
        other = _choose(rng, split)
        shelf.setdefault(other.name, other)
    chosen = list(shelf.values())
    rng.shuffle(chosen)
    return tuple(other.spec() for other in chosen)


def _call_sample(rng: Random, tool: Tool, split: Split, task: str) -> Sample:
    use = tool.make_use(rng, split)
    shelf = _shelf(rng, tool, split)
    answer = tool_call_text(tool.name, use.arguments)
    return Sample(task, answer, (user(use.wish),), shelf)


def tool_sample(rng: Random, split: Split = "train") -> Sample:
    """A wish that needs one tool call; held out are the values, not the tool."""
    return _call_sample(rng, rng.choice(TRAIN_TOOLS), split, "tool")


def new_tool_sample(rng: Random, split: Split = "train") -> Sample:
    """The same with a made-up tool, or, held out, one of the named tools kept back."""
    if split == "heldout" and rng.random() < 0.5:
        return _call_sample(rng, rng.choice(HELD_OUT_TOOLS), split, "new_tool")
    return _call_sample(rng, made_up_tool(rng, split), split, "new_tool")


def two_calls_sample(rng: Random, split: Split = "train") -> Sample:
    """One wish that needs the weather tool twice."""
    weather = TRAIN_TOOLS[0]
    places = [city(rng, split), city(rng, split)]
    wish = rng.choice(("What is the weather in {} and in {}?", "Compare the weather of {} and {}."))
    answer = "\n".join(tool_call_text(weather.name, {"city": place}) for place in places)
    shelf = _shelf(rng, weather, split)
    return Sample("two_calls", answer, (user(wish.format(*places)),), shelf)


def no_tool_sample(rng: Random, split: Split = "train") -> Sample:
    """Tools are offered, but the question needs none, or the tool that it needs is missing."""
    tool = rng.choice(TRAIN_TOOLS)
    shelf = _shelf(rng, None, split)
    missing = all(spec["function"]["name"] != tool.name for spec in shelf)
    if missing and rng.random() < 0.4:
        wish = tool.make_use(rng, split).wish
        return Sample("no_tool", _NO_TOOL, (user(wish),), shelf)
    make = rng.choice((faq_sample, faq_sample, faq_sample, unknown_sample))
    plain = make(rng, "train")
    return Sample("no_tool", plain.answer, plain.messages, shelf, opening=plain.opening)


def tool_result_sample(rng: Random, split: Split = "train") -> Sample:
    """The second turn: the tool has answered, and the model says it in words."""
    tool = rng.choice(TRAIN_TOOLS)
    use = tool.make_use(rng, split)
    call = {
        "type": "function",
        "function": {"name": tool.name, "arguments": dict(use.arguments)},
    }
    result = "{" + ", ".join(f'"{k}": {_scalar(v)}' for k, v in use.result.items()) + "}"
    messages = (
        user(use.wish),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
    )
    return Sample("tool_result", use.reply, messages, _shelf(rng, tool, split))


def _scalar(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
