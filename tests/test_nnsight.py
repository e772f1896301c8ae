"""The probe on nnsight models: what a trace reads can be explained."""

import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import nla_lens
from nla_lens import NLA, NLAError, ResidualTensor

from .checkpoints import FAMILIES, build_source

nnsight = pytest.importorskip("nnsight")
transformers = pytest.importorskip("transformers")

K = 3
TEXT, SHORT = "The garlic sizzles in the pan.", "Rain"


def blocks(model: Any) -> Any:
    """The block envoys by the model's real module path."""
    inner = model.model
    return inner.language_model.layers if hasattr(inner, "language_model") else inner.layers


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    return cache(lambda family: str(build_source(tmp_path_factory.mktemp(family), family)))


@pytest.fixture
def open_model(source_dir: Callable[[str], str]) -> Callable[..., Any]:
    """A new nnsight model of a family; its weights are not loaded yet."""

    def opened(family: str = "llama", name: str = "TransformersModel") -> Any:
        path = source_dir(family)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nnsight.NNsightDeprecationWarning)
            return getattr(nnsight, name)(path, task="text-generation", tokenizer=tokenizer)

    return opened


@pytest.fixture(scope="module")
def hidden(source_dir: Callable[[str], str]) -> Callable[[str, str], torch.Tensor]:
    """`hidden_states[K+1]` of plain transformers, `[T, d]`."""

    @torch.no_grad()
    def read(family: str, text: str) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(source_dir(family))
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_dir(family))
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return model(ids, output_hidden_states=True).hidden_states[K + 1][0]

    return cache(read)


