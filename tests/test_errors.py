"""Errors of loading: names, damaged weights, foreign code, things that do not belong together."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nla_lens
from nla_lens import NLA, Explanations, NLAError, NLAWarning
from nla_lens.adapters import sae
from nla_lens.checkpoints.releases import SMOL_DIR, SMOL_SOURCE_NAME

from .checkpoints import build_ar, build_av, build_lora_ar, build_source, reference, write_sidecar
from .checkpoints.sidecars import override
from .test_explanation import one


@pytest.fixture
def av(pair_dirs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs("qwen2", "replace")[0], tmp_path / "av"))


@pytest.fixture
def ar(pair_dirs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs("qwen2", "replace")[1], tmp_path / "ar"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- the exception --------------------------------------------------------------------------------


def test_one_exception_that_is_a_value_error() -> None:
    assert issubclass(NLAError, ValueError) and issubclass(NLAWarning, UserWarning)
    assert NLAError("x").explanations is None and not NLAError("x").later
    copied = pickle.loads(pickle.dumps(NLAError("what was wrong")))
    assert str(copied) == "what was wrong"


# --- what is no NLA -------------------------------------------------------------------------------

VECTOR = torch.ones(64)
WANTS_AN_NLA: dict[str, Callable[[object], object]] = {
    "attach": lambda nla: nla_lens.attach(object(), nla),
    "explain_corpus": lambda nla: nla_lens.explain_corpus(nla, ["a text"], "never-written"),
    "evaluate": lambda nla: nla_lens.evaluate(nla, ["a text"]),
    "examine": lambda nla: nla_lens.examine(nla, VECTOR),
    "compare": lambda nla: nla_lens.compare(nla, VECTOR, -VECTOR),
    "sweep": lambda nla: nla_lens.sweep("tiny", "a text", VECTOR, [1.0], nla=nla),
    "explain_features": lambda nla: sae.explain_features(nla, "no-dictionary"),
    "decompose": lambda nla: sae.decompose(nla, "no-dictionary", VECTOR),
    "label_score": lambda nla: sae.label_score(nla, ["a text"], VECTOR[None]),
    "run_with_nla": lambda nla: sae.run_with_nla(object(), "a text", nla),
    "plot": lambda nla: Explanations([one(cos=0.5)]).plot(nla, VECTOR[None]),
}


@pytest.mark.parametrize("name", WANTS_AN_NLA)
@pytest.mark.parametrize("wrong", ["tiny", 3, Path("tiny")])
def test_what_is_no_nla_is_refused_everywhere(name: str, wrong: object) -> None:
    """Its name most of all."""
    with pytest.raises(NLAError, match=r"is not an NLA; load one first: NLA\.from_pretrained"):
        WANTS_AN_NLA[name](wrong)
    assert not Path("never-written").exists()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), r"name a pair.*from_pretrained\(\"tiny\"\).*av="),
        (("tinny",), "no checkpoint 'tinny': not one of the embedded .*'tiny'"),
        (("",), "'' names no checkpoint"),
        (("a/b/c",), "no checkpoint 'a/b/c': .* not a hub repository"),
        (("x" * 5000,), "no checkpoint 'xxx"),
        (("syvb/nanonla-qwen3-8b-L24-ar",), "is a reconstructor .* 'syvb/nanonla-qwen3-8b-L24'"),
        (("./none",), "no checkpoint './none-av'|no checkpoint 'none-av'"),
        (("~nobody-of-this-name/x",), "~nobody-of-this-name/x"),
        (("\0",), "no checkpoint"),
        ((5,), "a checkpoint is a name or a directory, found 5"),
        ((["a"],), "found .'a'."),
    ],
)
def test_names_that_are_none(arguments: tuple, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        NLA.from_pretrained(*arguments)


def test_halves_that_are_none(av: Path) -> None:
    with pytest.raises(NLAError, match=r"two verbalizers are named: 'tiny' and av="):
        NLA.from_pretrained("tiny", av=av)
    with pytest.raises(NLAError, match="found 5"):
        NLA.from_pretrained(av=av, ar=5)
    with pytest.raises(NLAError, match="found 7"):
        NLA.from_pretrained(av=7)
    with pytest.raises(NLAError, match="no checkpoint 'nowhere'"):
        NLA.from_pretrained(av=av, ar="nowhere")


def test_what_cannot_be_fetched_names_the_repository_and_the_remedy() -> None:
    with pytest.raises(
        NLAError, match=r"someone/something-av cannot be fetched.*check the name, the"
    ):
        NLA.from_pretrained("someone/something")
    with pytest.raises(NLAError, match=r"someone/an-av cannot be fetched"):
        NLA.from_pretrained(av="someone/an-av")


def test_a_panic_in_rust_is_an_error_of_the_file(av: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer found one: merges that the tokenizers library cannot slice."""
    panic = type("PanicException", (BaseException,), {})

    def loading(*args: object, **options: object) -> None:
        raise panic("range end index 12 out of range for slice of length 11")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loading)
    with pytest.raises(NLAError, match=r"the tokenizer of .* cannot be loaded \(PanicException"):
        NLA.from_pretrained(av=av)


