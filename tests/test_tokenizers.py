"""Tokenizers and chat templates as people have them: whose files say two things, or lie apart."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import nla_lens
from nla_lens import NLA, NLAError, NLAWarning
from nla_lens.checkpoints.chat import canonical_prompt
from nla_lens.checkpoints.template import template_of
from nla_lens.models import limited
from nla_lens.models.saved_by_5 import reads_as_4
from nla_lens.models.weights import load_tokenizer
from nla_lens.stream.extraction import encode
from nla_lens.stream.hf_source import HFSource

from .checkpoints import build_lora_av, build_source, reference, write_sidecar
from .checkpoints.sidecars import override
from .checkpoints.texts import BPE_TEXT, QWEN2_CHAT
from .test_cli import run as run  # the fixture
from .test_costs import COSTLY, change_json


@pytest.fixture
def copies(pair_dirs: Any, tmp_path: Path) -> Any:
    """Both halves of a family, to be changed."""

    def make(family: str) -> tuple[Path, Path]:
        halves = zip(("av", "ar"), pair_dirs(family, "replace"), strict=True)
        av, ar = (Path(shutil.copytree(home, tmp_path / half)) for half, home in halves)
        return av, ar

    return make


def change_tokenizer(home: Path, change: Any) -> None:
    path = home / "tokenizer.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def loaded(home: Path) -> tuple[Any, list[str]]:
    """A tokenizer, and what was said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = load_tokenizer(home)
    return tokenizer, [str(w.message) for w in said if issubclass(w.category, NLAWarning)]