@pytest.mark.parametrize("rule", ["replace", "norm_matched_add"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_output_explains_as_hidden_states(
    family: str,
    rule: str,
    open_model: Callable[..., Any],
    hidden: Callable[..., torch.Tensor],
    load_pair: Callable[..., NLA],
) -> None:
    model, nla = open_model(family), load_pair(family, rule)
    with nla_lens.attach(model, nla), model.trace(TEXT):
        h = blocks(model)[K].output.save()
    h = h[0] if isinstance(h, tuple) else h
    assert torch.equal(h[0].as_ordinary(), hidden(family, TEXT))
    explained = h[0, -1].explain(max_new_tokens=16)
    wanted = nla.explain(hidden(family, TEXT)[-1], max_new_tokens=16)
    assert explained.token_ids == wanted.token_ids
    assert (explained.position, explained.hook_name) == (len(h[0]) - 1, nla.spec.hook_name)
    assert explained.token == "."


def test_language_model_and_nnsight_classes(
    open_model: Callable[..., Any], nla: NLA, hidden: Callable[..., torch.Tensor]
) -> None:
    language_model = open_model(name="LanguageModel")
    plain = nnsight.NNsight(open_model()._load(open_model().repo_id))
    ids = torch.tensor([language_model.tokenizer(TEXT)["input_ids"]])
    for model, given in ((language_model, TEXT), (plain, ids)):
        with nla_lens.attach(model, nla), model.trace(given):
            h = blocks(model)[K].output.save()
        assert torch.equal(h[0].as_ordinary(), hidden("llama", TEXT))
        assert h.origin.where_LX3[0, :, 1].tolist() == list(range(ids.shape[1]))


def test_invokes_have_their_own_rows_and_positions(
    open_model: Callable[..., Any], nla: NLA, hidden: Callable[..., torch.Tensor]
) -> None:
    model = open_model()
    with nla_lens.attach(model, nla), model.trace() as tracer:
        with tracer.invoke([TEXT, SHORT]):
            several = blocks(model)[K].output.save()
        with tracer.invoke(SHORT):
            short = blocks(model)[K].output.save()
        with tracer.invoke():
            whole = blocks(model)[K].output.save()
    n, n_short = len(hidden("llama", TEXT)), len(hidden("llama", SHORT))
    padded = [-1] * (n - n_short) + list(range(n_short))
    assert several.origin.where_LX3[:, :, 1].tolist() == [list(range(n)), padded]
    assert whole.origin.where_LX3[:, :, 1].tolist() == [list(range(n)), padded, padded]
    assert short.origin.where_LX3[0, -n_short:, 0].tolist() == [0] * n_short
    last = short[0, -1].explain(max_new_tokens=1)
    assert (last.position, last.token) == (
        n_short - 1,
        several[1, -1].explain(max_new_tokens=1).token,
    )
    assert torch.allclose(short[0, -1].as_ordinary(), hidden("llama", SHORT)[-1], atol=1e-3)


def test_positions_count_on_through_a_generation(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    with nla_lens.attach(model, nla), model.generate(SHORT, max_new_tokens=3) as tracer:
        steps = nnsight.save([])
        for _ in tracer.iter[:3]:
            steps.append(blocks(model)[K].output)
    n = steps[0].shape[1]
    positions = [step.origin.where_LX3[0, :, 1].tolist() for step in steps]
    assert positions == [list(range(n)), [n], [n + 1]]
    assert steps[2][0, -1].explain(max_new_tokens=1).position == n + 1


def test_cache_and_edits(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    with nla_lens.attach(model, nla):
        with model.trace(SHORT) as tracer:
            cached = tracer.cache(modules=[blocks(model)[K], blocks(model)[K].mlp])
        with model.trace(SHORT):
            blocks(model)[K].output[:, -1] = 2.0
            edited = blocks(model)[K].output.save()
        with model.trace(SHORT):
            # The residual goes back in: what runs on is an ordinary tensor.
            blocks(model)[K].output = blocks(model)[K - 1].output
            kind = nnsight.save(type(blocks(model)[K + 1].input_layernorm.input))
    assert kind is torch.Tensor
    assert type(cached[blocks(model)[K].mlp.path].output) is torch.Tensor
    from_cache = cached[blocks(model)[K].path].output
    assert from_cache[0, -1].explain(max_new_tokens=1).hook_name == f"blocks.{K}.hook_resid_post"
    assert torch.equal(edited[0, -1].as_ordinary(), torch.full((64,), 2.0))
    assert edited[0, -1].explain(max_new_tokens=1).norm == pytest.approx(16.0)


def test_gradients_are_those_without_a_probe(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()

    def gradient() -> Any:
        with model.trace(SHORT):
            h = blocks(model)[K].output
            loss = model.lm_head.output.float().logsumexp(-1).sum()
            with loss.backward():
                grad = h.grad.save()
        return grad

    plain = gradient()
    with nla_lens.attach(model, nla):
        assert torch.equal(gradient(), plain)


def test_detach_leaves_nothing_behind(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    kinds = [type(envoy) for envoy in model.modules()]
    names = sorted(vars(model)), sorted(vars(blocks(model)[K]))
    probe = nla_lens.attach(model, nla)
    assert isinstance(model, nnsight.TransformersModel)
    with pytest.raises(NLAError, match="has a probe already"):
        nla_lens.attach(model, nla)
    probe.detach()
    probe.detach()
    assert [type(envoy) for envoy in model.modules()] == kinds
    assert (sorted(vars(model)), sorted(vars(blocks(model)[K]))) == names
    with model.trace(SHORT):
        h = blocks(model)[K].output.save()
    assert type(h) is torch.Tensor
    assert not any(module._forward_pre_hooks for module in model._module.modules())


def test_a_simulated_server_never_sees_the_probe(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    kind = model._remoteable_class()
    with nla_lens.attach(model, nla):
        assert model._remoteable_class() is kind
        with model.trace(SHORT, remote="local"):
            h = blocks(model)[K].output[:, -1].save()
        shipped = nnsight.intervention.serialization.dumps(model)
    assert b"nla_lens" not in shipped
    assert h.shape == (1, 64)
    assert nla.explain(h[0], max_new_tokens=1).norm == pytest.approx(float(h.norm()), rel=1e-5)


def test_what_a_server_sends_back(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    remote = nnsight.intervention.backends.remote.RemoteBackend

    class Canned(remote):
        """A server's answers, without a server."""

        def request(self, request: Any, tracer: Any) -> Any:
            n = len(model.tokenizer(TEXT)["input_ids"])
            sizes = {"whole": (2, n), "last": (2,), "one": (), "mlp": (2, n), "twice": (2, n)}
            return {name: torch.randn(*size, 64) for name, size in sizes.items()}

    with nla_lens.attach(model, nla), model.trace([TEXT, SHORT], backend=Canned("key")):
        whole = model.model.layers[K].output.save()
        last = nnsight.save(model.model.layers[K].output[:, -1])
        one = model.model.layers[K - 1].output[1][-1].save()
        mlp = model.model.layers[K].mlp.output.save()
        twice = model.model.layers[K].output.save()
        twice = (twice * 2).save()
    assert not model.dispatched
    n_short = len(model.tokenizer(SHORT)["input_ids"])
    assert whole.origin.where_LX3[1, :, 1].tolist()[-n_short:] == list(range(n_short))
    assert last.origin.where_LX3[:, 1].tolist() == [whole.shape[1] - 1, n_short - 1]
    explained = one.explain(max_new_tokens=1)
    assert (explained.position, explained.hook_name) == (n_short - 1, "blocks.2.hook_resid_post")
    assert type(mlp) is type(twice) is torch.Tensor


def test_scan_is_left_alone(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    with nla_lens.attach(model, nla):
        with model.scan(SHORT):
            shape = nnsight.save(blocks(model)[K].output.shape)
        assert not model.dispatched
    assert shape[-1] == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_extract(
    family: str, open_model: Callable[..., Any], hidden: Callable[..., torch.Tensor]
) -> None:
    found = nla_lens.extract(open_model(family), [TEXT, SHORT], K)
    for resid, text in zip(found, (TEXT, SHORT), strict=True):
        assert isinstance(resid, ResidualTensor)
        assert torch.equal(resid.as_ordinary(), hidden(family, text))


def test_explain_text_writes_on(
    open_model: Callable[..., Any], source_dir: Callable[..., str], nla: NLA
) -> None:
    here, there = (
        nla.explain_text(SHORT, [-1], model=model, generate=2, max_new_tokens=4)
        for model in (open_model(), source_dir("llama"))
    )
    assert [e.token_ids for e in here.flat] == [e.token_ids for e in there.flat]


def test_other_models_are_refused(
    open_model: Callable[..., Any], nla: NLA, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = open_model()
    with pytest.raises(NLAError, match="pass the whole model"):
        nla_lens.attach(blocks(model)[0], nla)
    with pytest.raises(NLAError, match="no decoder blocks"):
        nla_lens.attach(nnsight.NNsight(torch.nn.Linear(4, 4)), nla)
    wide = build_source(tmp_path_factory.mktemp("wide"), "llama", d_model=80)
    other = nnsight.TransformersModel(str(wide), task="text-generation", tokenizer=model.tokenizer)
    with pytest.raises(NLAError, match="d_model=80"):
        nla_lens.attach(other, nla)


def test_recorded_residuals_outlive_the_probe(open_model: Callable[..., Any], nla: NLA) -> None:
    model = open_model()
    with nla_lens.attach(model, nla), model.trace(SHORT):
        h = blocks(model)[K].output.save()
    assert h[0, -1].explain(max_new_tokens=1).token is not None
    assert type(pickle.loads(pickle.dumps(h.detach()))) is torch.Tensor


def test_the_input_of_a_block_is_what_leaves_the_one_before(
    open_model: Callable[..., Any], nla: NLA, hidden: Callable[..., torch.Tensor]
) -> None:
    model = open_model()
    with nla_lens.attach(model, nla):
        with model.trace(TEXT) as tracer:
            first = blocks(model)[0].input.save()
            entering = blocks(model)[K + 1].input.save()
            inputs = nnsight.save(blocks(model)[K + 2].inputs)
            leaving = blocks(model)[K + 2].output.save()
        with model.trace(TEXT) as tracer:
            cached = tracer.cache(modules=[blocks(model)[K + 1]], include_inputs=True)
        with model.trace([TEXT, SHORT]):
            padded = blocks(model)[K + 1].input.save()
    leaving = leaving[0] if isinstance(leaving, tuple) else leaving
    given = inputs[0][0] if inputs[0] else inputs[1]["hidden_states"]
    entry = cached[blocks(model)[K + 1].path]
    for resid, place in (
        (first, "blocks.0.hook_resid_pre"),
        (entering, f"blocks.{K}.hook_resid_post"),
        (given, f"blocks.{K + 1}.hook_resid_post"),
        (leaving, f"blocks.{K + 2}.hook_resid_post"),
        (entry.input, f"blocks.{K}.hook_resid_post"),
    ):
        assert isinstance(resid, ResidualTensor) and resid.hook_name == place
        assert resid.origin.where_LX3[0, :, 1].tolist() == list(range(resid.shape[1]))
    assert torch.equal(entering[0].as_ordinary(), hidden("llama", TEXT))
    found = entering[0, -1].explain(max_new_tokens=4)
    assert found.token_ids == nla.explain(hidden("llama", TEXT)[-1], max_new_tokens=4).token_ids
    assert "other_layer" not in found.flags
    assert "other_layer" in given[0, -1].explain(max_new_tokens=1).flags
    n_short = len(hidden("llama", SHORT))
    assert padded.origin.where_LX3[1, -n_short:, 1].tolist() == list(range(n_short))


def test_the_input_of_a_block_is_written_as_without_a_probe(
    open_model: Callable[..., Any], nla: NLA
) -> None:
    model = open_model()

    def run() -> tuple[Any, ...]:
        with model.trace(TEXT):
            blocks(model)[1].input[:, -1] = 2.0
            blocks(model)[2].input = blocks(model)[1].output
            args, kwargs = blocks(model)[3].inputs
            blocks(model)[3].inputs = args, kwargs
            kind = nnsight.save(type(blocks(model)[3].input_layernorm.input))
            logits = model.output.logits.save()
        return kind, logits

    plain = run()
    with nla_lens.attach(model, nla):
        found = run()
    assert found[0] is plain[0] is torch.Tensor
    assert torch.equal(found[1], plain[1])
