"""Writes the pages of docs/ that are made from the code: protocol.md and reference.md.

python scripts/generate_docs.py            write them
python scripts/generate_docs.py --check    fail if they would change
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.main

import wsfed
from wsfed import cli, errors, federated, relay, syft, sync, testing
from wsfed.privacy import roster
from wsfed.protocol import codec, limits, session, stream
from wsfed.protocol import messages as m

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Made by scripts/generate_docs.py; do not edit. -->\n"


def main() -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="fail if they would change")
    check = parser.parse_args().check
    stale = []
    for name, text in (("protocol.md", protocol()), ("reference.md", reference())):
        path = DOCS / name
        if check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    if stale:
        print(f"{', '.join(stale)} differ from the code; run python scripts/generate_docs.py")
    return 1 if stale else 0


# --- the protocol --------------------------------------------------------------------------------


def protocol() -> str:
    """The wire, from the docstrings and tables of the code."""
    parts = [
        "# The wire protocol\n",
        NOTE,
        f"WebSocket subprotocol `wsfed.{m.VERSION}`, binary messages only, no compression.\n",
        "## Frames\n",
        prose(codec),
        "## The numbered stream\n",
        prose(stream),
        "## Sessions\n",
        prose(session),
        *transitions(),
        "## Messages\n",
        prose(m),
        *(table for kind in kinds() for table in messages_of(kind)),
        "## Arguments\n",
        prose(__import__("wsfed.protocol.values", fromlist=["x"])),
        "## Limits\n",
        prose(limits),
        *limits_table(),
    ]
    return "\n".join(parts)


def kinds() -> tuple[tuple[str, str], ...]:
    """Kinds of messages, with their headings."""
    return (
        (m.CONTROL, "Control messages"),
        (m.STREAM, "Stream messages"),
        (m.COMMANDS, "Commands"),
        (m.REPLIES, "Replies"),
        (m.HUB, "Hub messages"),
    )


def messages_of(kind: tuple[str, str]) -> Iterator[str]:
    """A section for each message."""
    yield f"### {kind[1]}\n"
    for code, cls in m.BY_CODE.items():
        if cls.kind != kind[0]:
            continue
        yield f"#### {cls.__name__}\n"
        yield f"Code {code}. {markdown(inspect.getdoc(cls) or '')}\n"
        if cls.checks:
            yield "| field | accepts |\n|---|---|"
            yield "".join(f"| `{name}` | {check.says} |\n" for name, check in cls.checks)


def transitions() -> Iterator[str]:
    """The state table, without the moves to the end that every state has."""
    yield "| end | state | what happens | next state |\n|---|---|---|---|"
    rows = [
        f"| {role.value} | {state.value} | {given.value} | {to.value} |\n"
        for (role, state, given), to in session.TRANSITIONS.items()
        if given is not session.Input.END
    ]
    yield "".join(rows) + "\nEvery state ends in `gone` when the session ends.\n"


def limits_table() -> Iterator[str]:
    """Each limit with the comment above it."""
    source = inspect.getsource(limits)
    comments = re.findall(
        r"((?:^#: .*\n|^# .*\n)*(?:#: .*\n)?)^([A-Z_]+(?:_[A-Z]+)*) = ", source, re.M
    )
    yield "| limit | value | reason |\n|---|---|---|"
    reason, rows = "", []
    for comment, name in comments:
        reason = " ".join(line.lstrip("#: ") for line in comment.splitlines()) or reason
        value = getattr(limits, name)
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        rows.append(f"| `{name}` | {shown} | {markdown(reason)} |\n")
    yield "".join(rows)


# --- the reference -------------------------------------------------------------------------------


def reference() -> str:
    """Every public name with its docstring, and the command line."""
    parts = ["# Reference\n", NOTE]
    modules = (
        ("wsfed", wsfed),
        ("wsfed.federated", federated),
        ("wsfed.federated.partition", federated.partition),
        ("wsfed.privacy.roster", roster),
        ("wsfed.relay", relay),
        ("wsfed.sync", sync),
        ("wsfed.syft", syft),
        ("wsfed.testing", testing),
    )
    known = set(errors.__all__)
    for title, module in modules:
        parts.append(f"## {title}\n")
        names = [n for n in module.__all__ if not n.startswith("__") and n not in known]
        names = [n for n in names if not inspect.ismodule(getattr(module, n))]
        parts += [section(f"{title}.{name}", getattr(module, name)) for name in sorted(names)]
    parts.append("## Errors\n\n```text\n" + tree() + "\n```\n")
    parts += [section(name, getattr(errors, name)) for name in sorted(errors.__all__)]
    parts += ["## Command line\n", *commands()]
    return "\n".join(parts)


def section(title: str, value: object) -> str:
    """One name."""
    text = f"### {title}\n\n"
    if not (inspect.isclass(value) or callable(value)):
        return text
    if not getattr(value, "__module__", "").startswith("wsfed"):  # another name of another's
        return text + f"```python\n{value!r}\n```\n"
    signature = _signature(value)
    text += f"```python\n{title.rsplit('.', 1)[-1]}{signature}\n```\n\n" if signature else ""
    text += docstring(inspect.getdoc(value) or "") + "\n"
    if inspect.isclass(value) and not issubclass(value, BaseException):
        for name, member in vars(value).items():
            if not name.startswith("_") and (doc := inspect.getdoc(member)) and _is_member(member):
                shown = (
                    ""
                    if isinstance(member, property)
                    else _signature(member).replace("self, ", "").replace("self", "")
                )
                first = doc.split("\n\n")[0]
                text += f"- `{name}{shown.split(' -> ')[0]}`: {markdown(first)}\n"
    return text


def _is_member(member: object) -> bool:
    return isinstance(member, property) or inspect.isfunction(member)


def _signature(value: object) -> str:
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    return re.sub(r"'([^']*)'", r"\1", re.sub(r"<object object at 0x\w+>", "…", text))


def tree() -> str:
    """The tree of errors as the module draws it."""
    drawn = re.search(r"::\n\n(.*?)\n\nData", inspect.getdoc(errors) or "", re.S)
    assert drawn is not None
    return inspect.cleandoc(drawn[1])


def commands() -> Iterator[str]:
    """The command line, from its own help."""
    group = typer.main.get_command(cli.app)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        yield f"### wsfed {name}\n"
        yield markdown(inspect.cleandoc(command.help or "").split("\n\nExample")[0]) + "\n"
        yield "| option | meaning |\n|---|---|"
        rows = [
            f"| {' '.join(f'`{opt}`' for opt in (*each.opts, *each.secondary_opts))} "
            f"| {getattr(each, 'help', '') or ''} |\n"
            for each in command.params
        ]
        yield "".join(rows)


# --- text ----------------------------------------------------------------------------------------


def prose(module: object) -> str:
    """A module's docstring without its first line."""
    doc = inspect.getdoc(module) or ""
    return docstring(doc.split("\n", 1)[1].strip()) + "\n"


