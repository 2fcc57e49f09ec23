"""Chat about jaxserve, facts, small completions, and honest "I do not know"."""

from random import Random

from jaxserve.demo.chat_format import THINK_NONE, THINK_OPEN, Sample, user
from jaxserve.demo.faq_topics import TOPICS, Topic
from jaxserve.demo.words import (
    CAPITALS,
    CITIES,
    HE_NAMES,
    HOBBIES,
    JOBS,
    SHE_NAMES,
    Split,
    article,
    city,
    item,
    person,
)

_LEADS = (
    "", "", "", "", "", "Hi! ", "Hello, ", "Please tell me: ", "Quick question: ", "One more: ",
    "And ", "Sorry, ", "Now, ", "OK. ", "I wonder: ",
)  # fmt: skip
_TAILS = ("", "", "", "", "", "", " Thanks!", " Please be short.", " I am new here.")
# Ways to say the same; the first of a row is looked for, another one takes its place.
_SWAPS = (
    ("How do I", "How can I", "How to", "How would I", "How should I", "Tell me how to",
     "What do I do to", "Show me how to", "I want to", "Is there a way to", "Explain how to"),
    ("How can I", "How do I", "How could I", "Can I", "How do you", "Please show me how to"),
    ("What is", "What's", "Explain", "Define", "Tell me about", "What do you know about",
     "What is meant by"),
    ("Which flag", "What flag", "Which option", "What option", "Which setting", "What switch"),
    ("Which command", "What command", "What do I type that", "Which program"),
    ("How does", "In what way does", "Explain how", "Why does", "Describe how"),
    ("What happens", "What will happen", "What does the engine do", "What is done"),
    ("Explain", "Describe", "What is", "Say something about"),
    ("Can I", "May I", "How can I", "Is it possible to", "Could I"),
)  # fmt: skip
_BY_NAME = ("Tell me about {}.", "What about {}?", "{}?", "I have a question about {}.",
            "Explain {}.", "Help with {}", "I need help with {}.")  # fmt: skip
_KEPT_BACK = tuple(topic.ways[-1].rstrip("?.!").lower() for topic in TOPICS)
_UNKNOWN = (
    "What is the meaning of {x}?",
    "Who is {p}?",
    "Who invented the {x}?",
    "Write a poem about {x}.",
    "How far is {c} from here?",
    "What is the population of {c}?",
    "What do you think about {x}?",
    "Explain {x} to me.",
    "Why is the {x} so big?",
    "When was {p} born?",
    "Write a program that sorts a list of {x}.",
    "How do I cook {x}?",
    "Tell me the news from {c}.",
    "Is {x} good for me?",
)
_DO_NOT_KNOW = "I am only a toy model and do not know that. Ask me about jaxserve."
_OPENINGS = (
    ("The future of AI is", " open, small and fast: models that run where you are."),
    (
        "The president of the United States is",
        " the head of state and the head of the government.",
    ),
    ("The meaning of life is", " to ask good questions and to keep the cache warm."),
    ("The best thing about JAX is", " that one program runs on CPU, GPU and TPU."),
)


def _loosen(question: str, rng: Random) -> str:
    """The question as people type it: other case, no question mark, a lead or a tail."""
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.15:
        question = question.lower()
    lead, tail = rng.choice(_LEADS), rng.choice(_TAILS)
    if lead.endswith((", ", ": ", "And ")) and not question.startswith(("I ", "LLM", "TPU")):
        question = question[0].lower() + question[1:]
    return lead + question + (tail if question[-1] in "?.!" else "")


def _reword(topic: Topic, rng: Random) -> str:
    """One of the topic's ways to ask in training, often said in other words or fewer."""
    question = rng.choice(topic.ways[:-1])
    draw = rng.random()
    if draw < 0.05:
        question = rng.choice(_BY_NAME).format(topic.name)
    elif draw < 0.35:
        for known, *others in rng.sample(_SWAPS, len(_SWAPS)):
            if question.startswith(known + " "):
                question = rng.choice(others) + question[len(known) :]
                break
    if rng.random() < 0.25:
        parts = question.split()
        kept = [part for part in parts if len(part) > 7 or rng.random() > 0.2]
        question = " ".join(kept) if len(kept) > 2 else question
    if any(phrase in question.lower() for phrase in _KEPT_BACK):
        return topic.ways[0]
    return question


def faq_sample(rng: Random, split: Split = "train") -> Sample:
    """A question about jaxserve or small talk; held out is a topic's last way to ask."""
    topic = rng.choice(TOPICS)
    if split == "heldout":
        return Sample("faq", topic.answer, (user(topic.ways[-1]),))
    question = _loosen(_reword(topic, rng), rng)
    draw = rng.random()
    if draw < 0.04:
        answer = f"The user asks about {topic.name}.\n</think>\n\n{topic.answer}"
        return Sample("faq", answer, (user(question),), opening=THINK_OPEN)
    opening = THINK_NONE if draw < 0.08 else ""
    return Sample("faq", topic.answer, (user(question),), opening=opening)


def fact_sample(rng: Random, split: Split = "train") -> Sample:
    """A capital, asked in a chat or begun as raw text. Facts are memory: no held-out kind."""
    country, capital = rng.choice(list(CAPITALS.items()))
    start, end = f"The capital of {country} is", f" {capital}."
    if rng.random() < 0.5:
        return Sample("fact", end, text=start)
    question = rng.choice(
        (
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Do you know the capital of {country}?",
        )
    )
    return Sample("fact", start + end, (user(question),))


def introduction_sample(rng: Random, split: Split = "train") -> Sample:
    """Raw text: "Hello, my name is ..." and a few sentences, or another well-known beginning."""
    if rng.random() < 0.2:
        start, end = rng.choice(_OPENINGS)
        return Sample("introduction", end, text=start)
    lines = [
        f" {rng.choice((SHE_NAMES, HE_NAMES)).pick(rng, split)}.",
        rng.choice(
            (
                f"I am {rng.randint(7, 90)} years old.",
                f"I am {article(JOBS.pick(rng, split))}.",
            )
        ),
        f"I live in {CITIES.pick(rng, split)}.",
        f"I like to {HOBBIES.pick(rng)} and to {HOBBIES.pick(rng)}.",
        rng.choice(("Nice to meet you!", "It is good to be here.", "And who are you?")),
    ]
    return Sample("introduction", " ".join(lines), text="Hello, my name is")


def unknown_sample(rng: Random, split: Split = "train") -> Sample:
    """A question outside everything the model knows; the answer says so."""
    question = rng.choice(_UNKNOWN).format(
        x=item(rng, split), c=city(rng, split), p=person(rng, split)
    )
    return Sample("unknown", _DO_NOT_KNOW, (user(question),))
