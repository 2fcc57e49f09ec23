"""What becomes of requests and processes when the engine fails, hangs or is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxserve import SamplingParams
from server.engine_client import EngineClient, EngineDeadError
from tests.helpers.engine_processes import fake_client, fake_process
from tests.helpers.fake_runner import naive
from tests.helpers.patience import timeout, until, within
from tests.server.test_engine_client import (
    LONG,
    VOCAB,
    greedy,
    play,
    read,
    seconds_until_idle,
)

ROOT = Path(__file__).resolve().parents[2]


def pid_of(client: EngineClient) -> int:
    """Of the engine's process."""
    assert client._process is not None and client._process.pid is not None
    return client._process.pid


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that nobody has waited for yet has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- a step fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["dispatch", "collect"])
def test_streams_go_on_after_a_failed_step_with_the_same_tokens(fault: str) -> None:
    async def scene(client: EngineClient) -> None:
        params = [greedy(40), SamplingParams(seed=3, max_tokens=40)]
        streams = [client.submit(str(i), [i, 1], params[i % 2]) for i in range(6)]
        results = await asyncio.gather(*map(read, streams))
        for index, (tokens, last) in enumerate(results):
            seed = 3 if index % 2 else None
            assert tokens == naive([index, 1], 40, VOCAB, seed)
            assert last.finish_reason == "length"
        assert (await client.stats())["recoveries"] == 3

    play(scene, faults={1: fault, 9: fault, 30: fault})


