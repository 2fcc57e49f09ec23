"""Text on the terminal as it comes, and what there is to say about it afterwards."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve.cli.interrupt import Interrupt, Stopped, interruptible

if TYPE_CHECKING:
    from jaxserve.cli.complete_client import Client
    from jaxserve.llm import LLM
    from jaxserve.outputs import RequestOutput
    from jaxserve.sampling.params import SamplingParams


@dataclass
class Answer:
    """One streamed completion.

    Attributes:
        text: so far.
        stopped: by Ctrl-C.
        started: when it was asked for.
        token_times: when each token came; from a server, when each piece of text came.
        prompt_tokens, output_tokens, cached_tokens: how many; None while they are unknown, because
            a server tells them at the end.
        finish_reason: why it ended, unless it was stopped.
    """

    text: str = ""
    stopped: bool = False
    started: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None

    def show(self, text: str) -> None:
        """Prints and keeps the next piece of text."""
        self.token_times.append(time.perf_counter())
        self.text += text
        print(text, end="", flush=True)

    def first_after(self) -> float | None:
        """Seconds until the first token."""
        return self.token_times[0] - self.started if self.token_times else None

    def tokens_per_second(self) -> float | None:
        """After the first token, whose time is the prompt's."""
        times, count = self.token_times, self.output_tokens
        return None if count is None or len(times) < 2 else (count - 1) / (times[-1] - times[0])

    def summary(self) -> str:
        """One line of figures."""
        words = []
        if self.prompt_tokens is not None:
            words.append(f"prompt {self.prompt_tokens} tokens, output {self.output_tokens} tokens")
        rate = self.tokens_per_second()
        if rate is not None:
            words.append(f"{rate:.1f} tok/s")
        if self.stopped:
            words.append("stopped")
        elif self.finish_reason is not None:
            words.append(f"ended by {self.finish_reason}")
        return ", ".join(words)


def stream(llm: LLM, prompt: str | list[dict[str, Any]], params: SamplingParams) -> Answer:
    """Generates from a text or answers a conversation, printing the text as it comes.

    Ctrl-C ends the answer between two tokens; what there is of it comes back.
    """
    answer = Answer()
    last: RequestOutput | None = None

    def show(interrupt: Interrupt, output: RequestOutput, text: str) -> None:
        nonlocal last
        last = output
        answer.show(text)
        interrupt.check()

    with interruptible() as interrupt:
        try:
            call: Any = llm.generate if isinstance(prompt, str) else llm.chat
            call(prompt, params, use_tqdm=False, on_text=lambda *new: show(interrupt, *new))
        except Stopped:
            answer.stopped = True
    if last is not None:
        answer.prompt_tokens, answer.output_tokens = (
            len(last.prompt_token_ids),
            len(answer.token_times),
        )
        answer.cached_tokens = last.num_cached_tokens or 0
        answer.finish_reason = last.outputs[0].finish_reason
    return answer


def stream_served(client: Client, path: str, body: dict[str, Any]) -> Answer:
    """The same from a server: ``path`` is that of completions or of chat completions.

    Ctrl-C ends the answer at once, also while nothing has come yet: it closes the connection, and
    so the server stops too.

    Raises:
        ServerError: the server can't be reached, refuses the request or fails on the way.
    """
    answer = Answer()
    wanted = body | {"stream_options": {"include_usage": True}}
    with interruptible(at_once=True) as interrupt:
        try:
            with contextlib.closing(client.stream(path, wanted)) as chunks:
                for chunk in chunks:
                    _take(answer, chunk)
                    interrupt.check()
        except (KeyboardInterrupt, Stopped):
            answer.stopped = True
    return answer


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    """What a server's chunk adds."""
    for choice in chunk["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        if text:
            answer.show(text)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    usage = chunk.get("usage")
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
