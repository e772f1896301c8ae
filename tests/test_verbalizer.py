"""Vectors to texts: the prompt, what is injected, what is generated, and where an answer stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nla_lens import NLA, NLAError
from nla_lens.engines.local.sampling import Sampler
from nla_lens.engines.local.transformers import TransformersVerbalizer

from .checkpoints import FAMILIES, build_av, build_pair, reference, vectors
from .scripted import EOS, ids_of, scripted

RULES = ("replace", "norm_matched_add")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_rule = pytest.mark.parametrize("rule", RULES)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest ||got - wanted|| / ||wanted|| over the last axis, in float64."""
    got, wanted = got.double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def token_ids(explanations) -> list[list[int]]:
    return [list(e.token_ids) for e in explanations]


# --- the prompt and what goes into it -----------------------------------------------------------


@each_family
@each_rule
def test_prompt_and_marker(load_pair, expected, family: str, rule: str) -> None:
    verbalizer, av = load_pair(family, rule).verbalizer, expected(family, rule).av
    assert verbalizer.prompt_ids == av.prompt_ids
    assert verbalizer.marker_position == av.marker_position
    bos = verbalizer.tokenizer.bos_token_id
    if bos is not None:
        assert [verbalizer.prompt_ids.count(bos), verbalizer.prompt_ids.index(bos)] == [1, 0]


@each_family
def test_prompt_embeds(load_pair, expected, family: str) -> None:
    verbalizer, wanted = load_pair(family, "replace").verbalizer, expected(family, "replace")
    embeds_NTD = verbalizer.prompt_embeds(wanted.vectors)
    assert embeds_NTD.dtype == torch.float32
    assert embeds_NTD.shape == (6, len(verbalizer.prompt_ids), 64)
    assert relative(embeds_NTD, wanted.av.prompt_embeds(wanted.vectors)) < 2e-6
    scale = wanted.av.injection_scale()
    norms_N = embeds_NTD[:, verbalizer.marker_position].norm(dim=-1)
    torch.testing.assert_close(norms_N, torch.full((6,), scale), rtol=2e-6, atol=0.0)


@each_family
def test_what_enters_block_0_is_prompt_embeds(load_pair, expected, family: str) -> None:
    nla, wanted = load_pair(family, "replace"), expected(family, "replace")
    seen: list[Tensor] = []
    block = first_block(nla)
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    nla.verbalizer.engine.forget_prefix()
    try:
        nla.explain(wanted.vectors, max_new_tokens=3, score=False)
    finally:
        handle.remove()
    embeds_NTD = nla.verbalizer.prompt_embeds(wanted.vectors)
    at = nla.verbalizer.marker_position
    # What is before the marker runs once for all rows.
    assert torch.equal(seen[0], embeds_NTD[:1, :at])
    assert torch.equal(seen[1], embeds_NTD[:, at:])
    # Decode steps: the embeddings of the tokens written, and nothing else.
    assert [tuple(s.shape) for s in seen[2:]] == [(6, 1, 64)] * 2
    ids = wanted.greedy.ids
    for step, entered in enumerate(seen[2:]):
        assert relative(entered[:, 0], wanted.av.embeds(ids[:, step])) < 1e-6


@each_family
def test_norm_matched_add_acts_on_the_output_of_block_1(load_pair, expected, family: str) -> None:
    nla, wanted = load_pair(family, "norm_matched_add"), expected(family, "norm_matched_add")
    blocks = first_block(nla, every=True)
    entered: list[Tensor] = []
    handle = blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    nla.verbalizer.engine.forget_prefix()
    try:
        nla.explain(wanted.vectors, max_new_tokens=2, score=False)
        nla.verbalizer.marker_reading(1)
    finally:
        handle.remove()
    # Each pass begins at the marker; the prefix before it has run once.
    prefix_1TD, injected_NTD, _, plain_1TD = entered
    assert prefix_1TD.shape[1] == nla.verbalizer.marker_position
    v_ND, h_D = wanted.vectors.double(), plain_1TD[0, 0].double()
    by_hand_ND = h_D + h_D.norm() * v_ND / v_ND.norm(dim=-1, keepdim=True)
    assert relative(injected_NTD[:, 0], by_hand_ND) < 2e-6
    assert relative(injected_NTD[:, 1:], plain_1TD[:, 1:].expand(6, -1, -1)) < 1e-6


