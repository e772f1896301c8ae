"""Every dictionary format: latents as arithmetic of its own has them, and as sae-lens does."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nla_lens import NLAError, ResidPost
from nla_lens.adapters.sae import Dictionary, load_dictionary

from . import dictionary_files as files

CASES: dict[str, Callable[[Path], files.Case]] = {
    "qresearch": files.qresearch,
    "goodfire": files.goodfire,
    "saelens-standard": files.saelens,
    "saelens-no-input-bias": lambda root: files.saelens(root, apply_b_dec_to_input=False),
    "saelens-jumprelu": lambda root: files.saelens(root, "jumprelu"),
    "saelens-topk": lambda root: files.saelens(root, "topk"),
    "saelens-topk-scaled": lambda root: files.saelens(
        root, "topk", rescale_acts_by_decoder_norm=True
    ),
    "saelens-gated": lambda root: files.saelens(root, "gated"),
    "saelens-before-6": files.saelens_before_6,
    "gemma-scope": files.gemma_scope,
    "sparsify": files.sparsify,
    **{
        kind: lambda root, kind=kind: files.dictionary_learning(root, kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
            "GatedAutoEncoder",
        )
    },
}
X = torch.randn(6, files.D, generator=torch.Generator().manual_seed(5))
has_sae_lens = importlib.util.find_spec("sae_lens") is not None


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> files.Case:
    return CASES[request.param](tmp_path)


def test_latents_and_reconstruction_are_those_of_arithmetic(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    acts = case.encode(X)
    assert 0 < (acts != 0).mean() < 1
    np.testing.assert_allclose(sae.encode(X).numpy(), acts, atol=2e-6)
    np.testing.assert_allclose(sae.decode(torch.tensor(acts)).numpy(), case.decode(acts), atol=2e-6)
    np.testing.assert_allclose(sae(X).numpy(), case.decode(acts), atol=5e-6)
    assert sae.encode(X.reshape(2, 3, -1)).shape == (2, 3, files.F)


def test_directions_and_biases_are_those_in_the_file(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    assert torch.equal(sae.W_dec, case.weights.W_dec)
    assert torch.equal(sae.W_enc, case.weights.W_enc)
    assert torch.equal(sae.b_dec, case.weights.b_dec)
    picked = [31, 3, 4, 3, 39, 0]
    assert torch.equal(sae.rows(picked), case.weights.W_dec[picked])
    # Parts are read from the file itself, not from the mapping.
    assert sae.decoder.stored.offset is not None
    assert sae.encoder.stored.offset is not None


def test_the_place_is_named(case: files.Case) -> None:
    sae = load_dictionary(case.source)
    assert sae.cfg.hook_name == case.hook_name
    assert sae.cfg.metadata.hook_name == case.hook_name
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (files.D, files.F)
    said = load_dictionary(case.source, hook_name="blocks.1.hook_resid_post")
    assert said.cfg.hook_name == "blocks.1.hook_resid_post"


def test_the_input_of_a_block_is_the_output_of_the_one_before(tmp_path: Path) -> None:
    sae = load_dictionary(files.qresearch(tmp_path).source)
    assert ResidPost.parse(sae.cfg.hook_name) == ResidPost(8)


def test_a_batch_topk_of_the_training_kind_is_read_with_its_one_threshold(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, "batchtopk", k=5, rescale_acts_by_decoder_norm=True)
    path = case.source / "sae_weights.safetensors"
    save_file({**load_file(path), "topk_threshold": torch.tensor(0.6)}, path)
    acts = load_dictionary(case.source).encode(X)
    w = case.weights
    scaled = torch.relu((X - w.b_dec) @ w.W_enc + w.b_enc) * w.W_dec.norm(dim=-1)
    kept = load_dictionary(case.source).encode(X) > 0
    assert torch.allclose(acts[kept], scaled[kept], atol=1e-6)
    assert torch.equal(kept, scaled > 0.6)


# --- as sae-lens has it -------------------------------------------------------------------------

SAE_LENS = [name for name in CASES if name.startswith("saelens")]


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("name", SAE_LENS)
def test_the_same_as_sae_lens(name: str, tmp_path: Path) -> None:
    import sae_lens

    case = CASES[name](tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(case.source), load_dictionary(case.source)
    acts = theirs.encode(X)
    assert torch.allclose(ours.encode(X), acts, atol=1e-6)
    assert torch.allclose(ours.decode(acts), theirs.decode(acts), atol=1e-6)
    assert torch.equal(ours.W_dec, theirs.W_dec)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("kind", ["BatchTopKTrainingSAE", "GatedTrainingSAE", "TopKTrainingSAE"])
def test_what_sae_lens_saves_is_read(kind: str, tmp_path: Path) -> None:
    import sae_lens

    torch.manual_seed(0)
    own = {} if kind.startswith("Gated") else {"k": 4}
    config = getattr(sae_lens, f"{kind}Config")(d_in=files.D, d_sae=files.F, **own)
    trained = getattr(sae_lens, kind)(config)
    if kind.startswith("Batch"):
        trained.topk_threshold = torch.tensor(0.3, dtype=torch.double)
    trained.save_inference_model(tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path), load_dictionary(tmp_path)
    assert torch.allclose(ours.encode(X), theirs.encode(X), atol=1e-6)
    assert torch.allclose(ours(X), theirs(X), atol=1e-6)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
def test_gemma_scope_is_the_same_as_sae_lens_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = files.gemma_scope(tmp_path)
    config = json.loads((case.source / "config.json").read_text())
    shapes = {"w_enc": [files.D, files.F], "w_dec": [files.F, files.D]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *a, **k: shapes)
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, subfolder=None, **k: tmp_path / (subfolder or "") / filename,
    )
    assert config["architecture"] == "jump_relu"
    theirs, _, _ = loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-4b-it", case.source.relative_to(tmp_path).as_posix()
    )
    ours = load_dictionary(case.source)
    assert theirs["hook_name"] == ours.cfg.hook_name
    assert theirs["architecture"] == ours.cfg.architecture
    assert theirs["apply_b_dec_to_input"] == ours.cfg.apply_b_dec_to_input


def converted_by_sae_lens(loader: Callable, *args: object) -> Any:
    """What one of sae-lens' converters makes of files that are here and not on the hub."""
    import sae_lens
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    cfg, state, _ = loader(*args)
    cfg = handle_config_defaulting(cfg)
    kind = sae_lens.SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    sae = sae_lens.SAE.get_sae_class_for_architecture(cfg["architecture"])(kind.from_dict(cfg))
    sae.load_state_dict(state)
    return sae


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning_is_the_same_as_sae_lens_converts_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = files.dictionary_learning(tmp_path, kind)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, **k: tmp_path / filename
    )
    loader = loaders.dictionary_learning_sae_huggingface_loader_1
    theirs, ours = converted_by_sae_lens(loader, "a/b", kind), load_dictionary(case.source)
    # sae-lens leaves latents in units of their own: activations differ by ||W_dec||, no more.
    lengths = ours.W_dec.norm(dim=-1) if case.scaled else 1.0
    assert torch.allclose(ours.encode(X), theirs.encode(X) * lengths, atol=1e-5)
    assert torch.allclose(ours(X), theirs(X), atol=1e-5)
    assert theirs.cfg.metadata.hook_name == ours.cfg.hook_name


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
@pytest.mark.parametrize("name", ["qresearch", "goodfire"])
def test_linear_files_are_the_same_as_sae_lens_converts_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    case = CASES[name](tmp_path)
    path = next(tmp_path.rglob("*.pt*"))
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **k: path)
    sizes = {"d_in": files.D, "d_sae": files.F, "dtype": "float32", "device": "cpu"}
    if name == "goodfire":
        loader, repo = (
            loaders.get_goodfire_huggingface_loader,
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        )
    else:
        # Of the same layout, and from the same people.
        loader, repo = loaders.deepseek_r1_sae_huggingface_loader, "a/b"
    theirs = converted_by_sae_lens(loader, repo, path.name, "cpu", False, sizes)
    ours = load_dictionary(case.source)
    assert torch.allclose(ours.encode(X), theirs.encode(X), atol=1e-6)
    assert torch.allclose(ours(X), theirs(X), atol=1e-6)
    side = "pre" if name == "qresearch" else "post"
    assert ours.cfg.hook_name == theirs.cfg.metadata.hook_name.replace("post", side)


