"""Would it run on NDIF? `nla-lens doctor --engine ndif CHECKPOINT` asks, and sends no job.

For vLLM and SGLang servers see `server_doctor`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import click

from nla_lens.cli.command import Command
from nla_lens.cli.output import Finding, print_findings
from nla_lens.errors import NLAError
from nla_lens.foreign import scrub

_TIMEOUT: Final = 30.0
_REFUSALS: Final = (400, 401, 403)
_Model: TypeAlias = tuple[str, str | None]
"""Repository or directory, and revision: the server has each revision as a model of its own."""


@click.command(
    cls=Command,
    short_help="Say whether CHECKPOINT could run on a server.",
    examples=[
        "nla-lens doctor kitft/Llama-3.3-70B-NLA-L53",
        "nla-lens doctor my-checkpoint --engine vllm --url http://localhost:8000",
    ],
)
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option(
    "--engine",
    default="ndif",
    show_default=True,
    help="ndif (the server nnsight is configured for), ndif:http://HOST:PORT, vllm or sglang.",
)
@click.option("--url", help="The vLLM or SGLang server: http://HOST:PORT.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--injection", type=click.Choice(["replace", "norm_matched_add"]), help="The rule.")
@click.pass_context
def doctor(
    context: click.Context,
    /,
    checkpoint: str,
    ar: str | None,
    engine: str,
    url: str | None,
    revision: str | None,
    injection: str | None,
) -> None:
    """Say whether CHECKPOINT could run on a server; sends no job.

    Exit status 1 if anything stands in the way.
    """
    findings = examine(
        checkpoint, ar=ar, engine=engine, url=url, revision=revision, injection=injection
    )
    if not print_findings(findings):
        context.exit(1)


def examine(
    checkpoint: str,
    *,
    ar: str | None = None,
    engine: str = "ndif",
    url: Any = None,
    revision: str | None = None,
    injection: str | None = None,
) -> Iterator[Finding]:
    """What stands between a checkpoint and a server.

    Args:
        checkpoint: As in `NLA.from_pretrained`.
        ar: Reconstructor, where that is a verbalizer alone.
        engine: "ndif" or "ndif:http://HOST:PORT"; "vllm" or "sglang".
        url: Where a vLLM or SGLang server is.
        revision: Branch, tag or commit on the hub.
        injection: The rule, where neither sidecar nor known release says it.

    Yields:
        Findings, as they are found; none after the server could not be reached.

    Raises:
        NLAError: No such checkpoint or engine.
    """
    from nla_lens.engines import is_remote, is_served

    if is_served(engine):
        from nla_lens.cli.server_doctor import examine_server

        wishes = {"revision": revision, "injection": injection}
        return examine_server(checkpoint, engine=engine, url=url, **wishes)
    if url is not None:
        raise NLAError(f"url= has no meaning with engine={engine!r}, only with vllm and sglang")
    from nla_lens.engines.local.nnsight_package import import_nnsight

    if not is_remote(engine) or engine.endswith(":local"):
        raise NLAError(f"engine={engine!r} needs no server; the doctor looks at ndif, vllm, sglang")
    import_nnsight()
    from nla_lens.engines.ndif.server import Server

    models = _wanted(checkpoint, ar, revision, injection)
    server = Server.named(engine)
    return _examine(models, server.address, lambda: server.api_key)


def _examine(
    models: Mapping[str, _Model | None], host: str, key: Callable[[], str | None]
) -> Iterator[Finding]:
    """What is found, without the key that a server may have repeated."""
    for finding in _found(models, host, key):
        yield replace(finding, detail=scrub(finding.detail, key()))


def _found(
    models: Mapping[str, _Model | None], host: str, key: Callable[[], str | None]
) -> Iterator[Finding]:
    reachable = _reachable(host)
    yield reachable
    if reachable.passed:
        yield _key(host, key())
        yield from _versions(host)
        yield from _models(host, models)


def _wanted(
    checkpoint: str, ar: str | None, revision: str | None, injection: str | None
) -> dict[str, _Model | None]:
    """What the server must have, by what it is for."""
    from nla_lens.checkpoints.names import name_halves
    from nla_lens.checkpoints.spec import read_spec

    halves = [half and str(half) for half in name_halves(checkpoint, None, ar, revision=revision)]
    spec = read_spec(checkpoint, ar=ar, revision=revision, injection=injection)
    wanted = zip(("verbalizer", "reconstructor"), halves, strict=True)
    found = {role: _as_server(name, revision) for role, name in wanted if name}
    # The halves' revision says nothing about another repository.
    return found | {"source model": _as_server(spec.source_model) if spec.source_model else None}


def _as_server(name: str | Path, revision: str | None = None) -> _Model:
    path = Path(os.path.expanduser(name))
    return (str(path.resolve()), None) if os.path.isdir(path) else (str(name), revision)


def _get(host: str, path: str, headers: Mapping[str, str] | None = None) -> Any:
    import httpx

    from nla_lens.engines.ndif.errors import SettingsError
    from nla_lens.engines.ndif.wire import ask

    try:
        answer = ask("GET", f"{host}{path}", seconds=_TIMEOUT, headers=headers)
    except SettingsError as error:
        raise ValueError(str(error)) from None
    if answer.status != httpx.codes.OK:
        raise ValueError(f"HTTP {answer.status}")
    return answer.json()


def _reachable(host: str) -> Finding:
    import httpx

    try:
        _get(host, "/ping")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        detail = f"no answer from {host} ({error}); check the network and NDIF_HOST"
        return Finding("the server answers", False, detail)
    try:
        _get(host, "/connected")
    except (httpx.HTTPError, ValueError) as error:
        detail = f"{host} answers, but has no contact with its models ({error}); try again later"
        return Finding("the server answers", False, detail)
    return Finding("the server answers", True, host)


def _key(host: str, key: str | None) -> Finding:
    import httpx

    name, remedy = "the API key", "get one at https://login.ndif.us, then `nnsight login`"
    try:
        refusal = _refusal(host, key)
        if refusal is not None:
            return Finding(name, False, f"the server refuses it ({refusal}); {remedy}")
        owner = _get(host, "/whoami", {"ndif-api-key": key}).get("email") if key else None
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        return Finding(name, None, f"could not be asked about ({error})")
    if owner:
        return Finding(name, True, f"belongs to {owner}")
    if key:
        return Finding(name, True, "the server takes it, and names no owner")
    return Finding(
        name, None, f"none is configured, and this server wants none; elsewhere {remedy}"
    )


def _refusal(host: str, key: str | None) -> str | None:
    """Why the server would take no job with this key; None where it would.

    The envelope of a job is sent without a job in it: ndif looks at the key first, and then finds
    that there is nothing to run.
    """
    from nla_lens.engines.ndif.wire import ask, detail

    answer = ask(
        "POST",
        f"{host}/request",
        data={"data": json.dumps({"model_key": "none"})},
        headers={"ndif-api-key": key} if key else None,
        seconds=_TIMEOUT,
    )
    return " ".join(detail(answer).split()) if answer.status in _REFUSALS else None


def _versions(host: str) -> Iterator[Finding]:
    from nla_lens.engines.ndif.versions import compare

    try:
        found = compare(host, _TIMEOUT)
    except NLAError as error:
        yield Finding("versions", None, str(error))
        return
    for package, (here, there) in found.items():
        # A release of transformers may lay modules out anew; a patch of it does not.
        equal = here.split(".")[:2] == there.split(".")[:2]
        detail = f"{here} here, {there} there"
        if not equal:
            detail += f"; traces may not fit: pip install {package}=={there}"
        yield Finding(f"version of {package}", equal or None, detail)


def _models(host: str, wanted: Mapping[str, _Model | None]) -> Iterator[Finding]:
    import httpx

    try:
        deployments = _get(host, "/status")["deployments"]
        states = [_state(name, value) for name, value in deployments.items()]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding("models", None, f"the server does not say which are up ({error})")
        return
    for role, model in wanted.items():
        if model is None:
            yield Finding(role, None, "the checkpoint does not name it")
            continue
        found = sorted({state for deployed, state in states if deployed == model})
        called = model[0] if model[1] is None else f"{model[0]} (revision {model[1]})"
        if "RUNNING" in found:
            yield Finding(role, True, f"{called} is up")
        else:
            what = f"is {' and '.join(found)}" if found else "is not deployed"
            others = {had[1] or "none given" for had, _ in states if had[0] == model[0]}
            if others and not found:
                what += f" (but other revisions are: {', '.join(sorted(others))})"
            remedy = "ask for it (on a server of your own: `ndif deploy`), or run it elsewhere"
            yield Finding(role, False, f"{called} {what}; {remedy}")


def _state(name: str, value: Mapping[str, Any]) -> tuple[_Model, str]:
    """Model and state of one deployment; an entry without fields has the model in its name."""
    repo, revision = value.get("repo_id"), value.get("revision")
    if repo is None:
        _, brace, rest = str(value.get("model_key") or name).partition("{")
        named = json.loads(brace + rest) if brace else {"repo_id": name}
        repo, revision = named["repo_id"], named.get("revision")
    return (str(repo), revision), str(value.get("application_state", "unknown"))
