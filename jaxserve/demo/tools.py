"""Tool calls: named tools, made-up tools, wishes that need no tool, and answers to results.

Made-up tools (`find_report`, parameters drawn at random) are what teaches reading a schema; twelve
fixed tools alone would be learnt by heart.
"""

from random import Random
from typing import Any

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
from jaxserve.demo.words import Split, WordSet, article, city, item, made_up_word, person, words

VERBS = words("find open create delete update check start stop list print copy archive")
NOUNS = words(
    "report ticket order album invoice project task song photo file page parcel budget contract"
    " machine camera server garden lesson query",
    "passport journal battery hotel",
)
_STRING_FIELDS = WordSet(("name", "owner", "city", "color", "kind", "reason", "key"), ("author",))
_INTEGER_FIELDS = WordSet(("id", "count", "year", "size", "days", "limit"), ("weight",))
_LEVELS = (("low", "high"), ("small", "medium", "large"), ("fast", "slow"), ("daily", "weekly"))
_NO_TOOL = "I have no tool for that."


def _field(rng: Random, split: Split) -> tuple[str, Schema, Any, str]:
    """A made-up parameter: its name, schema, value, and how a user says it."""
    kind = rng.choice(("string", "string", "integer", "integer", "enum", "boolean", "array"))
    if kind == "integer":
        name, number = _INTEGER_FIELDS.pick(rng, split), rng.randint(0, 10 ** rng.randint(1, 4))
        return name, INTEGER, number, f"{name} {number}"
    if kind == "enum":
        levels = rng.choice(_LEVELS)
        name, value = rng.choice(("priority", "mode", "level")), rng.choice(levels)
        return name, enum(*levels), value, f"{name} {value}"
    if kind == "boolean":
        name, on = rng.choice(("urgent", "private", "loud")), rng.random() < 0.5
        return name, BOOLEAN, on, f"{name} {'yes' if on else 'no'}"
    if kind == "array":
        name, values = rng.choice(("tags", "items", "parts")), some_items(rng, split)
        return name, STRINGS, values, f"{name} {listing(values)}"
    name = _STRING_FIELDS.pick(rng, split)
    value = rng.choice((city, item, person))(rng, split)
    return name, STRING, value, f"{name} {value}"


def made_up_tool(rng: Random, split: Split = "train") -> Tool:
    """A tool nobody has seen, whose use mentions all, or all but one optional, parameter."""
    verb, noun = VERBS.pick(rng), NOUNS.pick(rng, split)
    if split == "train" and rng.random() < 0.3:
        noun = made_up_word(rng)
    count = rng.randint(1, 4)
    fields: dict[str, tuple[Schema, Any, str]] = {}
    while len(fields) < count:
        name, schema, value, said = _field(rng, split)
        fields[name] = schema, value, said
    names = list(fields)
    used = names[:-1] if count > 1 and rng.random() < 0.3 else names
    optional = names[-1:] if used != names or rng.random() < 0.3 else []

    def make_use(rng: Random, split: Split) -> Use:
        said = listing([fields[name][2] for name in used])
        opening = rng.choice(
            (f"Please {verb} the {noun} with", f"{verb.capitalize()} {article(noun)}:",
             f"I want to {verb} the {noun} with", f"Can you {verb} this {noun}?")
        )  # fmt: skip
        arguments = {name: fields[name][1] for name in used}
        return Use(f"{opening} {said}", arguments, DONE, f"The {noun} is done.")

    which = rng.choice((article(noun), f"the {noun}", f"one {noun}"))
    return Tool(
        name=f"{verb}_{noun}",
        description=f"{verb.capitalize()} {which}",
        properties={name: schema for name, (schema, _, _) in fields.items()},
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