def test_adapters_whose_base_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of "smol" without what `make smol` puts beside them, and without a network."""
    pytest.importorskip("peft")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for half in ("av", "ar"):
        shutil.copytree(SMOL_DIR / half, tmp_path / "pair" / half)
    with pytest.raises(NLAError, match=rf"{SMOL_SOURCE_NAME} .*name its directory .base="):
        NLA.from_pretrained(tmp_path / "pair")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=r"has neither nla_meta.yaml nor av/ and ar/"):
        NLA.from_pretrained(tmp_path)
    with pytest.raises(NLAError, match=r"no nla_meta.yaml in .*not an NLA checkpoint"):
        NLA.from_pretrained(av=tmp_path)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dtype": "float33"}, "dtype='float33' is not a floating-point dtype"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not"),
        ({"dtype": 16}, "dtype=16 is not"),
        ({"dtype": "nn"}, "dtype='nn' is not"),
        ({"device": "abacus"}, "device='abacus' cannot be used on this machine"),
        ({"device": 1.5}, "device=1.5 cannot be used"),
        ({"engine": "steam"}, "engine='steam' is not known; known are"),
        ({"engine": ["transformers"]}, "engine="),
        ({"injection": "subtract"}, "injection='subtract' is not a known rule"),
        ({"layer": 7}, "contradictory layer"),
        ({"injection_scale": -1.0}, "injection_scale=-1.0 must be"),
        ({"engine": {"av": "steam"}}, "engine='steam' is not known"),
        ({"engine": {"judge": "transformers"}}, r"engine= has \['judge'\]"),
    ],
)
def test_options_that_are_refused(av: Path, ar: Path, options: dict, names: str) -> None:
    with pytest.raises(NLAError, match=names):
        NLA.from_pretrained(av=av, ar=ar, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(av: Path) -> None:
    with pytest.raises(NLAError, match="device='cuda' cannot be used on this machine"):
        NLA.from_pretrained(av=av, device="cuda")


def test_an_unknown_option_is_a_type_error(av: Path) -> None:
    with pytest.raises(TypeError, match="dtpye"):
        NLA.from_pretrained(av=av, dtpye="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16, "auto", None])
def test_dtypes(av: Path, dtype) -> None:
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    model = NLA.from_pretrained(av=av, dtype=dtype).verbalizer.engine.model
    assert model.dtype == (wanted if isinstance(wanted, torch.dtype) else torch.float32)


# --- weights --------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        save_file(
            {k: v for k, v in tensors.items() if not k.endswith(name)}, path, {"format": "pt"}
        )

    return damage


def reshape(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        key = next(k for k in tensors if k.endswith(name))
        save_file({**tensors, key: tensors[key][:-1].clone()}, path, {"format": "pt"})

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10_000])


def as_pickle(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


DAMAGES = {
    "gone": (Path.unlink, "cannot be loaded"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be loaded"),
    "cut": (cut, "cannot be loaded"),
    "not safetensors": (lambda path: path.write_bytes(b"PK" * 100), "cannot be loaded"),
    "a pickle": (as_pickle, "cannot be loaded"),
    "a missing block": (drop("layers.2.mlp.up_proj.weight"), r"do not fit config.json; missing"),
    "a missing embedding": (drop("embed_tokens.weight"), "do not fit config.json; missing"),
    "another shape": (reshape("layers.1.mlp.up_proj.weight"), "cannot be loaded|of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("half", ["av", "ar"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights(av: Path, ar: Path, half: str, name: str) -> None:
    damage, names = DAMAGES[name]
    directory = {"av": av, "ar": ar}[half]
    damage(directory / "model.safetensors")
    with pytest.raises(NLAError, match=names) as caught:
        NLA.from_pretrained(av=av, ar=ar)
    assert str(directory) in str(caught.value)


def test_a_verbalizer_without_its_norm_or_head_is_refused(av: Path) -> None:
    for name in ("lm_head.weight", "model.norm.weight"):
        whole = (av / "model.safetensors").read_bytes()
        drop(name)(av / "model.safetensors")
        with pytest.raises(NLAError, match=r"do not fit config.json; missing"):
            NLA.from_pretrained(av=av)
        (av / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}', "\x00\xff"])
@pytest.mark.parametrize("half", ["av", "ar"])
def test_damaged_json_files(av: Path, ar: Path, half: str, file: str, content: str) -> None:
    directory = {"av": av, "ar": ar}[half]
    (directory / file).write_bytes(content.encode("latin-1"))
    try:
        NLA.from_pretrained(av=av, ar=ar)
    except NLAError as error:
        assert half in str(error)
    else:
        # Some of it is not needed: an AR has no chat template.
        assert (half, file) == ("ar", "tokenizer_config.json")


def test_an_architecture_nobody_knows(av: Path) -> None:
    change_json(av / "config.json", model_type="perceptron-9")
    with pytest.raises(NLAError, match=r"config.json of .*av cannot be loaded .*perceptron-9"):
        NLA.from_pretrained(av=av)


# --- foreign code and foreign formats -------------------------------------------------------------


EVIL = """
from pathlib import Path
Path({target!r}).touch()
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
class Config(Qwen2Config):
    model_type = "evil"
