"""`jaxserve serve` takes its settings from flags, the environment and a file, in this order."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.__main__ import main
from jaxserve.cli import flags, serve, serve_flags
from jaxserve.compat import SERVER_FIXED, SERVER_NO_OPS, SWITCHES
from jaxserve.config import EngineConfig
from server.config import ServerConfig

OLD_FLAGS = """
    host port uvicorn-log-level allow-credentials allowed-origins allowed-methods allowed-headers
    api-key lora-modules chat-template response-role ssl-keyfile ssl-certfile ssl-ca-certs
    ssl-cert-reqs root-path middleware model tokenizer skip-tokenizer-init revision code-revision
    tokenizer-revision tokenizer-mode trust-remote-code download-dir load-format dtype
    kv-cache-dtype quantization-param-path max-model-len guided-decoding-backend
    distributed-executor-backend worker-use-ray pipeline-parallel-size tensor-parallel-size
    max-parallel-loading-workers ray-workers-use-nsight block-size enable-prefix-caching
    disable-sliding-window use-v2-block-manager num-lookahead-slots seed swap-space
    gpu-memory-utilization num-gpu-blocks-override max-num-batched-tokens max-num-seqs max-logprobs
    disable-log-stats quantization rope-scaling rope-theta enforce-eager max-context-len-to-capture
    max-seq-len-to-capture disable-custom-all-reduce tokenizer-pool-size tokenizer-pool-type
    tokenizer-pool-extra-config enable-lora max-loras max-lora-rank lora-extra-vocab-size lora-dtype
    long-lora-scaling-factors max-cpu-loras fully-sharded-loras device image-input-type
    image-token-id image-input-shape image-feature-size image-processor image-processor-revision
    disable-image-processor scheduler-delay-factor enable-chunked-prefill speculative-model
    num-speculative-tokens speculative-max-model-len speculative-disable-by-batch-size
    ngram-prompt-lookup-max ngram-prompt-lookup-min model-loader-extra-config preemption-mode
    served-model-name qlora-adapter-name-or-path engine-use-ray disable-log-requests max-log-len
"""
"""The flags of vLLM 0.5's server."""
NEW_FLAGS = """
    uds enable-auto-tool-choice tool-call-parser tool-parser-plugin chat-template-content-format
    disable-uvicorn-access-log enable-request-id-headers enable-server-load-tracking
    log-config-file return-tokens-as-token-ids enable-log-requests enable-log-outputs
    disable-fastapi-docs api-server-count headless fingerprint-mode logprobs-mode hf-overrides
    enable-prompt-embeds enable-sleep-mode runner convert logits-processors
    safetensors-load-strategy ignore-patterns data-parallel-size enable-expert-parallel worker-cls
    kv-cache-memory-bytes prefix-caching-hash-algo cpu-offload-gb kv-offloading-size
    long-prefill-token-threshold scheduling-policy scheduler-reserve-full-isl async-scheduling
    stream-interval disable-hybrid-kv-cache-manager lora-target-modules default-mm-loras
    structured-outputs-config reasoning-parser limit-mm-per-prompt media-io-kwargs
    mm-processor-kwargs mm-processor-cache-gb mm-encoder-tp-mode interleave-mm-strings
    skip-mm-profiling otlp-traces-endpoint show-hidden-metrics-for-version kv-cache-metrics
    speculative-config kv-transfer-config compilation-config performance-mode shutdown-timeout
    additional-config
"""
"""Those of its releases of 2026."""


