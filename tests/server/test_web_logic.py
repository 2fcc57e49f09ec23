"""The page's scripts that need no browser: Markdown, event streams, conversations, numbers.

They run in Node: the system's, or the one that comes with Playwright's package.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.web_files import WEB_FOLDER
from tests.helpers.patience import within

Tree = list[Any]


def find_node() -> str | None:
    spec = importlib.util.find_spec("playwright")
    bundled = Path(spec.origin).parent / "driver/node" if spec and spec.origin else None
    return shutil.which("node") or (str(bundled) if bundled and bundled.exists() else None)


NODE = find_node()
pytestmark = pytest.mark.skipif(NODE is None, reason="neither node nor playwright is installed")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts where Node takes them for modules."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(WEB_FOLDER, folder, dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    return folder


class Scripts:
    """Runs JavaScript next to the scripts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, code: str, **values: Any) -> Any:
        """What the code, the body of a function, returns; ``values`` are its variables."""
        assert NODE is not None
        modules = "".join(
            f"import * as {name} from './{name}.js';\n"
            for name in ("api", "format", "logprobs", "markdown", "sampling", "sse", "store")
        )
        names = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
        main = f"const main = async () => {{ {code} }};\n"
        out = "process.stdout.write(JSON.stringify(await main() ?? null));"
        program = f"{modules}import * as vocabulary from './vocabulary.js';\n{names}{main}{out}"
        command = [NODE, "--input-type=module", "-e", program]
        done = subprocess.run(
            command,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=within(30),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def markdown(self, text: str) -> Tree:
        """The tree of a text, without the blocks' sources."""
        return self.run("return markdown.parseMarkdown(text).map(({source, ...b}) => b)", text=text)

    def inline(self, text: str) -> Tree:
        """The nodes of a text that is one paragraph."""
        (block,) = self.markdown(text)
        assert block["type"] == "paragraph"
        return block["children"]


@pytest.fixture(scope="module")
def js(scripts: Path) -> Scripts:
    return Scripts(scripts)


def em(*children: Any) -> dict[str, Any]:
    return {"type": "em", "children": list(children)}


def strong(*children: Any) -> dict[str, Any]:
    return {"type": "strong", "children": list(children)}


def link(href: str, *children: Any) -> dict[str, Any]:
    return {"type": "link", "href": href, "children": list(children)}


class TestInline:
    @pytest.mark.parametrize(
        ("text", "nodes"),
        [
            ("plain", ["plain"]),
            ("*a* and **b**", [em("a"), " and ", strong("b")]),
            ("***a** b*", [em(strong("a"), " b")]),
            ("**a *b* c**", [strong("a ", em("b"), " c")]),
            ("2 * 3 * 4", ["2 * 3 * 4"]),
            ("snake_case_name", ["snake_case_name"]),
            ("**open", ["**open"]),
            ("~~gone~~ ~ ~", [{"type": "del", "children": ["gone"]}, " ~ ~"]),
            ("`a*b*`", [{"type": "code", "text": "a*b*"}]),
            ("`` a`b ``", [{"type": "code", "text": "a`b"}]),
            ("`open", ["`open"]),
            (r"\*a\*", ["*a*"]),
            ("a\nb<br>c", ["a", {"type": "break"}, "b", {"type": "break"}, "c"]),
            ("[t *x*](https://a.b/c_d)", [link("https://a.b/c_d", "t ", em("x"))]),
            ('[t](https://a.b "title")', [link("https://a.b", "t")]),
            ("[t](https://a.b/(c))", [link("https://a.b/(c)", "t")]),
            ("see https://a.b/c.", ["see ", link("https://a.b/c", "https://a.b/c"), "."]),
            ("(https://a.b)", ["(", link("https://a.b", "https://a.b"), ")"]),
            ("![alt](https://a.b/x.png)", [link("https://a.b/x.png", "alt")]),
            ("[https://a.b](https://c.d)", [link("https://c.d", "https://a.b")]),
        ],
    )
    def test_marks(self, js: Scripts, text: str, nodes: Tree) -> None:
        assert js.inline(text) == nodes

    @pytest.mark.parametrize(
        "address",
        [
            "javascript:alert(1)",
            "JaVaScRiPt:alert(1)",
            "java\\tscript:alert(1)",
            "\x01javascript:alert(1)",
            "data:text/html,<script>",
            "vbscript:x",
            "//evil.example",
            "/relative",
            "https:",
        ],
    )
    def test_only_web_and_mail_addresses_become_links(self, js: Scripts, address: str) -> None:
        for text in (f"[click]({address})", f"[click](<{address}>)", f"![x]({address})"):
            assert "link" not in json.dumps(js.markdown(text))

    def test_markup_is_text(self, js: Scripts) -> None:
        text = "<script>alert(1)</script><img src=x onerror=alert(1)>"
        assert js.inline(text) == [text]


class TestBlocks:
    def test_headings_rules_and_quotes(self, js: Scripts) -> None:
        assert js.markdown("## A #\n---\n> q\n> r") == [
            {"type": "heading", "level": 2, "children": ["A"]},
            {"type": "rule"},
            {
                "type": "quote",
                "blocks": [
                    {
                        "type": "paragraph",
                        "children": ["q", {"type": "break"}, "r"],
                        "source": "q\nr",
                    }
                ],
            },
        ]

    @pytest.mark.parametrize(
        ("text", "language", "code"),
        [
            ("```py\nx = 1\n\n# y\n```", "py", "x = 1\n\n# y"),
            ("~~~\n```\n~~~", "", "```"),
            ("````\n```\n````", "", "```"),
            ("```\nstill coming", "", "still coming"),
            ("```html\n<script>\n```", "html", "<script>"),
        ],
    )
    def test_code(self, js: Scripts, text: str, language: str, code: str) -> None:
        assert js.markdown(text) == [{"type": "code", "language": language, "text": code}]

    def test_lists_nest_and_hold_blocks(self, js: Scripts) -> None:
        (block,) = js.markdown("3. one\n   - a\n   - [x] b\n\n4. two\n\n   ```\n   code\n   ```")
        assert (block["ordered"], block["start"], len(block["items"])) == (True, 3, 2)
        paragraph, inner = block["items"][0]["blocks"]
        assert paragraph["children"] == ["one"]
        assert [item["done"] for item in inner["items"]] == [None, True]
        assert block["items"][1]["blocks"][1]["text"] == "code"

    def test_lists_indented_by_two_nest_below_numbers(self, js: Scripts) -> None:
        (block,) = js.markdown("1. one\n  - a\n2. two")
        assert len(block["items"]) == 2
        assert block["items"][0]["blocks"][1]["type"] == "list"

    def test_a_number_within_a_paragraph_starts_no_list(self, js: Scripts) -> None:
        assert [block["type"] for block in js.markdown("It was\n1984. Really.")] == ["paragraph"]

    def test_tables(self, js: Scripts) -> None:
        (block,) = js.markdown("| a | b |\n|:-:|--:|\n| 1 | x \\| `y` |\n| only |\nafter".strip())[
            :1
        ]
        assert block["align"] == ["center", "right"]
        assert block["head"] == [["a"], ["b"]]
        assert block["rows"][0] == [["1"], ["x | ", {"type": "code", "text": "y"}]]
        assert block["rows"][1] == [["only"], []]

    def test_a_table_needs_its_second_line(self, js: Scripts) -> None:
        assert [block["type"] for block in js.markdown("a | b\nc | d")] == ["paragraph"]

    def test_every_beginning_of_a_text_can_be_shown(self, js: Scripts) -> None:
        text = "# T\n\n1. a **b** `c`\n   - d\n\n|a|b|\n|-|-|\n|1|2|\n\n> q\n\n```x\ny\n```\n[l](https://a.b)"
        code = """
            for (let end = 0; end <= text.length; end += 1) {
              const blocks = markdown.parseMarkdown(text.slice(0, end));
              if (blocks.some((block) => typeof block.source !== "string")) return end;
            }"""
        assert js.run(code, text=text) is None

    @pytest.mark.parametrize(
        "piece",
        ["*a ", "**", "_a", "[", "![", "](", "[](", "`", "``` ", "> ", "- ", "1. ", "|", "|-", "<",
         "~~a", "http://", "http://)", "\\", "# ", "[a](https://b ", "![x](https://a.b)", "*a_b "],
    )  # fmt: skip
    def test_hostile_repetition_takes_no_time_and_no_depth(self, js: Scripts, piece: str) -> None:
        code = """
            const began = performance.now();
            const depth = (node) => 1 + Math.max(0, ...Object.values(node ?? {}).filter((v) =>
                typeof v === "object").map(depth));
            const deepest = Math.max(...[piece.repeat(20000), (piece + "\\n").repeat(5000),
                piece.repeat(2000) + "](https://a.b)".repeat(2000),
                piece.repeat(2000) + "b* ".repeat(2000)].map((text) =>
                depth(markdown.parseMarkdown(text))));
            return [deepest, performance.now() - began];"""
        deepest, milliseconds = js.run(code, piece=piece)
        assert deepest < 400
        assert milliseconds < 5000


CUT_SHORT = "The connection closed before the answer was complete."


class TestEventStream:
    STREAM = (
        "\ufeff: hello\r\ndata: {\"a\": 1}\r\n\r\nevent: error\r\ndata:one\r\ndata: two\n\n"
        "data\n\nid: 5\nretry: 9\n\ndata: u\u2028v\r\rdata: unfinished"
    )  # fmt: skip

    def test_whatever_the_cuts_the_events_are_the_same(self, js: Scripts) -> None:
        code = """
            const found = new Set();
            for (let size = 1; size <= stream.length; size += 1) {
              const parser = new sse.SSEParser();
              const events = [];
              for (let at = 0; at < stream.length; at += size)
                events.push(...parser.push(stream.slice(at, at + size)));
              found.add(JSON.stringify(events));
            }
            return [...found].map(JSON.parse)"""
        assert js.run(code, stream=self.STREAM) == [
            [
                {"event": "message", "data": '{"a": 1}'},
                {"event": "error", "data": "one\ntwo"},
                {"event": "message", "data": ""},
                {"event": "message", "data": "u\u2028v"},
            ]
        ]

    READ = """
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({start(controller) {
          for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
          controller.close();
        }});
        const got = [];
        try {
          for await (const object of api.readEvents(stream.getReader())) got.push(object);
        } catch (error) { got.push(error.message) }
        return got"""

    @pytest.mark.parametrize(
        ("text", "got"),
        [
            ('data: {"x": "é🙂"}\n\ndata: [DONE]\n\n', [{"x": "é🙂"}]),
            ('data: {"x": 1}\n\n', [{"x": 1}, CUT_SHORT]),
            ('data: {"error": {"message": "No."}}\n\ndata: [DONE]\n\n', ["No."]),
            ("data: nonsense\n\n", ["The server sent something that is not JSON."]),
        ],
    )  # fmt: skip
    def test_objects_up_to_done_or_an_error(self, js: Scripts, text: str, got: list[Any]) -> None:
        assert js.run(self.READ, text=text) == got


@pytest.mark.parametrize(
    ("status", "body", "wait", "shown"),
    [
        (400, '{"error": {"message": "Too long."}}', None, "Too long."),
        (400, '{"object": "error", "message": "Old."}', None, "Old."),
        (500, "<html>", None, "The server answered with status 500."),
        (401, '{"error": "Unauthorized"}', None,
         "The server wants another API key: Unauthorized. Enter it in the settings."),
        (429, "{}", "3", "The server is busy. Try again in 3 s."),
        (503, '{"error": {"message": "Loading."}}', None, "The server is not ready: Loading."),
    ],
)  # fmt: skip
def test_errors_are_readable(
    js: Scripts, status: int, body: str, wait: str | None, shown: str
) -> None:
    code = "return api.errorFromReply(status, body, wait).message"
    assert js.run(code, status=status, body=body, wait=wait) == shown


class TestConversations:
    STORAGE = """
        const map = new Map();
        const storage = {
          get length() { return map.size }, key: (i) => [...map.keys()][i] ?? null,
          getItem: (key) => map.get(key) ?? null, removeItem: (key) => map.delete(key),
          setItem: (key, value) => { if (full) throw new Error("full"); map.set(key, value) } };
        const kept = new store.ConversationStore(storage);
        const talk = store.newConversation("a", 1);
        """

    def test_latest_first_and_what_is_broken_is_passed_over(self, js: Scripts) -> None:
        code = """
            kept.save(talk);
            kept.save({...store.newConversation("b", 5), title: "later"});
            for (const bad of ["{", "null", '{"title": 1}',
                '{"title": "", "system": "", "updated": 1, "messages": [{"role": "x"}]}'])
              map.set("jaxserve.conversation.x" + map.size, bad);
            map.set("another", "{}");
            return kept.list().map(({id}) => id)"""
        assert js.run(self.STORAGE + code, full=False) == ["b", "a"]

    def test_a_full_storage_is_said_not_raised(self, js: Scripts) -> None:
        assert js.run(self.STORAGE + "return kept.save(talk)", full=True) is False

    def test_asking_retrying_and_editing(self, js: Scripts) -> None:
        code = """
            const sent = [];
            const say = (answer, text) => {
              sent.push(store.requestMessages(talk).map(({content}) => content).join("|"));
              answer.content = text;
            };
            talk.system = " Be kind. ";
            say(store.ask(talk, "one", 2), "1");
            say(store.ask(talk, "two", 3), "2");
            say(store.retry(talk, 3, 4), "2b");
            say(store.edit(talk, 0, "uno", 5), "1b");
            return [sent, talk.messages.length, talk.title, talk.updated]"""
        sent, count, title, updated = js.run(self.STORAGE + code, full=False)
        assert sent == [
            "Be kind.|one",
            "Be kind.|one|1|two",
            "Be kind.|one|1|two",
            "Be kind.|uno",
        ]
        assert (count, title, updated) == (2, "uno", 5)


def test_sampling_sends_what_is_set_and_right(js: Scripts) -> None:
    values = {"temperature": "0", "top_p": "0", "top_k": "2.5", "seed": "-3", "stop": "a\n\n b"}
    values |= {"min_p": "", "max_tokens": "x", "presence_penalty": "-2"}
    body = js.run("return sampling.samplingBody(values)", values=values)
    assert body == {"temperature": 0, "seed": -3, "presence_penalty": -2, "stop": ["a", " b"]}


def test_rates_leave_the_first_token_to_its_wait(js: Scripts) -> None:
    code = "return format.answerStats({sent: 1000, first: 1250, last: 2250, usage})"
    usage = {"completion_tokens": 11, "prompt_tokens": 3}
    stats = js.run(code, usage=usage)
    assert stats == {
        "firstTokenSeconds": 0.25,
        "tokensPerSecond": 10,
        "tokens": 11,
        "promptTokens": 3,
    }
    assert js.run(code, usage=None)["tokensPerSecond"] is None
    assert js.run(code, usage={"completion_tokens": 1})["tokensPerSecond"] is None


class TestTokens:
    @pytest.mark.parametrize(
        ("strings", "text", "pieces"),
        [
            (["Hello", " you"], "Hello you", ["Hello", " you"]),
            (["Hello", "Ġyou", "Ċ"], "Hello you\n", ["Hello", " you", "\n"]),
            (["caf", "Ã©"], "café", ["caf", "é"]),
            (["<s>", "▁Hi", "<0x0A>"], " Hi\n", ["<s>", " Hi", "\n"]),
            (["ðŁ", "ĻĤ"], "🙂", ["⟨f0 9f⟩", "⟨99 82⟩"]),
            (["a", "�"], "aé", ["a", "�"]),
        ],
    )
    def test_pieces_of_the_text(
        self, js: Scripts, strings: list[str], text: str, pieces: list[str]
    ) -> None:
        code = "return vocabulary.tokenPieces(strings, text)"
        assert js.run(code, strings=strings, text=text) == pieces

    @pytest.mark.parametrize(
        ("text", "ids"),
        [("[1, 2]", [1, 2]), (" 3 4\n5,", [3, 4, 5]), ("", []), ("1.5", None), ("-1", None)],
    )
    def test_ids(self, js: Scripts, text: str, ids: list[int] | None) -> None:
        assert js.run("return vocabulary.idsOf(text)", text=text) == ids

    def test_alternatives_are_sorted_and_hold_the_token(self, js: Scripts) -> None:
        choice = {
            "text": "ab",
            "logprobs": {
                "tokens": ["a", "b"],
                "token_logprobs": [-3.0, None],
                "top_logprobs": [{"x": -0.1, "y": -2.0}, None],
            },
        }
        code = "return logprobs.completionTokens(choice).map(logprobs.sortedAlternatives)"
        first, second = js.run(code, choice=choice)
        assert [other["text"] for other in first] == ["x", "y", "a"]
        assert second == []
