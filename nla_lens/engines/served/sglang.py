"""An AV on an SGLang server: `engine="sglang", url="http://host:30000"`. Needs no sglang here.

    python -m sglang.launch_server --model-path MODEL \\
        --disable-radix-cache --chunked-prefill-size -1

Never run against a real SGLang: its wheels need CUDA. What is sent, and what is expected back, was
read in the source of 0.5.23 (srt/entrypoints/http_server.py, srt/managers/tokenizer_manager.py,
srt/managers/io_struct.py, srt/sampling/sampling_params.py) and is tested against a server that
answers as written there.

* The radix cache keys prompts by token ids, and all embeddings count as the same ids: it must be
  off. The server refuses embeddings while it is on; it is asked when an NLA is loaded.
* Chunked prefill cuts prompts wherever a batch of them is longer than a chunk: it must be off. See
  `settings` for what else of the server's settings is looked at.
* `input_ids` are never sent along: they would win over the embeddings, silently.
* The wrapper of Gemma 3 (srt/models/gemma3_mm.py) ignores embeddings, silently: it is refused.
* Seeds count only with `--enable-deterministic-inference`; without it a sampled answer cannot be
  had a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines import Job, VerbalizerEngine
from nla_lens.engines.served.half import Generated, Half
from nla_lens.engines.served.server import Server
from nla_lens.engines.served.settings import SGLANG_FLAGS, Told, ask_sglang, of_sglang
from nla_lens.engines.served.several import on_servers
from nla_lens.engines.served.verbalizer import ServedVerbalizer, open_half
from nla_lens.errors import NLAError, NLARemoteError
from nla_lens.models.placement import Placement

_NEUTRAL: Final[Mapping[str, Any]] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": False,
    "no_stop_trim": True,
}
_SENT: Final = frozenset(
    (*_NEUTRAL, "max_new_tokens", "temperature", "stop_token_ids", "stop", "sampling_seed")
)
_BYTES_A_NUMBER: Final = 16


def load_verbalizer(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement, url: Any = None
) -> VerbalizerEngine:
    """An AV on SGLang servers, which are asked whether they read this checkpoint's embeddings."""
    if checkpoint.is_adapter:
        raise NLAError(
            f"{checkpoint.name} is a LoRA adapter, which engine='sglang' cannot run: merge it into "
            "its base model and serve that, or use another engine"
        )

    def load(server: Server) -> SGLangVerbalizer:
        half = open_half(checkpoint, spec, placement, server, "sglang")
        if half.config.model_type == "gemma3" and not half.server.reads_embeds:
            raise NLAError(
                f"{checkpoint.name} is Gemma 3's multimodal wrapper, in which SGLang ignores "
                "embeddings without a word: serve the text model alone (Gemma3ForCausalLM), or use "
                "another engine, or, if the server was patched, pass url=Server(URL, "
                "reads_embeds=True)"
            )
        return SGLangVerbalizer(half)

    return on_servers(url, "sglang", load)


class SGLangVerbalizer(ServedVerbalizer):
    """An AV on an SGLang server."""

    engine = "sglang"
    path = "/generate"

    def __init__(self, half: Half) -> None:
        super().__init__(half)
        self._written: tuple[Any, str, str] = (None, "", "")

    def told(self) -> Told:
        """See `ServedVerbalizer`."""
        computes = str(self.rows.dtype).removeprefix("torch.")
        return of_sglang(ask_sglang(self.server), self.server, computes, _SENT)

    def bytes_a_row(self, n_tokens: int) -> int:
        """Numbers are written out."""
        return n_tokens * self.rows.d_model * _BYTES_A_NUMBER

    def body(self, embeds_NTD: Tensor, job: Job, rows: Sequence[int]) -> bytes:
        """JSON; what is the same for all vectors is written out once."""
        params: dict[str, Any] = {
            **_NEUTRAL,
            "max_new_tokens": int(job.max_new_tokens),
            "temperature": float(job.temperature),
            "stop_token_ids": sorted(self.eos_ids),
            "stop": [] if job.stop is None else [job.stop],
        }
        seeded = job.temperature > 0
        each = [params | ({"sampling_seed": int(job.seeds[row])} if seeded else {}) for row in rows]
        embeds = [self._prompt(embeds_TD, job) for embeds_TD in embeds_NTD]
        return b'{"input_embeds": [%s], "sampling_params": %s}' % (
            ", ".join(embeds).encode(),
            json.dumps(each).encode(),
        )

    def _prompt(self, embeds_TD: Tensor, job: Job) -> str:
        key = (tuple(job.prompt_ids), job.marker)
        written = self._written
        if written[0] != key:
            before, after = embeds_TD[: job.marker], embeds_TD[job.marker + 1 :]
            # Another thread may write down its own prompt meanwhile.
            written = key, "".join(map(_row, before)), "".join(map(_row, after))
            self._written = written
        _, before_text, after_text = written
        marker_D = embeds_TD[job.marker].to(self.rows.dtype)
        return "[" + (before_text + _row(marker_D) + after_text).removesuffix(", ") + "]"

    def answers(self, answer: Any, n: int) -> list[Generated]:
        """A list of answers in the order of the request."""
        if not isinstance(answer, list) or not all(isinstance(one, Mapping) for one in answer):
            raise self.error("answered without a list of answers; is it an SGLang server?")
        if len(answer) != n:
            raise self.error(f"answered a request for {n} vectors with {len(answer)} answers")
        return [self._generated(one) for one in answer]

    def _generated(self, one: Mapping[str, Any]) -> Generated:
        meta = one.get("meta_info")
        reason = meta.get("finish_reason") if isinstance(meta, Mapping) else None
        return Generated(one.get("output_ids"), str(reason))

    def said_model(self, answer: Any) -> str | None:
        """The version that whoever updates weights in place gives them."""
        meta = answer[0].get("meta_info") if isinstance(answer, list) and answer else None
        found = meta.get("weight_version") if isinstance(meta, Mapping) else None
        return None if found is None else str(found)

    def comparable(self, embeds_1TD: Tensor, job: Job) -> list[Mapping[str, Any]]:
        """See `ServedVerbalizer`."""
        embeds = {**json.loads(self.body(embeds_1TD, job, [0])), "return_logprob": True}
        ids = {key: value for key, value in embeds.items() if key != "input_embeds"}
        return [{**ids, "input_ids": [list(job.prompt_ids)]}, embeds]

    def log_probs(self, answer: Any) -> list[tuple[Any, Any]]:
        """See `ServedVerbalizer`."""
        found = answer[0]["meta_info"]["output_token_logprobs"]
        return [(token, logprob) for logprob, token, *_ in found]

    def tell(self, status: int, words: str) -> NLARemoteError | None:
        """What SGLang 0.5.23 says where a flag is missing."""
        if "radix" in words:
            return self.error(
                f"has its radix cache on ({words}): start it with {SGLANG_FLAGS}", "settings"
            )
        return None


def _row(row_D: Tensor) -> str:
    """One row as JSON: nine digits bring every float32 back, and always make a float of it."""
    return "[" + ",".join([f"{x:.8e}" for x in row_D.float().tolist()]) + "], "
