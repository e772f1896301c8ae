"""Options that commands share: which NLA, and how it is loaded. For commands of adapters, too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from nla_lens.cli.command import SharedOption
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless
from nla_lens.progress import is_terminal

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


def _shared(section: str, *flags: str, **extra: Any) -> Any:
    return click.option(*flags, cls=SharedOption, section=section, **extra)


_WHICH = "Which NLA"
_WHERE = "Where it runs"
_UNSAID = "What its nla_meta.yaml does not say"


def _subfolder(flag: str) -> Any:
    return _shared(_WHICH, flag, "subfolder", help="The folder in the repository that --nla names.")


_SUBFOLDER = _subfolder("--subfolder")
_HALVES = [
    _shared(
        _WHICH,
        "--nla",
        "name",
        help="tiny (included), a pair on the hub (its name without -av or -ar), a directory, or a "
        "verbalizer alone; default: tiny.",
    ),
    _shared(
        _WHICH,
        "--av",
        help="Verbalizer (vector to text): directory or hub repository, instead of --nla.",
    ),
    _shared(
        _WHICH, "--ar", help="Reconstructor (text to vector, for the scores), where it has another."
    ),
]
_SPEC = [
    _shared(
        _UNSAID,
        "--injection",
        type=click.Choice(["replace", "norm_matched_add"]),
        help="How vectors enter the verbalizer; never guessed.",
    ),
    _shared(
        _UNSAID, "--injection-scale", type=float, help="With replace: the norm that vectors get."
    ),
    _shared(
        _UNSAID, "--layer", type=int, help="The block, from 0, whose output it was trained on."
    ),
    _SUBFOLDER,
    _shared(
        _UNSAID, "--base", help="The model that LoRA halves go onto, instead of what they name."
    ),
    _shared(
        _UNSAID,
        "--chat-template-kwargs",
        type=JsonObject(),
        help="""What the chat template is given besides, as in '{"enable_thinking": false}'.""",
    ),
]
_LOADING = [
    _shared(_WHICH, "--revision", help="Branch, tag or commit on the hub."),
    *_SPEC,
    _shared(
        _WHERE,
        "--engine",
        default="transformers",
        show_default=True,
        help="transformers, transformer_lens or nnsight, here; ndif, vllm or sglang, on a server.",
    ),
    _shared(
        _WHERE,
        "--url",
        multiple=True,
        help="The vLLM or SGLang server: http://HOST:PORT; more than once: spread over several.",
    ),
    _shared(_WHERE, "--device", help="cpu, cuda, cuda:1, mps; default: cpu."),
    _shared(
        _WHERE, "--device-map", help='"auto" spreads a large model over the devices there are.'
    ),
    _shared(
        _WHERE, "--dtype", help="float32, bfloat16 or float16; default: what config.json says."
    ),
    _shared(
        _WHERE,
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code from the checkpoint, which may do anything.",
    ),
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
    if is_terminal(sys.stderr):
        click.echo(f"loading {harmless(name or av or 'tiny')}", err=True)
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