def first_block(nla: NLA, every: bool = False):
    from nla_lens.models.anatomy import text_model

    layers = text_model(nla.verbalizer.engine.model).layers
    return layers if every else layers[0]


def test_prompt_embeds_is_for_the_replace_rule_alone(load_pair) -> None:
    with pytest.raises(NLAError, match="norm_matched_add acts at the output of block 1"):
        load_pair("llama", "norm_matched_add").verbalizer.prompt_embeds(vectors())


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (torch.zeros(2, 64), "all zero"),
        (torch.ones(2, 63), "d_model=64"),
        (torch.full((64,), torch.nan), "nan"),
        (torch.ones(64, dtype=torch.int64), "int64"),
    ],
)
def test_prompt_embeds_checks_its_vectors(nla: NLA, given: Tensor, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        nla.verbalizer.prompt_embeds(given)


# --- generation ---------------------------------------------------------------------------------


@each_family
@each_rule
def test_greedy_tokens(load_pair, expected, family: str, rule: str) -> None:
    wanted = expected(family, rule)
    assert wanted.greedy.margins.min() > 1e-3  # else rounding could decide
    explained = load_pair(family, rule).explain(
        wanted.vectors, max_new_tokens=wanted.N_TOKENS, score=False
    )
    assert token_ids(explained) == wanted.greedy.ids.tolist()
    assert len({e.text for e in explained}) == 6


@each_family
@each_rule
def test_rows_do_not_depend_on_their_batch(load_pair, expected, family: str, rule: str) -> None:
    nla, wanted = load_pair(family, rule), expected(family, rule)
    ids, options = wanted.greedy.ids[:, :12].tolist(), {"max_new_tokens": 12, "score": False}
    assert [nla.explain(v, **options).token_ids for v in wanted.vectors[:2]] == ids[:2]
    for batch_size in (1, 3, 64):
        assert token_ids(nla.explain(wanted.vectors, batch_size=batch_size, **options)) == ids
    order = [4, 0, 5, 2, 1, 3]
    permuted = nla.explain(wanted.vectors[order], **options)
    assert token_ids(permuted) == [ids[i] for i in order]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_many_rows(load_pair, expected, family: str) -> None:
    nla, wanted = load_pair(family, "replace"), expected(family, "replace")
    repeated = wanted.vectors.repeat(12, 1)
    explained = nla.explain(repeated, max_new_tokens=8, score=False)
    assert token_ids(explained) == wanted.greedy.ids[:, :8].tolist() * 12


@each_family
def test_nothing_of_generation_config_but_its_ends_is_used(
    tmp_path: Path, expected, family: str
) -> None:
    leaks = {
        "repetition_penalty": 4.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 3.0,
        "suppress_tokens": list(range(300)),
        "max_new_tokens": 2,
        "min_new_tokens": 1,
    }
    wanted = expected(family, "replace")
    nla = NLA.from_pretrained(av=build_av(tmp_path, family, generation=leaks))
    assert nla.verbalizer.engine.model.generation_config.repetition_penalty == 4.0
    explained = nla.explain(wanted.vectors, max_new_tokens=24)
    assert token_ids(explained) == wanted.greedy.ids[:, :24].tolist()


@each_family
def test_sampling_depends_on_the_seed_and_not_on_the_batch(load_pair, family: str) -> None:
    nla, options = load_pair(family, "replace"), {"max_new_tokens": 12, "temperature": 1.0}
    options |= {"score": False, "seed": 7}
    once = token_ids(nla.explain(vectors(), **options))
    for batch_size in (1, 2, 5):
        assert token_ids(nla.explain(vectors(), batch_size=batch_size, **options)) == once
    assert token_ids(nla.explain(vectors(), **(options | {"seed": 8}))) != once
    unseeded = options | {"seed": None}
    assert token_ids(nla.explain(vectors(), **unseeded)) != token_ids(
        nla.explain(vectors(), **unseeded)
    )


def test_sampling_follows_the_probabilities() -> None:
    """20 000 draws, each row with a seed of its own, against softmax(logits / T)."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    sampler = Sampler(0.7, range(20_000))
    drawn = sampler.pick(logits_V.expand(20_000, -1), range(20_000))
    shares_V = torch.bincount(torch.tensor(drawn), minlength=5) / 20_000
    wanted_V = (logits_V.double() / 0.7).exp()
    assert float((shares_V - wanted_V / wanted_V.sum()).abs().max()) < 0.015


def test_sampling_at_extreme_temperatures() -> None:
    logits_BV = torch.tensor([[1.0, 1e4, -1e4]]).expand(200, -1)
    assert set(Sampler(1e-30, range(200)).pick(logits_BV, range(200))) == {1}
    hot = Sampler(1e30, range(200)).pick(logits_BV, range(200))
    assert set(hot) == {0, 1, 2}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_keeps_float32_norms(pair_dirs, dtype: str) -> None:
    nla = NLA.from_pretrained(av=pair_dirs("llama", "replace")[0], dtype=dtype)
    assert nla.verbalizer.engine.model.dtype == getattr(torch, dtype)
    explained = nla.explain(vectors(), max_new_tokens=4)
    torch.testing.assert_close(
        torch.tensor([e.norm for e in explained]), vectors().norm(dim=-1), rtol=1e-6, atol=0.0
    )
    embeds = nla.verbalizer.prompt_embeds(vectors())
    assert relative(embeds[:, nla.verbalizer.marker_position].norm(dim=-1)[:, None],
                    torch.full((6, 1), 30.0)) < 2**-8  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3"])
def test_configs_saved_by_transformers_5_are_read_right(tmp_path, expected, family: str) -> None:
    """`rope_parameters`, read by transformers 4, would silently mean theta 10000."""
    wanted = expected(family, "replace")
    nla = NLA.from_pretrained(av=build_av(tmp_path, family, style="v5"))
    explained = nla.explain(wanted.vectors, max_new_tokens=24)
    assert token_ids(explained) == wanted.greedy.ids[:, :24].tolist()


# --- where an answer stops ----------------------------------------------------------------------


def closing_ids(nla: NLA) -> list[int]:
    return nla.verbalizer.tokenizer.encode("</explanation>\n", add_special_tokens=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_row_that_closes_leaves_the_others_alone(tmp_path, family: str) -> None:
    """A rigged model closes in some rows, in the middle, by a token that overhangs the tag."""
    av = build_av(tmp_path, family, closing=True)
    nla = NLA.from_pretrained(av=av)
    close = closing_ids(nla)
    assert nla.verbalizer.tokenizer.decode(close[-1:]) == ">\n"
    many = vectors(n=16, seed=3)
    wanted = reference.AV(av).greedy(many, 12).ids.tolist()
    cut = [upto(row, close) for row in wanted]
    lengths = {len(row) for row in cut}
    assert len(lengths) > 2 and 12 in lengths  # several stop, at several steps; some do not
    explained = nla.explain(many, max_new_tokens=12, score=False)
    assert token_ids(explained) == cut
    for e, row in zip(explained, cut, strict=True):
        closed = row[-len(close) :] == close
        assert e.complete is closed
        assert ("truncated" in e.flags) is not closed
        assert e.raw_text.endswith("</explanation>\n") is closed
        assert "</explanation>" not in e.text


def upto(row: list[int], close: list[int]) -> list[int]:
    for end in range(len(close), len(row) + 1):
        if row[end - len(close) : end] == close:
            return row[:end]
    return row


def test_gemma_rows_that_end_leave_the_others_alone(tmp_path) -> None:
    """Rows of a sliding-window cache are dropped one by one while the others go on."""
    av = build_av(tmp_path, "gemma3_text", quiet_eos=False)
    nla = NLA.from_pretrained(av=av)
    ends = set(reference.AV(av).eos_ids(av))
    many = vectors(n=16, seed=5)
    wanted = reference.AV(av).greedy(many, 20).ids.tolist()
    cut = [row[: min([i + 1 for i, t in enumerate(row) if t in ends] or [20])] for row in wanted]
    assert len({len(row) for row in cut}) > 2
    assert token_ids(nla.explain(many, max_new_tokens=20, score=False)) == cut


@each_family
def test_an_end_of_sequence_is_not_text(tmp_path, family: str) -> None:
    av = build_av(tmp_path, family, quiet_eos=False)
    nla = NLA.from_pretrained(av=av)
    ends = set(json.loads((av / "generation_config.json").read_text())["eos_token_id"])
    assert nla.verbalizer.engine.eos_ids == ends
    tokenizer, ended = nla.verbalizer.tokenizer, 0
    for e in nla.explain(vectors(n=24, seed=5), max_new_tokens=32, score=False):
        assert not any(token in ends for token in e.token_ids[:-1])
        if e.token_ids[-1] in ends:
            ended += 1
            assert not e.complete and "truncated" in e.flags
            assert e.raw_text == tokenizer.decode(e.token_ids[:-1])
        for end in ends:
            assert tokenizer.decode([end]) not in e.raw_text + e.text
    assert ended > 0


@pytest.mark.parametrize(
    ("written", "text", "complete"),
    [
        ("<explanation>\nA recipe.\n</explanation>", "A recipe.", True),
        ("<explanation>A recipe.</explanation>\n\n", "A recipe.", True),
        ("<explanation>\nA recipe,\n\nand salt", "A recipe,\n\nand salt", False),
        ("  <explanation> A recipe", "A recipe", False),
        ("A recipe", "A recipe", False),
        ("A recipe.</explanation>", "A recipe.", True),
        ("Well: <explanation>A recipe.</explanation>", "A recipe.", True),
        ("Well: <explanation>A recipe", "A recipe", False),
        ("<explanation></explanation>", "", True),
        ("<explanation> a < b > c </explanation>", "a < b > c", True),
        ("<explanation>a </explanatio", "a </explanatio", False),
        ("<Explanation>a</Explanation>", "<Explanation>a</Explanation>", False),
        ("", "", False),
        ("<explanation>It 's salt , and pepper .</explanation>", "It 's salt , and pepper .", True),
        ("<explanation>a <|eot_id|> b</explanation>", "a <|eot_id|> b", True),
    ],
)
@pytest.mark.parametrize("eos", [False, True])
def test_reading_an_answer(nla: NLA, written: str, text: str, complete: bool, eos: bool) -> None:
    e = scripted(nla, [written], eos=eos).explain(torch.ones(64))
    assert (e.text, e.complete, e.raw_text) == (text, complete, written)
    assert list(e.token_ids) == ids_of(nla, written, eos=eos)
    assert ("truncated" in e.flags) is not complete


@pytest.mark.parametrize("tail", ["", "\n", "\n\n", ".", "<", "x"])
def test_the_closing_tag_is_seen_at_its_last_token(nla: NLA, tail: str) -> None:
    ids = ids_of(nla, f"<explanation>a > b</explanation>{tail}")
    closed = [n for n in range(1, len(ids) + 1) if nla.verbalizer.is_closed(ids[:n])]
    text = nla.verbalizer.tokenizer.decode
    assert closed, "never seen"
    assert "</explanation>" not in text(ids[: closed[0] - 1])
    assert "</explanation>" in text(ids[: closed[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_closing_tag_is_seen_letter_by_letter(load_pair, family: str) -> None:
    """Written one character a token, as no tokenizer would encode it."""
    verbalizer = load_pair(family, "replace").verbalizer
    ids: list[int] = []
    for letter in "<explanation>é</explanation>":
        assert not verbalizer.is_closed(ids) if ids else True
        ids += verbalizer.tokenizer.encode(letter, add_special_tokens=False)
    assert verbalizer.is_closed(ids)


def test_an_eos_id_in_the_middle_of_a_script_is_never_decoded(nla: NLA) -> None:
    e = scripted(nla, ["<explanation>a"], eos=True).explain(torch.ones(64))
    assert e.token_ids[-1] == EOS and e.raw_text == "<explanation>a"


# --- another prompt -----------------------------------------------------------------------------


@each_family
def test_custom_prompt(load_pair, expected, family: str) -> None:
    nla, wanted = load_pair(family, "replace"), expected(family, "replace")
    av, marker = wanted.av, wanted.av.meta["tokens"]["injection_char"]
    turn = "Which topic is {marker}? One word."
    rendered = av.tokenizer.apply_chat_template(
        [{"role": "user", "content": turn.replace("{marker}", marker)}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = av.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    at = ids.index(av.meta["tokens"]["injection_token_id"])
    embeds = av.embeds(torch.tensor([ids]))
    v = wanted.vectors[3]
    embeds[0, at] = v * av.injection_scale() / v.norm()
    with torch.no_grad():
        hidden = av.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
    first = int((hidden @ av.output.T).argmax())
    e = nla.explain(v, prompt=turn.replace("{marker}", "<INJECT>"), max_new_tokens=1, score=False)
    assert e.token_ids == [first]


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("What is it?", "<INJECT> exactly once .* found 0"),
        ("<INJECT> and <INJECT>", "<INJECT> exactly once .* found 2"),
        ("", "found 0"),
        ("<concept>㎡</concept> or <INJECT>", "injection character '㎡' itself"),
        (17, "must be text"),
    ],
)
def test_custom_prompts_that_are_refused(nla: NLA, prompt, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        nla.explain(torch.ones(64), prompt=prompt)


def test_a_custom_prompt_that_holds_the_marker_is_never_guessed_at(nla: NLA) -> None:
    """The character alone has the canonical neighbours here, the <INJECT> has not."""
    with pytest.raises(NLAError, match="itself"):
        nla.verbalizer.custom_prompt("Is <concept>㎡</concept> like <INJECT>?")


# --- the engine by itself -----------------------------------------------------------------------


def test_no_hook_is_left_behind(load_pair) -> None:
    for rule in RULES:
        nla = load_pair("qwen2", rule)
        nla.explain(vectors(), max_new_tokens=2)
        engine = nla.verbalizer.engine
        assert isinstance(engine, TransformersVerbalizer)
        assert not any(m._forward_hooks for m in engine.model.modules())


def test_the_marker_alone_reads_as_the_bare_prompt(load_pair, expected) -> None:
    for rule in RULES:
        nla, av = load_pair("qwen2", rule), expected("qwen2", rule).av
        ids = torch.tensor([av.prompt_ids])
        for _ in range(8):
            ids = torch.cat([ids, av.logits(ids, None).argmax(-1, keepdim=True)], dim=1)
        text = av.tokenizer.decode(ids[0, len(av.prompt_ids) :])
        assert nla.verbalizer.marker_reading(8) == text.strip()


def test_a_pair_by_its_stem(tmp_path) -> None:
    build_pair(tmp_path, "qwen2", stem="some-pair")
    nla = NLA.from_pretrained(tmp_path / "some-pair")
    assert nla.reconstructor is not None
    assert "AV + AR" in repr(nla)
    alone = NLA.from_pretrained(tmp_path / "some-pair-av")
    assert alone.reconstructor is None
