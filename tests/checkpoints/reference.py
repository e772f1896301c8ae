"""What an AV and an AR should compute, in plain arithmetic, for tests to compare with.

No generate(), no padding, no from_pretrained of a model and nothing of the library under test:
weights are read from the safetensors files by name, every token is the likeliest of a pass over the
whole sequence before it, without a cache, and one row at a time is run where rows differ in length.

    av = AV(directory)                      # or AV(directory, injection="norm_matched_add")
    ids = av.greedy(vectors, 48).ids        # [n, 48]
    ar = AR(directory)
    x_hat = ar.vector("some text")          # [d]
"""

import inspect
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, DynamicCache

_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.")
_NOT_TEXT = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


def _short(name: str) -> str:
    """`model.layers.0...` and the wrapper's names -> `layers.0...`; `lm_head.weight` stays."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All text tensors under short names; those of a LoRA adapter are merged into its base."""
    if (directory / "adapter_config.json").exists():
        return _merge_lora(directory)
    files = sorted(directory.glob("model*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    return {
        _short(name): value for name, value in tensors.items() if not name.startswith(_NOT_TEXT)
    }


def _merge_lora(directory: Path) -> dict[str, torch.Tensor]:
    adapter = json.loads((directory / "adapter_config.json").read_text())
    rank, alpha = adapter["r"], adapter["lora_alpha"]
    scaling = alpha / math.sqrt(rank) if adapter.get("use_rslora") else alpha / rank
    tensors = read_tensors(Path(adapter["base_model_name_or_path"]))
    lora = load_file(directory / "adapter_model.safetensors")
    for name in lora:
        if name.endswith(".lora_A.weight"):
            a, b = lora[name], lora[name.replace(".lora_A.", ".lora_B.")]
            target = _short(name.removeprefix("base_model.model.")).replace(".lora_A.", ".")
            tensors[target] = tensors[target].float() + scaling * (b.float() @ a.float())
    return tensors


def read_text_config(directory: Path) -> dict:
    """The decoder's config, unwrapped; `rope_theta` at the top, where every version reads it."""
    if (directory / "adapter_config.json").exists():
        return read_text_config(
            Path(
                json.loads((directory / "adapter_config.json").read_text())[
                    "base_model_name_or_path"
                ]
            )
        )
    config = json.loads((directory / "config.json").read_text())
    config = dict(config.get("text_config", config))
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        if "sliding_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    for key in ("dtype", "torch_dtype", "transformers_version", "architectures"):
        config.pop(key, None)
    return config


def read_sidecar(directory: Path) -> dict:
    return yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))


def layer_of(meta: dict) -> int:
    """K, the block whose output is meant."""
    return (
        meta["extraction_layer_index"]
        if "extraction_layer_index" in meta
        else meta["extraction"]["layer_index"]
    )


def decoder(
    tensors: dict, config: dict, n_blocks: int, dtype: torch.dtype, norm: bool
) -> torch.nn.Module:
    """The text model's first blocks; without `norm` it returns the output of the last of them."""
    config = dict(config, num_hidden_layers=n_blocks)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:n_blocks]
    model = AutoModel.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager"
    ).float()
    wanted = set(model.state_dict()) - (set() if norm else {"norm.weight"})
    model.load_state_dict({name: tensors[name].float() for name in wanted}, strict=False)
    if not norm:
        model.norm = torch.nn.Identity()
    return model.eval().to(dtype)


class Greedy(NamedTuple):
    """`ids` [n, N], not cut at an EOS, and by how much each logit leads, `margins` [n, N]."""

    ids: torch.Tensor
    margins: torch.Tensor


