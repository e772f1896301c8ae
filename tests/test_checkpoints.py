"""The test checkpoints themselves: whether they are what the releases are."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from .checkpoints import (
    ABSENT,
    EXPLANATIONS,
    FAMILIES,
    MARKERS,
    build_ar,
    build_av,
    build_lora_ar,
    build_lora_av,
    build_pair,
    build_source,
    reference,
    sidecar,
    vectors,
)
from .checkpoints.configs import SLIDING_WINDOW, eos_ids

BOS = {"llama": "<|begin_of_text|>", "gemma3_text": "<bos>", "gemma3": "<bos>"}
RULES = ("replace", "norm_matched_add")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a loaded machine two threads wait for each other, up to a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {family: build_pair(folder, family) for family in FAMILIES}


def load(auto, directory):
    model, info = auto.from_pretrained(
        directory, output_loading_info=True, torch_dtype=torch.float32
    )
    return model.eval(), {key: set(value) for key, value in info.items() if value}


def names(directory, file="model.safetensors"):
    with safe_open(directory / file, "pt") as tensors:
        return set(tensors.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_finds_every_tensor(pairs, family):
    av, ar = pairs[family]
    model, info = load(AutoModelForCausalLM, av)
    assert info == {}
    assert model.config.architectures[0] == type(model).__name__
    _, info = load(AutoModelForCausalLM, ar)
    missing = {name.split(".")[-2] for name in info.pop("missing_keys")}
    assert info == {}
    assert missing == ({"norm"} if family.startswith("gemma3") else {"norm", "lm_head"})


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_has_one_site_and_one_bos(pairs, family):
    directory, ar = pairs[family]
    av, meta = reference.AV(directory), reference.read_sidecar(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    marker = meta["tokens"]["injection_token_id"]
    assert tokenizer.encode(MARKERS[family], add_special_tokens=False) == [marker]
    assert av.prompt_ids.count(marker) == 1
    assert av.prompt_ids[av.marker_position] == marker
    content = meta["prompt_templates"]["av"].replace("{injection_char}", MARKERS[family])
    message = [{"role": "user", "content": content}]
    in_one_step = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True)
    assert list(getattr(in_one_step, "input_ids", in_one_step)) == av.prompt_ids
    ar_ids = reference.AR(ar).prompt_ids("some text")
    if family in BOS:
        bos = tokenizer.convert_tokens_to_ids(BOS[family])
        assert tokenizer.bos_token_id == bos
        assert [av.prompt_ids.index(bos), av.prompt_ids.count(bos)] == [0, 1]
        assert [ar_ids.index(bos), ar_ids.count(bos)] == [0, 1]
    else:
        assert tokenizer.bos_token_id is None
    assert 90 <= len(av.prompt_ids) <= 160
    assert len(meta["prompt_templates"]["av"].split("\n\n")) == 4
    assert (tokenizer.pad_token is None) == (family == "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_are_several_tokens_and_may_overhang(pairs, family):
    tokenizer = AutoTokenizer.from_pretrained(pairs[family][0])
    closing = tokenizer.encode("</explanation>", add_special_tokens=False)
    overhanging = tokenizer.encode("</explanation>\n", add_special_tokens=False)
    assert len(closing) == len(overhanging) == 3
    assert closing[:-1] == overhanging[:-1]
    assert closing[-1] != overhanging[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_prompt_ends_on_the_sidecars_suffix(pairs, family):
    ar = reference.AR(pairs[family][1])
    suffix = ar.meta["tokens"]["critic_suffix_ids"]
    assert len(suffix) == 5
    for text in EXPLANATIONS:
        assert ar.prompt_ids(text)[-5:] == suffix


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_what_is_generated_depends_on_the_vector(pairs, family, rule):
    ids, margins = reference.AV(pairs[family][0], rule).greedy(vectors(), 48)
    assert len({tuple(row) for row in ids.tolist()}) == 6
    assert min(len(set(row)) for row in ids.tolist()) >= 20
    assert margins.min() > 0.004  # rounding in float32 moves a logit by less than 1e-4
    assert not set(ids.flatten().tolist()) & set(eos_ids(family))


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_changes_nothing(pairs, rule, monkeypatch):
    """Each token is the likeliest of a pass over all before it, whatever was guessed."""
    av = reference.AV(pairs["gemma3_text"][0], rule)
    ids = torch.tensor(av.prompt_ids).repeat(6, 1)
    for _ in range(5):
        ids = torch.cat([ids, av.logits(ids, vectors()).argmax(-1, keepdim=True)], dim=1)
    by_hand = ids[:, len(av.prompt_ids) :]
    usual = av.greedy(vectors(), 5)
    assert torch.equal(usual.ids, by_hand)
    n_passes = 0

    def wild(ids, vectors_ND, length):
        nonlocal n_passes
        n_passes += 1
        guess = by_hand.clone()
        guess[3, 1:] = 7
        return torch.cat([ids, guess[:, ids.shape[1] - length :]], dim=1)

    monkeypatch.setattr(av, "_draft", wild)
    guessed = av.greedy(vectors(), 5)
    assert torch.equal(guessed.ids, by_hand)
    torch.testing.assert_close(guessed.margins, usual.margins, rtol=0, atol=1e-4)
    assert n_passes == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_the_model_of_transformers(pairs, family):
    av, model = reference.AV(pairs[family][0]), load(AutoModelForCausalLM, pairs[family][0])[0]
    ids = torch.tensor([av.prompt_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(av.logits(ids, None), logits, rtol=1e-4, atol=2e-4)
    double = reference.AV(pairs[family][0], dtype=torch.float64).logits(ids, vectors()[:1])
    assert (av.logits(ids, vectors()[:1]) - double).abs().max() < 2e-4
    torch.testing.assert_close(av.embeds(ids), model.get_input_embeddings()(ids), rtol=1e-6, atol=0)


def test_gemmas_windows_are_shorter_than_its_prompts(pairs):
    for family in ("gemma3_text", "gemma3"):
        for directory in pairs[family]:
            config = reference.read_text_config(directory)
            assert config["sliding_window"] == SLIDING_WINDOW
            assert set(config["layer_types"][:3]) == {"sliding_attention", "full_attention"}
            assert len(config["layer_types"]) == config["num_hidden_layers"]
        av, ar = reference.AV(pairs[family][0]), reference.AR(pairs[family][1])
        assert av.marker_position > 2 * SLIDING_WINDOW
        assert len(ar.prompt_ids(EXPLANATIONS[0])) > 1.5 * SLIDING_WINDOW


def test_the_wrapper_has_the_text_models_weights_and_the_hubs_names(pairs, tmp_path):
    wrapper, text = pairs["gemma3"][0], pairs["gemma3_text"][0]
    assert {name.split(".")[0] for name in names(wrapper)} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
    }
    assert {f"language_model.{name}" for name in names(text)} < names(wrapper)
    ids, _ = reference.AV(wrapper).greedy(vectors()[:2], 4)
    assert torch.equal(ids, reference.AV(text).greedy(vectors()[:2], 4).ids)
    module = build_av(tmp_path, "gemma3", key_names="module")
    assert "model.language_model.layers.0.mlp.up_proj.weight" in names(module)
    assert load(AutoModelForCausalLM, module)[1] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_is_the_entry_of_hidden_states_above_block_k(tmp_path, family):
    ar = reference.AR(build_ar(tmp_path / "ar", family, layer=2, seed=7))
    source = load(AutoModel, build_source(tmp_path / "source", family, seed=7))
    if (
        family == "gemma3_text" and "missing_keys" in source[1]
    ):  # 4.57's AutoModel does not strip "model." there
        source = (load(AutoModelForCausalLM, tmp_path / "source")[0].model, {})
    assert source[1].get("missing_keys", set()) == set()
    ids = torch.tensor([ar.prompt_ids("some text")])
    with torch.no_grad():
        hidden = source[0](input_ids=ids, output_hidden_states=True).hidden_states[2 + 1][0, -1]
    torch.testing.assert_close(ar.hidden("some text"), hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ar.vector("some text"), ar.weight @ ar.hidden("some text"), rtol=0, atol=0
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ar_layouts_differ_in_the_file_and_not_in_the_vector(tmp_path, family):
    plain = reference.AR(build_ar(tmp_path / "plain", family)).vector("x")
    prefix = "language_model." if family == "gemma3" else ""
    for name, arguments in {
        "dummies": {"megatron_dummies": True},
        "norm": {"real_final_norm": True},
        "sharded": {"layout": "sharded"},
        "indexed": {"layout": "indexed"},
        "stale": {"layout": "stale_index"},
        "v5": {"style": "v5"},
    }.items():
        directory = build_ar(tmp_path / name, family, **arguments)
        assert torch.equal(reference.AR(directory).vector("x"), plain), name
        index = directory / "model.safetensors.index.json"
        assert index.exists() == (name in ("sharded", "indexed", "stale"))
        assert (directory / "model.safetensors").exists() == (name != "sharded")
        if name in ("dummies", "norm"):
            assert f"{prefix}model.norm.weight" in names(directory)
            assert (f"{prefix}lm_head.weight" in names(directory)) == (name == "dummies")
    biased = reference.AR(build_ar(tmp_path / "bias", family, head_bias=True))
    torch.testing.assert_close(biased.vector("x") - biased.bias, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, {"rope_theta": 10000.0}) for family in FAMILIES[:-1]),
        ("llama", {"rope_scaling": None}),
        ("gemma3_text", {"rope_scaling": None}),
        ("gemma3_text", {"rope_local_base_freq": 1e6}),
        ("gemma3_text", {"sliding_window": 4096}),
        ("gemma3_text", {"query_pre_attn_scalar": 32}),
        ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 5]}),
    ],
    ids=str,
)
def test_what_the_config_says_shows_in_the_tokens(pairs, monkeypatch, family, change):
    right = reference.AV(pairs[family][0]).greedy(vectors(), 6).ids
    config = reference.read_text_config(pairs[family][0])
    monkeypatch.setattr(reference, "read_text_config", lambda _: config | change)
    wrong = reference.AV(pairs[family][0]).greedy(vectors(), 6).ids
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_halves_change_their_base(tmp_path, family):
    source = build_source(tmp_path / "source", family)
    av = reference.AV(build_lora_av(tmp_path / "av", family, source))
    ids, margins = av.greedy(vectors(), 12)
    assert len({tuple(row) for row in ids.tolist()}) >= 3
    assert margins.min() > 0.003
    factor = json.loads((tmp_path / "av" / "adapter_config.json").read_text())
    assert factor["lora_alpha"] != factor["r"]  # so that a forgotten factor shows
    base, merged = reference.read_tensors(source), reference.read_tensors(tmp_path / "av")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert len(changed) == 4 * 6
    build_lora_ar(tmp_path / "ar", family, source)
    build_lora_ar(tmp_path / "bare", family, source, bare_prefix=True, all_blocks=True)
    usual, bare = (reference.AR(tmp_path / name).vector("x") for name in ("ar", "bare"))
    assert torch.equal(usual, bare)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_closing_tag_comes_in_some_rows(tmp_path, family):
    av = reference.AV(build_av(tmp_path, family, closing=True))
    texts = [av.tokenizer.decode(row) for row in av.greedy(vectors(), 40).ids]
    found = [text.find("</explanation>\n") for text in texts]
    assert len(set(found)) >= 3
    assert max(found) > 0


def test_eos_comes_early_when_asked(tmp_path):
    directory = build_av(tmp_path, "llama", quiet_eos=False)
    ends = set(reference.AV(directory).eos_ids(directory))
    rows = reference.AV(directory).greedy(vectors(), 40).ids.tolist()
    lengths = {next((i for i, token in enumerate(row) if token in ends), 40) for row in rows}
    assert len(lengths) >= 3


def test_weights_depend_on_name_shape_and_seed_alone(tmp_path):
    one = reference.read_tensors(build_source(tmp_path / "one", "qwen2"))
    two = reference.read_tensors(build_source(tmp_path / "two", "qwen2"))
    other = reference.read_tensors(build_source(tmp_path / "other", "qwen2", seed=5))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    half = reference.read_tensors(build_source(tmp_path / "half", "qwen2", dtype=torch.bfloat16))
    assert all(torch.equal(half[name], one[name].bfloat16()) for name in one)


def test_sidecars_of_every_kind(tmp_path):
    made = sidecar("av", "qwen2", d_model=64, layer=3, base="a/b", injection_scale=150.0)
    assert (made["role"], made["extraction"]) == ("av", {"injection_scale": 150.0})
    made = sidecar(
        "ar", "qwen2", d_model=64, layer=3, base="a/b", spelling="actor", schema=1, mse_scale=None
    )
    assert (made["role"], made["critic"]) == ("critic", {"num_hidden_layers": 3})
    assert set(made["prompt_templates"]) == {"actor", "critic"}
    assert made["extraction"] == {"mse_scale": None}
    directory = build_av(tmp_path / "nano", "qwen3", injection="norm_matched_add")
    meta = reference.read_sidecar(directory)
    assert (meta["kind"], meta["schema_version"]) == ("nla_dataset", 1)
    assert meta["extraction"]["layer_index"] == 3
    assert "injection_scale" not in json.dumps(meta)
    changed = {"tokens": {"injection_token_id": 5}, "extraction": ABSENT}
    directory = build_av(tmp_path / "changed", "qwen3", sidecar_overrides=changed)
    meta = reference.read_sidecar(directory)
    assert meta["tokens"]["injection_token_id"] == 5
    assert meta["tokens"]["injection_char"] == "㈎"
    assert "extraction" not in meta


def test_scores_of_the_reference():
    g = vectors()
    assert torch.allclose(reference.mse_nrm(g, -g), torch.tensor(4.0))
    p = vectors(seed=1)
    torch.testing.assert_close(reference.mse_nrm(p, g), 2 * (1 - reference.cos(p, g)))
    torch.testing.assert_close(reference.fve_nrm(p, g, 0.5), 1 - 4 * (1 - reference.cos(p, g)))
