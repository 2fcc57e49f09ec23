"""A server's answer on the terminal, and Ctrl-C in it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Generator
from typing import Any

import pytest

from jaxserve.cli.complete_client import Client
from jaxserve.cli.streaming import stream_served


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # the signal is taken at the latest here


class FakeClient(Client):
    """Gives 10 chunks; the user presses Ctrl-C at the third one."""

    def __init__(self, lost: bool) -> None:
        self.lost, self.given = lost, 0

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        for number in range(10):
            if number == 2:
                with contextlib.suppress(*[KeyboardInterrupt] * self.lost):
                    press_ctrl_c()
            self.given += 1
            yield {"choices": [{"text": f"{number} "}]}


@pytest.mark.parametrize(("lost", "text"), [(False, "0 1 "), (True, "0 1 2 ")])
def test_ctrl_c_stops_a_servers_answer_even_where_python_loses_the_exception(
    lost: bool, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    client = FakeClient(lost)
    answer = stream_served(client, "/v1/completions", {})
    assert answer.stopped
    assert capsys.readouterr().out.startswith(text) and client.given == text.count(" ")
    assert signal.getsignal(signal.SIGINT) is before
