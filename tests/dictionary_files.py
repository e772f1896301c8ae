"""Writes dictionaries in the formats people publish, and computes them by arithmetic of its own.

The arithmetic is written row by row in float64 from the formats' papers and code, and shares
nothing with the adapter.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 12, 40, 5


@dataclass(frozen=True)
class Weights:
    """Random parameters; `W_enc` `[d, f]`, `W_dec` `[f, d]`, one vector per name."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor


def weights(d: int = D, f: int = F, seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return Weights(
        W_enc=draw(d, f) / math.sqrt(d),
        # Of lengths from 0.2 to 2: a reading that leaves them out is seen.
        W_dec=draw(f, d) * torch.linspace(0.2, 2.0, f)[:, None] / math.sqrt(d),
        b_enc=0.3 * draw(f),
        b_dec=0.5 * draw(d),
        threshold=0.2 + draw(f).abs(),
        b_gate=0.3 * draw(f),
        b_mag=0.3 * draw(f),
        r_mag=0.3 * draw(f),
    )


@dataclass(frozen=True)
class Case:
    """A dictionary on disk and what it must compute.

    Attributes:
        source: What is given to `load_dictionary`.
        weights: Its parameters.
        act: relu, jumprelu, topk or gated.
        subtract: Whether b_dec is taken off the input.
        scaled: Whether latents are in units of the directions' lengths.
        hook_name: Where it must say that it reads.
        scale: What the input is multiplied by before all else, and the output divided by.
        least: The one threshold, of latents as they are in the model times the directions' lengths.
    """

    source: Path
    weights: Weights
    act: str
    subtract: bool
    scaled: bool
    hook_name: str | None
    scale: float = 1.0
    least: float | None = None

    def encode(self, x_ND: Tensor) -> np.ndarray:
        w = {k: v.double().numpy() for k, v in vars(self.weights).items()}
        out = []
        for x in x_ND.double().numpy() * self.scale:
            x = x - w["b_dec"] if self.subtract else x
            row = []
            for i in range(w["W_dec"].shape[0]):
                dot = math.fsum(x * w["W_enc"][:, i])
                length = math.sqrt(math.fsum(w["W_dec"][i] ** 2)) if self.scaled else 1.0
                if self.act == "gated":
                    magnitude = max(dot * math.exp(w["r_mag"][i]) + w["b_mag"][i], 0.0)
                    row.append(length * magnitude if dot + w["b_gate"][i] > 0 else 0.0)
                    continue
                pre = dot + w["b_enc"][i]
                if self.act == "jumprelu" and pre <= w["threshold"][i]:
                    pre = 0.0
                value = length * max(pre, 0.0) / self.scale
                row.append(0.0 if self.least is not None and value <= self.least else value)
            if self.act == "topk":
                kept = sorted(range(len(row)), key=lambda i: -row[i])[:K]
                row = [v if i in kept else 0.0 for i, v in enumerate(row)]
            out.append(row)
        return np.array(out)

    def decode(self, acts_NF: np.ndarray) -> np.ndarray:
        w_dec = self.weights.W_dec.double().numpy()
        if self.scaled:
            w_dec = w_dec / np.sqrt((w_dec**2).sum(-1, keepdims=True))
        return acts_NF @ w_dec + self.weights.b_dec.double().numpy() / self.scale


def _json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _t(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _linear(w: Weights, encoder: str, decoder: str) -> dict[str, Tensor]:
    return {
        f"{encoder}.weight": _t(w.W_enc),
        f"{encoder}.bias": w.b_enc,
        f"{decoder}.weight": _t(w.W_dec),
        f"{decoder}.bias": w.b_dec,
    }


def qresearch(root: Path) -> Case:
    w, folder = weights(), root / "Llama-3.2-1B-Instruct-SAE-l9"
    folder.mkdir()
    torch.save(_linear(w, "encoder", "decoder"), folder / "Llama-3.2-1B-Instruct-SAE-l9.pt")
    return Case(folder, w, "relu", False, False, "blocks.9.hook_resid_pre")


def goodfire(root: Path) -> Case:
    w, folder = weights(), root / "somewhere"
    folder.mkdir()
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(_linear(w, "encoder_linear", "decoder_linear"), path)
    return Case(path, w, "relu", False, False, "blocks.19.hook_resid_post")


def saelens(root: Path, architecture: str = "standard", **cfg: object) -> Case:
    w, folder = weights(), root / f"saelens-{architecture}"
    folder.mkdir()
    names = ["W_enc", "W_dec", "b_dec"]
    names += ["b_gate", "b_mag", "r_mag"] if architecture == "gated" else ["b_enc"]
    names += ["threshold"] if architecture == "jumprelu" else []
    save_file({n: getattr(w, n) for n in names}, folder / "sae_weights.safetensors")
    own = {"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    settings = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.0",
            "hook_name": "blocks.2.hook_resid_post",
            "model_name": "a/b",
        },
        **own,
        **cfg,
    }
    _json(folder / "cfg.json", **settings)
    return Case(
        folder,
        w,
        {"standard": "relu"}.get(architecture, architecture),
        bool(settings["apply_b_dec_to_input"]),
        bool(settings.get("rescale_acts_by_decoder_norm")),
        "blocks.2.hook_resid_post",
    )


def saelens_before_6(root: Path) -> Case:
    case = saelens(root)
    _json(
        case.source / "cfg.json",
        d_in=D,
        d_sae=F,
        dtype="float32",
        hook_point="blocks.3.hook_resid_pre",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        apply_b_dec_to_input=True,
    )
    return Case(case.source, case.weights, "topk", True, False, "blocks.3.hook_resid_pre")


GEMMA_SCOPE_2 = {
    "resid_post": ("model.layers.{}.output", "hook_resid_post"),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", "attn.hook_z"),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output", "hook_mlp_out"),
}
"""Folder -> what `config.json` says, and the place (google/gemma-scope-2-4b-pt)."""


