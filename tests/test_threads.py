"""Many threads on one NLA and one model: each call gives what it gives alone.

Threads change as often as the interpreter can change them. What a call gives alone is asked for
first, so that a wrong answer shows as a difference.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nla_lens
from nla_lens import NLA, NLAError
from nla_lens.models import onednn
from nla_lens.models.anatomy import text_model
from nla_lens.models.turns import Turns
from nla_lens.stream.extraction import open_source
from nla_lens.stream.frameworks import Probe

from .checkpoints import EXPLANATIONS, vectors
from .recording import N_BLOCKS, PASSES_MIX, plain_model, states_with_another_pass

RULES = ("replace", "norm_matched_add")
N_THREADS, N_CALLS = 8, 200
PATIENCE = 120.0
"""Seconds after which a thread that has not ended counts as hanging."""
TEXTS = ["The garlic sizzles.", "It is a long way to the river, she said.", "Snow"]

Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def hasty_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(calls: Sequence[Call], n_threads: int = N_THREADS) -> list[Any]:
    """What calls return, or raise, when threads share them out."""
    found: list[Any] = [None] * len(calls)
    left = iter(range(len(calls)))
    guard, start = threading.Lock(), threading.Barrier(n_threads)

    def work() -> None:
        start.wait()
        while True:
            with guard:
                i = next(left, None)
            if i is None:
                return
            try:
                found[i] = calls[i]()
            except BaseException as error:
                found[i] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    return found


def plain(value: Any) -> Any:
    """Something to compare by ==, to the last bit."""
    if isinstance(value, BaseException):
        return repr(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value


def assert_as_alone(calls: Sequence[Call], n_calls: int = N_CALLS) -> None:
    alone = [plain(call()) for call in calls]
    order = random.Random(0).choices(range(len(calls)), k=n_calls)
    order[: len(calls)] = range(len(calls))
    found = together([calls[i] for i in order])
    wrong = [i for i, value in zip(order, found, strict=True) if plain(value) != alone[i]]
    first = next((plain(v) for i, v in zip(order, found, strict=True) if i in wrong), None)
    assert not wrong, f"{len(wrong)} of {n_calls} calls, of {sorted(set(wrong))}: {first!r:.500}"


def calls_on(nla: NLA) -> list[Call]:
    """Every kind of call on an NLA."""
    short = {"max_new_tokens": 3}
    few, one, prompt = vectors()[:2], vectors()[4], "What is <INJECT> about?"
    return [
        lambda: nla.explain(few, **short),
        lambda: nla.explain(one, max_new_tokens=5),
        lambda: nla.explain(few.flip(0), prompt=prompt, score=False, **short),
        lambda: nla.explain(few, temperature=1.0, seed=3, num_samples=2, **short),
        lambda: nla.explain(vectors()[1:4], batch_size=2, score=False, **short),
        lambda: list(nla.explain_iter(few, **short)),
        # Left half-way: what it held must not be missed by anyone.
        lambda: next(nla.explain_iter(few, **short)),
        lambda: nla.reconstruct(list(EXPLANATIONS[:3])),
        lambda: nla.reconstruct([EXPLANATIONS[1]]),
        lambda: vars(nla.score([EXPLANATIONS[0]], one[None])),
        lambda: nla(one[None], **short),
        lambda: nla.verbalizer.marker_reading(4),
    ]


def prompt_embeds(nla: NLA) -> Tensor:
    return nla.verbalizer.prompt_embeds(vectors()[:2])


def calls_on_source(nla: NLA, model: Any, tokenizer: Any) -> list[Call]:
    def extract(layer: int, **options: Any) -> list[Tensor]:
        return [
            resid.as_ordinary()
            for resid in nla_lens.extract(model, TEXTS, layer, tokenizer=tokenizer, **options)
        ]

    def opened() -> Any:
        return open_source(model, tokenizer=tokenizer)

    return [
        lambda: extract(1),
        lambda: extract(4),
        lambda: extract(2, positions=-1),
        lambda: nla.explain_text(
            TEXTS[0],
            positions=[-1, 1],
            model=opened(),
            max_new_tokens=3,
        ),
        lambda: nla.explain_text(TEXTS[2], generate=1, model=opened(), max_new_tokens=2),
    ]


@torch.no_grad()
def forward(model: nn.Module, ids: Sequence[int], **options: Any) -> list[Any]:
    """A user's own call.

    Hidden states only where transformers keeps those of several passes apart; they are asked for
    everywhere.
    """
    out = model(input_ids=torch.tensor([list(ids)]), **options)
    states = () if PASSES_MIX else out.hidden_states
    return [out.logits, *(states or ())]


@pytest.fixture(scope="module")
def load(pair_dirs: Callable[..., tuple[Path, Path]]) -> Callable[[str, str], NLA]:
    """`load(engine, rule)` -> an NLA of this file's own."""

    def load(engine: str, rule: str) -> NLA:
        av, ar = pair_dirs("llama", rule)
        by_caller = None if rule == "replace" else rule
        return NLA.from_pretrained(av=av, ar=ar, injection=by_caller, engine=engine)

    return cache(load)


