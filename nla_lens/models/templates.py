"""Which chat templates are plain: what they cost is told by their syntax, before they run.

A chat template is a program that came with a checkpoint. Those of most models only join texts in
one loop over the messages; such a one runs here. Any other runs in a process of its own, see
`limited`.

Plain is what cannot grow: nothing is multiplied, formatted or repeated, no loop goes over a number,
an inner loop goes over a part of what the outer one goes over, and no text is added to itself in a
loop.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nla_lens.errors import NLAError, told
from nla_lens.models import limited_child
from nla_lens.models.limited import render

_MOST_CHARACTERS: Final = 1 << 17
_MOST_LOOPS: Final = 64
_MOST_DEPTH: Final = 3
_MOST_DOUBLINGS: Final = 8
_NODES: Final = {
    "Template", "Output", "TemplateData", "If", "For", "Assign", "Name", "NSRef", "Const",
    "Getattr", "Getitem", "Slice", "Test", "Filter", "Call", "Compare", "Operand", "And", "Or",
    "Not", "Add", "Concat", "Sub", "Neg", "CondExpr", "List", "Tuple", "Dict", "Pair", "Keyword",
    "Mod", "Break", "Continue",
}  # fmt: skip
_FILTERS: Final = {
    "trim", "length", "count", "tojson", "string", "upper", "lower", "default", "d", "int", "first",
    "last", "items", "selectattr", "rejectattr",
}  # fmt: skip
_METHODS: Final = {
    "split", "strip", "lstrip", "rstrip", "startswith", "endswith", "lower", "upper", "title",
    "items", "keys", "values", "get",
}  # fmt: skip
_TWO_TIMES: Final = ("2001-02-03T04:05:06.070809", "2032-11-10T19:18:17.161514")
_FUNCTIONS: Final = {"raise_exception", "strftime_now", "namespace"}


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Token ids of messages by a tokenizer's chat template, as `apply_chat_template` answers them.

    Args:
        tokenizer: One that has a template.
        messages: The chat.
        **options: What the template is given beside it.

    Raises:
        NLAError: A template that is not plain takes too long, or raises something.
    """
    template = tokenizer.get_chat_template()
    if is_plain(template):
        return tokenizer.apply_chat_template(messages, tokenize=True, **options)
    text = render(template, _given(tokenizer, messages, options))
    # As `apply_chat_template` does: the template has put the special tokens in.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def is_dated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> bool:
    """Whether a tokenizer's chat template writes the date or the time into messages.

    Raises:
        NLAError: As `apply_template`.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return False
    given = _given(tokenizer, messages, options)
    return len({render_text(template, given, now) for now in _TWO_TIMES}) > 1


def render_text(template: str, values: Mapping[str, Any], now: str | None = None) -> str:
    """The text of a chat template; one that is not plain is rendered in a process of its own.

    Args:
        template: The template.
        values: What it is given, `messages` among it.
        now: See `limited.render`.

    Raises:
        NLAError: It takes too long, or raises something.
    """
    if not is_plain(template):
        return render(template, values, now)
    try:
        return limited_child.render({"template": template, "values": values, "now": now})
    # A template may raise anything.
    except Exception as error:
        raise NLAError(f"the chat template fails ({type(error).__name__}: {error})") from told(
            error
        )


def _given(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a template is given. Keys of messages that are None are left out, as by 5.24."""
    said = [{key: value for key, value in m.items() if value is not None} for m in messages]
    given = {"messages": said, "tools": None, "documents": None}
    return {**given, **tokenizer.special_tokens_map, **options}


@functools.lru_cache(maxsize=64)
def is_plain(template: str) -> bool:
    """Whether a template's cost is bounded by the length of the messages."""
    import jinja2

    if len(template) > _MOST_CHARACTERS:
        return False
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        nodes = list(_walk(tree, ()))
    # Not valid, or deep: the process of its own will say.
    except (jinja2.TemplateError, RecursionError):
        return False
    loops = sum(type(node).__name__ == "For" for node, _ in nodes)
    assigned = {name for node, _ in nodes for name in _targets(node)}
    doublings = sum(_doubles(node, assigned) for node, _ in nodes)
    in_loops = any(_doubles(node, assigned) for node, around in nodes if around)
    return (
        loops <= _MOST_LOOPS
        and doublings <= _MOST_DOUBLINGS
        and not in_loops
        and all(_is_plain_node(node, around, assigned) for node, around in nodes)
    )


def _walk(node: Any, around: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every node, with the loops around it."""
    yield node, around
    inside = (*around, node) if type(node).__name__ == "For" else around
    for name, child in node.iter_fields():
        here = around if name == "iter" else inside
        for one in child if isinstance(child, list) else [child]:
            if hasattr(one, "iter_fields"):
                yield from _walk(one, here)


def _is_plain_node(node: Any, around: tuple[Any, ...], assigned: set[str]) -> bool:
    kind = type(node).__name__
    if kind == "For":
        if node.recursive or len(around) >= _MOST_DEPTH:
            return False
        outer = {name.name for loop in around for name in _named(loop.target)} - assigned
        inner = {name.name for name in _named(node.iter)}
        return not around or (len(inner) == 1 and inner <= outer)
    if kind == "Filter":
        return node.name in _FILTERS and not (node.name == "tojson" and not _is_small(node))
    if kind == "Call":
        called = node.node
        if type(called).__name__ == "Getattr":
            return called.attr in _METHODS
        return type(called).__name__ == "Name" and called.name in _FUNCTIONS
    if kind == "Mod":
        # Of texts it is a format.
        left = node.left
        return type(left).__name__ == "Getattr" and left.attr in ("index", "index0")
    return kind in _NODES


def _is_small(node: Any) -> bool:
    """Whether a call's arguments are constants, and small ones."""
    given = [*node.args, *(keyword.value for keyword in node.kwargs)]
    constants = [value.value for value in given if type(value).__name__ == "Const"]
    return len(constants) == len(given) and all(
        value is None or isinstance(value, bool) or (isinstance(value, int) and 0 <= value <= 8)
        for value in constants
    )


def _named(node: Any) -> list[Any]:
    import jinja2

    own = [node] if isinstance(node, jinja2.nodes.Name) else []
    return [*own, *node.find_all(jinja2.nodes.Name)]


def _targets(node: Any) -> list[str]:
    if type(node).__name__ != "Assign":
        return []
    target = node.target
    return [target.name] if hasattr(target, "name") else [name.name for name in _named(target)]


def _doubles(node: Any, assigned: set[str]) -> bool:
    """Whether a text made by the template is made into one of more than one of such."""
    if type(node).__name__ != "Assign":
        return False
    import jinja2

    nodes = jinja2.nodes
    joins = (nodes.Add, nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict, nodes.Call)
    value = node.node
    if not isinstance(value, joins) and next(value.find_all(joins), None) is None:
        return False
    return sum(name.name in assigned for name in _named(value)) >= 2
