"""Prompts that end inside a block of thought, and what a chat template is given against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_lens import NLA, NLAError
from nla_lens.checkpoints.open_block import open_block
from nla_lens.checkpoints.spec import read_spec
from nla_lens.cli.injection_check import check_injection

from .checkpoints import build_ar, build_av, reference, vectors, write_sidecar
from .checkpoints.sidecars import override
from .checkpoints.texts import QWEN3_CHAT
from .test_cli import run as run  # the fixture

# Qwen 3.5's way: thought is opened unless it is told not to.
THINKING = QWEN3_CHAT.replace(
    "</think>\\n\\n' }}\n    {%- endif %}",
    "</think>\\n\\n' }}\n    {%- else %}\n        {{- '<think>\\n' }}\n    {%- endif %}",
)
QUIET = {"enable_thinking": False}


@pytest.fixture
def av(tmp_path: Path) -> Path:
    """A verbalizer whose chat template opens a thought."""
    made = build_av(tmp_path / "x-av", "qwen3")
    config = made / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": THINKING}))
    return made


OPEN = {
    "Qwen": ("<|im_end|>\n<|im_start|>assistant\n<think>\n", "<think>"),
    "on one line": ("<|im_start|>assistant\n<think>", "<think>"),
    "closed and opened again": ("<think>a</think><think>", "<think>"),
    "DeepSeek": ("<\uff5cAssistant\uff5c><think>\n", "<think>"),
    "gpt-oss": ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis"),
    "Gemma 4": ("<turn|>\n<|turn>model\n<|channel>thought\n", "<|channel>"),
    "Cohere": ("<|CHATBOT_TOKEN|><|START_THINKING|>", "<|START_THINKING|>"),
    "OpenThinker": ("<|im_start|>assistant\n<|begin_of_thought|>\n", "<|begin_of_thought|>"),
    "Mistral": ("[/INST][THINK]", "[THINK]"),
    "Kimi": ("<|im_assistant|>assistant<|im_middle|>\u25c1think\u25b7", "\u25c1think\u25b7"),
    "Seed": ("<seed:bos>assistant\n<seed:think>", "<seed:think>"),
    "a scratchpad": ("<|assistant|>\n<scratchpad>\n", "<scratchpad>"),
    "a block in a block": ("<think><plan></plan>", "<think>"),
}
CLOSED = {
    "nothing": "",
    "Qwen, told not to": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "Qwen 2.5": "<|im_end|>\n<|im_start|>assistant\n",
    "Llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma 3": "<end_of_turn>\n<start_of_turn>model\n",
    "Gemma 4, told not to": "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "Mistral": "[/INST]",
    "gpt-oss, final": "<|start|>assistant<|channel|>final<|message|>",
    "gpt-oss, no channel yet": "<|end|><|start|>assistant",
    "DeepSeek, told not to": "<\uff5cAssistant\uff5c></think>",
    "Cohere, told not to": "<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
    "Phi": "<|end|><|assistant|>",
    "a role in angle brackets": "</s>\n<assistant>\n",
    "Vicuna": " ASSISTANT:",
    "an answer that is begun": "<|assistant|>\n<explanation>",
    "a closed block in capitals": "<THINK></think>",
}


@pytest.mark.parametrize("name", OPEN)
def test_open(name: str) -> None:
    written, tag = OPEN[name]
    template = "{{ '<|channel>' }} {{ '<channel|>' }}"
    assert open_block(written, template) == tag


@pytest.mark.parametrize("name", CLOSED)
def test_closed(name: str) -> None:
    assert open_block(CLOSED[name], "<|channel> <channel|> <assistant>") is None


def test_a_block_that_the_template_closes_elsewhere() -> None:
    assert open_block("<notes>", "... </notes> ...") == "<notes>"
    assert open_block("<notes>", "") is None


def test_what_the_prompt_itself_says_is_not_looked_at(tmp_path: Path) -> None:
    """The user's turn may speak of tags, also behind the marker."""
    text = "<concept>{injection_char}</concept> Do not write <think> but <explanation>."
    av = build_av(tmp_path / "av", "qwen3", sidecar_overrides={"prompt_templates": {"av": text}})
    assert finding(NLA.from_pretrained(av=av)).passed


def finding(nla: NLA):
    return next(f for f in check_injection(nla, n_vectors=2) if "block of thought" in f.name)


