"""Writing an NLA back: `av/` and `ar/` as transformers reads them, a complete sidecar, a card.

What runs is what is written: a LoRA half as the model it was merged into, each weight in the dtype
it has here. Every half carries a sidecar of its own, as the first releases do, and the same one
without a role lies at the top.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nla_lens.checkpoints import hub
from nla_lens.checkpoints.card import model_card
from nla_lens.checkpoints.layout import HEAD_NAME
from nla_lens.checkpoints.needed import TOKENIZER_FILES
from nla_lens.checkpoints.sidecar import SIDECAR_NAME, Role
from nla_lens.checkpoints.template import template_of
from nla_lens.checkpoints.writing import sidecar_text
from nla_lens.disk.folder import scratch, write_folder
from nla_lens.disk.writing import writing
from nla_lens.errors import NLAError
from nla_lens.models.tokenizer_names import TEMPLATE_NAME

if TYPE_CHECKING:
    from nla_lens.checkpoints.spec import NLASpec
    from nla_lens.halves.reconstructor import Reconstructor
    from nla_lens.halves.verbalizer import Verbalizer

_OURS: Final = frozenset({"av", "ar", SIDECAR_NAME, "README.md"})


class Saveable:
    """What an `NLA` does to be written.

    Attributes:
        spec: What was loaded.
        verbalizer: The AV.
        reconstructor: The AR, where there is one.
        calibration: Where `Explanation.trust` comes from, where there is one; it is written, too.
    """

    spec: NLASpec
    verbalizer: Verbalizer
    reconstructor: Reconstructor | None
    calibration: Any

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        evaluation: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes the NLA: `av/`, `ar/`, `nla_meta.yaml`, `README.md`.

        `NLA.from_pretrained(directory)` gives back the same spec, and in float32 the same texts and
        vectors to the last bit. LoRA halves are written merged into their base.

        Args:
            directory: Empty, not there yet, or written by an earlier call.
            overwrite: Replace whatever else is there, with all that is in it.
            evaluation: Names and numbers for the card's table, e.g. {"fve_nrm": 0.75}.

        Returns:
            The directory.

        Raises:
            NLAError: Something else is there; or a half's weights are not in this process (engines
                `ndif`, `vllm`, `sglang`), or not as transformers has them.
        """
        models = _models(self)
        ours = _OURS | ({self.spec.centre_mean} if self.spec.centre_mean else set())
        return write_folder(
            directory,
            lambda folder: _write(self, models, folder, evaluation),
            ours=ours,
            overwrite=overwrite,
        )

    def push_to_hub(
        self,
        repo: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes the NLA into a repository of the Hugging Face hub, made if there is none.

        Args:
            repo: `owner/name`.
            token: With the right to write; None is the one of `hf auth login`, or HF_TOKEN.
            private: Whether a repository that is made is private; None is the owner's default.
            evaluation: As in `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            NLAError: As `save_pretrained`; or the hub refuses, or is not reached.
        """
        hub.check_repo(repo)
        models = _models(self)
        with scratch() as made:
            with writing(made):
                _write(self, models, made, evaluation, name=repo)
            return hub.push(made, repo, token=token, private=private, message="Add an NLA")


def _models(nla: Saveable) -> dict[Role, Any]:
    """The transformers model of each half.

    Raises:
        NLAError: A half whose weights are not in this process, or are quantized.
    """
    halves: dict[Role, Any] = {
        "av": nla.verbalizer.engine,
        "ar": getattr(nla.reconstructor, "engine", None),
    }
    found: dict[Role, Any] = {}
    for half, engine in halves.items():
        if engine is None:
            continue
        model = getattr(engine, "hf_model", None)
        if model is None:
            raise NLAError(
                f"the {half.upper()} runs by {type(engine).__name__}, and its weights are not here "
                'as transformers has them: load it with engine="transformers" to write it'
            )
        if getattr(model, "is_quantized", False):
            raise NLAError(
                f"the {half.upper()} is quantized, which rounded its weights: load it without "
                "quantization to write it"
            )
        found[half] = model
    return found


def _write(
    nla: Saveable,
    models: Mapping[Role, Any],
    folder: Path,
    evaluation: Mapping[str, Any] | None,
    name: str | None = None,
) -> None:
    tokenizers: dict[Role, Any] = {"av": nla.verbalizer.tokenizer}
    if nla.reconstructor is not None:
        tokenizers["ar"] = nla.reconstructor.tokenizer
    homes: dict[Role | None, Path] = {None: folder}
    for half, model in models.items():
        home = homes[half] = folder / half
        home.mkdir()
        with _told("the weights", home):
            model.save_pretrained(home, safe_serialization=True)
        with _told("the tokenizer", home):
            _write_tokenizer(tokenizers[half], home)
    if nla.reconstructor is not None:
        with _told("the value head", folder / "ar"):
            _write_head(nla.reconstructor, models["ar"], folder / "ar")
    if nla.calibration is not None:
        nla.calibration.save(folder / "av")
    for role, home in homes.items():
        with _told("the sidecar", home):
            (home / SIDECAR_NAME).write_text(sidecar_text(nla.spec, role), encoding="utf-8")
            if nla.spec.centre_mean is not None:
                _write_mean(nla.verbalizer.mean_D, home / nla.spec.centre_mean)
    card = model_card(nla.spec, halves=tuple(models), evaluation=evaluation, name=name)
    with _told("the card", folder):
        (folder / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def _told(what: str, home: Path) -> Iterator[None]:
    """Says what could not be written."""
    try:
        yield
    except (NLAError, OSError):
        # Whoever asked names the place that is meant.
        raise
    # On a full disk safetensors and tokenizers raise what is neither an OSError nor a ValueError.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise NLAError(
            f"{what} cannot be written to {home} ({type(error).__name__}: {reason})"
        ) from error


def _write_tokenizer(tokenizer: Any, home: Path) -> None:
    """The files it was read from, as they are; a tokenizer written anew ties it to a version."""
    source = Path(str(tokenizer.name_or_path))
    if (source / "tokenizer_config.json").is_file():
        for path in sorted(source.iterdir()):
            named = any(fnmatch.fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES)
            if named and path.is_file():
                shutil.copyfile(path, home / path.name)
    else:
        tokenizer.save_pretrained(str(home))
    # It may come from elsewhere: from an adapter, or a folder of several.
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is not None and template_of(home) != template:
        (home / TEMPLATE_NAME).write_bytes(template.encode("utf-8"))


def _write_head(reconstructor: Reconstructor, model: Any, home: Path) -> None:
    from safetensors.torch import save_file

    head = {"weight": reconstructor.weight_DD}
    if reconstructor.bias_D is not None:
        head["bias"] = reconstructor.bias_D
    # It is kept in float32; in its model's dtype where nothing is lost.
    fits = all(bool((t.to(model.dtype).float() == t).all()) for t in head.values())
    dtype = model.dtype if fits else None
    save_file(
        {key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in head.items()},
        str(home / HEAD_NAME),
        metadata={"format": "pt"},
    )


def _write_mean(mean_D: Any, path: Path) -> None:
    import numpy as np
    from safetensors.torch import save_file

    if path.suffix == ".npy":
        np.save(path, mean_D.numpy(), allow_pickle=False)
    else:
        save_file({"mean": mean_D}, str(path), metadata={"format": "pt"})
