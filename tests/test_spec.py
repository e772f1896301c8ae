"""What is put together from sidecars, configs, the known releases and the caller."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from nla_lens import NLA, NLAError, NLAWarning, ResidPost
from nla_lens.checkpoints.releases import KNOWN_RELEASES, KnownRelease, find_release
from nla_lens.checkpoints.spec import read_spec

from .checkpoints import ABSENT, AR_TEMPLATE, AV_TEMPLATE, reference, write_sidecar
from .checkpoints.sidecars import override

D, K = 64, 3


class Halves:
    """The small files of a pair, to be changed and read."""

    def __init__(self, root: Path, sources: tuple[Path, Path]) -> None:
        self.av, self.ar = (
            Path(
                shutil.copytree(
                    source, root / name, ignore=shutil.ignore_patterns("model*.safetensors")
                )
            )
            for source, name in zip(sources, ("av", "ar"), strict=True)
        )

    def change(self, av=None, ar=None, av_config=None, ar_config=None) -> None:
        """Lays changes over the sidecars and configs; a string replaces a whole sidecar."""
        for directory, meta, config in ((self.av, av, av_config), (self.ar, ar, ar_config)):
            if meta is not None:
                write_sidecar(directory, override(reference.read_sidecar(directory), meta))
            if config is not None:
                path = directory / "config.json"
                path.write_text(json.dumps(override(json.loads(path.read_text()), config)))

    def read(self, ar: bool = True, **options):
        return read_spec(av=self.av, ar=self.ar if ar else None, **options)

    def load(self, ar: bool = True, **options) -> NLA:
        return NLA.from_pretrained(av=self.av, ar=self.ar if ar else None, **options)


@pytest.fixture
def make(tmp_path: Path, pair_dirs) -> Callable[..., Halves]:
    return lambda rule="replace", family="llama": Halves(tmp_path, pair_dirs(family, rule))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read before the small files were checked")

    monkeypatch.setattr("nla_lens.halves.loading.load_reconstructor_engine", refuse)
    monkeypatch.setattr("nla_lens.halves.loading.load_verbalizer_engine", refuse)


# --- accepted: (rule, changes, from_pretrained's arguments, the spec, its origins) ---------------

NANO = {"injection": "norm_matched_add"}
ACCEPTED = {
    "a released pair": (
        "replace",
        {},
        {},
        {
            "d_model": D,
            "layer": K,
            "injection": "replace",
            "injection_scale": 30.0,
            "mse_scale": 8.0,
            "var_nrm": None,
            "hook_name": "blocks.3.hook_resid_post",
            "source_model": "test/llama-source",
            "av_template": AV_TEMPLATE,
            "ar_template": AR_TEMPLATE,
            "min_position": 10,
        },
        {
            "d_model": "sidecar",
            "layer": "sidecar",
            "injection": "sidecar",
            "injection_scale": "sidecar",
            "mse_scale": "sidecar",
            "source_model": "sidecar",
            "min_position": "default",
        },
    ),
    "a data set's sidecar and the caller's rule": (
        "norm_matched_add",
        {},
        NANO,
        {"injection": "norm_matched_add", "injection_scale": None, "mse_scale": 8.0, "layer": K},
        {"injection": "caller", "mse_scale": "default"},
    ),
    "a data set's sidecar, replace and a scale by the caller": (
        "norm_matched_add",
        {},
        {"injection": "replace", "injection_scale": 40.0},
        {"injection": "replace", "injection_scale": 40.0},
        {"injection_scale": "caller"},
    ),
    "the rule in the sidecar": (
        "norm_matched_add",
        {"av": {"extraction": {"injection_rule": "norm_matched_add"}}},
        {},
        {"injection": "norm_matched_add"},
        {"injection": "sidecar"},
    ),
    "sqrt_d_model": (
        "replace",
        {"av": {"extraction": {"injection_scale": "sqrt_d_model"}}},
        {},
        {"injection_scale": 8.0},
        {"injection_scale": "sidecar"},
    ),
    "a numeric string": (
        "replace",
        {"av": {"extraction": {"injection_scale": "1e5"}}},
        {},
        {"injection_scale": 1e5},
        {},
    ),
    "mse_scale absent": (
        "replace",
        {"ar": {"extraction": {"mse_scale": ABSENT}}},
        {},
        {"mse_scale": math.sqrt(D)},
        {"mse_scale": "default"},
    ),
    "mse_scale null": (
        "replace",
        {"ar": {"extraction": {"mse_scale": None}}},
        {},
        {"mse_scale": None},
        {"mse_scale": "sidecar"},
    ),
    "mse_scale in the AV's sidecar alone": (
        "replace",
        {"av": {"extraction": {"mse_scale": 5.0}}, "ar": {"extraction": {"mse_scale": ABSENT}}},
        {},
        {"mse_scale": 5.0},
        {"mse_scale": "sidecar"},
    ),
    "the AR's mse_scale before the AV's": (
        "replace",
        {"av": {"extraction": {"mse_scale": 5.0}}, "ar": {"extraction": {"mse_scale": 6.0}}},
        {},
        {"mse_scale": 6.0},
        {},
    ),
    "no layer in the AV's sidecar": (
        "replace",
        {"av": {"extraction_layer_index": ABSENT}},
        {},
        {"layer": K},
        {"layer": "sidecar"},
    ),
    "the layer by the AR's config alone": (
        "replace",
        {
            "av": {"extraction_layer_index": ABSENT},
            "ar": {"extraction_layer_index": ABSENT, "ar": ABSENT},
        },
        {},
        {"layer": K},
        {},
    ),
    "the layer by the caller": (
        "replace",
        {
            "av": {"extraction_layer_index": ABSENT},
            "ar": {"extraction_layer_index": ABSENT, "ar": ABSENT},
        },
        {"layer": K},
        {"layer": K},
        {"layer": "caller"},
    ),
    "the width by config.json alone": (
        "replace",
        {"av": {"d_model": ABSENT}, "ar": {"d_model": ABSENT}},
        {},
        {"d_model": D},
        {"d_model": "config"},
    ),
    "var_nrm in the AR's sidecar": (
        "replace",
        {"ar": {"extraction": {"var_nrm": 0.5}}},
        {},
        {"var_nrm": 0.5},
        {"var_nrm": "sidecar"},
    ),
    "the AR's template in the AV's sidecar alone": (
        "replace",
        {"ar": {"prompt_templates": ABSENT}},
        {},
        {"ar_template": AR_TEMPLATE},
        {},
    ),
    "roles absent": (
        "replace",
        {"av": {"role": ABSENT}, "ar": {"role": ABSENT}},
        {},
        {"layer": K},
        {},
    ),
    "no neighbours": (
        "replace",
        {
            "av": {
                "tokens": {
                    "injection_left_neighbor_id": ABSENT,
                    "injection_right_neighbor_id": None,
                }
            }
        },
        {},
        {"injection_left_neighbor_id": None, "injection_right_neighbor_id": None},
        {},
    ),
    "no source": (
        "replace",
        {"av": {"base_checkpoint": ABSENT}},
        {},
        {"source_model": None},
        {},
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(make, name: str) -> None:
    rule, changes, options, wanted, origins = ACCEPTED[name]
    halves = make(rule)
    halves.change(**changes)
    if set(options) <= {"injection"}:
        spec = halves.read(**options)
        assert {key: getattr(spec, key) for key in wanted} == wanted
        assert {key: spec.origins.get(key) for key in origins} == origins
    loaded = load_spec(halves, options)
    assert {key: getattr(loaded, key) for key in wanted} == wanted
    assert {key: loaded.origins.get(key) for key in origins} == origins


def load_spec(halves: Halves, options: dict):
    """The spec, and the prompts checked, as `from_pretrained` does before weights are read."""
    from nla_lens.checkpoints.chat import canonical_prompt
    from nla_lens.checkpoints.files import open_checkpoint
    from nla_lens.checkpoints.spec import build_spec
    from nla_lens.halves.reconstructor import check_prompt
    from nla_lens.models.weights import load_tokenizer

    spec = build_spec(open_checkpoint(halves.av), open_checkpoint(halves.ar), **options)
    canonical_prompt(spec, load_tokenizer(halves.av))
    check_prompt(spec, load_tokenizer(halves.ar))
    return spec


# --- refused: (rule, changes, arguments, what the message names) --------------------------------

REFUSED = {
    "nothing names the rule": (
        "norm_matched_add",
        {},
        {},
        "nothing says how vectors are injected .*nla_meta.yaml.*pass "
        'injection="replace" or injection="norm_matched_add"',
    ),
    "no scale, no rule": (
        "replace",
        {"av": {"extraction": {"injection_scale": None}}},
        {},
        "nothing says how vectors are injected",
    ),
    "replace without a scale": (
        "norm_matched_add",
        {},
        {"injection": "replace"},
        "injection_scale is not known.*nla_meta.yaml has none; pass injection_scale=",
    ),
    "a rule nobody knows": (
        "replace",
        {},
        {"injection": "add"},
        r"injection='add' is not a known rule; known are \['replace'",
    ),
    "a rule that is a list": (
        "replace",
        {},
        {"injection": ["replace"]},
        "injection=.*not a known rule",
    ),
    "two layers in the sidecars": (
        "replace",
        {"av": {"extraction_layer_index": 4}},
        {},
        r"contradictory layer: .*av/nla_meta.yaml says 4; .*ar/nla_meta.yaml says 3; "
        r".*config.json \(num_hidden_layers - 1\) says 3",
    ),
    "K for K+1 in the AR's config": (
        "replace",
        {"ar_config": {"num_hidden_layers": 3}},
        {},
        r"contradictory layer: .*num_hidden_layers - 1\) says 2",
    ),
    "another layer by the caller": (
        "replace",
        {},
        {"layer": 5},
        "contradictory layer: layer= says 5; .*says 3",
    ),
    "layer text": ("replace", {}, {"layer": "3"}, "layer='3' must be the index of a block"),
    "layer negative": ("replace", {}, {"layer": -1}, "layer=-1 must be the index"),
    "layer true": ("replace", {}, {"layer": True}, "layer=True must be the index"),
    "widths of the halves": (
        "replace",
        {"ar": {"d_model": 32}, "ar_config": {"hidden_size": 32}},
        {},
        r"contradictory d_model: .*av/nla_meta.yaml says 64; .*ar/nla_meta.yaml says 32; "
        r".*\(hidden_size\) says 32",
    ),
    "sidecar and config": (
        "replace",
        {"av": {"d_model": 65}},
        {},
        r"contradictory d_model: .*says 65; .*av/config.json \(hidden_size\) says 64",
    ),
    "hidden_size text": (
        "replace",
        {"av_config": {"hidden_size": "64"}},
        {},
        "contradictory d_model",
    ),
    "no width at all": (
        "replace",
        {
            "av": {"d_model": ABSENT},
            "ar": {"d_model": ABSENT},
            "av_config": {"hidden_size": ABSENT},
            "ar_config": {"hidden_size": ABSENT},
        },
        {},
        "d_model is None; neither sidecar nor config says it",
    ),
    "config.json not an object": (
        "replace",
        {"av_config": lambda c: [1]},
        {},
        "config.json must hold an object, found list",
    ),
    "scale by the caller: zero": (
        "replace",
        {},
        {"injection_scale": 0},
        "injection_scale=0 must be a positive norm",
    ),
    "scale by the caller: text": (
        "replace",
        {},
        {"injection_scale": "30"},
        "injection_scale='30' must be",
    ),
    "scale by the caller: NaN": (
        "replace",
        {},
        {"injection_scale": math.nan},
        "injection_scale=nan must be",
    ),
    "scale by the caller: infinite": (
        "replace",
        {},
        {"injection_scale": math.inf},
        "injection_scale=inf must be",
    ),
    "scale by the caller: past float32": (
        "replace",
        {},
        {"injection_scale": 1e39},
        "injection_scale=1e\\+39 must be",
    ),
    "a scale for norm_matched_add": (
        "norm_matched_add",
        {},
        {"injection": "norm_matched_add", "injection_scale": 30.0},
        "norm_matched_add uses none",
    ),
    "no injection_char": (
        "replace",
        {"av": {"tokens": {"injection_char": ABSENT}}},
        {},
        "injection_char is not known: it must stand in .*av/nla_meta.yaml",
    ),
    "no tokens": ("replace", {"av": {"tokens": ABSENT}}, {}, "injection_char is not known"),
    "no marker id": (
        "replace",
        {"av": {"tokens": {"injection_token_id": None}}},
        {},
        "injection_token_id is not known",
    ),
    "no AV template": (
        "replace",
        {"av": {"prompt_templates": {"av": ABSENT}}},
        {},
        "av_template is not known: it must stand",
    ),
    "AR given as AV": (
        "replace",
        {"av": {"role": "critic"}},
        {},
        r"is a reconstructor \(AR\), not a verbalizer \(AV\) \(role in .*\); pass it as ar=",
    ),
    "AV given as AR": (
        "replace",
        {"ar": {"role": "actor"}},
        {},
        r"is a verbalizer \(AV\), not a reconstructor \(AR\) .*; pass it as av=",
    ),
    # against the live tokenizer
    "another marker id": (
        "replace",
        {"av": {"tokens": {"injection_token_id": 40}}},
        {},
        r"injection_token_id.*marker '㎡' is \[\d+\] .*the sidecar says \[40\]",
    ),
    "a marker of several tokens": (
        "replace",
        {"av": {"tokens": {"injection_char": "☃"}}},
        {},
        r"marker '☃' is \[\d+, \d+.*must be that one token",
    ),
    "an empty marker": (
        "replace",
        {"av": {"tokens": {"injection_char": ""}}},
        {},
        r"marker '' is \[\]",
    ),
    "another left neighbour": (
        "replace",
        {"av": {"tokens": {"injection_left_neighbor_id": 1}}},
        {},
        r"av/nla_meta.yaml: .*stands in the prompt as \[\(.*\)\], but the sidecar says its "
        r"neighbours are 1 and \d+",
    ),
    "another right neighbour": (
        "replace",
        {"av": {"tokens": {"injection_right_neighbor_id": 2}}},
        {},
        r"its neighbours are \d+ and 2",
    ),
    "no placeholder": (
        "replace",
        {"av": {"prompt_templates": {"av": "<concept>㎡</concept>"}}},
        {},
        r"av/nla_meta.yaml: .*prompt_templates.av.*\{injection_char\} exactly once, found 0",
    ),
    "two placeholders": (
        "replace",
        {"av": {"prompt_templates": {"av": "<concept>{injection_char}</concept>" * 2}}},
        {},
        r"\{injection_char\} exactly once, found 2",
    ),
    "two markers": (
        "replace",
        {
            "av": {
                "prompt_templates": {
                    "av": "<concept>{injection_char}</concept> <concept>㎡</concept>"
                }
            }
        },
        {},
        r"av/nla_meta.yaml: .*has 2 injection sites \(marker token \d+\), exactly one is needed",
    ),
    "no AR template": (
        "replace",
        {"av": {"prompt_templates": {"ar": ABSENT}}, "ar": {"prompt_templates": ABSENT}},
        {},
        r"no prompt template \(prompt_templates.ar\)",
    ),
    "no {explanation}": (
        "replace",
        {"ar": {"prompt_templates": {"ar": "Summary:"}}},
        {},
        r"ar/nla_meta.yaml: .*prompt_templates.ar.*\{explanation\} exactly once, found 0",
    ),
    "another suffix": (
        "replace",
        {"ar": {"tokens": {"critic_suffix_ids": [1, 2, 3]}}},
        {},
        r"ar/nla_meta.yaml: .*prompt ends with \[.*\], the sidecar says \[1, 2, 3\] "
        r"\(tokens.critic_suffix_ids\)",
    ),
    "a suffix longer than the prompt": (
        "replace",
        {"ar": {"tokens": {"critic_suffix_ids": list(range(500))}}},
        {},
        "critic_suffix_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(make, no_weights, name: str) -> None:
    rule, changes, options, names = REFUSED[name]
    halves = make(rule)
    halves.change(**changes)
    with pytest.raises(NLAError, match=names) as caught:
        halves.load(**options)
    assert "\n" not in str(caught.value)
    assert caught.value.explanations is None


def test_no_tokenizer_no_template(make, no_weights) -> None:
    halves = make()
    config = halves.av / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    with pytest.raises(NLAError, match=r"tokenizer of .*av has no chat template"):
        halves.load()
    for path in halves.av.glob("*token*"):
        path.unlink()
    with pytest.raises(NLAError, match=r"tokenizer of .*av cannot be loaded"):
        halves.load()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_chat_templates_that_fail(make, no_weights, template: str) -> None:
    halves = make()
    config = halves.av / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    with pytest.raises(NLAError, match=r"chat template|injection sites"):
        halves.load()


def test_an_ar_with_a_data_sets_sidecar_given_as_av(make, no_weights) -> None:
    """Such a sidecar has no role; the value head beside it tells."""
    halves = make("norm_matched_add")
    assert reference.read_sidecar(halves.ar)["kind"] == "nla_dataset"
    with pytest.raises(
        NLAError, match=r"is a reconstructor .*it has a value_head.safetensors.*pass it as ar="
    ):
        NLA.from_pretrained(av=halves.ar, injection="norm_matched_add")
    with pytest.raises(NLAError, match="pass it as ar="):
        NLA.from_pretrained(halves.ar, injection="norm_matched_add")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "\xff", '{"hidden_size": ' + "[" * 100_000]
)
def test_configs_that_are_none(make, no_weights, content: str) -> None:
    halves = make()
    (halves.av / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(NLAError, match=r"av/config.json (cannot be read|must hold an object)"):
        halves.load()


def test_a_missing_config(make, no_weights) -> None:
    halves = make()
    (halves.ar / "config.json").unlink()
    with pytest.raises(NLAError, match=r"ar/config.json cannot be read"):
        halves.load()


# --- the caller against the sidecar -------------------------------------------------------------


def test_the_callers_rule_against_the_sidecars_is_warned_about(make) -> None:
    with pytest.warns(
        NLAWarning,
        match="injection='norm_matched_add' was asked for, but .*nla_meta.yaml means 'replace'",
    ):
        spec = make().read(injection="norm_matched_add")
    assert (spec.injection, spec.injection_scale) == ("norm_matched_add", None)


def test_the_same_rule_as_the_sidecars_is_not(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make().read(injection="replace").origins["injection"] == "caller"


# --- known releases -----------------------------------------------------------------------------


@pytest.fixture
def released(make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A release whose AV and AR are the small pair; every field is different from the defaults."""

    def release(**changes) -> Halves:
        known = {
            "av": "someone/fake-L3-av",
            "ar": "someone/fake-L3-ar",
            "source_model": "someone/source",
            "layer": K,
            "d_model": D,
            "injection": "replace",
            "injection_scale": 77.0,
            "var_nrm": 0.4,
        }
        monkeypatch.setattr(
            "nla_lens.checkpoints.releases.KNOWN_RELEASES", (KnownRelease(**(known | changes)),)
        )
        halves = make("norm_matched_add")
        for half in ("av", "ar"):
            moved = tmp_path / "hub" / f"fake-L3-{half}"
            moved.parent.mkdir(exist_ok=True)
            shutil.move(getattr(halves, half), moved)
            setattr(halves, half, moved)
        return halves

    return release


