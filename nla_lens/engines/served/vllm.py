"""An AV on a vLLM server: `engine="vllm", url="http://host:8000"`. Needs no vllm here.

    vllm serve MODEL --enable-prompt-embeds

Prompt embeddings go to `POST /v1/completions`, several vectors a request. Greedy answers equal
those of the other engines token by token where both sides compute in float32 (tested on vLLM
0.32.0; in bfloat16 they part by rounding, as they do between any two engines). Sampled answers are
repeatable with a seed, but they are other ones than the engines here draw: the server has its own
generator. A request has one seed, so each sample is a request of its own.

All that a server would take from generation_config.json is sent along with a value that does
nothing: a repetition penalty there would leak into "greedy". Prefix caching may stay on: vLLM keys
it by the embeddings themselves.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import is_int
from nla_lens.engines import Job, VerbalizerEngine
from nla_lens.engines.served.half import Generated, Half
from nla_lens.engines.served.server import Server
from nla_lens.engines.served.settings import Told, ask_vllm, of_vllm
from nla_lens.engines.served.several import on_servers
from nla_lens.engines.served.verbalizer import ServedVerbalizer, open_half
from nla_lens.errors import NLARemoteError
from nla_lens.models.placement import Placement

_NEUTRAL: Final[Mapping[str, Any]] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    # The ids that end an answer are sent: the tokenizer's own end need not be one of them.
    "ignore_eos": True,
    # A tag may hold tokens that are special.
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
}


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement, url: Any = None
) -> VerbalizerEngine:
    """An AV on vLLM servers, which are asked whether they read this checkpoint's embeddings."""

    def load(server: Server) -> VLLMVerbalizer:
        return VLLMVerbalizer(open_half(checkpoint, spec, placement, server, "vllm"))

    return on_servers(url, "vllm", load)


class VLLMVerbalizer(ServedVerbalizer):
    """An AV on a vLLM server."""

    engine = "vllm"
    path = "/v1/completions"

    def __init__(self, half: Half) -> None:
        super().__init__(half)
        self._d_model = half.spec.d_model

    def told(self) -> Told:
        """See `ServedVerbalizer`."""
        computes = str(self.rows.dtype).removeprefix("torch.")
        return of_vllm(ask_vllm(self.server), self.server, computes)

    def most_rows(self, job: Job) -> int:
        """One where rows have seeds of their own."""
        return 1 if job.temperature > 0 else super().most_rows(job)

    def body(self, embeds_NTD: Tensor, job: Job, rows: Sequence[int]) -> Mapping[str, Any]:
        """See `ServedVerbalizer`."""
        body = {
            **_NEUTRAL,
            "model": self.served.name,
            "prompt_embeds": [encode(embeds_TD.to(self.rows.dtype)) for embeds_TD in embeds_NTD],
            "max_tokens": int(job.max_new_tokens),
            "temperature": float(job.temperature),
            "stop_token_ids": sorted(self.eos_ids),
            "stop": [] if job.stop is None else [job.stop],
        }
        return body | ({"seed": int(job.seeds[rows[0]])} if job.temperature > 0 else {})

    def answers(self, answer: Any, n: int) -> list[Generated]:
        """The choices, put in order by their index."""
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
            raise self.error("answered without choices; is it a vLLM server?")
        found = {c.get("index"): c for c in choices if is_int(c.get("index"))}
        if len(choices) != n or set(found) != set(range(n)):
            raise self.error(
                f"answered a request for {n} vectors with {len(choices)} choices, numbered "
                f"{str(sorted(found))[:80]}"
            )
        return [
            Generated(found[i].get("token_ids"), str(found[i].get("finish_reason")))
            for i in range(n)
        ]

    def said_model(self, answer: Any) -> str | None:
        """Its first name, whichever was asked for."""
        found = answer.get("model")
        return found if isinstance(found, str) else None

    def comparable(self, embeds_1TD: Tensor, job: Job) -> list[Mapping[str, Any]]:
        """See `ServedVerbalizer`."""
        embeds = {**self.body(embeds_1TD, job, [0]), "logprobs": 1}
        ids = {key: value for key, value in embeds.items() if key != "prompt_embeds"}
        return [{**ids, "prompt": list(job.prompt_ids), "add_special_tokens": False}, embeds]

    def log_probs(self, answer: Any) -> list[tuple[Any, Any]]:
        """See `ServedVerbalizer`."""
        choice = answer["choices"][0]
        return list(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))

    def tell(self, status: int, words: str) -> NLARemoteError | None:
        """What vLLM 0.32.0 says where a flag is missing or the model is another one."""
        if "enable-prompt-embeds" in words:
            return self.error(
                f"does not take prompt embeddings ({words}): start it with --enable-prompt-embeds",
                "settings",
            )
        if "hidden_size" in words:
            return self.error(
                f"runs a model of another width than d_model={self._d_model} ({words}): it is not "
                "this verbalizer",
                "not_deployed",
            )
        if status == 404:
            return self.error(
                f"has no model {self.served.name!r:.120} any more, or no {self.path} ({words})",
                "not_deployed",
            )
        return None


def encode(embeds_TD: Tensor) -> str:
    """A tensor as vLLM reads it: base64 of what `torch.save` writes."""
    file = io.BytesIO()
    # A slice would be saved with all that it was cut from.
    torch.save(embeds_TD.clone(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")