@pytest.fixture(scope="module")
def source(source_dir: Callable[[str], Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source_dir("llama")).eval()


# The other rule is that of `test_nnsight`.
@pytest.mark.parametrize(
    "rule", ["replace", pytest.param("norm_matched_add", marks=pytest.mark.slow)]
)
def test_transformers(rule: str, load: Callable[..., NLA], source: Any) -> None:
    # Copies: transformers 4.57 may leave there what recorded for two threads at once.
    nla, source = copy.deepcopy(load("transformers", rule)), copy.deepcopy(source)
    av = nla.verbalizer.engine.model
    ids, tokenizer = nla.verbalizer.prompt_ids, nla.verbalizer.tokenizer
    mine = [
        lambda: forward(av, ids, output_hidden_states=True),
        lambda: forward(av, ids[:9]),
        lambda: forward(source, ids, output_hidden_states=True),
        lambda: forward(source, ids[:7], use_cache=False),
        lambda: source.generate(torch.tensor([ids[:6]]), max_new_tokens=4, do_sample=False),
    ]
    calls = [*calls_on(nla), *calls_on_source(nla, source, tokenizer), *mine]
    if rule == "replace":
        calls.append(lambda: prompt_embeds(nla))
    assert_as_alone(calls)


@pytest.mark.parametrize("where", ["in a hook", "in another thread"])
def test_whether_transformers_keeps_passes_apart(where: str) -> None:
    """Two forwards of a user's own, without anything of ours: see `PASSES_MIX`."""
    model, ids = plain_model(), torch.arange(5)[None]

    @torch.no_grad()
    def plainly() -> Any:
        return model(input_ids=ids + 7)

    def other() -> None:
        together([plainly], n_threads=1) if where == "in another thread" else plainly()

    with torch.no_grad():
        wanted = plain(model(input_ids=ids, output_hidden_states=True).hidden_states)
    found = plain(states_with_another_pass(model, model.model.layers[1], ids, other))
    assert len(wanted) == N_BLOCKS + 1
    if PASSES_MIX:
        assert len(found) == len(wanted) + N_BLOCKS
    else:
        assert found == wanted


def test_transformer_lens(load: Callable[..., NLA], source_dir: Any) -> None:
    lens = pytest.importorskip("transformer_lens.model_bridge")
    nla = load("transformer_lens", "replace")
    av = nla.verbalizer.engine.bridge
    bridge = lens.TransformerBridge.boot_transformers(str(source_dir("llama")), device="cpu")
    ids = torch.tensor([nla.verbalizer.prompt_ids])
    mine = [
        lambda: av(ids),
        lambda: bridge(ids),
        lambda: bridge(ids[:, :7]),
        lambda: bridge.to_tokens(TEXTS[1]),
    ]
    calls = [*calls_on(nla), *calls_on_source(nla, bridge, nla.verbalizer.tokenizer), *mine]
    assert_as_alone(calls)


def test_nnsight(load: Callable[..., NLA], source_dir: Any) -> None:
    nnsight = pytest.importorskip("nnsight")
    nla = load("nnsight", "norm_matched_add")
    av = nla.verbalizer.engine.model
    model = nnsight.TransformersModel(
        str(source_dir("llama")), task="text-generation", dispatch=True
    )
    ids = nla.verbalizer.prompt_ids

    def traced(layer: int) -> Tensor:
        with torch.no_grad(), model.trace(torch.tensor([ids])):
            found = model.model.layers[layer].output.save()
        return found  # noqa: RET504 - what a trace saves is bound when it ends

    mine = [
        lambda: forward(av._module, ids, output_hidden_states=True),
        lambda: forward(model._module, ids[:9]),
        lambda: traced(2),
        lambda: traced(5),
    ]
    calls = [*calls_on(nla), *calls_on_source(nla, model, nla.verbalizer.tokenizer), *mine]
    assert_as_alone(calls)


def in_another_thread(call: Call) -> Any:
    (found,) = together([call], n_threads=1)
    return found


def hooked(module: nn.Module, call: Callable[..., Any]) -> Any:
    return module.register_forward_hook(call)


@pytest.mark.parametrize("rule", RULES)
def test_another_threads_forward_in_the_middle_of_a_pass(
    rule: str, load: Callable[..., NLA], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each block of each pass of ours; products that are ours alone would be seen, too."""
    # A copy: what it keeps of the prompt comes of products that are not right.
    nla = copy.deepcopy(load("transformers", rule))
    engine = nla.verbalizer.engine
    av, ids = engine.model, nla.verbalizer.prompt_ids
    wanted, middle = plain(forward(av, ids)), []
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "linear", lambda x, weight, bias: x @ weight.T * 1.5)
    monkeypatch.setattr(engine, "_by_onednn", onednn.ByOneDNN(av))
    explained = nla.explain(vectors()[0], max_new_tokens=2, score=False)
    ours = threading.get_ident()

    def look(*_: Any) -> None:
        if threading.get_ident() == ours:
            middle.append(plain(in_another_thread(lambda: forward(av, ids))))

    handles = [hooked(block, look) for block in text_model(av).layers]
    try:
        again = nla.explain(vectors()[0], max_new_tokens=2, score=False)
    finally:
        for handle in handles:
            handle.remove()
    assert again == explained
    assert len(middle) == 3 * len(handles) - len(handles)
    assert all(found == wanted for found in middle)


def test_extract_ends_no_other_pass(source: Any, nla: NLA) -> None:
    ids, tokenizer = nla.verbalizer.prompt_ids, nla.verbalizer.tokenizer
    wanted, middle = plain(forward(source, ids)), []
    ours = threading.get_ident()

    def look(*_: Any) -> None:
        if threading.get_ident() == ours:
            middle.append(plain(in_another_thread(lambda: forward(source, ids))))

    handle = hooked(text_model(source).layers[1], look)
    try:
        nla_lens.extract(source, TEXTS[0], 3, tokenizer=tokenizer)
    finally:
        handle.remove()
    assert middle == [wanted]


@pytest.mark.parametrize("rule", RULES)
def test_calls_inside_a_pass(rule: str, load: Callable[..., NLA]) -> None:
    """A user's hook on the verbalizer that explains what it sees, and runs the model itself."""
    nla = load("transformers", rule)
    av, ids, tokenizer = (
        nla.verbalizer.engine.model,
        nla.verbalizer.prompt_ids,
        nla.verbalizer.tokenizer,
    )

    def inside() -> list[Any]:
        return [
            plain(nla.explain(vectors()[1], max_new_tokens=3)),
            plain(forward(av, ids, output_hidden_states=True)),
            plain(nla_lens.extract(av, TEXTS[0], 1, tokenizer=tokenizer)[0].as_ordinary()),
            plain(prompt_embeds(nla)) if rule == "replace" else None,
        ]

    def outside() -> list[Any]:
        return [
            plain(nla.explain(vectors()[:2], max_new_tokens=3)),
            plain(nla_lens.extract(av, TEXTS[1], 2, tokenizer=tokenizer)[0].as_ordinary()),
            plain(forward(av, ids, output_hidden_states=True)),
        ]

    wanted_inside, wanted, found, busy = inside(), outside(), [], []

    def look(*_: Any) -> None:
        if not busy:
            busy.append(True)
            found.append(inside())
            busy.clear()

    for module in (av.get_input_embeddings(), *text_model(av).layers[:2]):
        handle = hooked(module, look)
        try:
            assert outside() == wanted
        finally:
            handle.remove()
    assert len(found) > 10
    assert all(values == wanted_inside for values in found)


def test_a_job_left_half_way_holds_nothing(load: Callable[..., NLA]) -> None:
    nla = load("transformers", "replace")
    wanted = plain(nla.explain(vectors()[0], max_new_tokens=3))
    left = nla.explain_iter(vectors(), max_new_tokens=3, batch_size=1)
    next(left)
    call = lambda: nla.explain(vectors()[0], max_new_tokens=3)  # noqa: E731
    assert plain(in_another_thread(call)) == wanted
    next(left)


def test_long_jobs_go_on_side_by_side(load: Callable[..., NLA]) -> None:
    """A short call is not kept waiting until a long one is over."""
    nla = load("transformers", "replace")
    nla.explain(vectors()[0], max_new_tokens=1)
    over = []
    passes = [0]
    handle = hooked(nla.verbalizer.engine.model, lambda *_: passes.__setitem__(0, passes[0] + 1))

    def long() -> None:
        nla.explain(vectors(), max_new_tokens=60, batch_size=2, score=False)
        over.append("long")

    def short() -> None:
        while passes[0] < 5:
            pass
        nla.explain(vectors()[1], max_new_tokens=3, score=False)
        over.append("short")

    try:
        together([long, short], n_threads=2)
    finally:
        handle.remove()
    assert over == ["short", "long"]


def test_asyncio(load: Callable[..., NLA]) -> None:
    nla = load("transformers", "replace")
    wanted = [plain(nla.explain(vector, max_new_tokens=4)) for vector in vectors()]

    async def serve() -> list[Any]:
        calls = [asyncio.to_thread(nla.explain, vector, max_new_tokens=4) for vector in vectors()]
        return await asyncio.gather(*calls)

    assert [plain(found) for found in asyncio.run(serve())] == wanted


def test_turns_come_in_order() -> None:
    turns, order = Turns(), []
    turns.take("main")
    threads = []
    for i in range(6):
        thread = threading.Thread(target=taking, args=(turns, i, order), daemon=True)
        thread.start()
        while len(turns._queue) < i + 1:
            pass
        threads.append(thread)
    turns.take("again")
    turns.give_back("again")
    assert not order, "a turn inside a turn ends nothing"
    turns.give_back("main")
    for thread in threads:
        thread.join(PATIENCE)
    assert order == list(range(6))


def taking(turns: Turns, name: object, order: list[Any]) -> None:
    turns.take(name)
    order.append(name)
    turns.give_back(name)


def test_threads_that_would_wait_for_one_another() -> None:
    one, other = Turns(), Turns()
    both, done = threading.Barrier(2), []

    def crosswise(first: Turns, second: Turns, name: str) -> None:
        inner = object()
        first.take(name)
        both.wait()
        second.take(inner)
        done.append(name)
        second.give_back(inner)
        first.give_back(name)

    together([lambda: crosswise(one, other, "a"), lambda: crosswise(other, one, "b")], n_threads=2)
    assert sorted(done) == ["a", "b"]
    for turns in (one, other):
        assert (turns._owner, turns._holders, turns._guests) == (None, [], [])


def test_an_interrupted_wait_lets_others_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does it; whether or not the turn had just come."""

    class Interrupted:
        """A ticket whose second `acquire` waits for nothing."""

        def __init__(self, came: bool) -> None:
            self.n, self.came = 0, came

        def acquire(self) -> None:
            self.n += 1
            if self.n == 2:
                if self.came:
                    turns.give_back("before")
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    for came in (False, True):
        turns, order = Turns(), []

        def before(turns: Turns = turns) -> None:
            turns.take("before")

        together([before], n_threads=1)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(threading, "Lock", lambda came=came: Interrupted(came))
            try:
                turns.take("me")
            finally:
                turns.give_back("me")
        turns.give_back("before")
        together([lambda turns=turns, order=order: taking(turns, "next", order)], n_threads=1)
        assert order == ["next"]


@pytest.fixture
def bridge(source_dir: Any) -> Any:
    lens = pytest.importorskip("transformer_lens.model_bridge")
    return lens.TransformerBridge.boot_transformers(str(source_dir("llama")), device="cpu")


def cached(bridge: Any, text: str) -> list[Any]:
    """What a probe says of every position of a text."""
    _, cache = bridge.run_with_cache(text)
    resid = cache["resid_post", 3]
    return [resid.as_ordinary().tolist(), resid.origin.where_LX3.tolist()]


def test_probed_runs_of_transformer_lens(bridge: Any, nla: NLA) -> None:
    """What TransformerLens caches, it caches of every thread's pass: these are kept apart."""
    with nla_lens.attach(bridge, nla):
        calls = [lambda text=text: cached(bridge, text) for text in TEXTS]
        calls += calls_on_source(nla, bridge, nla.verbalizer.tokenizer)[:3]
        assert_as_alone(calls, 60)


def test_tokens_are_those_of_the_probed_run(bridge: Any, nla: NLA) -> None:
    """Another thread's tokens reach the embedding first."""
    ids, ours = torch.tensor([nla.verbalizer.prompt_ids]), threading.get_ident()

    def other_first(*_: Any) -> None:
        if threading.get_ident() == ours:
            in_another_thread(lambda: bridge(ids))

    with nla_lens.attach(bridge, nla):
        wanted = cached(bridge, TEXTS[0])
        handle = bridge.original_model.register_forward_pre_hook(other_first)
        try:
            assert cached(bridge, TEXTS[0]) == wanted
        finally:
            handle.remove()


@pytest.mark.parametrize("framework", ["transformer_lens", "nnsight"])
def test_an_nla_spliced_into_one_threads_pass(
    framework: str, load: Callable[..., NLA], source_dir: Any, request: pytest.FixtureRequest
) -> None:
    from nla_lens.adapters.sae import run_with_nla

    nla, name = load("transformers", "replace"), str(source_dir("llama"))
    if framework == "nnsight":
        nnsight = pytest.importorskip("nnsight")
        model = nnsight.TransformersModel(name, task="text-generation", dispatch=True)
    else:
        model = request.getfixturevalue("bridge")
    ids = torch.tensor([nla.verbalizer.prompt_ids[:7]])

    def spliced() -> Any:
        found = run_with_nla(model, ids, nla, positions=-1, options={"max_new_tokens": 3})
        return found if isinstance(found, Tensor) else found.logits

    @torch.no_grad()
    def mine() -> Any:
        return model(ids) if framework == "transformer_lens" else model._module(ids).logits

    assert plain(spliced()) != plain(mine())
    assert_as_alone([spliced, mine, mine], 30)


def test_probed_traces_of_nnsight(nla: NLA, source_dir: Any) -> None:
    nnsight = pytest.importorskip("nnsight")
    name = str(source_dir("llama"))
    model = nnsight.TransformersModel(name, task="text-generation", dispatch=True)

    def traced(text: str) -> list[Any]:
        with torch.no_grad(), model.trace(text):
            resid = model.model.layers[3].output.save()
        return [resid.as_ordinary().tolist(), resid.origin.where_LX3.tolist()]

    with nla_lens.attach(model, nla):
        ids = nla.verbalizer.prompt_ids
        calls = [lambda text=text: traced(text) for text in TEXTS]
        calls += calls_on_source(nla, model, nla.verbalizer.tokenizer)[:3]
        assert_as_alone([*calls, lambda: forward(model._module, ids)], 60)


def test_of_threads_that_attach_at_once_one_does(bridge: Any, nla: NLA) -> None:
    for _ in range(20):
        found = together([lambda: nla_lens.attach(bridge, nla)] * 4, n_threads=4)
        (probe,) = [one for one in found if isinstance(one, Probe)]
        assert sum(isinstance(one, NLAError) for one in found) == 3
        probe.detach()
        assert "run_with_cache" not in vars(bridge)


def test_one_threads_detach_ends_no_other_threads_with(bridge: Any, nla: NLA) -> None:
    probe = nla_lens.attach(bridge, nla)
    with probe:
        for leave in (probe.detach, lambda: probe.__enter__().__exit__(None, None, None)):
            in_another_thread(leave)
            assert probe.attached
            assert cached(bridge, TEXTS[0])
    assert not probe.attached
    with nla_lens.attach(bridge, nla) as newer:
        in_another_thread(probe.detach)
        probe.detach()
        assert newer.attached
        assert cached(bridge, TEXTS[0])
        newer.detach()
        assert not newer.attached, "in its own with, detaching means what it says"


def test_a_with_that_another_thread_leaves(bridge: Any, nla: NLA) -> None:
    probe = nla_lens.attach(bridge, nla).__enter__()
    in_another_thread(lambda: probe.__exit__(None, None, None))
    assert not probe.attached


def test_loading_in_threads(
    pair_dirs: Callable[..., tuple[Path, Path]], load: Callable[..., NLA]
) -> None:
    """What transformers keeps for the whole process is as it was."""
    from transformers.utils import logging

    av, ar = pair_dirs("llama", "replace")
    wanted = plain(load("transformers", "replace").explain(vectors()[0], max_new_tokens=3))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    loaded = together([lambda: NLA.from_pretrained(av=av, ar=ar)] * 4, n_threads=4)
    assert [plain(nla.explain(vectors()[0], max_new_tokens=3)) for nla in loaded] == [wanted] * 4
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    assert after == before


def test_the_source_model_is_loaded_once(
    load: Callable[..., NLA], source_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nla = pickle.loads(pickle.dumps(load("transformers", "replace")))
    name = str(source_dir("llama"))
    nla._source._spec = dataclasses.replace(nla.spec, source_model=name)
    loaded = []

    def noted(*args: Any, **how: Any) -> Any:
        loaded.append(args)
        return open_source(*args, **how)

    monkeypatch.setattr("nla_lens.halves.source.open_source", noted)
    call = lambda: nla.explain_text(TEXTS[0], positions=-1, max_new_tokens=2)  # noqa: E731
    found = together([call] * 8)
    assert len(loaded) == 1
    assert [plain(one) for one in found] == [plain(call())] * 8
    assert pickle.loads(pickle.dumps(nla))._source.loaded is None