SILENT = {
    "av": {"extraction": {"layer_index": ABSENT, "base_model": ABSENT}},
    "ar": {"extraction": {"layer_index": ABSENT, "base_model": ABSENT}},
}


def test_a_known_release_fills_what_the_sidecars_leave_out(released) -> None:
    halves = released()
    halves.change(**SILENT, ar_config={"num_hidden_layers": ABSENT})
    spec = halves.read()
    filled = ("layer", "source_model", "injection", "injection_scale", "var_nrm")
    assert [getattr(spec, name) for name in filled] == [K, "someone/source", "replace", 77.0, 0.4]
    assert {spec.origins[name] for name in filled} == {"known release"}
    assert spec.mse_scale == 8.0 and spec.origins["mse_scale"] == "default"


def test_an_estimate_is_called_one(released) -> None:
    spec = released(
        var_nrm_is_estimate=True, injection="norm_matched_add", injection_scale=None
    ).read()
    assert spec.origins["var_nrm"] == "known release (an estimate)"
    assert (spec.injection, spec.injection_scale) == ("norm_matched_add", None)
    assert ("var_nrm", "0.4", "known release (an estimate)") in spec.rows()


def test_the_sidecar_wins_and_the_difference_is_named(released) -> None:
    halves = released(layer=7)
    with pytest.warns(
        NLAWarning,
        match=r"layer is 3 \(sidecar, .*nla_meta.yaml\), but the release someone/fake-L3 is known "
        "with 7; 3 is used",
    ):
        spec = halves.read()
    assert (spec.layer, spec.origins["layer"]) == (K, "sidecar")


