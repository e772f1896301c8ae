"""What is ambient where we are called changes nothing of what we answer, and is as it was after."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nla_lens
from nla_lens import NLA
from nla_lens.models.ambient import undisturbed, undisturbed_steps

TEXT = "The garlic sizzles in the pan."


@contextlib.contextmanager
def set_to(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def default_dtype(dtype: torch.dtype) -> Any:
    return set_to(torch.get_default_dtype, torch.set_default_dtype, dtype)


def deterministic() -> Any:
    return set_to(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    )


def sdpa(name: str) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


@contextlib.contextmanager
def everything() -> Iterator[None]:
    with (
        torch.inference_mode(),
        default_dtype(torch.bfloat16),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        sdpa("FLASH_ATTENTION"),
    ):
        yield


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "a default device": lambda: default_device("meta"),
    "a device": lambda: torch.device("meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "deterministic": deterministic,
    "one thread": lambda: set_to(torch.get_num_threads, torch.set_num_threads, 1),
    "plain attention": lambda: sdpa("MATH"),
    "flash attention": lambda: sdpa("FLASH_ATTENTION"),
    "attention that is not here": lambda: sdpa("CUDNN_ATTENTION"),
    "everything": everything,
}


def state() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.empty(0).device,
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


class Said:
    """What every public call answers."""

    def __init__(self, nla: NLA, source: Any, tokenizer: Any, vectors: Tensor, rule: str) -> None:
        texts = ["a pan of garlic", "sizzling {braces}"]
        explained = nla.explain(vectors, max_new_tokens=8)
        self.texts = [e.raw_text for e in explained]
        self.texts += [e.raw_text for e in nla.explain_iter(list(vectors), max_new_tokens=8)]
        self.texts += nla.encode(vectors.bfloat16(), max_new_tokens=3)
        sampled = nla.explain(vectors[0], max_new_tokens=3, temperature=1.0, num_samples=2, seed=3)
        self.texts += [e.raw_text for e in sampled.samples]
        read = nla.explain_text(TEXT, model=source, positions=[-1, 2], max_new_tokens=3, generate=2)
        self.texts += [e.raw_text for e in read]
        self.numbers = [(e.norm, e.cos, e.mse_nrm) for e in (*explained, *sampled.samples, *read)]
        self.known = [(e.hook_name, e.position, e.token_id) for e in read]
        score = nla.score(texts, vectors[:2])
        self.tensors = {
            "reconstruct": nla.reconstruct(texts),
            "decode": nla.decode(texts),
            "nla(x)": nla(vectors[:2], max_new_tokens=3),
            "steering_vector": nla.steering_vector(texts[0], texts[1]),
            "cos": score.cos,
            "mse_nrm": score.mse_nrm,
            "reconstructor": nla.reconstructor.reconstruct(texts),
        }
        if rule == "replace":
            self.tensors["prompt_embeds"] = nla.verbalizer.prompt_embeds(vectors)
        resid = nla_lens.extract(source, [TEXT, "Garlic"], 2, tokenizer=tokenizer)
        self.tensors |= {f"extract {i}": r.as_ordinary() for i, r in enumerate(resid)}


@pytest.fixture(scope="module")
def asking(
    load_pair: Callable[..., NLA], source_dir: Callable[[str], Path]
) -> Callable[[str, str], Callable[[], Said]]:
    """`asking(family, rule)()` asks everything."""

    @functools.cache
    def asking(family: str, rule: str) -> Callable[[], Said]:
        nla = load_pair(family, rule)
        source = nla_lens.stream.extraction.open_source(source_dir(family))
        vectors = torch.randn(3, nla.spec.d_model, generator=torch.Generator().manual_seed(0))

        def ask() -> Said:
            # What is kept of a prefix must be computed here, too.
            nla.verbalizer.engine.forget_prefix()
            nla.reconstructor.engine.forget_prefix()
            return Said(nla, source.model, source.tokenizer, vectors, rule)

        return ask

    return asking


@pytest.fixture(scope="module")
def plain(asking: Callable[..., Callable[[], Said]]) -> Callable[[str, str], Said]:
    return functools.cache(lambda family, rule: asking(family, rule)())


@pytest.mark.parametrize(
    ("name", "family", "rule"),
    [
        *((name, "llama", "replace") for name in AMBIENT),
        ("everything", "gemma3", "norm_matched_add"),
    ],
)
def test_what_is_ambient_changes_nothing(
    name: str,
    family: str,
    rule: str,
    asking: Callable[..., Callable[[], Said]],
    plain: Callable[[str, str], Said],
) -> None:
    ask, wanted = asking(family, rule), plain(family, rule)
    with AMBIENT[name]():
        before = state()
        said = ask()
        assert state() == before
    assert said.texts == wanted.texts
    assert said.known == wanted.known
    # Another way of attention rounds otherwise.
    exact = "attention" not in name and name != "everything"
    for found, same in zip(said.numbers, wanted.numbers, strict=True):
        assert found == (same if exact else pytest.approx(same, rel=1e-5, abs=1e-5))
    assert said.tensors.keys() == wanted.tensors.keys()
    for key, found in said.tensors.items():
        assert (found.dtype, found.device.type) == (torch.float32, "cpu"), key
        assert not found.is_inference() and not found.requires_grad, key
        same = wanted.tensors[key]
        assert found.equal(same) if exact else torch.allclose(found, same, atol=1e-4), key


LOADED = ("autocast", "a default device", "a device", "default bfloat16", "inference mode")


@pytest.mark.parametrize("name", [*LOADED, "everything"])
def test_a_pair_is_loaded_as_without(
    name: str, nla: NLA, pair_dirs: Callable[..., tuple[Path, Path]], source_dir: Any
) -> None:
    av, ar = pair_dirs("llama", "replace")
    with AMBIENT[name]():
        before = state()
        loaded = NLA.from_pretrained(av=av, ar=ar)
        source = nla_lens.stream.extraction.open_source(source_dir("llama"))
        assert state() == before
    for half, wanted in (
        (loaded.verbalizer.engine.model, nla.verbalizer.engine.model),
        (loaded.reconstructor.engine.model, nla.reconstructor.engine.model),
    ):
        tensors, same = half.state_dict(keep_vars=True), wanted.state_dict()
        assert tensors.keys() == same.keys()
        for _, found in [*tensors.items(), *half.named_buffers()]:
            assert not found.is_inference()
        for key, found in tensors.items():
            assert found.dtype == same[key].dtype and found.equal(same[key])
        for (_, found), (_, same_buffer) in zip(
            half.named_buffers(), wanted.named_buffers(), strict=True
        ):
            assert found.dtype == same_buffer.dtype and found.equal(same_buffer)
    assert not loaded.reconstructor.weight_DD.is_inference()
    assert not any(p.is_inference() or p.is_meta for p in source.model.parameters())
    assert loaded.explain(torch.ones(64), max_new_tokens=4) == nla.explain(
        torch.ones(64), max_new_tokens=4
    )


# Ordinary tensors everywhere


def test_what_is_answered_can_be_trained_on(asking: Callable[..., Callable[[], Said]]) -> None:
    for tensor in asking("llama", "replace")().tensors.values():
        tensor -= tensor.mean(0)
        tensor.requires_grad_()
        (tensor**2).sum().backward()
        assert tensor.grad is not None and tensor.grad.equal(2 * tensor)


@pytest.mark.parametrize("by", ["name", "model", "cut", "every position"])
def test_a_linear_probe_is_trained_on_what_is_extracted(
    by: str, source_dir: Callable[[str], Path]
) -> None:
    source: Any = source_dir("llama")
    if by != "name":
        source = nla_lens.stream.extraction.open_source(source)
    positions = [-1, 2] if by == "cut" else None
    residuals = nla_lens.extract(source, [TEXT, "Garlic in a pan"], 2, positions)
    probe = torch.nn.Linear(64, 1)
    for resid in residuals:
        assert not resid.is_inference()
        probe(resid).sum().backward()
        leaf = resid.clone().requires_grad_()
        probe(leaf).sum().backward()
        assert leaf.grad.equal(probe.weight.detach().expand_as(leaf))
        resid -= resid.mean(0)
        assert resid.requires_grad_().requires_grad
    assert probe.weight.grad is not None


# The one place


def test_between_the_steps_of_a_generator_the_callers_modes_act() -> None:
    @undisturbed_steps
    def steps() -> Iterator[tuple[Any, ...]]:
        while True:
            yield state()

    with everything():
        outside, going = state(), steps()
        inside = next(going)
        assert inside != outside and state() == outside
        assert next(going) == inside and state() == outside
        going.close()
        assert state() == outside
    assert inside[:4] == (False, inside[1], torch.device("cpu"), torch.float32)


def test_a_step_that_raises_leaves_everything_as_it_was() -> None:
    closed = []

    @undisturbed_steps
    def steps() -> Iterator[int]:
        try:
            yield 1
            raise ValueError("no more")
        finally:
            closed.append(True)

    with everything():
        outside, going = state(), steps()
        assert next(going) == 1
        with pytest.raises(ValueError, match="no more"):
            next(going)
        assert state() == outside and closed == [True]


def test_the_default_dtype_is_given_back_by_the_last_of_several_threads() -> None:
    entered, leave = threading.Barrier(3), threading.Barrier(3)
    seen: list[torch.dtype] = []

    def work(nth: int) -> None:
        with undisturbed():
            entered.wait(10)
            seen.append(torch.get_default_dtype())
            leave.wait(10)
            if nth:
                last.wait(10)
                seen.append(torch.get_default_dtype())

    last = threading.Event()
    with default_dtype(torch.float64):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        entered.wait(10)
        leave.wait(10)
        threads[0].join(10)
        assert torch.get_default_dtype() == torch.float32  # one is inside still
        last.set()
        threads[1].join(10)
        assert torch.get_default_dtype() == torch.float64
    assert seen == [torch.float32] * 3


def test_nothing_is_changed_where_nothing_is_ambient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_default_dtype", "autocast", "device"):
        monkeypatch.delattr(torch, name, raising=False)
    with undisturbed():
        assert torch.empty(0).dtype == torch.float32