def gemma_scope(root: Path, kind: str = "resid_post", **cfg: object) -> Case:
    """As published: the place stands in it twice, and what it is."""
    w, folder = weights(), root / kind / "layer_12_width_16k_l0_medium"
    folder.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    stored = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    save_file({names.get(n, n): getattr(w, n) for n in stored}, folder / "params.safetensors")
    point, place = GEMMA_SCOPE_2[kind.removesuffix("_all")]
    settings = {
        "hf_hook_point_in": point.format(12),
        "hf_hook_point_out": point.format(12),
        "width": F,
        "model_name": "google/gemma-3-4b-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
        **cfg,
    }
    _json(folder / "config.json", **{k: v for k, v in settings.items() if v is not None})
    return Case(folder, w, "jumprelu", False, False, f"blocks.12.{place}")


LLAMA_SCOPE = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out"}


def llama_scope(root: Path, side: str = "R", **cfg: object) -> Case:
    """fnlp/Llama3_1-8B-Base-LX*-8x: the config above, the weights a level below."""
    w, folder = weights(), root / f"Llama3_1-8B-Base-L15{side}-8x"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(_linear(w, "encoder", "decoder"), folder / "checkpoints" / "final.safetensors")
    place = f"blocks.15.{LLAMA_SCOPE.get(side, 'hook_mlp_out')}"
    norm, threshold = 1.4, 0.15
    settings = {
        "device": "cuda:0",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "hook_point_in": place,
        "hook_point_out": place,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
        **cfg,
    }
    _json(folder / "hyperparams.json", **{k: v for k, v in settings.items() if v is not None})
    scaled = settings["sparsity_include_decoder_norm"] is not False
    scale = math.sqrt(D) / norm
    return Case(folder, w, "relu", False, scaled, place, scale, threshold)


def qwen_scope(root: Path, layers: tuple[int, ...] = (5,), config: bool = True) -> Case:
    """Qwen/SAE-Res-*: one file a layer beside one config."""
    folder = root / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir()
    for layer in layers:
        w = weights(seed=layer)
        state = {"W_enc": _t(w.W_enc), "W_dec": _t(w.W_dec), "b_enc": w.b_enc, "b_dec": w.b_dec}
        torch.save(state, folder / f"layer{layer}.sae.pt")
    if config:
        _json(
            folder / "config.json",
            model_type="topk_sae",
            base_model="Qwen/Qwen3-1.7B-Base",
            d_model=D,
            d_sae=F,
            k=K,
            num_layers=28,
            hook_point="resid_post",
            dtype="float32",
        )
    path = folder / f"layer{layers[-1]}.sae.pt"
    place = f"blocks.{layers[-1]}.hook_resid_post"
    return Case(path, w, "topk", False, False, place)


def sparsify(root: Path, name: str = "layers.7") -> Case:
    w, folder = weights(), root / name
    folder.mkdir()
    save_file(
        {
            "encoder.weight": _t(w.W_enc),
            "encoder.bias": w.b_enc,
            "W_dec": w.W_dec,
            "b_dec": w.b_dec,
        },
        folder / "sae.safetensors",
    )
    _json(folder / "cfg.json", d_in=D, num_latents=F, k=K, normalize_decoder=True)
    return Case(folder, w, "topk", True, False, "blocks.7.hook_resid_post")


def dictionary_learning(root: Path, kind: str) -> Case:
    w, folder = weights(), root / kind
    folder.mkdir()
    linear = {"encoder.weight": _t(w.W_enc), "decoder.weight": _t(w.W_dec)}
    bare = {"W_enc": w.W_enc, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    one = torch.tensor(0.7)
    state, act, subtract, scaled = {
        "AutoEncoder": (linear | {"encoder.bias": w.b_enc, "bias": w.b_dec}, "relu", True, False),
        "AutoEncoderNew": (_linear(w, "encoder", "decoder"), "relu", False, False),
        "AutoEncoderTopK": (
            linear
            | {
                "encoder.bias": w.b_enc,
                "b_dec": w.b_dec,
                "k": torch.tensor(K),
                "threshold": torch.tensor(-1.0),
            },
            "topk",
            True,
            False,
        ),
        "BatchTopKSAE": (
            linear
            | {
                "encoder.bias": w.b_enc,
                "b_dec": w.b_dec,
                "k": torch.tensor(K),
                "threshold": one,
            },
            "jumprelu",
            True,
            False,
        ),
        "MatryoshkaBatchTopKSAE": (
            bare | {"k": torch.tensor(K), "threshold": one, "group_sizes": torch.tensor([8, 32])},
            "jumprelu",
            True,
            False,
        ),
        "JumpReluAutoEncoder": (bare | {"threshold": w.threshold}, "jumprelu", False, True),
        "GatedAutoEncoder": (
            linear
            | {
                "decoder_bias": w.b_dec,
                "r_mag": w.r_mag,
                "gate_bias": w.b_gate,
                "mag_bias": w.b_mag,
            },
            "gated",
            True,
            True,
        ),
    }[kind]
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": F,
        "k": K,
        "layer": 8,
        "lm_name": "EleutherAI/pythia-160m",
        "submodule_name": "resid_post_layer_8",
    }
    _json(folder / "config.json", trainer=trainer, buffer={"ctx_len": 128})
    if kind.endswith("BatchTopKSAE") or kind == "BatchTopKSAE":
        w = Weights(**{**vars(w), "threshold": torch.full((F,), 0.7)})
    return Case(folder, w, act, subtract, scaled, "blocks.8.hook_resid_post")
