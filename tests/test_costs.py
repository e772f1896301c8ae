"""What strangers' programs may cost: chat templates, tokenizers, adapters."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import nla_lens
from nla_lens import NLA, NLAError
from nla_lens.checkpoints.spec import read_spec
from nla_lens.models import limited
from nla_lens.models.block_reader import BlockReader
from nla_lens.models.templates import apply_template, is_plain
from nla_lens.models.weights import load_tokenizer

from .checkpoints import build_lora_av, build_source, reference, write_sidecar
from .checkpoints.sidecars import override
from .checkpoints.vocabulary import CHAT_TEMPLATES

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a b c"},
    {"role": "assistant", "content": "<think>x</think> d"},
    {"role": "user", "content": "e"},
]


@pytest.fixture(scope="module")
def tokenizer(pair_dirs: Any) -> Any:
    return AutoTokenizer.from_pretrained(str(pair_dirs("qwen2", "replace")[0]))


@pytest.fixture
def av(pair_dirs: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs("qwen2", "replace")[0], tmp_path / "av"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A limit of half a second, and no call that takes much longer."""
    monkeypatch.setattr(limited, "SECONDS", 0.5)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- chat templates ---

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PLAIN = {
    "turns": TURNS + "{% endfor %}",
    "with a namespace": "{%- set ns = namespace(last=0) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if m.role == 'user' and not (m.content.startswith('<t>')) %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}" + TURNS + "{% endfor %}",
    "with thoughts": TURNS + "{%- if '</think>' in m.content %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}{{ content }}{%- endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "with parts": "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{% endif %}{% endfor %}",
    "with tools": "{% if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}"
    "{% endif %}{{ strftime_now('%d %b %Y') }}",
}
OTHER = {
    "a macro": "{% macro turn(m) %}{{ m.role ~ ': ' ~ m.content }}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ eos_token }}",
    "a range": "{% for i in range(messages|length) %}{{ i }} {{ messages[i].content }} {% endfor %}"
    "{{ messages | tojson }}{% if add_generation_prompt %}é㈎{% endif %}",
    "a format": "{{ '%s and %s' % (messages[0].role, bos_token) }}{{ 'ab' * 3 }}",
}
COSTLY = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over characters": "{% for a in messages[0].content %}" * 3 + "{% endfor %}" * 3,
    "a name reused": "{% for a in messages[0].content %}{% set a = messages[0].content %}"
    "{% for b in a %}{% set b = a %}{% for c in b %}{% endfor %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**11 }}",
    "a long list": "{{ [1] * 10**10 }}",
    "a power": "{{ 10**(10**10) }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a wide field": "{{ 'a'.ljust(10**11) }}",
    "doubling": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "doubling by ~": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "doubling a list": "{% set x = 'ab' %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubling in a namespace": "{% set n = namespace(x='ab') %}"
    + "{% set n.x = n.x + n.x %}" * 60
    + "{{ n.x }}",
    "doubling in a loop": "{% set n = namespace(x='ab') %}{% for c in messages[0].content %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling a block": "{% set x %}ab{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "replacing": "{{ 'a' * 9999 | replace('a', 'a' * 9999) | replace('a', 'a' * 9999) }}",
    "indenting": "{{ [1] | tojson(indent=10**10) }}",
    "lorem ipsum": "{{ lipsum(n=10**8) }}",
}


def test_the_templates_of_the_test_families_are_plain() -> None:
    assert all(map(is_plain, CHAT_TEMPLATES.values()))


@pytest.mark.parametrize("name", PLAIN)
def test_templates_as_published_models_have_them_run_here(name: str, monkeypatch: Any) -> None:
    assert is_plain(PLAIN[name])


