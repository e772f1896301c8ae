"""HTTP servers that answer as vLLM 0.32.0 and SGLang 0.5.23 do, with a small model behind them.

    with ModelServer("vllm", model, tokenizer, name) as server:
        NLA.from_pretrained(..., engine="vllm", url=server.url)

The model reads the embeddings that arrive, one prompt at a time and without a line of the library:
token ids can be compared. What the servers refuse, they refuse in the words of the real ones.
"""

import base64
import io
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nla_lens.models.cache_keyword import cache_keyword

Answered = tuple[int, Any]
"""Status and body: JSON, or bytes as they are."""
Act = Callable[["Handler"], "Answered | None"]
"""What is done instead of answering; None: nothing more is sent."""


class Handler(BaseHTTPRequestHandler):
    """Hands requests to the server's methods."""

    protocol_version = "HTTP/1.1"
    server: "_HTTP"

    def setup(self) -> None:
        super().setup()
        self.server.owner.connections.add(self.connection)

    def do_GET(self) -> None:
        self.body: Any = None
        self._reply(self.server.owner.get(self.path, self))

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(self.server.owner.post(self.path, self))

    def _reply(self, answered: Answered | None) -> None:
        if answered is None:
            self.close_connection = True
            return
        status, body = answered
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class _HTTP(ThreadingHTTPServer):
    owner: "ModelServer"
    request_queue_size = 64

    def handle_error(self, *args: object) -> None:
        """A client that went away is nothing to print."""