class Causal(Qwen2ForCausalLM):
    config_class = Config
class Model(Qwen2Model):
    config_class = Config
"""


@pytest.mark.parametrize("half", ["av", "ar"])
def test_code_in_a_checkpoint_is_not_run(av: Path, ar: Path, tmp_path: Path, half: str) -> None:
    directory, target = {"av": av, "ar": ar}[half], tmp_path / "was-run"
    (directory / "evil.py").write_text(EVIL.format(target=str(target)))
    change_json(
        directory / "config.json",
        model_type="evil",
        auto_map={
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Causal",
            "AutoModel": "evil.Model",
        },
    )
    with pytest.raises(NLAError, match="cannot be loaded"):
        NLA.from_pretrained(av=av, ar=ar)
    with pytest.raises(NLAError, match="cannot be loaded"):
        nla_lens.extract(directory, "a", 0)
    assert not target.exists()


def test_trust_remote_code_is_off_everywhere() -> None:
    import nla_lens.engines
    from nla_lens.models import weights

    functions = [
        NLA.from_pretrained, weights.load_tokenizer, weights.load_causal_lm, weights.load_backbone,
    ]  # fmt: skip
    for function in functions:
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    assert nla_lens.engines.Placement().trust_remote_code is False


def test_a_pickle_beside_the_weights_is_never_opened(av: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was-run",)

    for name in ("pytorch_model.bin", "value_head.pt", "value_head.bin", "nla_meta.pkl"):
        (av / name).write_bytes(pickle.dumps(Bomb()))
    NLA.from_pretrained(av=av)
    (av / "model.safetensors").unlink()
    with pytest.raises(NLAError):
        NLA.from_pretrained(av=av)
    assert not (tmp_path / "was-run").exists()


def test_templates_read_no_attributes(av: Path) -> None:
    """`str.format` on a template would put in what the field names."""
    field = "{injection_char.__class__.__mro__}"
    template = reference.read_sidecar(av)["prompt_templates"]["av"] + field
    write_sidecar(av, override(reference.read_sidecar(av), {"prompt_templates": {"av": template}}))
    nla = NLA.from_pretrained(av=av)
    assert field in nla.verbalizer.tokenizer.decode(nla.verbalizer.prompt_ids)


# --- things that do not belong together -----------------------------------------------------------


def test_norm_matched_add_needs_a_block_1(tmp_path: Path) -> None:
    av = build_av(tmp_path, "qwen2", n_blocks=1, injection="norm_matched_add")
    with pytest.raises(NLAError, match="acts at the output of block 1; the model has fewer"):
        NLA.from_pretrained(av=av, injection="norm_matched_add")


def test_halves_of_two_widths(av: Path, tmp_path: Path) -> None:
    wide = build_ar(tmp_path / "wide", "qwen2", d_model=80)
    with pytest.raises(NLAError, match=r"contradictory d_model: .*says 64; .*says 80"):
        NLA.from_pretrained(av=av, ar=wide)


def test_halves_of_two_layers(av: Path, tmp_path: Path) -> None:
    deep = build_ar(tmp_path / "deep", "qwen2", layer=4)
    with pytest.raises(NLAError, match=r"contradictory layer: .*says 3; .*says 4"):
        NLA.from_pretrained(av=av, ar=deep)


@pytest.mark.filterwarnings("ignore:the tokenizer of .* makes")
def test_the_tokenizer_of_another_family(av: Path, pair_dirs) -> None:
    for path in pair_dirs("gemma3_text", "replace")[0].glob("*token*"):
        shutil.copy(path, av / path.name)
    with pytest.raises(NLAError, match=r"tokens.injection_token_id: the marker '㈎' is \["):
        NLA.from_pretrained(av=av)


def test_an_adapter_whose_layer_nobody_says(tmp_path: Path, av: Path) -> None:
    """Its base is a whole model: without K nobody knows where to cut it."""
    pytest.importorskip("peft")
    silent = {"extraction_layer_index": "<<absent>>", "ar": "<<absent>>"}
    write_sidecar(av, override(reference.read_sidecar(av), silent))
    base = build_source(tmp_path / "base", "qwen2")
    ar = build_lora_ar(tmp_path / "lora", "qwen2", base, sidecar_overrides=silent)
    with pytest.raises(NLAError, match=r"an adapter over a whole model, .* pass layer="):
        NLA.from_pretrained(av=av, ar=ar)
    known = NLA.from_pretrained(av=av, ar=ar, layer=3)
    wanted = reference.AR(build_lora_ar(tmp_path / "said", "qwen2", base)).vectors(["x"])
    torch.testing.assert_close(known.reconstruct(["x"]), wanted, rtol=1e-4, atol=1e-4)