class AV:
    """Vectors -> token ids.

    Args:
        directory: a checkpoint or a LoRA adapter with its sidecar.
        injection: "replace" or "norm_matched_add".
        dtype: of the arithmetic; float64 tells whether float32 was enough.
    """

    def __init__(
        self, directory: Path | str, injection: str = "replace", dtype: torch.dtype = torch.float32
    ) -> None:
        directory = Path(directory)
        self.injection, self.dtype = injection, dtype
        self.meta, self.config = read_sidecar(directory), read_text_config(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        tensors = read_tensors(directory)
        self.table = tensors["embed_tokens.weight"].to(dtype)
        self.output = tensors.get("lm_head.weight", tensors["embed_tokens.weight"]).to(dtype)
        self.model = decoder(
            tensors, self.config, self.config["num_hidden_layers"], dtype, norm=True
        )
        self.prompt_ids = self._prompt_ids()
        self.marker_position = self._marker_position()

    def _prompt_ids(self) -> list[int]:
        templates = self.meta["prompt_templates"]
        template = templates["av"] if "av" in templates else templates["actor"]
        content = template.replace("{injection_char}", self.meta["tokens"]["injection_char"])
        message = [{"role": "user", "content": content}]
        rendered = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _marker_position(self) -> int:
        tokens, ids = self.meta["tokens"], self.prompt_ids
        wanted = [
            tokens[f"injection_{name}_id"] for name in ("left_neighbor", "token", "right_neighbor")
        ]
        sites = [i for i in range(1, len(ids) - 1) if ids[i - 1 : i + 2] == wanted]
        (position,) = sites
        return position

    def injection_scale(self) -> float | None:
        scale = self.meta["extraction"].get("injection_scale")
        if scale == "sqrt_d_model":
            return math.sqrt(self.config["hidden_size"])
        return None if scale is None else float(scale)

    def embeds(self, ids_NT: torch.Tensor) -> torch.Tensor:
        """What enters block 0: rows of the table, for Gemma times sqrt(d)."""
        rows = self.table[ids_NT]
        return (
            rows * math.sqrt(self.config["hidden_size"])
            if self.config["model_type"] == "gemma3_text"
            else rows
        )

    def prompt_embeds(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """[n, T, d] as they enter block 0 under the replace rule."""
        ids = torch.tensor(self.prompt_ids).expand(len(vectors_ND), -1)
        return self._replaced(self.embeds(ids), vectors_ND)

    def _replaced(self, embeds_NTD: torch.Tensor, vectors_ND: torch.Tensor) -> torch.Tensor:
        v, scale = vectors_ND.to(self.dtype), self.injection_scale()
        embeds_NTD = embeds_NTD.clone()
        embeds_NTD[:, self.marker_position] = (
            v if scale is None else v * scale / v.norm(dim=-1, keepdim=True)
        )
        return embeds_NTD

    def _add_at_block_1(self, vectors_ND: torch.Tensor):
        v = vectors_ND.to(self.dtype)
        unit = v / v.norm(dim=-1, keepdim=True)

        def hook(_module, _inputs, output):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            at = h[:, self.marker_position]
            h[:, self.marker_position] = at + at.norm(dim=-1, keepdim=True) * unit
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return self.model.layers[1].register_forward_hook(hook)

    def logits(self, ids_NT: torch.Tensor, vectors_ND: torch.Tensor | None) -> torch.Tensor:
        """Logits [n, vocab] behind whole sequences; without vectors nothing is injected."""
        return self._pass(ids_NT, vectors_ND)[:, -1] @ self.output.T

    @torch.no_grad()
    def _pass(
        self, ids_NT: torch.Tensor, vectors_ND: torch.Tensor | None, cache: object = None
    ) -> torch.Tensor:
        """What leaves the final norm, [n, T, d]; `cache` is for drafts alone."""
        embeds = self.embeds(ids_NT)
        hook = None
        if vectors_ND is not None and self.injection == "replace":
            embeds = self._replaced(embeds, vectors_ND)
        elif vectors_ND is not None:
            hook = self._add_at_block_1(vectors_ND)
        named = inspect.signature(self.model.forward).parameters
        takes_cache_as = "cache" if "cache" in named else "past_key_values"
        options = {"use_cache": False} if cache is None else {takes_cache_as: cache}
        hidden = self.model(inputs_embeds=embeds, **options).last_hidden_state
        if hook is not None:
            hook.remove()
        return hidden

    def greedy(self, vectors_ND: torch.Tensor, n_tokens: int) -> Greedy:
        """The likeliest token, n_tokens times, each by a forward pass over all before it.

        One pass reads a draft as a whole. What it says behind a token holds where everything up to
        there is what it said itself, so it is kept up to the first token that is another one, and
        the rest is drafted again: how the draft was made (with a cache) changes how many passes it
        takes, and nothing else.
        """
        prompt = torch.tensor(self.prompt_ids).repeat(len(vectors_ND), 1)
        ids, margins = prompt, torch.empty(len(vectors_ND), 0)
        while ids.shape[1] < prompt.shape[1] + n_tokens:
            drafted = self._draft(ids, vectors_ND, prompt.shape[1] + n_tokens)
            hidden = self._pass(drafted[:, :-1], vectors_ND)[:, ids.shape[1] - 1 :]
            best = (hidden @ self.output.T).topk(2, dim=-1)
            agrees = (best.indices[..., 0] == drafted[:, ids.shape[1] :]).all(0)
            # The first column that is another one is right, too: all before it was.
            n = min(int(agrees.long().cumprod(0).sum()) + 1, len(agrees))
            ids = torch.cat([ids, best.indices[:, :n, 0]], dim=1)
            margins = torch.cat([margins, (best.values[..., 0] - best.values[..., 1])[:, :n]], 1)
        return Greedy(ids[:, prompt.shape[1] :], margins)

    def _draft(self, ids: torch.Tensor, vectors_ND: torch.Tensor, length: int) -> torch.Tensor:
        """`ids` [n, T], with a guess at what follows, up to T = length."""
        cache = DynamicCache()
        hidden = self._pass(ids, vectors_ND, cache)
        while True:
            ids = torch.cat([ids, (hidden[:, -1] @ self.output.T).argmax(-1, keepdim=True)], dim=1)
            if ids.shape[1] >= length:
                return ids
            # The injection is in the cache.
            hidden = self._pass(ids[:, -1:], None, cache)

    def eos_ids(self, directory: Path | str) -> list[int]:
        return json.loads((Path(directory) / "generation_config.json").read_text())["eos_token_id"]


class AR:
    """Text -> vector: W @ (output of block K at the last token) (+ bias)."""

    def __init__(self, directory: Path | str, dtype: torch.dtype = torch.float32) -> None:
        directory = Path(directory)
        self.meta, self.dtype = read_sidecar(directory), dtype
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        head = load_file(directory / "value_head.safetensors")
        self.weight, self.bias = head["weight"].to(dtype), head.get("bias")
        n_blocks = layer_of(self.meta) + 1
        self.model = decoder(
            read_tensors(directory), read_text_config(directory), n_blocks, dtype, norm=False
        )

    def prompt_ids(self, text: str) -> list[int]:
        templates = self.meta["prompt_templates"]
        template = templates["ar"] if "ar" in templates else templates["critic"]
        before, after = template.split("{explanation}")
        return self.tokenizer(before + text + after, add_special_tokens=True)["input_ids"]

    @torch.no_grad()
    def hidden(self, text: str) -> torch.Tensor:
        """Output of block K at the last token, [d]."""
        ids = torch.tensor([self.prompt_ids(text)])
        return self.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]

    def vector(self, text: str) -> torch.Tensor:
        """The reconstruction, [d], not normalised."""
        raw = self.weight @ self.hidden(text)
        return raw if self.bias is None else raw + self.bias.to(self.dtype)

    def vectors(self, texts: list[str]) -> torch.Tensor:
        """[n, d], one text at a time."""
        return torch.stack([self.vector(text) for text in texts])


def cos(p_ND: torch.Tensor, g_ND: torch.Tensor) -> torch.Tensor:
    return (p_ND * g_ND).sum(-1) / (p_ND.norm(dim=-1) * g_ND.norm(dim=-1))


def mse_nrm(p_ND: torch.Tensor, g_ND: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the two, each scaled to norm sqrt(d)."""
    root = math.sqrt(p_ND.shape[-1])
    p, g = (x * root / x.norm(dim=-1, keepdim=True) for x in (p_ND, g_ND))
    return ((p - g) ** 2).mean(-1)


def fve_nrm(p_ND: torch.Tensor, g_ND: torch.Tensor, var_nrm: float) -> torch.Tensor:
    return 1 - mse_nrm(p_ND, g_ND) / var_nrm
