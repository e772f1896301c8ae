"""An AV on a server that reads prompt embeddings: what the vLLM and SGLang engines share.

The client holds the tokenizer, the sidecar and some rows of the embedding table. The injected
prompt is sent as embeddings, once for every vector, and token ids come back, from which an answer
is cut where the engines in this process would have ended it.

Nothing that is not finite is ever sent: vLLM 0.32.0 answers such a request with HTTP 200 and then
gives wrong answers to others, too.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.checks import is_int
from nla_lens.engines import Job
from nla_lens.engines.served.alike import Reading, are_apart, reading_of
from nla_lens.engines.served.channel import MODELS, Channel
from nla_lens.engines.served.half import Generated, Half
from nla_lens.engines.served.prompt_rows import model_files, open_rows
from nla_lens.engines.served.server import Server, listed, pick
from nla_lens.engines.served.settings import Told
from nla_lens.engines.served.spreading import spread
from nla_lens.errors import NLAError, NLARemoteError
from nla_lens.models.lora import WEIGHTS_NAME
from nla_lens.models.placement import Placement
from nla_lens.models.tokens import find_eos_ids
from nla_lens.models.weights import load_configs
from nla_lens.stream.injection import replace

_log = logging.getLogger(__name__)

_BYTES_A_TOKEN: Final = 1 << 10
"""More than an answer's id and text can take."""
_BYTES_AN_ANSWER: Final = 1 << 20