@pytest.mark.skipif(not has_sae_lens, reason="needs sae-lens")
def test_what_is_not_read_here_is_left_to_sae_lens(tmp_path: Path) -> None:
    case = files.saelens(tmp_path, normalize_activations="layer_norm")
    sae = load_dictionary(case.source)
    assert type(sae).__module__.startswith("sae_lens")


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"architecture": "temporal"}, "temporal"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ],
)
def test_what_is_not_read_is_named(
    cfg: dict, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.loading._by_sae_lens", lambda folder: None)
    case = files.saelens(tmp_path)
    settings = json.loads((case.source / "cfg.json").read_text())
    (case.source / "cfg.json").write_text(json.dumps({**settings, **cfg}))
    with pytest.raises(NLAError, match=named):
        load_dictionary(case.source)


# --- damaged and hostile files ------------------------------------------------------------------


def change(case: files.Case, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Replaces one tensor of a case's file."""
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".safetensors"))
    if path.suffix == ".safetensors":
        state = {k: v.clone() for k, v in load_file(path).items()}
        save_file({**state, name: to(state[name]).contiguous()}, path)
    else:
        state = torch.load(path, weights_only=True)
        torch.save({**state, name: to(state[name]).contiguous()}, path)
    return path


MATRICES = {
    "qresearch": ("encoder.weight", "decoder.weight"),
    "goodfire": ("encoder_linear.weight", "decoder_linear.weight"),
    "saelens-standard": ("W_enc", "W_dec"),
    "gemma-scope": ("w_enc", "w_dec"),
    "sparsify": ("encoder.weight", "W_dec"),
    "AutoEncoderTopK": ("encoder.weight", "decoder.weight"),
}
EACH = [(case, name) for case, names in MATRICES.items() for name in names]


