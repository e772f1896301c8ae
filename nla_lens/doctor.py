"""Would it run on NDIF? `nla-lens doctor --engine ndif CHECKPOINT` asks, and sends no job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import click

from nla_lens.checkup import Finding
from nla_lens.cli import print_findings
from nla_lens.errors import NLAError

_MUST_BE_EQUAL: Final = ("nnsight", "transformers")
_TIMEOUT: Final = 30.0


@click.command()
@click.argument("checkpoint", default="tiny")
@click.option("--ar", help="Reconstructor, where CHECKPOINT is a verbalizer alone.")
@click.option(
    "--engine",
    default="ndif",
    show_default=True,
    help="ndif (the server nnsight is configured for), or ndif:http://HOST:PORT.",
)
@click.option("--injection", type=click.Choice(["replace", "norm_matched_add"]), help="The rule.")
@click.pass_context
def doctor(
    context: click.Context, /, checkpoint: str, ar: str | None, engine: str, injection: str | None
) -> None:
    """Say whether CHECKPOINT could run on an NDIF server; sends no job.

    Exit status 1 if anything stands in the way.
    """
    if not print_findings(examine(checkpoint, ar=ar, engine=engine, injection=injection)):
        context.exit(1)


def examine(
    checkpoint: str, *, ar: str | None = None, engine: str = "ndif", injection: str | None = None
) -> Iterator[Finding]:
    """What stands between a checkpoint and a server.

    Args:
        checkpoint: As in `NLA.from_pretrained`.
        ar: Reconstructor, where that is a verbalizer alone.
        engine: "ndif" or "ndif:http://HOST:PORT".
        injection: The rule, where neither sidecar nor known release says it.

    Yields:
        Findings, as they are found; none after the server could not be reached.

    Raises:
        NLAError: No such checkpoint or engine.
    """
    from nla_lens.engines import is_remote
    from nla_lens.engines.nnsight import import_nnsight

    if not is_remote(engine) or engine.endswith(":local"):
        raise NLAError(f"engine={engine!r} needs no server; the doctor looks at ndif")
    import_nnsight()
    from nla_lens.engines.ndif import Server

    names = _names(checkpoint, ar, injection)
    server = Server.named(engine)
    return _examine(names, server.address, server.api_key)


def _examine(names: Mapping[str, str | None], host: str, key: str | None) -> Iterator[Finding]:
    reachable = _reachable(host)
    yield reachable
    if reachable.passed:
        yield _key(host, key)
        yield from _versions(host)
        yield from _models(host, names)


def _names(checkpoint: str, ar: str | None, injection: str | None) -> dict[str, str | None]:
    """What the server must have, by what it is for."""
    from nla_lens.checkpoint import name_halves
    from nla_lens.spec import read_spec

    halves = name_halves(checkpoint, None, ar)
    spec = read_spec(checkpoint, ar=ar, injection=injection)
    wanted = zip(("verbalizer", "reconstructor"), halves, strict=True)
    names: dict[str, str | None] = {role: _as_server(name) for role, name in wanted if name}
    return names | {"source model": _as_server(spec.source_model) if spec.source_model else None}


def _as_server(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name)


def _get(host: str, path: str, headers: Mapping[str, str] | None = None) -> Any:
    import httpx

    response = httpx.get(f"{host}{path}", timeout=_TIMEOUT, headers=dict(headers or {}))
    response.raise_for_status()
    return response.json()


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
    if not key:
        return Finding(
            name, None, f"none is configured; a server with accounts wants one: {remedy}"
        )
    try:
        email = _get(host, "/whoami", {"ndif-api-key": key}).get("email")
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        from nla_lens.remote_errors import scrub

        return Finding(name, None, f"could not be asked about ({scrub(str(error), key)})")
    if email:
        return Finding(name, True, f"belongs to {email}")
    detail = (
        "the server names no owner for it: either it is not valid, or the server has no accounts"
    )
    return Finding(name, None, f"{detail}; {remedy}")


def _versions(host: str) -> Iterator[Finding]:
    import httpx

    try:
        there = _get(host, "/env")["packages"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        yield Finding("versions", None, f"the server does not say ({error})")
        return
    for package in _MUST_BE_EQUAL:
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "not installed"
        found = str(there.get(package, "unknown"))
        # A release of transformers may lay modules out anew; a patch of it does not.
        equal = here.split(".")[:2] == found.split(".")[:2]
        detail = f"{here} here, {found} there"
        if not equal:
            detail += f"; traces may not fit: pip install {package}=={found}"
        yield Finding(f"version of {package}", equal or None, detail)


def _models(host: str, names: Mapping[str, str | None]) -> Iterator[Finding]:
    import httpx

    try:
        deployments = _get(host, "/status")["deployments"]
        states = [_state(name, value) for name, value in deployments.items()]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding("models", None, f"the server does not say which are up ({error})")
        return
    for role, name in names.items():
        if name is None:
            yield Finding(role, None, "the checkpoint does not name it")
            continue
        found = sorted({state for repo, state in states if repo == name})
        if "RUNNING" in found:
            yield Finding(role, True, f"{name} is up")
        else:
            what = f"is {' and '.join(found)}" if found else "is not deployed"
            remedy = "ask for it (on a server of your own: `ndif deploy`), or run it elsewhere"
            yield Finding(role, False, f"{name} {what}; {remedy}")


def _state(name: str, value: Mapping[str, Any]) -> tuple[str, str]:
    """Repository and state of one deployment; an entry without fields has both in its name."""
    repo = value.get("repo_id")
    if repo is None:
        _, brace, rest = str(value.get("model_key") or name).partition("{")
        repo = json.loads(brace + rest)["repo_id"] if brace else name
    return str(repo), str(value.get("application_state", "unknown"))
