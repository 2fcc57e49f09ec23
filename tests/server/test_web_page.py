"""The page in a real browser, against a server of its own that fakes the API's replies.

Skipped where Playwright or a Chromium is missing (Debian: ``apt install chromium-headless-shell``).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.app import create_app, create_runner
from server.config import ServerConfig
from server.web_files import add_web
from tests.helpers.fake_engine_client import STORY, FakeEngineClient
from tests.helpers.patience import poll, within
from tests.helpers.serving import demo_tokenizer, story

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = sync_api.Page
expect = sync_api.expect

CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
XSS = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "<svg onload=\"document.title='owned'\"> [click](javascript:document.title='owned')"
)
TOKENS = [
    {"text": " little", "top": {" little": -0.4, " small": -1.5, " <b>big</b>": -3.2}},
    {"text": " <i>girl</i>", "top": {" boy": -0.9, " <i>girl</i>": -1.2}},
    {"text": ".\n", "top": {".\n": -0.01, "!": -5.0}},
]


class FakeApi:
    """The API's routes with scripted replies; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.pieces = ["Hello", ", ", "world", "."]
        self.startup = {"stage": "ready", "done": 1, "total": 1, "eta_s": 0}
        self.api_key: str | None = None
        self.failure: tuple[int, dict[str, str]] | None = None
        self.event: dict[str, Any] | None = None
        self.hold: threading.Event | None = None
        self.cut = False
        self.aborted = threading.Event()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware])
        add_web(app)
        app.router.add_get("/startup", self._startup)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        return app

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """The bodies sent to the path, in order."""
        return [body for asked, body in self.asked if asked == path]

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/" or request.path.startswith("/web/"):
            return await handler(request)
        self.asked.append((request.path, await request.json() if request.can_read_body else {}))
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return error(401, "Wrong API key.")
        if self.failure and request.method == "POST":
            status, headers = self.failure
            return error(status, "It <b>failed</b>.", headers)
        return await handler(request)

    async def _startup(self, request: web.Request) -> web.Response:
        return web.json_response(self.startup)

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": name, "object": "model", "max_model_len": 2048} for name in ("demo", "b")]
        return web.json_response({"object": "list", "data": models})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        chunks += [
            {"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in self.pieces
        ]
        chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
        return await self._stream(request, chunks)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        chunks = []
        for token in TOKENS:
            top: Any = token["top"]
            logprobs = {
                "tokens": [token["text"]],
                "token_logprobs": [top[token["text"]]],
                "top_logprobs": [top],
                "text_offset": [0],
            }
            chunks.append({"choices": [{"index": 0, "text": token["text"], "logprobs": logprobs}]})
        return await self._stream(request, chunks)

    async def _stream(
        self, request: web.Request, chunks: list[dict[str, Any]]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        try:
            for i, chunk in enumerate([*chunks, {"choices": [], "usage": usage}]):
                if self.hold and i == 2:
                    while not self.hold.is_set():
                        await response.write(b": waiting\n\n")
                        await asyncio.sleep(0.02)
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
                await asyncio.sleep(0.005)
            if self.event:
                await response.write(f"data: {json.dumps(self.event)}\n\n".encode())
            if not self.cut:
                await response.write(b"data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.aborted.set()
            raise
        return response

    async def _tokenize(self, request: web.Request) -> web.Response:
        strings = re.findall(r" ?\w+|\s|[^\w\s]", (await request.json())["prompt"])
        ids = [100 + len(text) for text in strings]
        reply = {"count": len(ids), "max_model_len": 2048, "tokens": ids}
        return web.json_response({**reply, "token_strs": [s.replace(" ", "Ġ") for s in strings]})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"prompt": " ".join("w" * i for i in (await request.json())["tokens"])}
        )


def error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
    return web.json_response(body, status=status, headers=headers)


def serve(runner: web.AppRunner) -> Iterator[str]:
    """Runs the application from a thread; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait_for(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    wait_for(runner.setup())
    wait_for(web.TCPSite(runner, "127.0.0.1", 0).start())
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    wait_for(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def find_chromium(own: str) -> str | None:
    """The browser that Playwright installed, or one of the system's."""
    if Path(own).exists():
        return own
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def address(api: FakeApi) -> Iterator[str]:
    yield from serve(web.AppRunner(api.app(), shutdown_timeout=0.1, handler_cancellation=True))


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    """The page, opened; a test fails if its scripts raised or the browser refused something."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1e3 * within(5))
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.on("console", lambda m: faults.append(m.text) if "Security Policy" in m.text else None)
    page.goto(address)
    yield page
    context.close()
    assert faults == []


def say(page: Page, text: str) -> None:
    """Sends a message as a person does, once the server is ready."""
    expect(page.locator("#send")).to_be_enabled()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_for_answer(page: Page) -> None:
    expect(page.locator(".assistant").last).to_have_attribute("aria-busy", "false")


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_the_page_loads_everything_from_its_own_server(page: Page, address: str) -> None:
    expect(page.locator("#send")).to_be_enabled()
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith(address) for name in loaded)


class TestChat:
    def test_an_answer_streams_in_with_its_numbers_below(self, page: Page, api: FakeApi) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        expect(page.locator(".user .body")).to_have_text("Hi")
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")
        stats = page.locator(".assistant .stats")
        expect(stats).to_have_text(
            re.compile(r"4 tokens · [\d.,]+ tok/s · first token after \d+ ms")
        )
        (body,) = api.bodies("/v1/chat/completions")
        assert body["model"] == "demo"
        assert body["stream"] is True
        assert body["messages"] == [{"role": "user", "content": "Hi"}]

    def test_text_shows_before_the_answer_is_complete(self, page: Page, api: FakeApi) -> None:
        api.hold = threading.Event()
        say(page, "Hi")
        expect(page.locator(".assistant .body")).to_have_text("Hello")
        expect(page.locator(".assistant")).to_have_attribute("aria-busy", "true")
        api.hold.set()
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")

    def test_escape_stops_the_answer_and_keeps_what_came(self, page: Page, api: FakeApi) -> None:
        api.hold = threading.Event()
        say(page, "Hi")
        expect(page.locator(".assistant .body")).to_have_text("Hello")
        page.keyboard.press("Escape")
        wait_for_answer(page)
        expect(page.locator(".assistant .stats")).to_contain_text("stopped")
        expect(page.locator(".assistant .body")).to_have_text("Hello")
        assert api.aborted.wait(5)

    def test_the_send_button_stops_while_an_answer_comes(self, page: Page, api: FakeApi) -> None:
        api.hold = threading.Event()
        say(page, "Hi")
        button(page, "Stop").click()
        wait_for_answer(page)
        expect(button(page, "Send")).to_be_visible()

    def test_shift_enter_starts_a_line(self, page: Page, api: FakeApi) -> None:
        expect(page.locator("#send")).to_be_enabled()
        box = page.get_by_label("Message", exact=True)
        box.press_sequentially("one")
        box.press("Shift+Enter")
        box.press_sequentially("two")
        assert api.bodies("/v1/chat/completions") == []
        box.press("Enter")
        wait_for_answer(page)
        (body,) = api.bodies("/v1/chat/completions")
        assert body["messages"][0]["content"] == "one\ntwo"

    def test_retry_asks_again_without_the_old_answer(self, page: Page, api: FakeApi) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        api.pieces = ["Another."]
        button(page, "Retry answer").click()
        expect(page.locator(".assistant .body")).to_have_text("Another.")
        expect(page.locator(".assistant")).to_have_count(1)
        assert api.bodies("/v1/chat/completions")[1]["messages"] == [
            {"role": "user", "content": "Hi"}
        ]

    def test_an_edited_message_goes_on_from_there(self, page: Page, api: FakeApi) -> None:
        for text in ("first", "second"):
            say(page, text)
            wait_for_answer(page)
        page.locator(".user").first.hover()
        button(page, "Edit message").first.click()
        page.get_by_label("Message text").fill("changed")
        page.keyboard.press("Enter")
        wait_for_answer(page)
        expect(page.locator(".message")).to_have_count(2)
        expect(page.locator(".user .body")).to_have_text("changed")
        assert api.bodies("/v1/chat/completions")[-1]["messages"] == [
            {"role": "user", "content": "changed"}
        ]

    def test_an_edited_answer_is_what_the_model_is_told_it_said(
        self, page: Page, api: FakeApi
    ) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        page.locator(".assistant").get_by_role("button", name="Edit message").click()
        page.get_by_label("Message text").fill("Better.")
        button(page, "Save").click()
        say(page, "Go on")
        wait_for_answer(page)
        assert api.bodies("/v1/chat/completions")[-1]["messages"][1] == {
            "role": "assistant",
            "content": "Better.",
        }

    def test_system_prompt_and_sampling_are_sent(self, page: Page, api: FakeApi) -> None:
        button(page, "Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Top p").fill("7")
        page.get_by_label("Stop at").fill("END\nFIN")
        expect(page.locator("#sampling-top_p-error")).to_have_text("At most 1")
        say(page, "Hi")
        wait_for_answer(page)
        (body,) = api.bodies("/v1/chat/completions")
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["temperature"], body["stop"]) == (0.5, ["END", "FIN"])
        assert "top_p" not in body

    def test_markdown_becomes_elements_and_code_can_be_copied(
        self, page: Page, api: FakeApi
    ) -> None:
        table = "| a | b |\n|---|--:|\n| 1 | **2** |"
        code = "```py\nx = '<b>'\n```"
        api.pieces = list(f"# Title\n\n{table}\n\n- one\n  - two\n\n{code}\n")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        say(page, "Hi")
        wait_for_answer(page)
        answer = page.locator(".assistant .body")
        expect(answer.locator("h3")).to_have_text("Title")
        expect(answer.locator("td strong")).to_have_text("2")
        expect(answer.locator("li li")).to_have_text("two")
        expect(answer.locator("pre code")).to_have_text("x = '<b>'")
        button(page, "Copy code").click()
        expect(page.locator(".code .copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == "x = '<b>'"

    def test_markup_in_an_answer_or_a_message_stays_text(self, page: Page, api: FakeApi) -> None:
        api.pieces = [XSS, "\n\n```<script>\n</code></pre><script>alert(1)</script>\n```"]
        say(page, XSS)
        wait_for_answer(page)
        expect(page.locator(".user .body")).to_have_text(XSS)
        expect(page.locator(".assistant .body")).to_contain_text("<img src=x onerror=")
        assert (
            page.locator("main :is(img, script, iframe, object, [onerror], [onload])").count() == 0
        )
        assert page.locator("main a").count() == 0
        assert page.title() == "jaxserve"

    def test_ctrl_slash_opens_and_closes_the_help(self, page: Page) -> None:
        page.keyboard.press("Control+/")
        expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
        page.keyboard.press("Control+/")
        expect(page.locator("#help")).not_to_be_visible()


class TestConversations:
    def test_they_outlive_a_reload(self, page: Page) -> None:
        say(page, "Remember me")
        wait_for_answer(page)
        page.reload()
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")
        expect(page.locator(".assistant .stats")).to_contain_text("tok/s")

    def test_there_may_be_several_each_with_its_own_answer(self, page: Page, api: FakeApi) -> None:
        api.hold = threading.Event()
        say(page, "first")
        expect(page.locator(".assistant .body")).to_have_text("Hello")
        button(page, "New conversation").click()
        expect(page.locator(".message")).to_have_count(0)
        api.hold.set()
        say(page, "second")
        wait_for_answer(page)
        page.locator("#conversations").get_by_role("button", name="first", exact=True).click()
        expect(page.locator(".user .body")).to_have_text("first")
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")

    def test_a_deleted_one_comes_back_by_undo(self, page: Page) -> None:
        say(page, "Precious")
        wait_for_answer(page)
        page.locator("#conversations li").hover()
        button(page, "Delete Precious").click()
        expect(page.locator("#conversations li")).to_have_count(0)
        button(page, "Undo").click()
        expect(page.locator(".user .body")).to_have_text("Precious")

    def test_they_are_exported_as_json(self, page: Page) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        with page.expect_download() as download:
            button(page, "Export as JSON").click()
        exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        (conversation,) = exported["conversations"]
        assert [m["content"] for m in conversation["messages"]] == ["Hi", "Hello, world."]
        assert download.value.suggested_filename.endswith(".json")


class TestErrors:
    @pytest.mark.parametrize(
        ("failure", "shown"),
        [
            ((400, {}), "It <b>failed</b>."),
            (
                (429, {"Retry-After": "7"}),
                "The server is busy: It <b>failed</b>. Try again in 7 s.",
            ),
            ((413, {}), "The request is too large for the server: It <b>failed</b>."),
        ],
    )
    def test_a_refusal_is_shown_as_text(
        self, page: Page, api: FakeApi, failure: tuple[int, dict[str, str]], shown: str
    ) -> None:
        api.failure = failure
        say(page, "Hi")
        expect(page.get_by_role("alert")).to_have_text(shown)

    def test_an_error_in_the_stream_keeps_the_text_before_it(
        self, page: Page, api: FakeApi
    ) -> None:
        api.event = {"error": {"message": "The engine died.", "type": "x", "code": 500}}
        say(page, "Hi")
        expect(page.get_by_role("alert")).to_have_text("The engine died.")
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")

    def test_a_stream_cut_short_is_an_error_and_can_be_retried(
        self, page: Page, api: FakeApi
    ) -> None:
        api.cut = True
        say(page, "Hi")
        expect(page.get_by_role("alert")).to_contain_text("closed before the answer was complete")
        api.cut = False
        button(page, "Retry answer").click()
        wait_for_answer(page)
        expect(page.get_by_role("alert")).to_have_count(0)


class TestServer:
    def test_start_up_is_shown_until_the_model_is_ready(
        self, browser: Any, api: FakeApi, address: str
    ) -> None:
        api.startup = {"stage": "compiling", "done": 3, "total": 12, "eta_s": 7.2}
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#banner")).to_have_text(
            "The model is not ready yet: compiling 3 of 12, about 8 s left."
        )
        expect(page.locator("#send")).to_be_disabled()
        assert page.locator("progress").evaluate("(bar) => bar.value / bar.max") == 0.25
        api.startup = {"stage": "ready", "done": 1, "total": 1, "eta_s": 0}
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#send")).to_be_enabled()
        page.close()

    def test_the_key_is_asked_for_sent_and_not_kept(
        self, browser: Any, api: FakeApi, address: str
    ) -> None:
        api.api_key = "secret"
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#banner")).to_contain_text("wants an API key")
        button(page, "Settings").click()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        say(page, "Hi")
        expect(page.locator(".assistant .body")).to_have_text("Hello, world.")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        context.close()


class TestCompletion:
    @pytest.fixture(autouse=True)
    def completion(self, page: Page) -> None:
        expect(page.locator("#send")).to_be_enabled()
        page.get_by_role("tab", name="Completion").click()
        page.get_by_label("Text to go on from").fill("Once there was a")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#completion-stats")).to_contain_text("tok/s")

    def test_each_token_is_a_place_to_look_at(self, page: Page, api: FakeApi) -> None:
        expect(page.locator(".token")).to_have_count(3)
        expect(page.locator("#completion-output")).to_have_text(" little <i>girl</i>.\n")
        (body,) = api.bodies("/v1/completions")
        assert (body["prompt"], body["logprobs"]) == ("Once there was a", 5)

    def test_hovering_shows_probabilities_and_alternatives_as_text(self, page: Page) -> None:
        page.locator(".token").nth(1).hover()
        card = page.get_by_role("tooltip")
        expect(card.locator("p")).to_have_text("␣<i>girl</i> 30.1 %")
        expect(card.locator("li")).to_have_text(["␣boy40.7 %", "␣<i>girl</i>30.1 %"])
        assert page.locator("main i").count() == 0

    def test_the_arrow_keys_go_from_token_to_token(self, page: Page) -> None:
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator(".token").nth(1)).to_be_focused()
        expect(page.get_by_role("tooltip")).to_contain_text("30.1 %")

    def test_an_alternative_is_gone_on_with(self, page: Page, api: FakeApi) -> None:
        page.locator(".token").nth(1).hover()
        page.get_by_role("tooltip").get_by_role("button").first.click()
        expect(page.get_by_label("Text to go on from")).to_have_value("Once there was a little boy")
        expect(page.locator("#completion-stats")).to_contain_text("tok/s")
        assert api.bodies("/v1/completions")[1]["prompt"] == "Once there was a little boy"


class TestTokenizer:
    @pytest.fixture(autouse=True)
    def tokenizer(self, page: Page) -> None:
        page.get_by_role("tab", name="Tokenizer").click()

    def test_text_becomes_ids_and_coloured_tokens(self, page: Page) -> None:
        page.get_by_label("Text", exact=True).fill("Hello <b>you")
        expect(page.get_by_label("Token ids")).to_have_value("105, 101, 101, 101, 101, 103")
        expect(page.locator(".piece")).to_have_text(["Hello", " ", "<", "b", ">", "you"])
        expect(page.locator("#token-count")).to_contain_text("6 tokens, 12 characters")
        assert page.locator("#pieces b").count() == 0

    def test_ids_become_text(self, page: Page) -> None:
        page.get_by_label("Token ids").fill("[3, 2]")
        expect(page.get_by_label("Text", exact=True)).to_have_value("www ww")

    def test_what_is_no_id_is_said(self, page: Page) -> None:
        page.get_by_label("Token ids").fill("3, x")
        expect(page.get_by_role("alert")).to_contain_text("Ids are whole numbers")


class TestLooks:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_the_switch_overrules_the_system_and_is_kept(self, page: Page, theme: str) -> None:
        page.emulate_media(color_scheme="dark" if theme == "light" else "light")
        button(page, "Settings").click()
        page.get_by_label(theme.capitalize(), exact=True).check()
        page.reload()
        red = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (int(re.findall(r"\d+", red)[0]) > 128) is (theme == "light")

    @pytest.mark.parametrize("tab", ["chat", "completion", "tokenizer"])
    def test_nothing_is_wider_than_a_phone(self, page: Page, api: FakeApi, tab: str) -> None:
        page.set_viewport_size({"width": 360, "height": 640})
        api.pieces = [
            "word" * 200,
            "\n\n```\n",
            "x" * 500,
            "\n```\n|a|b|\n|-|-|\n|",
            "y" * 300,
            "|z|\n",
        ]
        say(page, "long" * 200)
        wait_for_answer(page)
        page.locator(f"#tab-{tab}").click()
        expect(page.locator("#toggle-settings")).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate(
            "[...document.querySelectorAll('#messages, .page')].every((e) => e.scrollWidth <= 360)"
        )

    def test_on_a_phone_the_panels_lie_over_the_page_and_close(self, page: Page) -> None:
        page.set_viewport_size({"width": 360, "height": 640})
        expect(page.locator("#sidebar")).to_be_hidden()
        button(page, "Conversations").click()
        expect(page.locator("#sidebar")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()

    def test_every_control_has_a_name(self, page: Page) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        nameless = page.evaluate(
            """[...document.querySelectorAll("button, input, select, textarea")].filter((e) =>
                 !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)
               ).map((e) => e.outerHTML)"""
        )
        assert nameless == []


class TestRealRoutes:
    """The server's own routes behind the page, with an engine that tells a story."""

    @pytest.fixture
    def engine(self) -> FakeEngineClient:
        return FakeEngineClient(list(story()), step_s=0.002)

    @pytest.fixture
    def address(self, engine: FakeEngineClient) -> Iterator[str]:
        config = ServerConfig(api_keys=("right",))
        yield from serve(create_runner(create_app(config, engine, demo_tokenizer(), ["demo"])))

    @pytest.fixture(autouse=True)
    def key(self, page: Page) -> None:
        expect(page.locator("#banner")).to_contain_text("wants an API key")
        button(page, "Settings").click()
        page.get_by_label("API key").fill("right")
        page.get_by_label("Longest answer").fill("20")
        page.get_by_label("Temperature").fill("0")
        expect(page.locator("#send")).to_be_enabled()

    def test_chat(self, page: Page) -> None:
        say(page, "Hi")
        wait_for_answer(page)
        told = page.locator(".assistant .body").inner_text().strip()
        assert len(told) > 10
        assert told in STORY * 2
        expect(page.locator(".assistant .stats")).to_contain_text("20 tokens")
        expect(page.locator(".assistant .stats")).to_contain_text("cut at the longest length")

    def test_stopping_frees_the_engine(self, page: Page, engine: FakeEngineClient) -> None:
        engine.frozen = True
        say(page, "Hi")
        page.wait_for_function("document.querySelector('.assistant')")
        poll(lambda: len(engine.live) == 1)
        page.keyboard.press("Escape")
        poll(lambda: not engine.live)

    def test_a_prompt_that_is_too_long_is_explained(self, page: Page) -> None:
        say(page, "long " * 3000)
        expect(page.get_by_role("alert")).to_contain_text("2048")

    def test_completion_with_alternatives(self, page: Page) -> None:
        page.get_by_role("tab", name="Completion").click()
        page.get_by_label("Text to go on from").fill("Once")
        page.get_by_role("spinbutton", name="Tokens").fill("12")
        button(page, "Complete").click()
        expect(page.locator("#completion-stats")).to_contain_text("12 tokens")
        expect(page.locator(".token")).to_have_count(12)
        page.locator(".token").nth(3).hover()
        assert page.get_by_role("tooltip").locator("li").count() >= 5

    def test_tokens_there_and_back(self, page: Page) -> None:
        page.get_by_role("tab", name="Tokenizer").click()
        text = "Once upon a time: café 🙂"
        page.get_by_label("Text", exact=True).fill(text)
        ids = ", ".join(map(str, demo_tokenizer().encode(text, add_special_tokens=True)))
        expect(page.get_by_label("Token ids")).to_have_value(ids)
        expect(page.locator(".piece").first).to_have_text("Once")
        page.get_by_label("Text", exact=True).fill("")
        expect(page.get_by_label("Token ids")).to_have_value("")
        page.get_by_label("Token ids").fill(ids)
        expect(page.get_by_label("Text", exact=True)).to_have_value(text)