@pytest.mark.parametrize(("name", "tensor"), EACH)
@pytest.mark.parametrize(
    "damage",
    [lambda t: t.T, lambda t: t[:, :-1], lambda t: t[:-1], lambda t: t.reshape(-1)],
    ids=["transposed", "narrower", "shorter", "flat"],
)
def test_a_matrix_of_another_shape_is_named(
    name: str, tensor: str, damage: Callable, tmp_path: Path
) -> None:
    case = CASES[name](tmp_path)
    change(case, tensor, damage)
    with pytest.raises(NLAError, match=tensor.replace(".", r"\.")):
        load_dictionary(case.source)


@pytest.mark.parametrize(("name", "tensor"), EACH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_named(name: str, tensor: str, bad: float, tmp_path: Path) -> None:
    def spoil(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[3, 5] = bad
        return t

    case = CASES[name](tmp_path)
    change(case, tensor, spoil)
    with pytest.raises(NLAError, match=tensor.replace(".", r"\.") + r".*(nan|inf)"):
        load_dictionary(case.source)


def test_nan_in_a_bias_is_named(tmp_path: Path) -> None:
    case = files.goodfire(tmp_path)
    change(case, "decoder_linear.bias", lambda t: t * float("nan"))
    with pytest.raises(NLAError, match=r"decoder_linear\.bias"):
        load_dictionary(case.source)


def test_a_large_file_is_looked_through_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_lens.adapters.dictionaries.dictionary._SCANNED", 0)
    case = files.qresearch(tmp_path)

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t[2, 7] = float("nan")
        return t

    change(case, "decoder.weight", spoil)
    sae = load_dictionary(case.source)
    assert torch.equal(sae.rows([6, 8]), case.weights.W_dec[[6, 8]])
    with pytest.raises(NLAError, match=r"decoder\.weight"):
        sae.rows([6, 7])


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(name: str, share: float, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(NLAError, match=path.name):
        load_dictionary(case.source)


def test_the_cut_tensor_is_named(tmp_path: Path) -> None:
    case = files.saelens(tmp_path)
    path = case.source / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(NLAError, match=r"ends in the middle of \w+"):
        load_dictionary(case.source)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["qresearch", "goodfire", "AutoEncoder"])
def test_a_hostile_pickle_leaves_no_trace(name: str, zipped: bool, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    folder = case.source if case.source.is_dir() else case.source.parent
    path = next(p for p in folder.iterdir() if p.suffix in (".pt", ".pth"))
    trace = tmp_path / "trace"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "x": Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(NLAError, match="refused"):
        load_dictionary(case.source)
    assert not trace.exists()
    # The file would have done it.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_file_of_old_torch_and_a_turned_tensor_are_read_whole(tmp_path: Path) -> None:
    case = files.qresearch(tmp_path)
    path = next(case.source.iterdir())
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_dictionary(path).rows([1, 9]), case.weights.W_dec[[1, 9]])
    torch.save({**state, "decoder.weight": case.weights.W_dec.T}, path)
    assert torch.equal(load_dictionary(path).rows([1, 9]), case.weights.W_dec[[1, 9]])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda root: root / "nowhere", "no dictionary"),
        (lambda root: root, "no dictionary"),
        (lambda root: torch.save([1], root / "x.pt") or root, "list"),
        (lambda root: torch.save({"a": torch.ones(2)}, root / "x.pt") or root, "'a'"),
        (lambda root: (root / "x.safetensors").write_bytes(b"{}") and root, "x.safetensors"),
        (lambda root: SimpleNamespace(W_dec=torch.ones(2, 2)), "encode, decode"),
        (lambda root: 7, "W_dec"),
    ],
)
def test_what_is_no_dictionary_is_named(make: Callable, named: str, tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=named):
        load_dictionary(make(tmp_path))