def test_a_device_that_fails_again_and_again_is_started_anew(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(client: EngineClient) -> None:
        first = pid_of(client)
        _, last = await read(client.submit("a", [1], greedy(50)))
        assert (last.finish_reason, last.error) == ("error", "The engine has failed.")
        await until(lambda: client.state == "ready", 10)
        assert pid_of(client) != first

    play(scene, faults={4: "dispatch", 5: "dispatch", 6: "dispatch"})
    assert "DeviceFailure: the step could not be started" in capfd.readouterr().err
    assert "the engine's process ended (exit code 1)" in caplog.text


# --- the process dies -----------------------------------------------------------------------------


def test_after_kill_9_streams_get_an_error_and_the_process_is_started_again() -> None:
    async def scene(client: EngineClient) -> None:
        streams = [client.submit(str(i), [i], greedy(2000)) for i in range(4)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0.2)
        first = pid_of(client)
        os.kill(first, signal.SIGSTOP)
        question = asyncio.create_task(client.stats())
        await asyncio.sleep(0.1)
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        for _, last in await asyncio.gather(*readers):
            assert (last.finish_reason, last.error) == ("error", "The engine has failed.")
        with pytest.raises(EngineDeadError):
            await question
        assert time.monotonic() - killed < within(2)
        assert client.state == "dead"
        with pytest.raises(EngineDeadError, match="started again"):
            client.submit("too early", [1], greedy(1))
        with pytest.raises(EngineDeadError):
            await client.stats()
        await until(lambda: client.state == "ready", 10)
        assert time.monotonic() - killed > 0.5, "not without some delay"
        assert pid_of(client) != first
        assert (await read(client.submit("again", [1], greedy(9))))[0] == naive([1], 9, VOCAB)

    play(scene, pace="slow", **LONG)


def test_each_death_in_a_row_doubles_the_delay(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(client: EngineClient) -> None:
        for delay in (0.5, 1.0):
            killed = time.monotonic()
            os.kill(pid_of(client), signal.SIGKILL)
            await until(lambda: client.state == "dead", 5)
            await until(lambda: client.state == "ready", 10)
            assert time.monotonic() - killed > delay

    play(scene)
    assert [record.args[-1] for record in caplog.records] == [0.5, 1.0]  # type: ignore[index]


def test_without_restart_the_owner_is_told() -> None:
    async def scene(client: EngineClient) -> None:
        os.kill(pid_of(client), signal.SIGKILL)
        async with timeout(5):
            assert await client.failed() == "the engine's process ended (signal 9)"
        assert client.state == "dead"

    play(scene, restart=False)


@pytest.mark.parametrize(
    ("start", "message"),
    [("is refused", "the engine can't start: no such model"), ("fails", "does not answer")],
)
def test_an_engine_that_cannot_start_is_not_started_again(
    start: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scene() -> None:
        client = EngineClient(fake_process(start=start))
        await client.start()
        async with timeout(10):
            assert "exit code 3" in await client.failed()
        with pytest.raises(EngineDeadError):
            client.submit("a", [1], greedy(1))
        await client.close()

    asyncio.run(scene())
    err = capfd.readouterr().err
    assert message in err
    assert ("Traceback" in err) == (start == "fails")


def test_closing_leaves_no_process_and_no_files() -> None:
    async def scene() -> None:
        async with fake_client(pace="slow", **LONG) as client:
            client.submit("a", [1], greedy(2000))
            pid, path = pid_of(client), client._path
            assert is_running(pid)
        assert not is_running(pid)
        assert not path.parent.exists()

    asyncio.run(scene())


def test_closing_ends_a_process_that_hangs() -> None:
    async def scene() -> None:
        async with fake_client(faults={2: "hang"}) as client:
            client.submit("a", [1], greedy(20))
            pid = pid_of(client)
            await asyncio.sleep(0.2)
            began = time.monotonic()
        assert time.monotonic() - began < within(6)
        assert not is_running(pid)

    asyncio.run(scene())


def test_the_process_ends_with_its_parent() -> None:
    """Killed, so that the parent can tidy up nothing."""
    code = """
        import asyncio
        from tests.helpers.engine_processes import fake_client

        async def scene():
            async with fake_client() as client:
                print(client._process.pid, flush=True)
                await asyncio.sleep(60)

        asyncio.run(scene())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    asyncio.run(until(lambda: not is_running(pid), 5))


# --- a step hangs ---------------------------------------------------------------------------------


def test_a_hung_step_is_written_down_and_the_process_started_anew(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(client: EngineClient) -> None:
        first, began = pid_of(client), time.monotonic()
        _, last = await read(client.submit("a", [1, 2, 3], greedy(50)))
        assert last.finish_reason == "error"
        assert time.monotonic() - began < within(5)
        assert client.last_heartbeat < time.monotonic() - 0.9, "it tells when it last got on"
        await until(lambda: client.state == "ready", 10)
        assert pid_of(client) != first

    play(scene, faults={5: "hang"}, step_timeout_s=1)
    err = capfd.readouterr().err
    assert "jaxserve: no step has completed for" in err
    assert "running, 3 prompt tokens, 5 output tokens, row 0" in err
    assert "collect" in err and "most recent call first" in err, "all threads are shown"
    assert "(exit code 4)" in caplog.text


def test_compiling_a_program_late_is_no_hang() -> None:
    """It takes longer than the watchdog waits."""

    async def scene(client: EngineClient) -> None:
        first = pid_of(client)
        reader = asyncio.create_task(read(client.submit("a", [1, 2, 3], greedy(20))))
        await until(lambda: client.compiling, 5)
        assert time.monotonic() - client.last_heartbeat < within(1)
        tokens, last = await reader
        assert (tokens, last.finish_reason) == (naive([1, 2, 3], 20, VOCAB), "length")
        assert pid_of(client) == first
        await until(lambda: not client.compiling, 3)

    play(scene, faults={5: "compile"}, step_timeout_s=1)


def test_a_hang_after_a_late_compilation_is_one() -> None:
    async def scene(client: EngineClient) -> None:
        _, last = await read(client.submit("a", [1, 2, 3], greedy(20)))
        assert last.finish_reason == "error"

    play(scene, faults={3: "compile", 5: "hang"}, step_timeout_s=1)


# --- the process says nothing -------------------------------------------------------------------


def test_a_stopped_process_is_noticed_within_five_seconds_and_killed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(client: EngineClient) -> None:
        first = pid_of(client)
        streams = [client.submit(str(i), [i], greedy(3000)) for i in range(3)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(1.0)  # by then the supervisor has heard from it, too
        os.kill(first, signal.SIGSTOP)
        stopped = time.monotonic()
        for _, last in await asyncio.gather(*readers):
            assert (last.finish_reason, last.error) == ("error", "The engine has failed.")
        assert client.state == "dead"
        assert 2 < time.monotonic() - stopped < within(5)
        await until(lambda: client.state == "ready", 10)
        assert not is_running(first)
        assert (await read(client.submit("again", [1], greedy(9))))[0] == naive([1], 9, VOCAB)

    play(scene, pace="slow", silence_s=5, **LONG)
    assert "the engine's process is killed: nothing was heard for 5 s." in caplog.text
    assert "it is started again in 0.5 s" in caplog.text


def test_a_short_pause_changes_nothing() -> None:
    async def scene(client: EngineClient) -> None:
        first = pid_of(client)
        reader = asyncio.create_task(read(client.submit("a", [1], greedy(150))))
        for _ in range(2):
            os.kill(first, signal.SIGSTOP)
            await asyncio.sleep(1.5)
            os.kill(first, signal.SIGCONT)
            await asyncio.sleep(0.2)
            assert client.state == "ready"
        assert (await reader)[0] == naive([1], 150, VOCAB)
        assert pid_of(client) == first

    play(scene, pace="slow", **LONG)


def test_who_comes_back_after_its_requests_were_given_up_serves_on() -> None:
    """Longer than front-ends wait, shorter than the supervisor does."""

    async def scene(client: EngineClient) -> None:
        first = pid_of(client)
        stream = client.submit("a", [1], greedy(3000))
        os.kill(first, signal.SIGSTOP)
        assert (await read(stream))[1].finish_reason == "error"
        os.kill(first, signal.SIGCONT)
        await until(lambda: client.state == "ready", 5)
        assert pid_of(client) == first
        assert await seconds_until_idle(client) < within(1), "what was given up was aborted"

    play(scene, pace="slow", **LONG)


def test_an_idle_engine_does_not_hang() -> None:
    async def scene(client: EngineClient) -> None:
        pid = pid_of(client)
        await asyncio.sleep(2.5)
        assert (client.state, pid_of(client)) == ("ready", pid)
        assert time.monotonic() - client.last_heartbeat < within(1.5)

    play(scene, step_timeout_s=1)
