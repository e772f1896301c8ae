"""Options that commands share: which NLA, and how it is loaded. For commands of adapters, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from nla_lens.errors import NLAError

_Command = TypeVar("_Command", bound=Callable[..., Any])


class JsonObject(click.ParamType):
    """A mapping, written as JSON."""

    name = "json"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"{value!r:.80} is no JSON object", param, ctx)
        return found


def _subfolder(flag: str) -> Any:
    return click.option(flag, "subfolder", help="The folder in what names the NLA.")


_SUBFOLDER = _subfolder("--subfolder")
_HALVES = [
    click.option(
        "--nla",
        "name",
        help="Embedded pair, pair's stem on the hub or on disk, or a verbalizer; default: tiny.",
    ),
    click.option("--av", help="Verbalizer: directory or hub repository, instead of --nla."),
    click.option("--ar", help="Reconstructor: directory or hub repository."),
]
_SPEC = [
    click.option(
        "--injection",
        type=click.Choice(["replace", "norm_matched_add"]),
        help="The rule, where neither sidecar nor known release says it.",
    ),
    click.option("--injection-scale", type=float, help="The norm vectors are injected at."),
    click.option("--layer", type=int, help="K, where neither sidecar nor known release says it."),
    _SUBFOLDER,
    click.option("--base", help="What LoRA halves go onto, instead of what they name."),
    click.option(
        "--chat-template-kwargs",
        type=JsonObject(),
        help="""What the chat template is given besides, as in '{"enable_thinking": false}'.""",
    ),
]
_LOADING = [
    click.option("--dtype", help="float32, bfloat16 or float16; default: what config.json says."),
    click.option("--device", help="cpu, cuda, cuda:1, mps; default: cpu."),
    click.option("--device-map", help='"auto" spreads a large model over the devices there are.'),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    *_SPEC,
    click.option(
        "--engine",
        default="transformers",
        show_default=True,
        help="Where the halves run: transformers, transformer_lens, nnsight, ndif, vllm, sglang.",
    ),
    click.option(
        "--url",
        multiple=True,
        help="The vLLM or SGLang server: http://HOST:PORT; more than once: spread over several.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint."),
]


def with_options(options: list[Any]) -> Callable[[_Command], _Command]:
    """A decorator that gives a command several options, in this order."""

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


halves_options = with_options(_HALVES)
"""Which NLA; `load_nla` takes what they give."""
spec_options = with_options(_SPEC)
"""What a checkpoint may leave out."""
loading_options = with_options(_LOADING)
"""How it is loaded."""
loading_options_beside_another = with_options(
    [*(option for option in _LOADING if option is not _SUBFOLDER), _subfolder("--nla-subfolder")]
)
"""As `loading_options`, for a command whose `--subfolder` is something else's."""


def load_nla(*, name: str | None, av: str | None, url: Sequence[str] = (), **options: Any) -> Any:
    """The NLA that the options of `halves_options` and `loading_options` name."""
    from nla_lens.nla import NLA

    return NLA.from_pretrained(**loading(name=name, av=av, url=url, **options))


def loading(
    *, name: str | None, av: str | None, url: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """The arguments of `NLA.from_pretrained` for these options."""
    if name is None and av is None:
        name = "tiny"
    return {"name": name, "av": av, "url": list(url) or None, **options}


def parse_positions(positions: str | None) -> list[int] | slice | None:
    """Reads "3", "-1", "0,5,-2" or "2:8".

    Raises:
        NLAError: Something else.
    """
    if positions is None:
        return None
    try:
        if ":" in positions:
            parts = [int(p) if p.strip() else None for p in positions.split(":")]
            if len(parts) <= 3:
                return slice(*parts)
        return [int(p) for p in positions.split(",")]
    except ValueError:
        pass
    raise NLAError(f'--positions {positions!r} is not of the form "3", "-1", "0,5,-2" or "2:8"')
