"""Runs strangers' chat templates and regular expressions, in a process of its own.

Started by path and alone (`python -I limited_child.py`), so that it costs the start of a bare
interpreter: it imports nothing of nla_lens. One line of JSON comes in, one goes out. Whoever
started it ends it when it takes too long; memory is limited here.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from typing import Any

MOST_MEMORY = 1 << 30
MOST_TEXT = 4 << 20
MOST_SECONDS = 60


def environment(now: str | None = None) -> Any:
    """As transformers renders chat templates (utils/chat_template_utils.py).

    Args:
        now: What templates are told it is, as ISO 8601; None is the present.
    """
    import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body)

        def _inside(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        options: dict[str, Any] = {
            "indent": indent,
            "separators": separators,
            "sort_keys": sort_keys,
        }
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception

    def strftime_now(form: str) -> str:
        clock = datetime.datetime
        return (clock.now() if now is None else clock.fromisoformat(now)).strftime(form)

    made.globals["strftime_now"] = strftime_now
    return made


def render(request: dict[str, Any]) -> str:
    """The text of a chat; MemoryError where it is too long."""
    pieces: list[str] = []
    length = 0
    made = environment(request.get("now"))
    for piece in made.from_string(request["template"]).generate(**request["values"]):
        length += len(piece)
        if length > MOST_TEXT:
            raise MemoryError(f"more than {MOST_TEXT} characters")
        pieces.append(piece)
    return "".join(pieces)


def match(request: dict[str, Any]) -> bool:
    """Whether each pattern has come to an end with every name."""
    for pattern in request["patterns"]:
        for name in request["names"]:
            re.fullmatch(pattern, name)
    return True


def main() -> None:
    """Answers until the other end is closed."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for line in sys.stdin.buffer:
        # Should whoever asked be gone, it still ends.
        if hasattr(signal, "alarm"):
            signal.alarm(MOST_SECONDS)
        try:
            request = json.loads(line)
            done = render(request) if request["what"] == "render" else match(request)
            answer: dict[str, Any] = {"done": done}
        # Strangers' programs raise anything.
        except BaseException as error:
            answer = {"raised": f"{type(error).__name__}: {error}"[:2000]}
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