@pytest.mark.parametrize("name", {**PLAIN, **OTHER})
@pytest.mark.parametrize("answer", [True, False])
def test_every_template_gives_what_transformers_gives(
    name: str, answer: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {**PLAIN, **OTHER}[name]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = apply_template(tokenizer, MESSAGES, add_generation_prompt=answer)
    due = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=answer, tokenize=True)
    ids = [list(x["input_ids"] if hasattr(x, "keys") else x) for x in (found, due)]
    assert ids[0] == ids[1] and len(ids[0]) > 3
    assert is_plain(template) == (name in PLAIN)


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_ended(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    assert not is_plain(COSTLY[name])
    monkeypatch.setattr(
        tokenizer, "chat_template", COSTLY[name].replace("in t ", "in messages[0].content ")
    )
    messages = [{"role": "user", "content": "x" * 5000}]
    with pytest.raises(NLAError, match=r"takes too long|MemoryError|OverflowError|Recursion|Error"):
        apply_template(tokenizer, messages)


def test_a_costly_template_is_refused_when_a_checkpoint_is_loaded(av: Path, hurried: None) -> None:
    change_json(av / "tokenizer_config.json", chat_template=COSTLY["loops"])
    (av / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(NLAError, match=r"the chat template of .* refuses .*takes too long"):
        NLA.from_pretrained(av=av)
    # And the next one is not harmed.
    assert limited.render("{{ messages }}", {"messages": "é\ud7ff"}) == "é\ud7ff"


def test_the_process_sees_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    limited._child._end()
    assert limited.render("{{ x * 2 }}", {"x": "a"}) == "aa"


# --- tokenizers ---


def many_added(found: dict) -> None:
    one = {**found["added_tokens"][0], "special": False}
    found["added_tokens"] = [{**one, "id": 10**6 + i, "content": f"<{i}>"} for i in range(300_000)]


def doubling(part: str, step: dict) -> Any:
    def change(found: dict) -> None:
        found[part] = {
            "type": "Sequence",
            {"normalizer": "normalizers"}.get(part, f"{part}s"): [step] * 40,
        }

    return change


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS = {
    "added tokens": many_added,
    "doubling": doubling("normalizer", REPLACE),
    "doubling bytes": doubling("normalizer", {"type": "ByteLevel"}),
    "doubling when decoded": doubling("decoder", REPLACE),
    "doubling words": doubling("pre_tokenizer", BYTES),
    "a long token": lambda found: found["added_tokens"].append(
        {**found["added_tokens"][0], "id": 10**6, "content": "x" * 10**6}
    ),
    "padding": lambda found: found.update(
        padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_token": "x",
                 "pad_to_multiple_of": None, "pad_type_id": 0}
    ),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_costly_tokenizer_is_refused(name: str, av: Path) -> None:
    path = av / "tokenizer.json"
    found = json.loads(path.read_text())
    TOKENIZERS[name](found)
    path.write_text(json.dumps(found))
    with pytest.raises(NLAError, match=r"tokenizer.json.*(adds|grow|a token of|pads every)"):
        load_tokenizer(av)


# --- adapters ---

pytest.importorskip("peft")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = build_source(tmp_path / "base", "qwen2")
    return build_lora_av(tmp_path / "av", "qwen2", base)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"r": 10**6}, "r is 1000000; expected ranks of at most"),
        ({"r": "8"}, "r is '8'; expected ranks"),
        ({"r": True}, "r is True; expected ranks"),
        ({"rank_pattern": {"q_proj": 10**6}}, "rank_pattern is .*expected ranks"),
        ({"rank_pattern": [1]}, "rank_pattern is .*expected values by module"),
        ({"lora_alpha": "nan"}, "lora_alpha is 'nan'; expected a number"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha is"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication in adapter_config.json"),
        (
            {"target_modules": r"(.*)*(.*)*(.*)*(.*)*(.*)*x"},
            "a regular expression in it .* takes too long",
        ),
        ({"target_modules": r"((\w|\.)+)+x"}, "a regular expression in it .* takes too long"),
        ({"exclude_modules": r"((\w|\.)+)+x"}, "a regular expression in it .* takes too long"),
        ({"rank_pattern": {r"((\w|\.)+)+x": 1}}, "a regular expression in it .* takes too long"),
        ({"modules_to_save": [r"((\w|\.)+)+x"]}, "a regular expression in it .* takes too long"),
        ({"target_modules": "(q_proj"}, "a regular expression in it .* cannot be used: error"),
    ],
)
def test_a_costly_adapter_is_refused(
    values: dict, named: str, adapter: Path, hurried: None
) -> None:
    change_json(adapter / "adapter_config.json", **values)
    with pytest.raises(NLAError, match=named):
        NLA.from_pretrained(av=adapter)


def test_an_adapter_that_holds_nan_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(NLAError, match=f"{key} holds NaN"):
        NLA.from_pretrained(av=adapter)