def test_another_scale_than_the_releases_is_named(released) -> None:
    halves = released()
    halves.change(av={"kind": "nla_model", "d_model": D, "extraction": {"injection_scale": 30.0}})
    with pytest.warns(NLAWarning, match=r"injection_scale is 30.0 \(sidecar.*known with 77.0"):
        spec = halves.read()
    assert spec.injection_scale == 30.0


def test_the_callers_word_against_a_known_release_is_warned_about(released) -> None:
    halves = released()
    with pytest.warns(
        NLAWarning, match=r"injection is 'norm_matched_add' \(caller.*known with 'replace'"
    ):
        spec = halves.read(injection="norm_matched_add")
    assert spec.injection == "norm_matched_add"


def test_a_famous_name_and_another_width_gives_the_rule_and_no_numbers(released) -> None:
    with pytest.warns(
        NLAWarning, match="d_model is 64 .* known with 4096; only its injection rule"
    ):
        spec = released(d_model=4096, injection="norm_matched_add", injection_scale=None).read()
    assert (spec.injection, spec.origins["injection"]) == ("norm_matched_add", "known release")
    assert spec.var_nrm is None


def test_the_table_of_releases() -> None:
    """Against the table of the model cards."""
    table = """
        kitft/nla-qwen2.5-7b-L20 | Qwen/Qwen2.5-7B-Instruct | 20 | 3584 | replace | 150 | 0.7335
        kitft/nla-gemma3-12b-L32 | google/gemma-3-12b-it | 32 | 3840 | replace | 80000 | 0.0302
        kitft/nla-gemma3-27b-L41 | google/gemma-3-27b-it | 41 | 5376 | replace | 60000 | 0.0579
        kitft/Llama-3.3-70B-NLA-L53|meta-llama/Llama-3.3-70B-Instruct|53|8192|replace|30|0.9169
        syvb/nanonla-qwen3-8b-L24 | Qwen/Qwen3-8B | 24 | 4096 | norm_matched_add | None | 0.6704
    """
    rows = [row.split("|") for row in table.splitlines() if "|" in row]
    wanted = {tuple(cell.strip() for cell in row) for row in rows}
    alone = next(r for r in KNOWN_RELEASES if r.ar is None)
    assert (alone.av, alone.stem) == ("ceselder/nanonla-l24-av-qwen3-8b",) * 2
    pairs = [r for r in KNOWN_RELEASES if r is not alone]
    got = set()
    for r in pairs:
        assert (r.av, r.ar) == (f"{r.stem}-av", f"{r.stem}-ar")
        scale = r.injection_scale and int(r.injection_scale)
        row = (r.stem, r.source_model, r.layer, r.d_model, r.injection, scale, r.var_nrm)
        got.add(tuple(map(str, row)))
    assert got == wanted
    nano = next(r for r in pairs if r.stem.startswith("syvb"))
    assert (alone.layer, alone.d_model, alone.injection) == (24, 4096, "norm_matched_add")
    assert (alone.var_nrm, nano.layer) == (0.6704, 24)
    assert not [r for r in KNOWN_RELEASES if r.var_nrm_is_estimate]
    reported = [r.reported_fve_nrm for r in KNOWN_RELEASES]
    assert reported == [0.752, 0.768, 0.763, 0.80, None, None]


