"""What transformers 5 saved means the same with every release that is supported.

The files are written here as 5.24 writes them, so that the tests say something with 4.57, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

from nla_lens import NLA, NLAError
from nla_lens.models import saved_by_5
from nla_lens.models.saved_by_5 import reads_as_4
from nla_lens.models.weights import load_causal_lm, load_tokenizer

from .checkpoints import FAMILIES, build_av

TEXTS = ["The garlic  sizzles.\n\n<c> é ", " leading", "<|im_end|>x<end_of_turn>", "a\tb", ""]


def saved(directory: Path, **said: Any) -> None:
    """Rewrites tokenizer_config.json as transformers 5 would write it."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config.pop("additional_special_tokens", None)
    config.pop("added_tokens_decoder", None)
    path.write_text(json.dumps({**config, "backend": "tokenizers", **said}))


def assert_as_saved(directory: Path) -> Any:
    tokenizer = load_tokenizer(directory)
    whole = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == whole.encode(text).ids
        bare = whole.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == bare
    return tokenizer


@pytest.mark.parametrize("extra", [{}, {"extra_special_tokens": ["<c>"]}], ids=["", "extra"])
@pytest.mark.parametrize("named", ["TokenizersBackend", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer(tmp_path: Path, family: str, named: str | None, extra: dict[str, Any]) -> None:
    build_av(tmp_path, family)
    before = load_tokenizer(tmp_path)
    if extra:
        whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        whole.add_special_tokens([AddedToken("<c>", special=True)])
        whole.save(str(tmp_path / "tokenizer.json"))
    saved(tmp_path, **extra, **({"tokenizer_class": named} if named else {}))
    tokenizer = assert_as_saved(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (before.bos_token, before.eos_token)
    assert ("<c>" in tokenizer.all_special_tokens) == bool(extra)
    messages = [{"role": "user", "content": "hello"}]
    rendered = (t.apply_chat_template(messages, tokenize=False) for t in (tokenizer, before))
    assert len(set(rendered)) == 1


def test_an_nla_with_such_a_tokenizer(tmp_path: Path) -> None:
    plain, by_5 = tmp_path / "plain", tmp_path / "by_5"
    for directory in (plain, by_5):
        build_av(directory, "llama")
    saved(by_5, tokenizer_class="TokenizersBackend", extra_special_tokens=[])
    vectors = torch.randn(3, 64)
    texts = [
        NLA.from_pretrained(av=av).explain(vectors, max_new_tokens=8).to_dict()
        for av in (plain, by_5)
    ]
    assert texts[0] == texts[1]


def small_bpe() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: 3 + i for i, c in enumerate("▁ahi")}, "▁a": 7}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
def test_a_bos_that_was_switched_on_or_off(tmp_path: Path, bos: bool) -> None:
    """transformers 4 gives a Llama tokenizer its BOS by its class, whatever tokenizer.json says."""
    tokenizer = small_bpe()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved(
        tmp_path,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_prefix_space=None,
    )
    assert (load_tokenizer(tmp_path)("a hi")["input_ids"][0] == 1) == bos


def test_other_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    saved(tmp_path, tokenizer_class="TokenizersBackend", unk_token="<unk>")
    from_file = Tokenizer.from_file

    class Other:
        @staticmethod
        def from_file(path: str) -> Tokenizer:
            changed = from_file(path)
            changed.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
            return changed

    monkeypatch.setattr("tokenizers.Tokenizer", Other)
    with pytest.raises(NLAError, match=r"saved by transformers 5.*pip install --upgrade"):
        saved_by_5.tokenizer_saved_by_5(tmp_path)


ROTARY: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 0.25},
    "stablelm": {"partial_rotary_factor": 0.75},
    "nemotron": {"partial_rotary_factor": 0.25},
    "gpt_neox": {"rotary_pct": 0.5},
    "llama": {},
}


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_parameters(tmp_path: Path, family: str) -> None:
    """A part of each head turns, by another theta than is usual."""
    theta = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    config = AutoConfig.for_model(
        family,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        **{theta: 30_000.0},
        **ROTARY[family],
    )
    torch.manual_seed(0)
    model, ids_1T = AutoModelForCausalLM.from_config(config).eval(), torch.arange(5, 25)[None]
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    if "rope_parameters" not in said:
        rope = {"rope_type": "default", "rope_theta": said.pop(theta)}
        for name in ROTARY[family]:
            rope["partial_rotary_factor"] = said.pop(name)
        path.write_text(json.dumps({**said, "rope_parameters": rope}))
    with torch.no_grad():
        wanted, found = (m(input_ids=ids_1T).logits for m in (model, load_causal_lm(tmp_path)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_read_says_who_saved_it(
    pair_dirs: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    build_av(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 32, "transformers_version": "5.99.0"}))
    with pytest.raises(NLAError) as refused:
        load_causal_lm(tmp_path)
    assert ("saved by transformers '5.99.0'" in str(refused.value)) == reads_as_4()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_beside_a_config_that_calls_it_tied(tmp_path: Path, family: str) -> None:
    """5 takes the head that is there; 4 would write by the table of the embeddings."""
    av = build_av(tmp_path / "av", family, tied=False)
    vectors_ND = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    def said() -> list[list[int]]:
        explained = NLA.from_pretrained(av=av).explain(vectors_ND, max_new_tokens=8)
        return [e.token_ids for e in explained]

    def call_it(tied: bool) -> None:
        path = av / "config.json"
        config = json.loads(path.read_text())
        for part in (config, config.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = tied
        path.write_text(json.dumps(config))

    call_it(False)
    untied = said()
    call_it(True)
    assert said() == untied