def test_check_and_info_find_it(run, av: Path) -> None:
    nla = NLA.from_pretrained(av=av)
    found = finding(nla)
    assert found.passed is False and "<think>" in found.detail
    assert 'chat_template_kwargs={"enable_thinking": False}' in found.detail
    got = run("info", av)
    assert got.status == 0
    assert "warning: the prompt ends inside an open block (<think>)" in got.err
    got = run("info", av, "--json")
    assert "open block" in got.err and json.loads(got.out)["layer"]["value"] == 3
    got = run("check", av, "--vectors", "2")
    assert got.status == 1 and "FAIL the prompt does not end inside" in got.out


def test_told_not_to_think(run, av: Path) -> None:
    nla = NLA.from_pretrained(av=av, chat_template_kwargs=QUIET)
    assert finding(nla).passed
    assert nla.spec.chat_template_kwargs == QUIET
    assert nla.spec.origins["chat_template_kwargs"] == "caller"
    plain = NLA.from_pretrained(av=av)
    tail = nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids[-12:])
    assert tail.endswith("<think>\n\n</think>\n\n")
    assert nla.verbalizer.marker_position == plain.verbalizer.marker_position
    assert nla.verbalizer.prompt_ids != plain.verbalizer.prompt_ids
    # A prompt of the caller's is rendered in the same way.
    custom = nla.verbalizer.custom_prompt("Say: <INJECT>.")
    assert nla.verbalizer.tokenizer.decode(list(custom.ids)).endswith("</think>\n\n")
    got = run("info", av, "--chat-template-kwargs", '{"enable_thinking": false}')
    assert (got.status, got.err) == (0, "") and "enable_thinking" in got.out
    bad = run("info", av, "--chat-template-kwargs", "thinking")
    assert bad.status == 2 and "is no JSON object" in bad.err


def test_the_tokens_are_those_of_the_arithmetic(av: Path) -> None:
    """Against a reference that is given the rendered prompt."""
    nla = NLA.from_pretrained(av=av, chat_template_kwargs=QUIET)
    got = nla.explain(vectors()[:2], max_new_tokens=6, score=False)
    by_hand = reference.AV(av)
    by_hand.prompt_ids = nla.verbalizer.prompt_ids
    by_hand.marker_position = nla.verbalizer.marker_position
    assert [list(e.token_ids) for e in got] == by_hand.greedy(vectors()[:2], 6).ids.tolist()


def test_in_the_sidecar(av: Path) -> None:
    changed = override(reference.read_sidecar(av), {"chat_template_kwargs": QUIET})
    write_sidecar(av, changed)
    spec = read_spec(av)
    assert spec.chat_template_kwargs == QUIET
    assert spec.origins["chat_template_kwargs"] == "sidecar"
    # The caller's word replaces it, an empty one too.
    thinking = read_spec(av, chat_template_kwargs={})
    assert thinking.chat_template_kwargs == {} and hash(spec) != 0


@pytest.mark.parametrize(
    "wrong",
    [
        "thinking", ["enable_thinking"], {"tokenize": False}, {"add_generation_prompt": False},
        {"messages": []}, {3: True}, {"a b": True}, {"x": [1]}, {"x": {"y": 1}}, {"tools": None},
    ],
)  # fmt: skip
def test_options_that_are_none(av: Path, wrong: object) -> None:
    with pytest.raises(NLAError, match="chat_template_kwargs="):
        NLA.from_pretrained(av=av, chat_template_kwargs=wrong)
    if wrong != {3: True}:
        write_sidecar(av, override(reference.read_sidecar(av), {"chat_template_kwargs": wrong}))
        with pytest.raises(NLAError, match=r"nla_meta.yaml: chat_template_kwargs"):
            read_spec(av)


def test_a_template_in_a_file_of_its_own(run, av: Path) -> None:
    config = av / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    (av / "chat_template.jinja").write_text(settings.pop("chat_template"))
    config.write_text(json.dumps(settings))
    assert "open block" in run("info", av).err


def test_the_ar_has_nothing_to_do_with_it(av: Path, tmp_path: Path) -> None:
    ar = build_ar(tmp_path / "ar", "qwen3")
    nla = NLA.from_pretrained(av=av, ar=ar, chat_template_kwargs=QUIET)
    assert nla.reconstructor.prompt_ids("x") == reference.AR(ar).prompt_ids("x")