def test_a_regular_expression_as_they_are_used_is_taken(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    before = NLA.from_pretrained(av=adapter).encode(torch.ones(64), max_new_tokens=5)
    targets = "|".join(config["target_modules"])
    change_json(adapter / "adapter_config.json", target_modules=rf".*\.({targets})$")
    assert NLA.from_pretrained(av=adapter).encode(torch.ones(64), max_new_tokens=5) == before


def test_no_process_is_started_without_need(av: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited.subprocess, "Popen", None)
    limited._child._end()
    assert os.listdir(av)
    assert NLA.from_pretrained(av=av).encode(torch.ones(64), max_new_tokens=2)


# --- lengths, NaN, code, names ---


def test_a_text_beyond_the_sources_context_is_refused(
    source_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(source_dir("llama"), tmp_path / "source"))
    change_json(source / "config.json", max_position_embeddings=12)
    text = "the " * 40
    with pytest.raises(NLAError, match=r"tokens of the text .* was made for 12"):
        nla_lens.extract(source, text, 1)
    first = nla_lens.extract(source, text, 1, positions=[0, 11])[0]
    assert first.as_subclass(torch.Tensor).equal(
        nla_lens.extract(source_dir("llama"), text, 1, positions=[0, 11])[0].as_subclass(
            torch.Tensor
        )
    )
    with pytest.raises(NLAError, match=r"was made for 12"):
        nla_lens.extract(source, text, 1, positions=[12])
    # Of a text of 20,000 words only what stands before the last position asked for is run.
    ran: list[int] = []
    run = BlockReader.run

    def counted(self: Any, ids_BT: Any, *rest: Any, **options: Any) -> Any:
        ran.append(ids_BT.numel())
        return run(self, ids_BT, *rest, **options)

    monkeypatch.setattr(BlockReader, "run", counted)
    nla_lens.extract(source, "word " * 20_000, 1, positions=[0])
    assert sum(ran) < 12


def test_an_answer_beyond_the_verbalizers_context_is_refused(nla: NLA) -> None:
    with pytest.raises(NLAError, match=r"max_new_tokens=5000 are more than the \d+ tokens"):
        nla.explain(torch.ones(64), max_new_tokens=5000)


@pytest.mark.parametrize("half", ["av", "ar"])
def test_weights_that_compute_nan_are_refused(half: str, pair_dirs: Any, tmp_path: Path) -> None:
    halves = dict(zip(("av", "ar"), pair_dirs("llama", "replace"), strict=True))
    halves[half] = Path(shutil.copytree(halves[half], tmp_path / half))
    path = halves[half] / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layers.1.mlp.down_proj.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NLAError, match="computes NaN for plain tokens"):
        NLA.from_pretrained(**halves)


def test_the_sources_code_is_not_run_with_the_checkpoints(
    pair_dirs: Any, source_dir: Any, tmp_path: Path
) -> None:
    """The sidecar alone names the source: nobody said that its code may run."""
    source = Path(shutil.copytree(source_dir("llama"), tmp_path / "source"))
    (source / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    change_json(source / "config.json", auto_map={"AutoConfig": "code.C"}, model_type="strange")
    av = Path(shutil.copytree(pair_dirs("llama", "replace")[0], tmp_path / "av"))
    write_sidecar(av, override(reference.read_sidecar(av), {"base_checkpoint": str(source)}))
    nla = NLA.from_pretrained(av=av, trust_remote_code=True)
    with pytest.raises(NLAError, match="cannot be loaded"):
        nla.explain_text("a")
    assert not (tmp_path / "ran").exists()


NAMES = ["~nosuchuser", "~nosuchuser/x", "\0", "a/\0", "x" * 300, "//", "..", "", ".", "/",
         "a" * 300 + "/b", "/dev/zero", "\ud800", "con\x1b/x"]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_odd_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two empty folders: what is above them may hold the checkpoints of other tests.
    here = tmp_path / "one" / "two"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (
        lambda: NLA.from_pretrained(name),
        lambda: NLA.from_pretrained(av=name),
        lambda: read_spec(name),
        lambda: nla_lens.extract(name, "a", 0),
    ):
        with pytest.raises(NLAError) as caught:
            load()
        assert "\x1b" not in str(caught.value) and str(caught.value).encode()