def parse(*words: str, **environ: str) -> tuple[EngineConfig, ServerConfig]:
    """The two configs of a command line and an environment."""
    arranged = serve.arrange(flags.with_dashes(words), environ)
    return serve_flags.configs(serve.make_parser().parse_args(arranged))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a wrong command line gets."""
    try:
        code = main(["serve", *words])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("jaxserve serve: ") and captured.err.count("\n") == 1
    return captured.err


def test_without_flags_both_configs_are_the_defaults() -> None:
    assert parse() == (EngineConfig(), ServerConfig())


def test_flags_fill_both_configs() -> None:
    engine, server = parse(
        *("some/model", "--max_model_len", "8k", "-tp", "2", "--seed=3", "--skip-tokenizer-init"),
        *("--port", "9", "--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y"),
        *("--uvicorn-log-level", "error", "--no-restart", "--shutdown-timeout", "3"),
        *("--allowed-origins", '["http://a", "http://b"]', "--allowed-methods", "GET"),
        *("--middleware", "m.one", "--middleware", "m:two"),
    )
    wanted = {"tensor_parallel_size": 2, "seed": 3, "skip_tokenizer_init": True}
    assert engine == EngineConfig(model="some/model", max_model_len=8000, **wanted)
    assert server == ServerConfig(
        port=9,
        api_keys=("a", "b"),
        served_model_name=("x", "y"),
        log_level="error",
        restart=False,
        shutdown_timeout_s=3.0,
        allowed_origins=("http://a", "http://b"),
        allowed_methods=("GET",),
        middleware=("m.one", "m:two"),
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1m", 10**6), ("auto", None), ("-1", None)],
)
def test_lengths_are_read_as_vllm_reads_them(text: str, tokens: int | None) -> None:
    assert parse(f"--max-model-len={text}")[0].max_model_len == tokens


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_field_has_a_flag(cls: type) -> None:
    known = serve.make_parser().parse_args([])
    assert [field.name for field in dataclasses.fields(cls) if field.name not in known] == []


@pytest.mark.parametrize("name", [*OLD_FLAGS.split(), *NEW_FLAGS.split()])
def test_vllms_flags_are_known_by_the_same_name(name: str) -> None:
    known = serve.make_parser()._option_string_actions
    assert f"--{name}" in known


@pytest.mark.parametrize("name", SERVER_NO_OPS)
def test_flags_without_effect_say_so_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [serve_flags.flag_of(name), *([] if name in SWITCHES else ["7"])]
    assert parse(*words) == (EngineConfig(), ServerConfig())
    assert capsys.readouterr().err == f"{words[0]} has no effect here: {SERVER_NO_OPS[name]}.\n"


@pytest.mark.parametrize("name", SERVER_FIXED)
def test_flags_that_would_change_replies_take_their_default_only(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, neutral = serve_flags.flag_of(name), SERVER_FIXED[name]
    if name in SWITCHES:
        assert parse(flag.replace("--", "--no-", 1)) == (EngineConfig(), ServerConfig())
        assert f"{flag} is not supported" in fails(capsys, flag)
    else:
        assert parse(f"{flag}={neutral}") == (EngineConfig(), ServerConfig())
        assert f"{flag} other is not supported" in fails(capsys, flag, "other")
    assert capsys.readouterr().err == ""


def test_no_name_means_two_things() -> None:
    ours = {field.name for cls in (EngineConfig, ServerConfig) for field in dataclasses.fields(cls)}
    assert not ours & (SERVER_NO_OPS.keys() | SERVER_FIXED.keys())
    assert not SERVER_NO_OPS.keys() & SERVER_FIXED.keys()
    assert not SWITCHES - (SERVER_NO_OPS.keys() | SERVER_FIXED.keys())


def test_json_flags_may_be_dotted(capsys: pytest.CaptureFixture[str]) -> None:
    parse("--structured-outputs-config.backend", "xgrammar", "--compilation-config.level=3")
    assert capsys.readouterr().err.count("has no effect here") == 2


# --- Where a setting comes from -------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A YAML file in vLLM's spelling."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: file/model\nport: 1001\nmax-model-len: 8K\nenable_prefix_caching: false\n"
        "api-key: [f1, f2]\nenforce-eager: true\nswap-space: 4\nrevision:\n"
        'kernel-overrides: {paged_attention: "m:f"}\n'
    )
    return str(path)


def test_a_file_gives_settings(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine, server = parse("--config", file)
    assert (engine.model, engine.max_model_len, engine.revision) == ("file/model", 8192, None)
    assert engine.enforce_eager and not engine.enable_prefix_caching
    assert engine.kernel_overrides == {"paged_attention": "m:f"}
    assert (server.port, server.api_keys) == (1001, ("f1", "f2"))
    assert "--swap-space has no effect" in capsys.readouterr().err


def test_the_environment_beats_the_file(file: str) -> None:
    environ = {
        "JAXSERVE_CONFIG": file,
        "JAXSERVE_PORT": "1002",
        "JAXSERVE_API_KEY": "e1, e2",
        "JAXSERVE_MODEL": "environment/model",
        "JAXSERVE_ENFORCE_EAGER": "0",
        "JAXSERVE_ENABLE_PREFIX_CACHING": "yes",
        "JAXSERVE_SHUTDOWN_TIMEOUT": "4",
        "JAXSERVE_HOST": "",
    }
    engine, server = parse(**environ)
    assert (engine.model, engine.max_model_len) == ("environment/model", 8192)
    assert engine.enable_prefix_caching and not engine.enforce_eager
    assert (server.port, server.api_keys, server.shutdown_timeout_s) == (1002, ("e1", "e2"), 4.0)
    assert server.host == "127.0.0.1"


@pytest.mark.parametrize("words", [["word/model"], ["--model", "word/model"]])
def test_the_command_line_beats_both(file: str, words: list[str]) -> None:
    environ = {"JAXSERVE_PORT": "1002", "JAXSERVE_MODEL": "e", "JAXSERVE_API_KEY": "e1"}
    words = [*words, "--port=1003", "--config", file, "--api-key", "w", "--no-enforce-eager"]
    engine, server = parse(*words, **environ)
    assert (engine.model, engine.enforce_eager) == ("word/model", False)
    assert (server.port, server.api_keys) == (1003, ("w",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 3", "there is no setting 'max-model-length'; did you mean max-model"),
        ("port: many", "--port must be an integer, got 'many'"),
        ("- port", "must hold settings, like max-model-len: 8192"),
        ("port: [", "can't be read"),
        ("restart: perhaps", "restart must be true or false, got 'perhaps'"),
    ],
)
def test_a_wrong_file_gets_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert message in fails(capsys, "--config", str(tmp_path / "c.yaml"))


def test_a_missing_file_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/file can't be read" in fails(capsys, "--config", "no/file")


def test_a_wrong_variable_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSERVE_RESTART", "maybe")
    assert "JAXSERVE_RESTART must be true or false" in fails(capsys)


def test_a_misspelt_variable_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(JAXSERVE_MAX_MODEL_LENGTH="3", OTHER="x") == (EngineConfig(), ServerConfig())
    err = capsys.readouterr().err
    assert "JAXSERVE_MAX_MODEL_LENGTH in the environment has no effect; did you mean " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prot", "1"], "did you mean --port?"),
        (["--port", "x"], "--port must be an integer, got 'x'"),
        (["--port", "70000"], "port=70000 must be from 0 to 65535"),
        (["--max-model-len", "8q"], "--max-model-len must be an integer, got '8q' (8k is 8000"),
        (["--block-size", "5"], "block_size=5 must be 8, 16"),
        (["--allowed-origins", "[x"], "is no JSON list"),
        (["--log-level", "loud"], "invalid choice: 'loud'"),
        (["--stream-interval", "1025"], "stream_interval=1025 must be at most 1024"),
        (["--ssl-keyfile", "k"], "need ssl_certfile"),
    ],
)
def test_wrong_flags_get_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *words)


# --- What it shows --------------------------------------------------------------------------------


def test_print_config_can_be_read_again_and_shows_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["m", "--port", "7", "--api-key", "sk-hidden", "--served-model-name", "a", "b"]
    words += ["--chat-template", "{{ é }}", "--max-model-len", "8k", "--no-restart"]
    assert main(["serve", *words, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "sk-hidden" not in text and "# api-key: 1 given" in text
    assert yaml.safe_load(text)["max-model-len"] == 8000
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "c.yaml"), "--api-key", "sk-hidden") == parse(*words)


def test_what_was_changed_is_told_without_keys() -> None:
    shown = serve_flags.changed(*parse("m", "--api-key", "sk-hidden", "--shutdown-timeout", "3"))
    assert shown == {"model": "m", "api-key": "(not shown)", "shutdown-timeout": 3.0}


def test_help_loads_nothing_heavy_and_hides_vllms_other_flags() -> None:
    heavy = ["jax", "flax", "numpy", "transformers", "aiohttp", "msgpack", "orjson"]
    code = (
        "import sys\nfrom jaxserve.__main__ import main\n"
        "for words in (['serve'], ['complete'], ['run-batch'], ['bench', 'serve']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        f"print('LOADED', sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    assert "--shutdown-timeout X" in done.stdout and "--swap-space" not in done.stdout


@pytest.mark.parametrize("words", [["serve"], ["run-batch", "-i", "IN", "-o", "OUT"]])
def test_without_the_extra_it_says_what_to_install(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").touch()
    paths = {"IN": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    for module in ("server.serve", "server.batch"):
        monkeypatch.setitem(sys.modules, module, None)  # as when what they import is missing
    assert main([paths.get(word, word) for word in words]) == 2
    err = capsys.readouterr().err
    assert 'pip install "jaxserve[server]"' in err and err.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "max-queue" in out and "swap-space" not in out


def test_python_m_server_is_the_same_command() -> None:
    words: list[Any] = [sys.executable, "-m", "server", "--print-config", "--model", "some/model"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("model: some/model\n")
