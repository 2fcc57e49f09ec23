"""ServerConfig: how to listen, whom to let in, and how much. Standard library only."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jaxserve import chat_templates
from jaxserve.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_STREAM_INTERVAL = 1024
"""The text of so many tokens is made in two milliseconds, in which other streams have to wait."""
KEY_CHARACTERS = frozenset(map(chr, range(0x21, 0x7F)))
"""Of an API key: what an Authorization header carries unchanged."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server; names are vLLM's where it has them, times are in seconds.

    Attributes:
        host: address or name to listen on; 0.0.0.0 and :: mean every interface.
        port: to listen on; 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        api_keys: each lets in who shows it as "Authorization: Bearer KEY"; without any, everybody.
        ssl_keyfile: private key, for HTTPS.
        ssl_certfile: certificate chain, for HTTPS.
        ssl_ca_certs: certificates by which clients' certificates are checked.
        ssl_cert_reqs: clients' certificates: 0 asks for none, 1 checks one that is shown, 2
            demands one.
        allowed_origins: origins whose pages may use the server from a browser (CORS); * allows
            all. By default only pages that the server itself delivers.
        allowed_methods: HTTP methods that such pages may use.
        allowed_headers: headers that such pages may send.
        allow_credentials: such pages may send cookies and certificates.
        root_path: path below which a reverse proxy shows the server.
        middleware: "module.function" or "module:function", an aiohttp middleware of your own.
        chat_template: a Jinja file, the template itself, or the name of a built-in one (vicuna,
            llama-2, llama-3, chatml, qwen), instead of the tokenizer's.
        trust_request_chat_template: requests may bring a chat template of their own.
        response_role: of the messages that the model answers with.
        served_model_name: names by which requests may call the model, the first one in replies;
            by default as it was given to the command.
        max_logprobs: most log-probabilities per token that a request may ask for.
        max_body_bytes: largest request body.
        max_prompts: most prompts or inputs in one request.
        max_n: most completions of one prompt.
        max_messages: most messages of one conversation.
        max_queue: most requests that wait for the engine; further ones get 429.
        queue_timeout_s: longest wait in that queue before a request gets 503.
        read_timeout_s: longest wait for the rest of a request's head or body.
        write_timeout_s: longest wait for a client that doesn't read its stream.
        keep_alive_s: how long an idle connection stays open.
        stream_ping_s: silence in a stream after which a comment line keeps proxies awake.
        stream_interval: tokens for which a stream gets a chunk, after the first one, which is sent
            at once. More spare the server and its clients work, and make the text come in jerks.
        step_timeout_s: a step of the engine that takes longer counts as hung.
        shutdown_timeout_s: how long running requests may go on after the first signal.
        api_server_count: processes that speak HTTP, all on the same port.
        restart: start the engine's process again when it died; otherwise exit.
        log_level: debug, info, warning, error or critical.
        access_log: log a line for each HTTP request.
        enable_log_requests: log each request's sampling parameters and prompt.
        max_log_len: characters of a prompt in the log.
        disable_fastapi_docs: answer neither /docs nor /openapi.json.

    Raises:
        ConfigError: a value is out of its range, or contradicts another one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    root_path: str = ""
    middleware: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    served_model_name: tuple[str, ...] = ()
    max_logprobs: int = 20
    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 1024
    max_n: int = 128
    max_messages: int = 4096
    max_queue: int = 1024
    queue_timeout_s: float = 120.0
    read_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    stream_ping_s: float = 30.0
    stream_interval: int = 1
    step_timeout_s: float = 300.0
    shutdown_timeout_s: float = 25.0
    api_server_count: int = 1
    restart: bool = True
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    access_log: bool = False
    enable_log_requests: bool = False
    max_log_len: int | None = None
    disable_fastapi_docs: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must be from 0 to 65535.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs={self.ssl_cert_reqs} must be 0, 1 or 2.")
        if self.log_level not in LOG_LEVELS:
            known = ", ".join(LOG_LEVELS)
            raise ConfigError(f"log_level={self.log_level!r} must be one of {known}.")
        if self.stream_interval > MAX_STREAM_INTERVAL:
            raise ConfigError(
                f"stream_interval={self.stream_interval} must be at most {MAX_STREAM_INTERVAL}."
            )
        self._check_access()
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path={self.root_path!r} must begin with a slash.")
        if any(not name.strip() for name in self.served_model_name):
            raise ConfigError("served_model_name must not be empty.")
        for path in self.middleware:
            parts = path.replace(":", ".").split(".")
            if len(parts) < 2 or not all(part.isidentifier() for part in parts):
                raise ConfigError(f"middleware={path!r} must be like package.module.function.")

    def _check_types(self) -> None:
        for one in fields(self):
            value, default = getattr(self, one.name), one.default
            if isinstance(default, tuple):
                if isinstance(value, str) or not all(isinstance(text, str) for text in value):
                    raise ConfigError(f"{one.name}={value!r} must be a list of strings.")
                object.__setattr__(self, one.name, tuple(value))
            elif isinstance(default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{one.name}={value!r} must be true or false.")
            elif isinstance(default, int):
                least = 0 if one.name in ("port", "ssl_cert_reqs", "max_logprobs") else 1
                _check_number(one.name, value, int, least)
            elif isinstance(default, float):
                _check_number(one.name, value, float, 0)
                if value == 0 and one.name != "shutdown_timeout_s":
                    raise ConfigError(f"{one.name} must be more than 0.")
        if self.max_log_len is not None:
            _check_number("max_log_len", self.max_log_len, int, 0)

    def _check_access(self) -> None:
        for key in self.api_keys:
            # The key itself must not come out: this message may end in a log.
            if not key or not KEY_CHARACTERS.issuperset(key):
                raise ConfigError("api_keys must be of visible ASCII characters, without spaces.")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ConfigError(
                "allow_credentials needs allowed_origins that name the origins, not *."
            )
        if (self.ssl_keyfile or self.ssl_ca_certs) and not self.ssl_certfile:
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile.")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ConfigError(f"ssl_cert_reqs={self.ssl_cert_reqs} needs ssl_ca_certs.")
        if self.uds is not None and not self.uds:
            raise ConfigError("uds must be the path of a socket.")

    @property
    def enable_docs(self) -> bool:
        """Whether /docs and /openapi.json are there."""
        return not self.disable_fastapi_docs

    @property
    def on_all_interfaces(self) -> bool:
        """Whether other machines can connect from everywhere."""
        return self.uds is None and self.host in ("", "0", "0.0.0.0", "::", "*")

    def ssl_context(self) -> ssl.SSLContext | None:
        """What aiohttp needs for HTTPS; None for HTTP.

        Raises:
            ConfigError: a file can't be read, or key and certificate don't belong together.
        """
        if self.ssl_certfile is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the TLS files can't be used: {error}.") from error
        context.verify_mode = ssl.VerifyMode(self.ssl_cert_reqs)
        return context

    def chat_template_text(self) -> str | None:
        """The template's text, see ``chat_templates.text_of``.

        Raises:
            ConfigError: it can't be found.
        """
        return None if self.chat_template is None else chat_templates.text_of(self.chat_template)


def _check_number(name: str, value: Any, kind: type, least: int) -> None:
    right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not right or not least <= value < 2**63:
        word = "an integer" if kind is int else "a number"
        raise ConfigError(f"{name}={value!r} must be {word}, at least {least}.")
