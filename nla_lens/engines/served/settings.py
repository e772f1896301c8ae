"""How a server was started, as far as it tells: what of it makes answers wrong is refused, the rest is said.

Read in the sources of SGLang 0.5.23 and vLLM 0.32.0:

* SGLang cuts a prompt into chunks when those of a batch together are longer than `chunked_prefill_size`
  (srt/managers/schedule_policy.py), whatever its own length: one sent as embeddings is cut, too.
* `preferred_sampling_params` of SGLang count wherever a request says nothing
  (srt/managers/tokenizer_manager.py); vLLM takes penalties and the like from generation_config.json in the same
  way. Requests say all of what is known here.
* vLLM tells its settings only where VLLM_SERVER_DEV_MODE is set.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nla_lens.checks import is_number
from nla_lens.engines.served.channel import Channel
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLARemoteError
from nla_lens.foreign import harmless

SGLANG_FLAGS: Final = "--disable-radix-cache --chunked-prefill-size -1"
_DTYPES: Final = {"half": "float16", "float": "float32"}
_USUAL: Final[tuple[Any, ...]] = (None, False, "", "auto", "null", "none", "None", [], {})


@dataclass(frozen=True)
class Told:
    """What a server's settings mean for answers.

    Attributes:
        wrong: What makes them wrong, with the remedy.
        said: What makes them other than those of an engine here, by rounding at least.
    """

    wrong: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def check(self, server: Server) -> tuple[str, ...]:
        """What is to be said.

        Raises:
            NLARemoteError: Something makes answers wrong.
        """
        if self.wrong:
            raise NLARemoteError(
                f"the server at {server.url} {'; it '.join(self.wrong)}", cause="settings"
            )
        return self.said


def ask_sglang(server: Server) -> Mapping[str, Any]:
    """An SGLang server's settings; empty where it does not tell them.

    Raises:
        NLARemoteError: It cannot be asked.
    """
    # As it was called before 0.5.4.
    return _asked(server, ("/server_info", "/get_server_info"), ("not_found",))


def ask_vllm(server: Server) -> Mapping[str, Any]:
    """A vLLM server's settings by section; empty where it does not tell them, as most do not.

    Raises:
        NLARemoteError: It cannot be asked.
    """
    # Whatever stands in front of it may answer for it.
    may_fail = ("not_found", "not_deployed", "failed")
    found = _asked(server, ("/server_info?config_format=json",), may_fail).get("vllm_config")
    return found if isinstance(found, Mapping) else {}


def _asked(server: Server, paths: tuple[str, ...], may_fail: tuple[str, ...]) -> Mapping[str, Any]:
    with Channel(server.hurried()) as channel:
        for path in paths:
            try:
                found = channel.get(path)
            except NLARemoteError as error:
                if error.cause not in may_fail:
                    raise
                continue
            return found if isinstance(found, Mapping) else {}
    return {}


def of_sglang(
    settings: Mapping[str, Any], server: Server, computes: str, sent: frozenset[str]
) -> Told:
    """What an SGLang server's settings mean.

    Args:
        settings: What it told.
        server: Where, and what the caller claims of it.
        computes: The dtype of the embeddings that are sent.
        sent: The sampling parameters that every request says.
    """
    wrong = []
    if settings.get("disable_radix_cache") is False:
        wrong.append(
            "has its radix cache on, which takes all embeddings for the same prompt: start it with "
            f"{SGLANG_FLAGS}"
        )
    chunk = settings.get("chunked_prefill_size")
    if is_number(chunk) and (chunk or 0) > 0:
        wrong.append(
            f"cuts prompts into chunks (chunked_prefill_size={_words(chunk)}), those sent as "
            f"embeddings, too, whenever a batch is longer than one: start it with {SGLANG_FLAGS}"
        )
    for key, flag in (
        ("skip_tokenizer_init", "--skip-tokenizer-init"),
        ("enable_tokenizer_batch_encode", "--enable-tokenizer-batch-encode"),
    ):
        if settings.get(key) is True:
            wrong.append(f"cannot answer prompts sent as embeddings: start it without {flag}")
    preferred = _object(settings.get("preferred_sampling_params"))
    more = sorted(set(preferred) - sent)
    if more:
        wrong.append(
            f"applies sampling parameters of its own to every request ({_words(more)}): start it "
            "without them in --preferred-sampling-params"
        )
    wrong += _dtype(settings.get("dtype"), server)
    return Told(
        tuple(wrong),
        (
            *_other_dtype(settings.get("dtype"), computes),
            *_unusual("quantization", settings.get("quantization")),
            *_unusual("kv_cache_dtype", settings.get("kv_cache_dtype"), computes),
            *_unusual("speculative_algorithm", settings.get("speculative_algorithm")),
            *_unusual("disaggregation_mode", settings.get("disaggregation_mode")),
        ),
    )


def of_vllm(settings: Mapping[str, Any], server: Server, computes: str) -> Told:
    """What a vLLM server's settings mean; the arguments are those of `of_sglang`."""
    model, cache = _object(settings.get("model_config")), _object(settings.get("cache_config"))
    wrong = []
    if model.get("enable_prompt_embeds") is False:
        wrong.append("does not take prompt embeddings: start it with --enable-prompt-embeds")
    if model.get("skip_tokenizer_init") is True:
        wrong.append("cannot end answers at a text: start it without --skip-tokenizer-init")
    wrong += _dtype(model.get("dtype"), server)
    speculative = _object(settings.get("speculative_config"))
    return Told(
        tuple(wrong),
        (
            *_other_dtype(model.get("dtype"), computes),
            *_unusual("quantization", model.get("quantization")),
            *_unusual("cache_dtype", cache.get("cache_dtype"), computes),
            *_unusual("logits_processors", model.get("logits_processors")),
            *_unusual("speculative_config", speculative.get("method")),
        ),
    )


def _object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _plain(dtype: Any) -> str | None:
    """`bfloat16` for `torch.bfloat16` and the like; None where it says nothing."""
    if not isinstance(dtype, str) or dtype in _USUAL:
        return None
    name = dtype.removeprefix("torch.")
    return _DTYPES.get(name, name)


def _dtype(dtype: Any, server: Server) -> list[str]:
    there = _plain(dtype)
    claimed = None if server.dtype is None else _plain(str(server.dtype))
    if there is None or claimed is None or there == claimed:
        return []
    return [f"computes in {_words(there)}, not in dtype={claimed!r} as url=Server(URL, ...) says"]


def _other_dtype(dtype: Any, computes: str) -> list[str]:
    there = _plain(dtype)
    return [] if there in (None, computes) else [f"it computes in {_words(there)}, not {computes}"]


def _unusual(name: str, value: Any, usual: str | None = None) -> list[str]:
    if value in _USUAL or (usual is not None and _plain(value) == usual):
        return []
    return [f"{name}={_words(value)}"]


def _words(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return harmless(text)[:80]
