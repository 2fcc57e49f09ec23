"""Text on the terminal as it comes, and what there is to say about it afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxserve.cli.interrupt import Interrupt, Stopped, interruptible

if TYPE_CHECKING:
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
        token_times: when each token came.
        output: the engine's; None before the first token.
    """

    text: str = ""
    stopped: bool = False
    started: float = field(default_factory=time.perf_counter)
    token_times: list[float] = field(default_factory=list)
    output: RequestOutput | None = None

    def tokens_per_second(self) -> float | None:
        """After the first token, whose time is the prompt's."""
        times = self.token_times
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None

    def summary(self) -> str:
        """One line of figures."""
        prompt = len(self.output.prompt_token_ids) if self.output else 0
        words = [f"prompt {prompt} tokens, output {len(self.token_times)} tokens"]
        rate = self.tokens_per_second()
        if rate is not None:
            words.append(f"{rate:.1f} tok/s")
        if self.stopped:
            words.append("stopped")
        elif self.output is not None:
            words.append(f"ended by {self.output.outputs[0].finish_reason}")
        return ", ".join(words)


def stream(llm: LLM, prompt: str | list[dict[str, Any]], params: SamplingParams) -> Answer:
    """Generates from a text or answers a conversation, printing the text as it comes.

    Ctrl-C ends the answer between two tokens; what there is of it comes back.
    """
    answer = Answer()

    def show(interrupt: Interrupt, output: RequestOutput, text: str) -> None:
        answer.output = output
        answer.token_times.append(time.perf_counter())
        answer.text += text
        print(text, end="", flush=True)
        interrupt.check()

    with interruptible() as interrupt:
        try:
            call: Any = llm.generate if isinstance(prompt, str) else llm.chat
            call(prompt, params, use_tqdm=False, on_text=lambda *new: show(interrupt, *new))
        except Stopped:
            answer.stopped = True
    return answer