def token(content: str, id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


# --- files that say two things ---

CHANGES = {
    "nothing": lambda found: None,
    "lower case": lambda found: found.update(normalizer={"type": "Lowercase"}),
    "a prefix": lambda found: found.update(normalizer={"type": "Prepend", "prepend": "x"}),
    "words": lambda found: found.update(pre_tokenizer={"type": "Whitespace"}),
    "offsets alone": lambda found: found["pre_tokenizer"]["pretokenizers"][1].update(
        trim_offsets=not found["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_class_that_does_not_read_tokenizer_json(name: str, family: str, copies: Any) -> None:
    home, _ = copies(family)
    change_tokenizer(home, CHANGES[name])
    tokenizer, said = loaded(home)
    alone = Tokenizer.from_file(str(home / "tokenizer.json"))
    texts = ("The Quick brown fox's.", " x", "UPPER case")
    is_other = any(
        tokenizer(text, add_special_tokens=False)["input_ids"]
        != alone.encode(text, add_special_tokens=False).ids
        for text in texts
    )
    assert [("tokenizer.json alone" in words) for words in said] == [True] * is_other
    # Of these transformers 5 builds Qwen2Tokenizer anew, and reads the other as it is.
    expected = family == "qwen2" and name not in ("nothing", "offsets alone")
    assert is_other == (expected and not reads_as_4())


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_bos_by_one_file_and_not_by_the_other(
    written: bool, said: bool | None, name: str, copies: Any
) -> None:
    _, home = copies("llama")
    if not written:
        change_tokenizer(home, lambda found: found["post_processor"]["processors"].pop())
    change_json(home / "tokenizer_config.json", tokenizer_class=name)
    if said is not None:
        change_json(home / "tokenizer_config.json", add_bos_token=said)
    tokenizer, words = loaded(home)
    goes_by_config = name == "LlamaTokenizerFast"
    differ = goes_by_config and (said is not False) != written
    assert ["by tokenizer.json it begins" in w for w in words] == [True] * differ
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert begins == (said is not False if goes_by_config and reads_as_4() else written)


def test_an_added_token_that_is_loaded_as_another(copies: Any) -> None:
    home, _ = copies("llama")
    change_tokenizer(home, lambda found: found["added_tokens"].append(token("<new>", 600)))
    tokenizer, said = loaded(home)
    given = tokenizer.convert_tokens_to_ids("<new>")
    assert given != 600 and f"'<new>' is the token 600, and it is loaded as {given}" in said[0]


def test_tokens_by_chance_are_refused(copies: Any) -> None:
    home, _ = copies("llama")
    change_tokenizer(home, lambda found: found["model"].update(dropout=0.1))
    with pytest.raises(NLAError, match=r"model.dropout is 0.1: .*set it to null"):
        load_tokenizer(home)


def test_cutting_and_padding_are_left_to_us(copies: Any) -> None:
    """A tokenizer.json that was saved while a trainer cut and padded."""
    av, ar = copies("qwen2")
    plain = NLA.from_pretrained(av=av, ar=ar)
    due = plain.explain(torch.ones(64), max_new_tokens=4).token_ids, plain.reconstruct(["a b"])
    side = {"strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "!", "pad_to_multiple_of": None}
    for home in (av, ar):
        change_tokenizer(
            home,
            lambda found: found.update(
                truncation={"max_length": 8, **side},
                padding={"strategy": {"Fixed": 300}, "direction": "Left", **pad},
            ),
        )
    nla = NLA.from_pretrained(av=av, ar=ar)
    assert nla.verbalizer.prompt_ids == plain.verbalizer.prompt_ids
    assert nla.explain(torch.ones(64), max_new_tokens=4).token_ids == due[0]
    assert nla.reconstruct(["a b"]).equal(due[1])


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    """The tokenizers library raises bare Exceptions, some only when a text is read."""
    home = build_source(tmp_path / "source", "llama")
    tokenizer = load_tokenizer(home)
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None,
                    "pre_tokenizer": None, "post_processor": None, "decoder": None,
                    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<no>"}})
    ).model  # fmt: skip
    source = HFSource(AutoModelForCausalLM.from_pretrained(str(home)), tokenizer)
    with pytest.raises(NLAError, match=r"the tokenizer of .* fails on 'b'"):
        encode(source, "b")


# --- tokens that the model lacks ---


def add_tokens(home: Path, word: str) -> None:
    """Makes a word the first token that the embedding of 640 rows has not."""

    def change(found: dict) -> None:
        first = max(token["id"] for token in found["added_tokens"]) + 1
        found["added_tokens"] += [token(f"<{i}>", i) for i in range(first, 640)]
        found["added_tokens"].append(token(word, 640))

    change_tokenizer(home, change)
    config = json.loads((home / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder")
    (home / "tokenizer_config.json").write_text(json.dumps(config))


LACKING = r"makes the token 640 \('zebra'\), and the model knows 640"


@pytest.mark.parametrize("engine", ["transformers", "transformer_lens", "nnsight"])
def test_a_token_that_a_half_lacks(engine: str, copies: Any) -> None:
    if engine != "transformers":
        needs = {"transformer_lens": "transformer_lens.model_bridge", "nnsight": "nnsight"}
        pytest.importorskip(needs[engine])
    av, ar = copies("llama")
    add_tokens(av, "zebra")
    add_tokens(ar, "zebra")
    nla = NLA.from_pretrained(av=av, ar=ar, engine=engine)
    assert nla.explain(torch.ones(64), prompt="horse <INJECT>.", max_new_tokens=2).text
    with pytest.raises(NLAError, match=LACKING):
        nla.explain(torch.ones(64), prompt="zebra <INJECT>.", max_new_tokens=2)
    assert nla.reconstruct(["a horse"]).shape == (1, 64)
    for call in (nla.reconstruct, lambda texts: nla.score(texts, torch.ones(1, 64))):
        with pytest.raises(NLAError, match=LACKING):
            call(["a zebra"])


@pytest.mark.parametrize("half", ["av", "ar"])
def test_a_prompt_that_a_half_lacks_a_token_for(half: str, copies: Any) -> None:
    halves = dict(zip(("av", "ar"), copies("llama"), strict=True))
    add_tokens(halves[half], {"av": "snippets", "ar": "Summary"}[half])
    with pytest.raises(NLAError, match=r"makes the token 640 .* the model knows 640"):
        NLA.from_pretrained(**halves)


def test_a_token_that_the_source_lacks(copies: Any, tmp_path: Path) -> None:
    """In a corpus it costs that document."""
    source = build_source(tmp_path / "source", "llama")
    add_tokens(source, "zebra")
    nla = NLA.from_pretrained(av=copies("llama")[0])
    chat = [{"role": "user", "content": "a zebra"}]
    for text in ("a zebra", chat):
        with pytest.raises(NLAError, match=LACKING):
            nla_lens.extract(source, [text], 1)
        with pytest.raises(NLAError, match=LACKING):
            nla.explain_text(text, model=source)
    store = nla_lens.explain_corpus(
        nla, ["a zebra", "a horse"], out=tmp_path / "store", model=source, positions="last",
        max_new_tokens=2,
    )  # fmt: skip
    rows = store.to_pandas().to_dict("records")
    assert [row["document"] for row in rows] == [0, 1]
    assert "makes the token 640" in rows[0]["error"] and rows[1]["token_id"] > 0


@pytest.mark.parametrize("framework", ["transformer_lens", "nnsight"])
def test_a_token_that_a_source_of_another_framework_lacks(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    home = build_source(tmp_path / "source", "llama")
    add_tokens(home, "zebra")
    hf_model = AutoModelForCausalLM.from_pretrained(str(home))
    tokenizer = load_tokenizer(home)
    if framework == "nnsight":
        import nnsight

        model: Any = nnsight.NNsight(hf_model)
    else:
        bridges = pytest.importorskip("transformer_lens.model_bridge")
        model = bridges.TransformerBridge.boot_transformers(
            str(home), device="cpu", tokenizer=tokenizer
        )
    assert len(nla_lens.extract(model, ["a horse"], 1, tokenizer=tokenizer)) == 1
    with pytest.raises(NLAError, match=LACKING):
        nla_lens.extract(model, ["a zebra"], 1, tokenizer=tokenizer)


def test_a_prompt_without_tokens(copies: Any) -> None:
    """Of a tokenizer without BOS, and a template that is the text alone."""
    av, ar = copies("qwen2")
    change = {"prompt_templates": {"ar": "{explanation}"}, "tokens": {"critic_suffix_ids": None}}
    write_sidecar(ar, override(reference.read_sidecar(ar), change))
    nla = NLA.from_pretrained(av=av, ar=ar)
    with pytest.raises(NLAError, match="has no tokens to be read at"):
        nla.reconstruct(["a", ""])


# --- templates ---


@pytest.mark.parametrize(
    "chance",
    [
        "{{ [1,2,3,4,5,6,7,8,9]|random }}" * 20,
        "{{ strftime_now('%f') }}",
        "{% for m in messages %}{% if strftime_now('%f') %}{{ strftime_now('%f') }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_a_template_of_chance_is_refused(chance: str, copies: Any) -> None:
    av, _ = copies("qwen2")
    change_json(av / "tokenizer_config.json", chat_template=chance + QWEN2_CHAT)
    with pytest.raises(NLAError, match="another prompt each time"):
        NLA.from_pretrained(av=av)


DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n"
)


@pytest.mark.parametrize("more", ["", "{{ '%s' % 'not plain' }}"])
def test_a_template_that_writes_the_date(more: str, copies: Any) -> None:
    """As Llama 3.2's: the prompt of tomorrow is another one."""
    av, _ = copies("qwen2")
    change_json(av / "tokenizer_config.json", chat_template=DATED + more + QWEN2_CHAT)
    with pytest.warns(NLAWarning, match="writes the date into the prompt"):
        NLA.from_pretrained(av=av)
    fixed = NLA.from_pretrained(av=av, chat_template_kwargs={"date_string": "26 Jul 2024"})
    assert "26 Jul 2024" in fixed.verbalizer.tokenizer.decode(fixed.verbalizer.prompt_ids)


OWN = "Own: " + QWEN2_CHAT
PLACES: dict[str, dict[str, Any]] = {
    "config": {"config": OWN},
    "nowhere": {"config": None},
    "a list": {"config": [{"name": "rag", "template": "x"}, {"name": "default", "template": OWN}]},
    "a list without": {"config": [{"name": "rag", "template": OWN}]},
    "file before config": {"config": "x", "chat_template.jinja": OWN},
    "folder before all": {
        "config": "x",
        "chat_template.jinja": "y",
        "additional_chat_templates/default.jinja": OWN,
    },
    "file and folder": {
        "config": "x",
        "chat_template.jinja": OWN,
        "additional_chat_templates/rag.jinja": "y",
    },
    "folder alone": {"config": OWN, "additional_chat_templates/rag.jinja": "y"},
    "line ends": {"config": None, "chat_template.jinja": OWN.replace("\n", "\r\n")},
    "the processor's": {"config": OWN, "chat_template.json": '{"chat_template": "x"}'},
}


@pytest.mark.parametrize("name", PLACES)
def test_the_template_that_transformers_takes(name: str, copies: Any, tmp_path: Path) -> None:
    """Of the files, for `info`; when a checkpoint is loaded; and when it is written and read."""
    av, _ = copies("qwen2")
    for place, text in PLACES[name].items():
        if place == "config":
            change_json(av / "tokenizer_config.json", chat_template=text)
        else:
            (av / place).parent.mkdir(exist_ok=True)
            (av / place).write_bytes(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(str(av))
    try:
        due = tokenizer.get_chat_template()
    except ValueError:
        due = None
    # transformers reads files with one kind of line end.
    assert (template_of(av) or "").replace("\r\n", "\n") == (due or "")
    assert (due is None) == (name in ("nowhere", "a list without", "folder alone"))
    if due is None:
        with pytest.raises(NLAError, match="chat template"):
            NLA.from_pretrained(av=av)
        return
    nla = NLA.from_pretrained(av=av)
    assert nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids).startswith("Own:")
    nla.save_pretrained(tmp_path / "saved")
    again = NLA.from_pretrained(tmp_path / "saved")
    assert again.verbalizer.prompt_ids == nla.verbalizer.prompt_ids


def test_info_ends_a_costly_template(
    copies: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "SECONDS", 0.5)
    av, _ = copies("qwen2")
    change_json(av / "tokenizer_config.json", chat_template=COSTLY["loops"])
    assert run("info", av).status == 0


def test_info_renders_as_transformers_does(copies: Any, run: Any) -> None:
    """Tags and filters that are transformers' own."""
    av, _ = copies("qwen2")
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ 'é'|tojson }}"
    change_json(av / "tokenizer_config.json", chat_template=template + "<think>")
    assert "ends inside an open block (<think>)" in run("info", av).err


# --- a template that lies elsewhere than its tokenizer ---


def names(home: Path) -> list[str]:
    return ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def without_tokenizer(home: Path) -> None:
    for name in names(home):
        (home / name).unlink(missing_ok=True)


def prompt_of(av: Path, **options: Any) -> str:
    nla = NLA.from_pretrained(av=av, **options)
    return str(nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids))


def test_a_template_of_its_own_beside_a_tokenizer_above(copies: Any, tmp_path: Path) -> None:
    av, _ = copies("qwen2")
    repository = tmp_path / "repository"
    home = Path(shutil.copytree(av, repository / "av"))
    for name in names(home):
        shutil.move(home / name, repository / name)
    assert not prompt_of(repository).startswith("Own:")
    (home / "chat_template.jinja").write_text(OWN)
    assert prompt_of(repository).startswith("Own:")
    nla = NLA.from_pretrained(repository)
    nla.save_pretrained(tmp_path / "saved")
    assert prompt_of(tmp_path / "saved" / "av").startswith("Own:")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pytest.importorskip("peft")
    base = build_source(tmp_path / "base", "qwen2")
    return build_lora_av(tmp_path / "lora", "qwen2", base)


def test_an_adapter_with_a_template_alone(adapter: Path) -> None:
    without_tokenizer(adapter)
    assert not prompt_of(adapter).startswith("Own:")
    (adapter / "chat_template.jinja").write_text(OWN)
    assert prompt_of(adapter).startswith("Own:")


def test_an_adapter_with_a_tokenizer_json_alone(adapter: Path) -> None:
    """It is the adapter's tokenizer, in the base's chat format."""
    due = prompt_of(adapter)
    for name in names(adapter)[1:]:
        (adapter / name).unlink(missing_ok=True)
    nla = NLA.from_pretrained(av=adapter)
    assert nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids) == due
    assert str(nla.verbalizer.tokenizer.name_or_path) == str(adapter)


# --- one text, one set of tokens ---


@pytest.mark.parametrize("framework", ["transformers", "transformer_lens", "nnsight"])
@pytest.mark.parametrize("adds", [True, False])
def test_the_same_tokens_in_every_framework(framework: str, adds: bool, tmp_path: Path) -> None:
    """TransformerLens has tokenizers write a BOS where they have one (Pythia's own does not)."""
    home = build_source(tmp_path / "source", "llama")
    if not adds:
        change_tokenizer(home, lambda found: found["post_processor"]["processors"].pop())
    tokenizer = AutoTokenizer.from_pretrained(str(home))
    ids = tokenizer("Some words here")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == adds
    model: Any = AutoModelForCausalLM.from_pretrained(str(home))
    due = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    if framework == "nnsight":
        nnsight = pytest.importorskip("nnsight")
        model = nnsight.TransformersModel(
            model, task="text-generation", tokenizer=load_tokenizer(home)
        )
    elif framework == "transformer_lens":
        bridges = pytest.importorskip("transformer_lens.model_bridge")
        model = bridges.TransformerBridge.boot_transformers(str(home), device="cpu")
        assert model.tokenizer("Some words here")["input_ids"][0] == tokenizer.bos_token_id
    found = nla_lens.extract(model, ["Some words here"], 1)[0]
    assert found.shape == due.shape
    assert torch.allclose(found.as_subclass(torch.Tensor), due, atol=1e-5)


def test_a_tokenizer_that_only_transformer_lens_knows(tmp_path: Path) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    home = build_source(tmp_path / "source", "llama")
    model = bridges.TransformerBridge.boot_transformers(str(home), device="cpu")
    model.tokenizer.add_tokens(["<mine>"])
    with pytest.warns(NLAWarning, match="puts? a BOS before each text.*tokens were added"):
        assert len(nla_lens.extract(model, ["a<mine>"], 1)[0]) == 3
    assert len(nla_lens.extract(model, ["a"], 1, tokenizer=load_tokenizer(home))[0]) == 2


# --- SentencePiece ---


def test_a_marker_behind_a_blank_that_opens_each_text(copies: Any) -> None:
    """As Llama 2's and Mistral's: the marker is one token of the prompt, and two of itself."""
    av, _ = copies("gemma3_text")
    plain = NLA.from_pretrained(av=av)
    change_json(av / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    change_json(av / "config.json", model_type="llama")
    change_tokenizer(
        av,
        lambda found: found.update(
            normalizer={"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, found["normalizer"]]}
        ),
    )  # fmt: skip
    tokenizer = load_tokenizer(av)
    marker = plain.spec.injection_char
    _, token_id = tokenizer(marker, add_special_tokens=False)["input_ids"]
    assert token_id == plain.spec.injection_token_id
    prompt = canonical_prompt(plain.spec, tokenizer)
    assert prompt.ids[prompt.marker] == token_id
    with pytest.raises(NLAError, match="it must be that one token"):
        canonical_prompt(replace(plain.spec, injection_char="x" + marker), tokenizer)
    with pytest.raises(NLAError, match="it must be that one token"):
        canonical_prompt(replace(plain.spec, injection_char=" " + marker), tokenizer)


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer"])
def test_pieces_that_are_not_the_models(blank: bool, name: str, tmp_path: Path) -> None:
    """A SentencePiece model alone says whether a text begins with a blank; some classes do not
    ask it."""
    pieces = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = tmp_path / "text.txt"
    text.write_text(BPE_TEXT)
    pieces.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=blank, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    shutil.move(tmp_path / "tokenizer.model", home / "tokenizer.model")
    (home / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (home / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, said = loaded(home)
    alone = pieces.SentencePieceProcessor(model_file=str(home / "tokenizer.model"))
    texts = ("The quick brown fox", "UPPER, lower")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    differ = ids != [alone.encode(text) for text in texts]
    assert ["tokenizer.model alone" in words for words in said] == [True] * differ
    assert reads_as_4() or differ == (blank != (name == "LlamaTokenizer"))
