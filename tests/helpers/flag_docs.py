"""The tables of docs/server.md, from the parser and the table of vLLM's flags.

    python -m tests.helpers.flag_docs

writes them anew; a test fails as long as they differ.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ActionYesNo

from jaxserve.cli import serve
from jaxserve.cli.flags import flag_of
from jaxserve.compat import SERVER_FIXED, SERVER_NO_OPS, SWITCHES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "server.md"
SUPPRESSED = "==SUPPRESS=="


def flag_tables() -> str:
    """A table for each group of flags that the help shows."""
    parts = []
    for group in serve.make_parser()._action_groups:
        rows = []
        for action in group._group_actions:
            if not action.option_strings or action.help == SUPPRESSED or action.dest == "help":
                continue
            value = f" {action.metavar}" if isinstance(action.metavar, str) else ""
            names = action.option_strings
            if isinstance(action, ActionYesNo) and not action.default:
                names = names[:1]
            text, _, shown = str(action.help).replace("|", r"\|").partition(" [default: ")
            default = shown.removesuffix("]") or str(action.default)
            default = "" if action.default in (None, "", False) and not shown else f"`{default}`"
            if action.default is True:
                default = "on"
            rows.append(f"| `{', '.join(names)}{value}` | {text} | {default} |")
        if rows:
            title = "" if group.title == "options" else f"### {str(group.title).capitalize()}\n\n"
            parts.append(title + "| Flag | Meaning | Default |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def foreign_tables() -> str:
    """vLLM's flags that have no effect, by the reason, and those that take one value only."""
    reasons: dict[str, list[str]] = {}
    for name, reason in SERVER_NO_OPS.items():
        reasons.setdefault(reason, []).append(f"`{flag_of(name)}`")
    lines = ["| Accepted without effect | because |", "|---|---|"]
    lines += [f"| {', '.join(flags)} | {reason} |" for reason, flags in reasons.items()]
    lines += ["", "| Refused unless at its default | default |", "|---|---|"]
    for name, neutral in SERVER_FIXED.items():
        shown = "off" if name in SWITCHES else "none" if neutral is None else f"`{neutral}`"
        lines.append(f"| `{flag_of(name)}` | {shown} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with its tables made anew."""
    for name, table in (("flags", flag_tables()), ("vllm", foreign_tables())):
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert mark and end, f"{DOCUMENT} has no place for {name}"
        text = f"{before}{mark}{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