class ServedVerbalizer(ABC):
    """An AV on a server.

    Attributes:
        eos_ids: See `VerbalizerEngine`.
        server: Where it is.
        served: What it serves.
        rows: The embedding table, of which the prompt's rows are read.
        said: What of its settings makes its answers others than an engine's here.
        digest: A hash of what the client has of the model's weights.
        reading: What the server computes, where it is one of several.
    """

    engine: str
    path: str

    def __init__(self, half: Half) -> None:
        self.eos_ids, self.server, self.served = half.eos_ids, half.server, half.served
        self.rows, self.marker_id = half.rows, half.spec.injection_token_id
        self.said: tuple[str, ...] = ()
        self.digest = half.digest
        self.reading: Reading | None = None
        self._said_model: str | None = None

    def settle(self) -> None:
        """Asks how the server was started, logs what of it counts, and has it read an embedding.

        Raises:
            NLAError: It cannot be asked, or its answers would be wrong.
        """
        self.said = self.told().check(self.server)
        for words in self.said:
            _log.warning("the server at %s: %s", self.server.url, words)
        self.probe([self.marker_id])

    def look(self) -> None:
        """Looks again at a server that was away.

        Raises:
            NLAError: It is still away, or is not what it was.
        """
        with Channel(self.server.hurried()) as channel:
            self.confirm(channel.get(MODELS))
        self.settle()
        if are_apart(self.reading, reading_of(self), self.rows.dtype):
            raise self.error("computes something else than it did", "not_deployed")

    def confirm(self, models: Any) -> None:
        """Raises an NLARemoteError if the server's list of models has not what it had."""
        if self.served not in listed(models, self.server.url):
            raise self.error(
                f"does not serve {self.served.name!r:.120} any more as it did when it was loaded: "
                "load it again",
                "not_deployed",
            )

    def embed(self, ids: Sequence[int]) -> Tensor:
        """What enters block 0 for these ids, `[T, d]` float32 on the CPU."""
        return self.rows.of(ids)

    @abstractmethod
    def told(self) -> Told:
        """What the server's settings mean."""

    @abstractmethod
    def body(self, embeds_NTD: Tensor, job: Job, rows: Sequence[int]) -> Mapping[str, Any] | bytes:
        """A request for some rows of a job, whose injected prompts are given."""

    @abstractmethod
    def answers(self, answer: Any, n: int) -> list[Generated]:
        """The n answers in what the server said, in the order of the request.

        Raises:
            NLAError: It is something else.
        """

    @abstractmethod
    def tell(self, status: int, words: str) -> NLARemoteError | None:
        """What a refusal means, where this kind of server is known to mean something by it."""

    @abstractmethod
    def said_model(self, answer: Any) -> str | None:
        """What an answer that is one says of the model that gave it."""

    @abstractmethod
    def comparable(self, embeds_1TD: Tensor, job: Job) -> list[Mapping[str, Any]]:
        """Two requests for log-probabilities: of the prompt as ids, and as embeddings."""

    @abstractmethod
    def log_probs(self, answer: Any) -> list[tuple[Any, Any]]:
        """Token ids and log-probabilities in the answer to one of these."""

    def most_rows(self, job: Job) -> int:
        """Most vectors in one request."""
        return self.server.rows_per_request

    def bytes_a_row(self, n_tokens: int) -> int:
        """About what one injected prompt takes in a request."""
        return n_tokens * self.rows.d_model * self.rows.dtype.itemsize * 4 // 3

    def probe(self, ids: Sequence[int]) -> None:
        """Has the server read one token's embedding, which shows most of what may be wrong.

        Raises:
            NLAError: It would not; says why.
        """
        embed_1D = self.embed(ids[:1])
        job = Job(ids[:1], 0, embed_1D, 1, lambda ids: True)
        with Channel(self.server.hurried(), self.tell) as channel:
            self.read(channel.post(self.path, self.body(embed_1D[None], job, [0])), job, [0])

    def generate(self, job: Job) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, ids) as requests are answered; checks the job before anything is sent.

        Raises:
            NLAError: Too long for the server, or not finite in its dtype; or the server failed:
                what it still answers within 5 s is yielded first.
        """
        self.check(job)
        return spread([self], job)

    def send(
        self, channel: Channel, embed_TD: Tensor, job: Job, rows: Sequence[int]
    ) -> Future[Any]:
        """Asks for some rows; `read` takes what comes of it."""
        embed_NTD = embed_TD.expand(len(rows), -1, -1)
        embeds_NTD = replace(embed_NTD, job.injected_ND[list(rows)], job.marker)
        # The prompt's ids come back, too: placeholders.
        n_tokens = job.max_new_tokens + len(job.prompt_ids)
        limit = _BYTES_AN_ANSWER + len(rows) * n_tokens * _BYTES_A_TOKEN
        return channel.post(self.path, self.body(embeds_NTD, job, rows), limit)

    def check(self, job: Job) -> None:
        """Raises an NLAError for a job that the server cannot do."""
        n_tokens, longest = len(job.prompt_ids) + job.max_new_tokens, self.served.max_len
        if longest is not None and n_tokens > longest:
            raise NLAError(
                f"a prompt of {len(job.prompt_ids)} tokens and max_new_tokens={job.max_new_tokens} "
                f"are more than the {longest} tokens the server at {self.server.url} takes: pass a "
                "smaller max_new_tokens, or start it with a larger context length"
            )
        finite = job.injected_ND.to(self.rows.dtype).isfinite().all(-1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise NLAError(
                f"row {row} is not finite in {self.rows.dtype}, which the server computes in; "
                "nothing was sent: it would also spoil the answers to others"
            )

    def read(
        self, future: Future[Any], job: Job, rows: Sequence[int]
    ) -> list[tuple[int, list[int]]]:
        """Each row's ids in the answer to a request.

        Raises:
            NLAError: There is none, or it is something else.
        """
        answer = future.result()
        found = self.answers(answer, len(rows))
        self._check_model(self.said_model(answer))
        return [(row, self._cut(one, job, row)) for row, one in zip(rows, found, strict=True)]

    def _check_model(self, said: str | None) -> None:
        """Raises an NLARemoteError where other weights answer than the first time."""
        if self._said_model is None:
            self._said_model = said
        elif said != self._said_model:
            raise self.error(
                f"answered as {said!r:.120}, and before as {self._said_model!r:.120}: it was given "
                "another model; load it again",
                "not_deployed",
            )

    def _cut(self, generated: Generated, job: Job, row: int) -> list[int]:
        """An answer up to where it ends by the rules of every engine."""
        ids = generated.ids
        if not isinstance(ids, list) or not all(map(is_int, ids)):
            raise self.error("sent no token ids for an answer; is it too old for this?")
        ids = ids[: job.max_new_tokens]
        if not all(0 <= token < self.rows.vocab_size for token in ids):
            raise self.error(f"sent token ids beyond the {self.rows.vocab_size} of the model")
        for length in range(1, len(ids) + 1):
            over = ids[length - 1] in self.eos_ids or length == job.max_new_tokens
            if over or job.is_finished(ids[:length]):
                return ids[:length]
        raise self.error(
            f"ended the answer for vector {row} after {len(ids)} tokens ({generated.ended:.80}), "
            "at none of the places where this verbalizer's answers end: it has a limit or stop "
            "tokens of its own"
        )

    def error(self, what: str, cause: str = "failed") -> NLARemoteError:
        """Something the server did."""
        return self.server.error(what, cause)


def open_half(
    checkpoint: Checkpoint, spec: NLASpec, placement: Placement, url: Any, engine: str
) -> Half:
    """Reads what a client needs of a checkpoint, and asks the server what it serves.

    Raises:
        NLAError: A checkpoint that such a server cannot run, or another model there.
    """
    if spec.injection != "replace":
        raise NLAError(
            f"{checkpoint.name} is injected by {spec.injection}, at the output of block 1; "
            f"engine={engine!r} sends prompt embeddings, for which that rule has no equivalent: "
            "use engine='transformers', 'transformer_lens', 'nnsight' or 'ndif'"
        )
    server = Server.of(url, engine)
    path = model_files(checkpoint).path
    foreign_code = placement.trust_remote_code
    config, generation = load_configs(path, trust_remote_code=foreign_code)
    rows = open_rows(checkpoint, config, _dtype(server, placement))
    if rows.d_model != spec.d_model:
        raise NLAError(
            f"{checkpoint.name}: embeddings are {rows.d_model} wide, d_model is {spec.d_model}"
        )
    named = SimpleNamespace(generation_config=generation, config=config, name_or_path=str(path))
    with Channel(server.hurried()) as channel:
        served = pick(listed(channel.get(MODELS), server.url), checkpoint, server)
    adapter = checkpoint.path / WEIGHTS_NAME if checkpoint.is_adapter else None
    digest = rows.digest(adapter)
    return Half(spec, server, served, rows, find_eos_ids(named), config, digest)


def _dtype(server: Server, placement: Placement) -> torch.dtype | None:
    if server.dtype is None:
        found: torch.dtype | None = placement.dtype
        return found
    from nla_lens.models.placement import torch_dtype

    given: torch.dtype | None = torch_dtype(server.dtype)
    return given
