"""What makes decoding fast on a CPU changes no answer: the prefix kept once, products by oneDNN."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nla_lens import NLA
from nla_lens.engines.local.shared_prefix import NAME, attention_forward
from nla_lens.errors import NLAError
from nla_lens.models import onednn

from .checkpoints import FAMILIES, reference, vectors

N_TOKENS = 16


class Attention(torch.nn.Module):
    """What transformers' SDPA looks at in an attention module."""

    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("n_queries", [1, 4])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_over_a_shared_prefix(n_queries: int, masked: str | None) -> None:
    """Against a softmax written out in float64, one query head at a time."""
    generator = torch.Generator().manual_seed(3)
    rows, heads, kv_heads, head_dim, n_prefix, n_own = 5, 6, 2, 8, 7, 9
    query = torch.randn(rows, heads, n_queries, head_dim, generator=generator)
    prefix = [torch.randn(1, kv_heads, n_prefix, head_dim, generator=generator) for _ in range(2)]
    own = [torch.randn(rows, kv_heads, n_own, head_dim, generator=generator) for _ in range(2)]
    seen = torch.rand(rows, 1, n_queries, n_prefix + n_own, generator=generator) > 0.4
    seen[..., 0] = True
    if masked is None:
        seen = torch.ones_like(seen)
    mask = {
        None: None if n_queries == 1 else seen,
        "bool": seen,
        "float": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    }[masked]

    keys, values = own
    keys.shared_prefix = tuple(prefix)  # type: ignore[attr-defined]
    found, _ = attention_forward(Attention(), query, keys, values, mask, scaling=0.3)

    assert found.shape == (rows, n_queries, heads, head_dim)
    for row in range(rows):
        for head in range(heads):
            kv = head // 3
            all_keys, all_values = (
                torch.cat([shared[0, kv], mine[row, kv]]).double()
                for shared, mine in zip(prefix, own, strict=True)
            )
            scores = 0.3 * query[row, head].double() @ all_keys.T
            weights = scores.masked_fill(~seen[row, 0], -torch.inf).softmax(-1)
            assert torch.allclose(found[row, :, head].double(), weights @ all_values, atol=1e-6)


def test_rows_keep_only_their_own_columns(load_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    nla = load_pair("llama", "replace")
    engine, caches = nla.verbalizer.engine, []
    run = engine.run

    def noted(ids, cache, **options):
        caches.append(cache)
        return run(ids, cache, **options)

    monkeypatch.setattr(engine, "run", noted)
    nla.explain(vectors(), max_new_tokens=4, score=False)
    prompt, marker = nla.verbalizer.prompt_ids, nla.verbalizer.marker_position
    layer = caches[-1].layers[0]
    assert layer.shared[0].shape[:3:2] == (1, marker)
    # The last token is not run any more.
    assert layer.keys.shape[-2] == len(prompt) - marker + 3
    assert layer.get_seq_length() == len(prompt) + 3


def with_window(av: Path, folder: Path, window: int) -> Path:
    """A copy of a checkpoint whose sliding window is another."""
    shutil.copytree(av, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("window", "shares"), [(24, False), (1024, True)])
def test_a_window_that_cuts_needs_the_prefix_in_every_row(
    pair_dirs, tmp_path: Path, window: int, shares: bool
) -> None:
    av = with_window(pair_dirs("gemma3_text", "replace")[0], tmp_path / "av", window)
    nla = NLA.from_pretrained(av=av)
    n_columns = len(nla.verbalizer.prompt_ids) + N_TOKENS
    assert nla.verbalizer.engine.can_share(n_columns) is shares
    expected = reference.AV(av, "replace").greedy(vectors(), N_TOKENS)
    found = nla.explain(vectors(), max_new_tokens=N_TOKENS)
    assert [list(e.token_ids) for e in found] == [ids.tolist() for ids in expected.ids]


def test_other_attention_than_sdpa_is_left_alone(pair_dirs) -> None:
    from nla_lens.engines.local import shared_prefix

    nla = NLA.from_pretrained(av=pair_dirs("llama", "replace")[0])
    model = nla.verbalizer.engine.model
    assert model.config._attn_implementation == NAME
    model.set_attn_implementation("eager")
    assert not shared_prefix.enable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_by_onednn(family: str, expected, load_pair, monkeypatch) -> None:
    """Every product of the small models, on every processor."""
    monkeypatch.setattr(onednn, "_WORTH_A_CALL", 0)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    wanted, nla = expected(family, "replace"), load_pair(family, "replace")
    engine = nla.verbalizer.engine
    monkeypatch.setattr(engine, "_by_onednn", onednn.ByOneDNN(engine.model))
    found = nla.explain(wanted.vectors, max_new_tokens=wanted.N_TOKENS, score=False)
    full = [ids.tolist() for ids in wanted.greedy.ids]
    assert [list(e.token_ids) for e in found] == [
        ids[: len(e.token_ids)] for ids, e in zip(full, found, strict=True)
    ]


def test_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    linear = onednn.linear

    def noted(*args):
        called.append(args)
        return linear(*args)

    monkeypatch.setattr(onednn, "linear", noted)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    module = torch.nn.Linear(512, 700)
    model = torch.nn.Sequential(module)
    by_onednn = onednn.ByOneDNN(model)
    x = torch.randn(3, 40, 512)[:, 1:]
    plain = module(x).detach()
    with torch.inference_mode(), by_onednn:
        fast = model(x)
    assert len(called) == 1
    exact = (x.double() @ module.weight.double().T + module.bias.double()).detach()
    # Sums of 512 float32 products in two orders: errors of a like size, and no rounded operands.
    errors = [float((found - exact).abs().max()) for found in (plain, fast)]
    assert max(errors) < 1e-5, errors
    model(x)
    assert len(called) == 1, "behind the with, layers are what they were"
    with by_onednn:
        model(x).sum().backward()
        halves = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert halves.dtype is torch.bfloat16
    assert module.weight.grad is not None


def test_a_layer_with_a_forward_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate gives it to layers that it moves between devices."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    layer = torch.nn.Linear(512, 700)
    by_onednn = onednn.ByOneDNN(layer)
    layer.forward = lambda x: x
    x = torch.randn(4, 512)
    for _ in range(2):
        with torch.inference_mode(), by_onednn:
            assert layer(x) is x
    assert "forward" in vars(layer)


def test_an_error_leaves_the_layers_as_they_were(load_pair) -> None:
    nla = load_pair("llama", "replace")
    engine = nla.verbalizer.engine

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle of a pass")

    handle = engine.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises((NLAError, RuntimeError)):
        nla.explain(vectors(), max_new_tokens=2, score=False)
    handle.remove()
    assert not any("forward" in vars(m) for m in engine.model.modules())