def docstring(text: str) -> str:
    """A Google-style docstring as Markdown."""
    text = re.sub(
        r"::\n\n((?:    .*\n?|\n)+)",
        lambda x: "\n\n```text\n" + inspect.cleandoc(x[1]) + "\n```\n",
        text,
    )
    text = re.sub(
        r"^(Args|Raises|Returns|Attributes|Raises \(when awaited\)):\n((?:    .*\n?)+)",
        lambda x: f"**{x[1]}**\n\n" + items(x[2]) + "\n",
        text,
        flags=re.M,
    )
    return markdown(text)


def items(block: str) -> str:
    """``name: text`` lines as a list."""
    text = inspect.cleandoc(block)
    made: list[str] = []
    for line in text.splitlines():
        if re.match(r"[\w, *]+: ", line):
            name, rest = line.split(": ", 1)
            made.append(f"- `{name}`: {rest}")
        elif made:
            made.append(f"  {line.strip()}")
        else:
            made.append(line)
    return "\n".join(made)


def markdown(text: str) -> str:
    """reStructuredText roles and double back quotes as Markdown has them."""
    text = re.sub(r":(?:attr|class|func|meth|mod|data):`~?([^`]*)`", _reference, text)
    text = re.sub(r"^(=+  =+)$\n(.*?)\n^=+  =+$", lambda x: "\n" + x[2], text, flags=re.M | re.S)
    return re.sub(r"(?<!`)``(?!`)", "`", text).strip()


def _reference(role: re.Match[str]) -> str:
    return f"`{role[1].rsplit('.', 1)[-1]}`"


if __name__ == "__main__":
    sys.exit(main())
