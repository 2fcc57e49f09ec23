"""ServerConfig refuses what can't work, and keeps secrets to itself."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from jaxserve.cli.flags import summaries
from jaxserve.errors import ConfigError
from server.config import ServerConfig


def test_the_defaults_are_valid_and_let_in_only_this_machine() -> None:
    config = ServerConfig()
    assert (config.host, config.port, config.api_keys) == ("127.0.0.1", 8000, ())
    assert config.allowed_origins == () and not config.on_all_interfaces
    assert config.ssl_context() is None and config.chat_template_text() is None


def test_every_field_is_documented() -> None:
    assert set(summaries(ServerConfig)) == {f.name for f in dataclasses.fields(ServerConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, "port=65536 must be from 0 to 65535"),
        ({"port": True}, "port=True must be an integer"),
        ({"max_queue": 0}, "max_queue=0 must be an integer, at least 1"),
        ({"max_n": "3"}, "max_n='3' must be an integer"),
        ({"read_timeout_s": 0.0}, "read_timeout_s must be more than 0"),
        ({"read_timeout_s": float("nan")}, "read_timeout_s=nan must be a number"),
        ({"shutdown_timeout_s": -1.0}, "shutdown_timeout_s=-1.0 must be a number, at least 0"),
        ({"max_log_len": -1}, "max_log_len=-1 must be an integer, at least 0"),
        ({"api_keys": "secret"}, "must be a list of strings"),
        ({"restart": 1}, "restart=1 must be true or false"),
        ({"log_level": "loud"}, "log_level='loud' must be one of debug"),
        ({"root_path": "api"}, "root_path='api' must begin with a slash"),
        ({"served_model_name": (" ",)}, "served_model_name must not be empty"),
        ({"middleware": ("nothing",)}, "middleware='nothing' must be like"),
        ({"uds": ""}, "uds must be the path"),
        ({"ssl_keyfile": "k"}, "need ssl_certfile"),
        ({"ssl_cert_reqs": 3}, "ssl_cert_reqs=3 must be 0, 1 or 2"),
        ({"ssl_cert_reqs": 2}, "ssl_cert_reqs=2 needs ssl_ca_certs"),
        ({"allow_credentials": True, "allowed_origins": ["*"]}, "that name the origins, not *"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["", "two words", "line\n", "ключ-secret"])
def test_a_bad_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerConfig(api_keys=(key,))
    assert "visible ASCII" in str(error.value) and "secret" not in str(error.value)


def test_keys_are_no_part_of_the_text_of_a_config() -> None:
    assert "sk-hidden" not in repr(ServerConfig(api_keys=("sk-hidden",)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_interfaces_are_recognized(host: str) -> None:
    assert ServerConfig(host=host).on_all_interfaces
    assert not ServerConfig(host=host, uds="socket").on_all_interfaces


def test_a_chat_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    inline = "{{ messages }}"
    assert ServerConfig(chat_template=inline).chat_template_text() == inline
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{% endfor %}")
    assert ServerConfig(chat_template=str(file)).chat_template_text() == file.read_text()
    with pytest.raises(ConfigError, match="neither a file that can be read nor a template"):
        ServerConfig(chat_template=str(tmp_path / "none")).chat_template_text()


def test_tls_files_make_a_context_that_asks_clients_as_told(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    key, chain, ca = (str(tmp_path / name) for name in ("key.pem", "chain.pem", "ca.pem"))
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    authority.cert_pem.write_to_path(ca)
    context = ServerConfig(ssl_keyfile=key, ssl_certfile=chain).ssl_context()
    assert context is not None and context.verify_mode is ssl.CERT_NONE
    files = {"ssl_keyfile": key, "ssl_certfile": chain, "ssl_ca_certs": ca}
    context = ServerConfig(**files, ssl_cert_reqs=2).ssl_context()
    assert context is not None and context.verify_mode is ssl.CERT_REQUIRED
    with pytest.raises(ConfigError, match="the TLS files can't be used"):
        ServerConfig(ssl_certfile=ca, ssl_keyfile=key).ssl_context()
