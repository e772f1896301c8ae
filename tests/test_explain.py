"""`NLA.explain` and `explain_iter`: vectors, options, order, laziness, failures, scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from nla_lens import NLA, Explanation, Explanations, NLAError, ResidualTensor
from nla_lens.halves.options import Options
from nla_lens.stream.residual import Origin, locate

from .checkpoints import FAMILIES, reference, vectors
from .scripted import (
    Forbidden,
    ScriptedReconstructor,
    ScriptedVerbalizer,
    ids_of,
    scripted,
    with_engines,
)

D = 64
CLOSED = "<explanation>\ntext {}\n</explanation>"


def numbered(n: int) -> list[str]:
    return [CLOSED.format(i) for i in range(n)]


# --- shapes, types, order -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (2, 3), (1, 1), (2, 2, 2), (0,), (2, 0), (0, 3)], ids=str
)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_result_has_the_shape_of_the_leading_axes(
    nla: NLA, shape: tuple[int, ...], kind: str
) -> None:
    n = int(np.prod(shape))
    given = torch.randn(*shape, D, generator=torch.Generator().manual_seed(0))
    explained = scripted(nla, numbered(max(n, 1))).explain(
        given if kind == "torch" else given.numpy()
    )
    if shape == ():
        assert isinstance(explained, Explanation) and explained.text == "text 0"
        return
    assert isinstance(explained, Explanations)
    assert explained.shape == shape and len(explained) == shape[0]
    for i, index in enumerate(itertools.product(*map(range, shape))):
        assert explained[index].text == f"text {i}"
        assert explained[index].norm == pytest.approx(float(given[index].norm()), rel=1e-6)


def test_vectors_reach_the_engine_in_input_order_and_rescaled(nla: NLA) -> None:
    given = torch.randn(2, 3, D)
    mine = scripted(nla, numbered(6))
    mine.explain(given)
    (job,) = mine.verbalizer.engine.jobs
    flat = given.reshape(6, D).double()
    wanted = flat / flat.norm(dim=-1, keepdim=True) * nla.spec.injection_scale
    torch.testing.assert_close(job.injected_ND.double(), wanted, rtol=2e-6, atol=1e-6)
    assert list(job.prompt_ids) == nla.verbalizer.prompt_ids
    assert job.marker == nla.verbalizer.marker_position


GIVEN = vectors()[2]
FORMS = {
    "float64": GIVEN.double(),
    "numpy float64": GIVEN.double().numpy(),
    "requires_grad": GIVEN.clone().requires_grad_(True),
    "in a graph": GIVEN.clone().requires_grad_(True) * 1.0,
    "not contiguous": torch.stack([GIVEN, GIVEN], dim=-1)[:, 1],
    "expanded": GIVEN[None].expand(3, -1)[1],
    "numpy, negative strides": GIVEN.flip(0).numpy()[::-1],
    "numpy, read-only": np.broadcast_to(GIVEN.numpy(), (2, D))[0],
    "fortran order": np.asfortranarray(torch.stack([GIVEN, GIVEN]).numpy())[0],
    "list": GIVEN.tolist(),
    "parameter": torch.nn.Parameter(GIVEN.clone()),
    "sparse": GIVEN.to_sparse(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error")
def test_every_form_of_a_vector_says_the_same(nla: NLA, form: str) -> None:
    wanted = nla.explain(GIVEN, max_new_tokens=6, score=False)
    assert nla.explain(FORMS[form], max_new_tokens=6, score=False) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_low_precision_vectors_are_explained_as_they_are(nla: NLA, dtype: torch.dtype) -> None:
    given = vectors()[3].to(dtype)
    explained = nla.explain(given, max_new_tokens=6, score=False)
    assert explained == nla.explain(given.float(), max_new_tokens=6, score=False)
    # The norm is that of the numbers given, taken in float32.
    assert explained.norm == pytest.approx(float(given.double().norm()), rel=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e30])
def test_norms_whose_squares_leave_float32(nla: NLA, size: float) -> None:
    direction = torch.nn.functional.normalize(vectors()[3], dim=0)
    mine = scripted(nla, numbered(1), resid_ND=torch.stack([direction]))
    e = mine.explain(direction * size)
    assert e.norm == pytest.approx(size, rel=1e-5)
    assert e.cos == pytest.approx(1.0, abs=1e-6)
    injected = mine.verbalizer.engine.jobs[0].injected_ND[0]
    assert float(injected.norm()) == pytest.approx(nla.spec.injection_scale, rel=1e-6)


def test_a_buffer_that_is_reused_does_not_change_what_is_due(nla: NLA) -> None:
    buffer = vectors().clone()
    mine = scripted(nla, numbered(6))
    iterator = mine.explain_iter(buffer, batch_size=2)
    buffer.zero_()
    assert [e.norm for e in iterator] == pytest.approx(vectors().norm(dim=-1).tolist(), rel=1e-6)
    assert float(mine.verbalizer.engine.jobs[0].injected_ND.norm(dim=-1).min()) > 1


def test_a_residual_tells_where_it_came_from(nla: NLA) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    origin = Origin("blocks.3.hook_resid_post", locate(ids), lambda i: f"<{i}>")
    resid = ResidualTensor.wrap(torch.randn(2, 3, D), origin)
    explained = scripted(nla, numbered(6)).explain(resid)
    assert [[e.position for e in row] for row in explained] == [[0, 1, 2]] * 2
    assert [[e.token_id for e in row] for row in explained] == ids.tolist()
    assert explained[1, 2].token == "<10>"
    assert explained[0, 0].hook_name == "blocks.3.hook_resid_post"
    alone = scripted(nla, numbered(1)).explain(resid[1, 2])
    assert (alone.token, alone.position) == ("<10>", 2)
    plain = scripted(nla, numbered(1)).explain(torch.randn(D))
    assert (plain.token, plain.token_id, plain.position, plain.hook_name) == (None,) * 4


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_by_independent_arithmetic(load_pair, pair_dirs, family: str) -> None:
    nla, wanted = load_pair(family, "replace"), reference.AR(pair_dirs(family, "replace")[1])
    explained = nla.explain(vectors(), max_new_tokens=10)
    predicted = wanted.vectors([e.text for e in explained]).double()
    gold = vectors().double()
    got = torch.tensor([[e.cos, e.mse_nrm] for e in explained]).double()
    torch.testing.assert_close(got[:, 0], reference.cos(predicted, gold), rtol=0.0, atol=1e-5)
    # The sidecar writes sqrt(d) with four digits, here exactly 8.
    torch.testing.assert_close(got[:, 1], reference.mse_nrm(predicted, gold), rtol=0.0, atol=4e-5)
    assert all(e.fve_nrm is None for e in explained)  # var_nrm is not known


def test_score_off_on_and_without_a_reconstructor(nla: NLA) -> None:
    answers, resid = numbered(2), torch.randn(2, D)
    for score in (None, True):
        scored = scripted(nla, answers, resid_ND=resid).explain(torch.ones(2, D), score=score)
        assert all(e.cos is not None and e.mse_nrm is not None for e in scored)
    silent = scripted(nla, answers, resid_ND=resid)
    unscored = silent.explain(torch.ones(2, D), score=False)
    assert silent.reconstructor.engine.calls == 0
    alone = scripted(nla, answers)
    for explained in (unscored, alone.explain(torch.ones(2, D))):
        assert [(e.cos, e.mse_nrm, e.fve_nrm) for e in explained] == [(None, None, None)] * 2
    with pytest.raises(NLAError, match="score=True needs a reconstructor; load one with ar="):
        alone.explain(torch.ones(2, D), score=True)
    assert len(alone.verbalizer.engine.jobs) == 1


def test_samples_are_sorted_and_the_best_is_shown(nla: NLA) -> None:
    """Three samples for each of two vectors, whose reconstructions are set by hand."""
    gold = torch.eye(D)[:2]
    angles = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.2, 0.6])
    resid = torch.stack(
        [
            torch.cos(a) * gold[i // 3] + torch.sin(a) * torch.eye(D)[10]
            for i, a in enumerate(angles)
        ]
    )
    mine = scripted(nla, numbered(6), resid_ND=resid)
    explained = mine.explain(gold, num_samples=3, temperature=1.0, seed=1)
    assert [[s.text for s in e.samples] for e in explained] == [
        ["text 1", "text 2", "text 0"],
        ["text 4", "text 3", "text 5"],
    ]
    for e in explained:
        best = e.samples[0]
        assert (e.text, e.cos, e.token_ids) == (best.text, best.cos, best.token_ids)
        assert [s.cos for s in e.samples] == sorted((s.cos for s in e.samples), reverse=True)
        assert all(s.samples == () for s in e.samples)
    injected = mine.verbalizer.engine.jobs[0].injected_ND
    assert torch.equal(injected[0], injected[2]) and not torch.equal(injected[2], injected[3])


def test_a_sample_that_reconstructs_to_nan_comes_last(nla: NLA) -> None:
    resid = torch.eye(D)[:3].clone()
    resid[0] = torch.nan
    resid[2, 0] = 5.0
    explained = scripted(nla, numbered(3), resid_ND=resid).explain(
        torch.eye(D)[0], num_samples=3, temperature=1.0
    )
    assert [s.text for s in explained.samples] == ["text 2", "text 1", "text 0"]


def test_samples_of_a_real_pair(load_pair) -> None:
    nla = load_pair("qwen2", "replace")
    options = {"num_samples": 3, "temperature": 1.0, "seed": 5, "max_new_tokens": 8}
    explained = nla.explain(vectors()[:2], **options)
    for e in explained:
        assert len({s.text for s in e.samples}) == 3
        assert [s.cos for s in e.samples] == sorted((s.cos for s in e.samples), reverse=True)
        assert e.cos == e.samples[0].cos
    for batch_size in (1, 2, 4):
        again = nla.explain(vectors()[:2], batch_size=batch_size, **options)
        assert [[s.token_ids for s in e.samples] for e in again] == [
            [s.token_ids for s in e.samples] for e in explained
        ]


def test_encode_decode_and_call(nla: NLA) -> None:
    given = vectors().reshape(2, 3, D)
    texts = nla.encode(given, max_new_tokens=6)
    assert texts == [e.text for e in nla.explain(given, max_new_tokens=6).flat]
    assert torch.equal(nla.decode(texts), nla.reconstruct(texts))
    x_hat = nla(given, max_new_tokens=6)
    assert x_hat.shape == (2, 3, D)
    assert torch.equal(x_hat.reshape(6, D), nla.reconstruct(texts))
    alone = nla(given[0, 0].numpy(), max_new_tokens=6)
    torch.testing.assert_close(alone, x_hat[0, 0], rtol=1e-5, atol=1e-4)
    assert nla(torch.ones(0, D)).shape == (0, D)
    with pytest.raises(NLAError, match="no reconstructor"):
        with_engines(nla, Forbidden())(given)


def test_steering_vector(nla: NLA) -> None:
    before, after = nla.reconstruct(["a reward"])[0], nla.reconstruct(["a penalty"])[0]
    e = scripted(nla, ["<explanation>a reward</explanation>"]).explain(torch.ones(D))
    for original in ("a reward", e):
        steering = nla.steering_vector(original, "a penalty")
        torch.testing.assert_close(steering, after - before, rtol=1e-5, atol=1e-4)


# --- one at a time ------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_explain_iter_is_lazy(nla: NLA, scored: bool, batch_size: int) -> None:
    resid = torch.randn(9, D) if scored else None
    mine = scripted(nla, numbered(9), resid_ND=resid)
    engine, seen = mine.verbalizer.engine, []
    iterator = mine.explain_iter(torch.ones(9, D), batch_size=batch_size)
    assert engine.jobs == []
    for e in iterator:
        seen.append(e.text)
        assert len(engine.given) <= -(-len(seen) // batch_size) * batch_size
        assert (e.cos is not None) is scored
    assert seen == [f"text {i}" for i in range(9)]


def test_explain_iter_of_many_scores_them_in_batches(nla: NLA) -> None:
    mine = scripted(nla, numbered(40), resid_ND=torch.randn(40, D))
    first = next(mine.explain_iter(torch.ones(40, D)))
    assert first.text == "text 0"
    assert len(mine.verbalizer.engine.given) < 40
    assert mine.reconstructor.engine.calls == 1
    assert len(list(mine.explain_iter(torch.ones(40, D)))) == 40
    assert mine.reconstructor.engine.calls < 6


def test_rows_that_finish_out_of_order_are_put_in_order(nla: NLA) -> None:
    order = [3, 1, 0, 4, 5, 2]
    mine = scripted(nla, numbered(6), order=order)
    assert [e.text for e in mine.explain_iter(torch.ones(6, D))] == [f"text {i}" for i in range(6)]


def test_explain_iter_with_a_real_pair(load_pair) -> None:
    nla = load_pair("qwen2", "replace")
    options = {"max_new_tokens": 6}
    at_once = nla.explain(vectors().reshape(3, 2, D), **options)
    assert list(nla.explain_iter(vectors().reshape(3, 2, D), **options)) == at_once.flat


def test_an_unknown_option_is_named(nla: NLA) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        nla.explain_iter(torch.ones(D), max_tokens=3)
    with pytest.raises(TypeError, match="max_tokens"):
        nla.explain(torch.ones(D), max_tokens=3)


# --- refused before any model runs ----------------------------------------------------------------


def one_bad(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    bad = torch.ones(2, 3, D, dtype=dtype)
    bad[1, 2, 5] = value
    return bad


BAD_VECTORS = {
    "too narrow": (torch.ones(2, 63), r"shape \(2, 63\); .* d_model=64"),
    "too wide": (torch.ones(65), r"shape \(65,\); .* d_model=64"),
    "a number": (torch.tensor(1.0), r"shape \(\)"),
    "NaN": (one_bad(torch.nan), r"index \(1, 2\) holds nan in float32; drop it"),
    "infinity": (one_bad(torch.inf), r"index \(1, 2\) holds inf"),
    "minus infinity": (one_bad(-torch.inf), r"index \(1, 2\) holds -inf"),
    "float16 overflow": (one_bad(1e6).half(), r"index \(1, 2\) holds inf.*float16"),
    "float64 too large": (one_bad(1e39, torch.float64), r"index \(1, 2\) holds inf"),
    "all zero": (torch.eye(D)[:3] * torch.tensor([[1.0], [0], [1]]), r"index \(1,\) is all zero"),
    "one zero vector": (torch.zeros(D), "vector at hand is all zero"),
    "float64 too small": (torch.full((D,), 1e-60, dtype=torch.float64), "all zero"),
    "integers": (torch.ones(D, dtype=torch.int64), "int64; .*floating point. Token ids"),
    "numpy integers": (np.ones((2, D), dtype=np.int32), "int32"),
    "booleans": (torch.ones(D, dtype=torch.bool), "bool"),
    "complex": (torch.ones(D, dtype=torch.complex64), "complex64"),
    "text": ("a text", "torch tensor or a numpy array, found str"),
    "nothing": (None, "found NoneType"),
    "a ragged list": ([[1.0, 2.0], [3.0]], "found list"),
    "texts": (["a", "b"], "found list"),
    "objects": (np.array([object()] * D), "found ndarray"),
    "no data": (torch.ones(D, device="meta"), "found Tensor"),
    "vectors of two widths": ([torch.ones(D, requires_grad=True), torch.ones(9)], "found list"),
}

BAD_OPTIONS = {
    "max_new_tokens=0": {"max_new_tokens": 0},
    "max_new_tokens=-5": {"max_new_tokens": -5},
    "max_new_tokens=2.5": {"max_new_tokens": 2.5},
    "max_new_tokens='9'": {"max_new_tokens": "9"},
    "max_new_tokens=True": {"max_new_tokens": True},
    "max_new_tokens=None": {"max_new_tokens": None},
    "num_samples=0": {"num_samples": 0},
    "num_samples=None": {"num_samples": None},
    "num_samples=2 at temperature 0": {"num_samples": 2},
    "batch_size=0": {"batch_size": 0},
    "batch_size=1.5": {"batch_size": 1.5},
    "temperature=-1": {"temperature": -1},
    "temperature=nan": {"temperature": float("nan")},
    "temperature=inf": {"temperature": float("inf")},
    "temperature=None": {"temperature": None},
    "temperature='hot'": {"temperature": "hot"},
    "seed=-1": {"seed": -1},
    "seed=1.0": {"seed": 1.0},
    "seed=9223372036854775808": {"seed": 2**63},
    "prompt= must contain <INJECT>": {"prompt": "what is this?"},
    "prompt= must be text": {"prompt": ["<INJECT>"]},
}


@pytest.fixture(scope="module")
def untouchable(nla: NLA) -> NLA:
    """An NLA whose models must not run."""
    return with_engines(nla, Forbidden(), Forbidden())


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_bad_vectors(untouchable: NLA, name: str) -> None:
    given, names = BAD_VECTORS[name]
    for call in (
        untouchable.explain,
        untouchable.explain_iter,  # by the call itself, not by the first step of the loop
        untouchable.encode,
        untouchable,
        lambda v: untouchable.score(["a"], v),
    ):
        with pytest.raises(NLAError, match=names) as caught:
            call(given)
        assert caught.value.explanations is None


@pytest.mark.parametrize("names", BAD_OPTIONS)
def test_bad_options(untouchable: NLA, names: str) -> None:
    for call in (untouchable.explain, untouchable.explain_iter):
        with pytest.raises(NLAError) as caught:
            call(torch.ones(D), **BAD_OPTIONS[names])
        assert names in str(caught.value)
    with pytest.raises(NLAError):
        untouchable.explain_text("a text", model=Forbidden(), **BAD_OPTIONS[names])


@pytest.mark.parametrize("generate", [-1, 1.5, "3", True, None])
def test_bad_generate(untouchable: NLA, generate: object) -> None:
    with pytest.raises(NLAError, match="generate="):
        untouchable.explain_text("a text", model=Forbidden(), generate=generate)


def test_numpys_numbers_are_numbers(nla: NLA) -> None:
    Options(np.int64(5), np.float32(1.0), np.int32(2), np.uint64(3), np.int8(4)).check(
        has_reconstructor=False
    )
    once = scripted(nla, numbered(4))
    once.explain(torch.ones(2, D), seed=np.int64(2**62), temperature=1.0, num_samples=np.int64(2))
    assert len(set(once.verbalizer.engine.jobs[0].seeds)) == 4


@pytest.mark.parametrize(
    ("texts", "given", "names"),
    [
        (["a", "b"], torch.ones(3, D), "2 texts cannot be scored against 3 vectors"),
        ("ab", torch.ones(2, D), "list of strings"),
        (["a", 5], torch.ones(2, D), r"texts\[1\] is a int"),
        (7, torch.ones(1, D), "list of strings"),
    ],
)
def test_bad_texts_to_score(untouchable: NLA, texts, given, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        untouchable.score(texts, given)


# --- failures on the way ------------------------------------------------------------------------

FAILURES = [RuntimeError("the model fell over"), MemoryError(), KeyboardInterrupt(), NLAError("no")]


def collect(iterator) -> tuple[list[Explanation], BaseException | None]:
    got: list[Explanation] = []
    try:
        got.extend(iterator)
    except (NLAError, KeyboardInterrupt) as error:
        return got, error
    return got, None


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_failing_verbalizer_loses_nothing_that_was_finished(
    nla: NLA, error: BaseException, after: int, scored: bool, batch_size: int | None
) -> None:
    resid = torch.randn(6, D) if scored else None

    def make() -> NLA:
        return scripted(nla, numbered(6), resid_ND=resid, fail_after=after, error=error)

    finished = [f"text {i}" for i in range(after)]
    got, raised = collect(make().explain_iter(torch.ones(6, D), batch_size=batch_size))
    assert [e.text for e in got] == finished
    assert all((e.cos is not None) is scored for e in got)
    expected_type = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else NLAError
    assert type(raised) is expected_type
    if isinstance(error, RuntimeError):
        assert f"failed after {after} of 6 vectors: RuntimeError: the model fell over" in str(
            raised
        )
    if isinstance(error, MemoryError):
        assert "smaller batch_size" in str(raised)
    with pytest.raises(expected_type) as caught:
        make().explain(torch.ones(2, 3, D), batch_size=batch_size)
    kept = caught.value.explanations
    assert isinstance(kept, Explanations)
    assert [e.text for e in kept] == finished and kept.shape == (after,)


def test_a_failure_after_rows_out_of_order_keeps_the_first_ones(nla: NLA) -> None:
    mine = scripted(nla, numbered(6), order=[1, 3, 0, 5, 2, 4], fail_after=3)
    with pytest.raises(NLAError) as caught:
        mine.explain(torch.ones(6, D))
    assert [e.text for e in caught.value.explanations] == ["text 0", "text 1"]


def test_a_vector_with_some_of_its_samples_is_not_finished(nla: NLA) -> None:
    mine = scripted(nla, numbered(6), fail_after=5)
    with pytest.raises(NLAError) as caught:
        mine.explain(torch.ones(3, D), num_samples=2, temperature=1.0)
    assert len(caught.value.explanations) == 2


@pytest.mark.parametrize("error", [RuntimeError("fell over"), KeyboardInterrupt()])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_failing_reconstructor_leaves_the_texts(
    nla: NLA, error: BaseException, batch_size: int | None
) -> None:
    engine = ScriptedVerbalizer([ids_of(nla, text) for text in numbered(4)])
    fails_at = 0 if batch_size is None else 1
    backbone = ScriptedReconstructor(torch.randn(4, D), fail_after=fails_at, error=error)
    mine = with_engines(nla, engine, backbone)
    got, raised = collect(mine.explain_iter(torch.ones(4, D), batch_size=batch_size))
    assert [e.text for e in got] == [f"text {i}" for i in range(4)]
    assert [e.cos is None for e in got] == [i >= 2 * fails_at for i in range(4)]
    if isinstance(error, KeyboardInterrupt):
        assert raised is error
    else:
        assert isinstance(raised, NLAError)
        assert "the reconstructor failed (RuntimeError: fell over); the texts are" in str(raised)


def test_a_real_model_that_fails_in_the_middle_keeps_the_rows_before(
    load_pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    nla = load_pair("qwen2", "replace")
    wanted = nla.explain(vectors(), max_new_tokens=4, score=False)
    engine, calls = nla.verbalizer.engine, []
    run = engine.run

    def failing_run(ids, cache, **options):
        calls.append(1)
        if len(calls) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run(ids, cache, **options)

    monkeypatch.setattr(engine, "run", failing_run)
    with pytest.raises(NLAError, match="out of memory for a single vector") as caught:
        nla.explain(vectors(), max_new_tokens=4, score=False, batch_size=2)
    assert caught.value.explanations.flat == wanted.flat[:4]


def test_out_of_memory_halves_the_batch_and_goes_on(
    load_pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    nla = load_pair("qwen2", "replace")
    wanted = nla.explain(vectors(), max_new_tokens=6, score=False)
    run, widths = nla.verbalizer.engine.run, []

    def small_memory(ids, cache, **options):
        widths.append(len(ids))
        if len(ids) > 2 and len(widths) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run(ids, cache, **options)

    monkeypatch.setattr(nla.verbalizer.engine, "run", small_memory)
    assert nla.explain(vectors(), max_new_tokens=6, score=False) == wanted
    assert widths[0] == 6 and set(widths[-4:]) <= {1, 2}


def test_a_row_that_is_over_is_kept_when_its_batch_fails(
    load_pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row closes at once; the second goes on, and then the model fails."""
    nla = load_pair("qwen2", "replace")
    verbalizer, run, asked = nla.verbalizer, nla.verbalizer.engine.run, []

    def over(ids: Sequence[int]) -> bool:
        asked.append(ids)
        return len(asked) == 1

    def fails_to_decode(ids, cache, **options):
        if ids.shape[1] == 1:
            raise RuntimeError("fell over")
        return run(ids, cache, **options)

    monkeypatch.setattr(verbalizer, "is_closed", over)
    monkeypatch.setattr(verbalizer.engine, "run", fails_to_decode)
    with pytest.raises(NLAError, match="after 1 of 2") as caught:
        nla.explain(vectors()[2:4], max_new_tokens=4, score=False)
    assert len(caught.value.explanations) == 1


# --- progress -----------------------------------------------------------------------------------


def test_no_bar_where_nobody_looks(nla: NLA, capfd: pytest.CaptureFixture[str]) -> None:
    scripted(nla, numbered(3)).explain(torch.ones(3, D))
    scripted(nla, numbered(3)).explain(torch.ones(3, D), progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_when_asked_for(nla: NLA, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_lens.progress._SHOWN_AFTER_SECONDS", 0.0)
    explained = scripted(nla, numbered(3)).explain(torch.ones(3, D), progress=True)
    assert len(explained) == 3
    assert "3" in capfd.readouterr().err