@pytest.mark.parametrize(
    "name", ["kitft/nla-qwen2.5-7b-L20", "kitft/nla-qwen2.5-7b-L20-ar", "a/b/nla-qwen2.5-7b-L20-av"]
)
def test_a_release_is_found_by_any_of_its_names(name: str) -> None:
    assert find_release(name).layer == 20
    assert find_release("kitft/nla-qwen2.5-7b") is None
    assert find_release("") is None and find_release(None) is None


def test_every_release_is_found_on_the_hub_under_its_own_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nla_lens.checkpoints.names import find_pair

    for release in KNOWN_RELEASES:
        assert find_pair(release.av) == (release.av, None)
        if release.ar:
            assert find_pair(release.stem) == (release.av, release.ar)


# --- the spec itself ----------------------------------------------------------------------------


def test_rows_name_every_field_its_value_and_where_it_is_from(make) -> None:
    spec = make().read()
    rows = {name: (value, origin) for name, value, origin in spec.rows()}
    assert rows["injection_scale"] == ("30.0", "sidecar")
    assert rows["hook_name"][0] == "'blocks.3.hook_resid_post'"
    assert set(rows) == (set(spec.__dataclass_fields__) - {"origins"}) | {"hook_name"}


def test_the_place_of_a_layer() -> None:
    assert ResidPost(20).name == "blocks.20.hook_resid_post"
    assert ResidPost(20).hidden_states_index == 21
    assert ResidPost(20).n_blocks == 21
    assert ResidPost.parse("blocks.21.hook_resid_pre") == ResidPost(20)
    assert ResidPost.parse("blocks.20.hook_resid_post") == ResidPost(20)
    for name in (
        "blocks.3.hook_resid_mid",
        "blocks.3.attn.hook_q",
        "hook_embed",
        "",
        "blocks.x.hook_resid_post",
    ):
        assert ResidPost.find(name) is None
        with pytest.raises(NLAError, match="not a place in the residual stream"):
            ResidPost.parse(name)


def test_integers_too_large_to_show(make) -> None:
    """YAML writes them in hexadecimal, past Python's limit on decimals."""
    halves = make()
    sidecar = halves.av / "nla_meta.yaml"
    text = sidecar.read_text(encoding="utf-8")
    sidecar.write_text(
        text.replace(f"d_model: {D}", "d_model: 0x" + "f" * 5000, 1), encoding="utf-8"
    )
    with pytest.raises(NLAError, match=r"nla_meta\.yaml .*an integer of more than 300 digits"):
        halves.read()
