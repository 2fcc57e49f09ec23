"""The page's files: how they are served, and what must not stand in them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from server.web_files import CONTENT_TYPES, WEB_FOLDER, add_web

FILES = sorted(path for path in WEB_FOLDER.iterdir() if path.is_file())
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FILES}


def get(path: str, **arguments: Any) -> tuple[web.Response, bytes]:
    """The reply of an application that has only the page."""

    async def ask() -> tuple[Any, bytes]:
        app = web.Application()
        add_web(app)
        async with TestClient(TestServer(app)) as client:
            reply = await client.request(arguments.pop("method", "GET"), path, **arguments)
            return reply, await reply.read()

    return asyncio.run(ask())


def test_every_file_is_served_and_said_to_be_open() -> None:
    paths = add_web(web.Application())
    names = {path.name for path in FILES} - {"index.html"}
    assert set(paths) == {"/", *(f"/web/{name}" for name in names)}


@pytest.mark.parametrize("path", ["/", "/web/app.js", "/web/style.css", "/web/icon.svg"])
def test_headers_keep_the_page_to_itself(path: str) -> None:
    reply, body = get(path)
    assert reply.status == 200
    assert body
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    suffix = path[path.rfind(".") :] if "." in path else ".html"
    assert reply.headers["Content-Type"] == f"{CONTENT_TYPES[suffix]}; charset=utf-8"


def test_a_known_file_is_not_sent_again() -> None:
    reply, _ = get("/web/app.js")
    assert reply.headers["Cache-Control"] == "no-cache"
    again, body = get("/web/app.js", headers={"If-None-Match": reply.headers["ETag"]})
    assert (again.status, body) == (304, b"")
    other, _ = get("/web/app.js", headers={"If-None-Match": '"old"'})
    assert other.status == 200


def test_head_has_the_headers_alone() -> None:
    reply, body = get("/", method="HEAD")
    assert (reply.status, body) == (200, b"")


@pytest.mark.parametrize("path", ["/web/", "/web/none.js", "/web/..%2fweb_files.py", "/web/a/b"])
def test_nothing_else_is_served(path: str) -> None:
    assert get(path)[0].status == 404


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 150_000


@pytest.mark.parametrize("name", [name for name in SOURCES if name.endswith(".js")])
def test_scripts_never_make_html_or_code_from_text(name: str) -> None:
    wrong = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser"
    assert not re.search(wrong, SOURCES[name])


@pytest.mark.parametrize("name", list(SOURCES))
def test_no_file_names_another_server(name: str) -> None:
    addresses = set(re.findall(r"https?://[\w.-]+", SOURCES[name]))
    assert addresses <= {
        "http://www.w3.org",
        "https://html.spec.whatwg.org",
        "https://spec.commonmark.org",
    }


def test_the_html_holds_no_script_and_no_style_of_its_own() -> None:
    html = SOURCES["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
