"""Would it run on a vLLM or SGLang server? `nla-lens doctor --engine vllm --url URL CHECKPOINT`.

What loading checks is done one by one and told; beyond that the server is asked to read the prompt
twice, as ids and as embeddings. Where both are the same to it, what is sent is what enters its
block 0: a token more or less, or Gemma's factor, would show in the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from nla_lens.checkpoints.chat import Prompt, canonical_prompt
from nla_lens.checkpoints.names import name_halves
from nla_lens.checkpoints.spec import NLASpec, read_spec
from nla_lens.cli.output import Finding
from nla_lens.engines.served.alike import readings
from nla_lens.engines.served.channel import Channel
from nla_lens.engines.served.prompt_rows import open_small
from nla_lens.engines.served.server import Server
from nla_lens.engines.served.verbalizer import ServedVerbalizer
from nla_lens.errors import NLAError
from nla_lens.foreign import scrub
from nla_lens.halves.loading import load_av_tokenizer
from nla_lens.models.placement import Placement

_N_TOKENS: Final = 4
_SAME: Final = 1e-3
"""Log-probabilities: both readings are one computation, but may fall into different batches."""
_Reading = tuple[list[int], list[float]]


def examine_server(
    checkpoint: str, *, engine: str, url: str | Server | None, **options: Any
) -> Iterator[Finding]:
    """What stands between a verbalizer and a server that reads prompt embeddings.

    Args:
        checkpoint: As in `NLA.from_pretrained`.
        engine: "vllm" or "sglang".
        url: Where the server is.
        **options: `revision` and `injection`, as in `NLA.from_pretrained`.

    Yields:
        Findings, as they are found; none after the server turned out not to do.

    Raises:
        NLAError: No such checkpoint, or no address.
    """
    server = Server.of(url, engine)
    spec = read_spec(checkpoint, **options)
    found = _examine(checkpoint, spec, engine, server, options.get("revision"))
    return (replace(f, detail=scrub(f.detail, server.api_key)) for f in found)


def _examine(
    name: str, spec: NLASpec, engine: str, server: Server, revision: str | None
) -> Iterator[Finding]:
    from nla_lens.engines import load_verbalizer_engine

    av = open_small(name_halves(name, None, None)[0], role="av", revision=revision)
    tokenizer = load_av_tokenizer(av)
    prompt = canonical_prompt(spec, tokenizer)
    try:
        loaded: Any = load_verbalizer_engine(engine, av, spec, Placement(), server)
    except NLAError as error:
        yield Finding("the server can run it", False, str(error))
        return
    longest, n_tokens = loaded.served.max_len, len(prompt.ids)
    yield Finding("the server can run it", True, f"{loaded.served.name} at {server.url}")
    yield from (Finding("its settings", None, f"{said}: texts may differ") for said in loaded.said)
    yield _length(longest, n_tokens)
    yield _tokens(server, loaded.served.name, tokenizer, prompt)
    yield _embeddings(loaded, prompt)


def _length(longest: int | None, n_tokens: int) -> Finding:
    if longest is None:
        return Finding("context length", None, "the server does not say")
    left = longest - n_tokens
    detail = f"{longest} tokens: the prompt's {n_tokens}, and {left} for an answer"
    return Finding(
        "context length", left >= 200, detail + ("" if left >= 200 else "; 200 are usual")
    )


def _tokens(server: Server, model: str, tokenizer: Any, prompt: Prompt) -> Finding:
    """Whether the server's tokenizer agrees; it is not used, but shows another model."""
    name, text = "its tokenizer", tokenizer.decode(list(prompt.ids))
    here = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        with Channel(server.hurried()) as channel:
            answer = channel.post("/tokenize", body).result()
    except NLAError:
        return Finding(name, None, "the server does not tell")
    there = answer.get("tokens") if isinstance(answer, Mapping) else None
    equal = there == list(here)
    return Finding(name, equal, "the same" if equal else "another one: is it another model?")


def _embeddings(engine: ServedVerbalizer, prompt: Prompt) -> Finding:
    name = "embeddings are read as they are sent"
    try:
        by_ids, by_embeds = _readings(engine, prompt)
    except (NLAError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return Finding(name, None, f"could not be compared ({' '.join(str(error).split())[:200]})")
    apart = [abs(a - b) for a, b in zip(by_ids[1], by_embeds[1], strict=True)]
    if by_ids[0] == by_embeds[0] and max(apart, default=1.0) <= _SAME:
        detail = f"log-probabilities of {len(apart)} tokens differ by {max(apart):.1e} at most"
        return Finding(name, True, detail)
    return Finding(
        name,
        False,
        "the prompt sent as embeddings is not what it is as ids: another checkpoint, another dtype "
        "(url=Server(URL, dtype=...)), or a server that does something else with embeddings",
    )


def _readings(engine: ServedVerbalizer, prompt: Prompt) -> tuple[_Reading, _Reading]:
    """Ids and log-probabilities of the first tokens after the prompt, as ids and as embeddings."""
    found = readings(engine, prompt.ids, prompt.marker, _N_TOKENS, slice(None))
    as_ids, as_embeds = (([t for t, _ in one], [p for _, p in one]) for one in found)
    return as_ids, as_embeds