def test_a_folder_of_several_asks_which(tmp_path: Path) -> None:
    case = files.sparsify(tmp_path)
    with pytest.raises(NLAError, match=r"layers\.7.*subfolder"):
        load_dictionary(tmp_path)
    assert load_dictionary(tmp_path, subfolder="layers.7").cfg.hook_name == case.hook_name


def test_a_hub_repository_is_fetched_one_folder_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.sparsify(tmp_path)
    asked = {}

    def snapshot(repo: str, **kwargs: object) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    sae = load_dictionary("EleutherAI/sae-x", subfolder="layers.7", revision="v1")
    assert isinstance(sae, Dictionary)
    assert asked["repo"] == "EleutherAI/sae-x"
    assert asked["revision"] == "v1"
    assert "layers.7/*.safetensors" in asked["allow_patterns"]
    assert asked["ignore_patterns"] == ["layers.7/*/*"]


def test_an_object_with_the_three_names_is_taken_as_it_is() -> None:
    class Own:
        W_dec = torch.ones(3, 4)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        decode = encode

    own = Own()
    assert load_dictionary(own) is own
    with pytest.raises(NLAError, match="hook_name"):
        load_dictionary(own, hook_name="blocks.1.hook_resid_post")


def test_dictionaries_need_none_of_the_tools() -> None:
    code = (
        "import sys, nla_lens.adapters.sae, nla_lens.adapters.dictionaries.command;"
        "print({'sae_lens', 'transformer_lens', 'nnsight'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import re, sys
from nla_lens.adapters.sae import load_dictionary

# Not ru_maxrss: a new process begins with its parent's.
def highest():
    with open("/proc/self/status") as status:
        return re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1]

base = highest()
sae = load_dictionary(sys.argv[1])
rows = sae.rows([0, 11, 977, 4096, 9999, 20000, 31000, 44444, 60000, 65535])
peak = highest()
print(base, peak, [round(float(r[0]), 3) for r in rows], tuple(rows.shape))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
@pytest.mark.parametrize("name", ["goodfire", "saelens"])
def test_ten_latents_of_a_2_gb_matrix_cost_megabytes(name: str, tmp_path: Path) -> None:
    """The files have holes in place of zeros, so they take no room and no time to write."""
    d, f = 8192, 65536
    if name == "goodfire" and not hasattr(torch.serialization, "skip_data"):
        pytest.skip("torch.save writes no holes before 2.6")
    path = sparse_file(tmp_path, name, d, f)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    base, peak, rest = run.stdout.split(" ", 2)
    assert "(10, 8192)" in rest
    # In KiB, torch itself included in both.
    assert int(peak) - int(base) < 100 * 1024, (base, peak)


def sparse_file(root: Path, name: str, d: int, f: int) -> Path:
    """A dictionary of zeros whose two matrices have 2 GB each."""
    if name == "saelens":
        shapes = {"W_dec": [f, d], "W_enc": [d, f], "b_dec": [d], "b_enc": [f]}
        header, at = {}, 0
        for key, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        said = json.dumps(header).encode()
        path = root / "sae_weights.safetensors"
        with path.open("wb") as file:
            file.write(len(said).to_bytes(8, "little") + said)
            file.truncate(8 + len(said) + at)
        (root / "cfg.json").write_text(json.dumps({"d_in": d, "d_sae": f}))
        return path
    shapes = {
        "encoder_linear.weight": (f, d),
        "encoder_linear.bias": (f,),
        "decoder_linear.weight": (d, f),
        "decoder_linear.bias": (d,),
    }
    path = root / "X-SAE-l19.pth"
    # Never touched, so the two gigabytes are no memory; and left out of the file.
    with torch.serialization.skip_data():
        torch.save({k: torch.empty(s) for k, s in shapes.items()}, path)
    return path