class ModelServer:
    """One of the two servers, on loopback.

    Attributes:
        bodies: What was asked for, each parsed.
        acts: What the next requests for text get instead of an answer; None is an answer.
        mangle: Changes an answer before it is sent.
        key: The API key it wants.
        flag: Whether it was started with the flag that embeddings need.
        settings: What else it tells of how it was started; vLLM tells it only where there is some.
    """

    def __init__(self, kind: str, model: Any, tokenizer: Any, name: str) -> None:
        self.kind, self.model, self.tokenizer, self.name = kind, model, tokenizer, name
        self.bodies: list[Any] = []
        self.acts: deque[Act | None] = deque()
        self.mangle: Callable[[Any], Any] = lambda answer: answer
        self.key: str | None = None
        self.flag = True
        self.settings: dict[str, Any] = {}
        self.max_len = 512
        self.settings_path = "/server_info"
        self.models: Any = None
        self._lock = threading.Lock()
        self.connections: set[Any] = set()
        self._http: _HTTP | None = None
        self._port = 0
        self._listen()
        self.url = f"http://127.0.0.1:{self._port}"

    def _listen(self) -> None:
        self._http = _HTTP(("127.0.0.1", self._port), Handler)
        self._http.owner, self._port = self, self._http.server_port

    def __enter__(self) -> "ModelServer":
        assert self._http is not None
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def kill(self) -> None:
        """What a process that is killed leaves: nobody listens, and every connection is closed."""
        self.__exit__()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def start_again(self) -> None:
        """At the same address."""
        self._listen()
        self.__enter__()

    def get(self, path: str, handler: Handler) -> Answered:
        if not self._let_in(handler):
            return 401, {"error": "Unauthorized"}
        card = {
            "id": self.name,
            "object": "model",
            "root": self.name,
            "max_model_len": self.max_len,
        }
        if path == "/v1/models":
            return 200, self.models or {"object": "list", "data": [card]}
        if path == self.settings_path and self.kind == "sglang":
            return 200, {
                "disable_radix_cache": self.flag,
                "chunked_prefill_size": -1,
                "dtype": "auto",
                "quantization": None,
                "kv_cache_dtype": "auto",
                "skip_tokenizer_init": False,
                "preferred_sampling_params": None,
                "version": "0.5.23",
                **self.settings,
            }
        if path == "/server_info?config_format=json" and self.kind == "vllm" and self.settings:
            return 200, {"vllm_config": self.settings}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, handler: Handler) -> Answered | None:
        if not self._let_in(handler):
            return 401, {"error": "Unauthorized"}
        if path == "/tokenize":
            ids = self.tokenizer(json.loads(handler.body)["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids["input_ids"]}
        if path != {"vllm": "/v1/completions", "sglang": "/generate"}[self.kind]:
            return 404, {"detail": "Not Found"}
        with self._lock:
            self.bodies.append(json.loads(handler.body))
            body, act = self.bodies[-1], self.acts.popleft() if self.acts else None
        if act is not None:
            return act(handler)
        status, answer = (self._vllm if self.kind == "vllm" else self._sglang)(body)
        return status, self.mangle(answer) if status == 200 else answer

    def _let_in(self, handler: Handler) -> bool:
        return self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}"

    def _vllm(self, body: Any) -> Answered:
        if body["model"] != self.name:
            return 404, _error(f"The model `{body['model']}` does not exist.", 404)
        if "prompt_embeds" not in body:
            prompts = [self._table(body["prompt"])]
        elif not self.flag:
            words = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            return 400, _error(words, 400)
        else:
            prompts = [_decoded(one) for one in body["prompt_embeds"]]
        d_model = self._table([0]).shape[-1]
        if prompts[0].shape[-1] != d_model:
            words = (
                f"`prompt_embeds` hidden_size {prompts[0].shape[-1]} does not match the model's "
                f"hidden_size {d_model}."
            )
            return 400, _error(words, 400)
        choices = []
        for index, embeds_TD in enumerate(prompts):
            ids, logprobs, reason = self._generate(embeds_TD, body["max_tokens"], body)
            text = self.tokenizer.decode(ids)
            choice = {"index": index, "text": text, "finish_reason": reason, "token_ids": ids}
            if "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": logprobs}
            choices.append(choice)
        return 200, {"object": "text_completion", "model": self.name, "choices": choices}

    def _sglang(self, body: Any) -> Answered:
        params = body["sampling_params"]
        if "input_embeds" not in body:
            prompts = [self._table(ids) for ids in body["input_ids"]]
        elif not self.flag:
            words = (
                "input_embeds is provided while disable_radix_cache is False. Please add "
                "`--disable-radix-cache` when you launch the server if you want to use "
                "input_embeds as inputs."
            )
            return 400, {"error": {"message": words}}
        else:
            prompts = [torch.tensor(one) for one in body["input_embeds"]]
        each = params if isinstance(params, list) else [params] * len(prompts)
        answers = []
        for embeds_TD, wishes in zip(prompts, each, strict=True):
            ids, logprobs, reason = self._generate(embeds_TD, wishes["max_new_tokens"], wishes)
            meta: dict[str, Any] = {"finish_reason": {"type": reason}}
            if body.get("return_logprob"):
                meta["output_token_logprobs"] = [
                    [logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)
                ]
            answers.append(
                {"text": self.tokenizer.decode(ids), "output_ids": ids, "meta_info": meta}
            )
        return 200, answers

    @torch.inference_mode()
    def _table(self, ids: Sequence[int]) -> Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids))

    @torch.inference_mode()
    def _generate(
        self, embeds_TD: Tensor, most: int, wishes: Any
    ) -> tuple[list[int], list[float], str]:
        """Greedy ids; above temperature 0 drawn with the request's seed."""
        stack = self.model.model
        stack = getattr(stack, "language_model", stack)
        dtype = next(self.model.parameters()).dtype
        cache, ids, logprobs = DynamicCache(config=stack.config), list[int](), list[float]()
        seed = wishes.get("seed", wishes.get("sampling_seed", 0))
        generator = torch.Generator().manual_seed(seed)
        x_1TD = embeds_TD[None].to(dtype)
        while len(ids) < most:
            out = stack(inputs_embeds=x_1TD, use_cache=True, **{cache_keyword(stack): cache})
            logits_V = self.model.lm_head(out.last_hidden_state[0, -1]).float()
            if wishes["temperature"] > 0:
                probs_V = (logits_V / wishes["temperature"]).softmax(-1)
                ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
            else:
                ids.append(int(logits_V.argmax()))
            logprobs.append(float(logits_V.log_softmax(-1)[ids[-1]]))
            stops = wishes.get("stop") or []
            if ids[-1] in wishes["stop_token_ids"] or any(
                stop in self.tokenizer.decode(ids) for stop in stops
            ):
                return ids, logprobs, "stop"
            x_1TD = self._table(ids[-1:])[None]
        return ids, logprobs, "length"


def _decoded(text: str) -> Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}
