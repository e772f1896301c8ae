"""The pair: `NLA.from_pretrained`, `.explain`, `.reconstruct`, `.score`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_lens.checkpoints.names import name_halves
from nla_lens.checkpoints.pairs import Bases
from nla_lens.checkpoints.spec import NLASpec
from nla_lens.engines import per_half, remote_host
from nla_lens.engines.served.server import Server
from nla_lens.errors import NLAError
from nla_lens.halves.calibrated import Calibrated
from nla_lens.halves.loading import Request, load_halves
from nla_lens.halves.options import Options
from nla_lens.halves.reconstructing import Reconstructing
from nla_lens.halves.reconstructor import Reconstructor
from nla_lens.halves.saving import Saveable
from nla_lens.halves.shown import collected, run
from nla_lens.halves.source import OwnSource
from nla_lens.halves.verbalizer import Verbalizer
from nla_lens.models.placement import Placement
from nla_lens.results.explanation import Explanation
from nla_lens.results.explanations import Explanations
from nla_lens.stream.extraction import Positions, Source, Text
from nla_lens.stream.origin import Origin
from nla_lens.stream.residual import ResidualTensor
from nla_lens.stream.vectors import VectorBatch, VectorsLike, check_vectors


class NLA(Saveable, Calibrated, Reconstructing):
    """A natural language autoencoder: a verbalizer and, where there is one, a reconstructor.

    >>> nla = NLA.from_pretrained("tiny")
    >>> nla.explain(vector)                    # [d_model] -> Explanation
    >>> nla.explain(vectors).to_pandas()       # [n, d_model] -> Explanations

    Attributes:
        spec: What was loaded, and where each value came from.
        verbalizer: The AV, vectors to texts.
        reconstructor: The AR, texts to vectors; None if none was loaded.
        calibration: What `Explanation.trust` comes from; None if there is none.
    """

    def __init__(self, verbalizer: Verbalizer, reconstructor: Reconstructor | None = None) -> None:
        """Joins two loaded halves; `from_pretrained` is the usual way."""
        self.spec: NLASpec = verbalizer.spec
        self.verbalizer = verbalizer
        self.reconstructor = reconstructor
        self._source = OwnSource(self.spec)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        av: str | Path | None = None,
        ar: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        revision: str | None = None,
        injection: str | None = None,
        injection_scale: float | None = None,
        layer: int | None = None,
        subfolder: str | Mapping[str, str] | None = None,
        base: Bases = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        engine: str | Mapping[str, str] = "transformers",
        url: str | Server | Sequence[str | Server] | None = None,
        trust_remote_code: bool = False,
    ) -> NLA:
        """Loads a pair, or a verbalizer alone.

        Args:
            name: An embedded pair ("tiny", "tiny-norm-matched"), a pair's stem on the hub or on
                disk (`NAME-av`, `NAME-ar`), a directory or repository with both halves in it, or
                a verbalizer alone.
            av: Instead of `name`: the verbalizer, a directory or hub repository.
            ar: The reconstructor; also overrides the one `name` stands for.
            dtype: Of the weights; None is what config.json says.
            device: Where the weights go; None is the CPU.
            device_map: Instead of `device`: accelerate's way to spread a model.
            quantization_config: transformers' own, to load in 8 or 4 bits.
            revision: Branch, tag or commit on the hub.
            injection: "replace" or "norm_matched_add"; None takes the sidecar's or the known
                release's.
            injection_scale: Overrides the sidecar's; the verbalizer was trained with that one.
            layer: K, where neither sidecar nor known release says it.
            subfolder: A folder of what is named, or {"av": ..., "ar": ...}; a hub name may also
                have it at its end, "owner/name/folder".
            base: What LoRA halves go onto, instead of what their adapter_config.json names: a
                directory or hub repository, or {"av": ..., "ar": ...}.
            chat_template_kwargs: What the verbalizer's chat template is given beside the prompt,
                e.g. {"enable_thinking": False}; None takes the sidecar's.
            engine: Where the halves run: "transformers", "transformer_lens", "nnsight", "ndif";
                "vllm" and "sglang" (the verbalizer there, the rest by transformers here); or
                {"av": ..., "ar": ..., "source": ...}, each elsewhere.
            url: Where the vLLM or SGLang server is, or a list of several: requests are spread over
                them, and one that dies only costs its share of speed.
            trust_remote_code: Run Python code from the checkpoint. Off: code of strangers.

        Raises:
            NLAError: Not found, not an NLA, incomplete or contradictory.
        """
        halves = name_halves(name, av, ar, subfolder=subfolder, revision=revision)
        placement = Placement.of(dtype, device, device_map, quantization_config, trust_remote_code)
        request = Request(*halves, placement, revision, injection, injection_scale, layer, engine)
        request = replace(request, url=url, base=base, chat_template_kwargs=chat_template_kwargs)
        loaded_av, loaded_ar, av_files = load_halves(request)
        nla = cls(loaded_av, loaded_ar)
        nla.find_calibration(av_files)
        nla._source = OwnSource(nla.spec, placement, remote_host(per_half(engine)["source"]))
        return nla

    def __repr__(self) -> str:
        spec = self.spec
        halves = "AV + AR" if self.reconstructor else "AV alone"
        return (
            f"NLA({halves}, source={spec.source_model!r}, hook={spec.hook_name!r}, "
            f"d_model={spec.d_model}, injection={spec.injection!r}, var_nrm={spec.var_nrm})"
        )

    def explain(
        self,
        vectors: VectorsLike,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        num_samples: int = 1,
        seed: int | None = None,
        batch_size: int | None = None,
        prompt: str | None = None,
        score: bool | None = None,
        progress: bool | None = None,
    ) -> Explanation | Explanations:
        """Says in words what vectors hold.

        Args:
            vectors: `[d]`, `[n, d]`, `[batch, pos, d]` or a list of them, of any float dtype and
                device. A `ResidualTensor` tells its place, too; else `hook_name` is None: unknown.
            max_new_tokens: Longest explanation, in tokens.
            temperature: 0 is plain argmax, whatever the checkpoint's generation_config says.
            num_samples: Explanations per vector; needs a temperature above 0.
            seed: Makes sampling repeatable, in any batch.
            batch_size: Most vectors at once; None chooses from free memory.
            prompt: Another user turn, with `<INJECT>` where the vector goes.
            score: Reconstruct and compare; None does where there is a reconstructor.
            progress: A bar; None shows one when it takes long on a terminal or in a notebook.

        Returns:
            An `Explanation` for `[d]`, else `Explanations` with the shape of the leading axes.

        Raises:
            NLAError: A vector or an option that cannot be explained, before any model runs; or an
                engine that failed on the way. What was finished is in the error's `explanations`.
        """
        options = Options(
            max_new_tokens, temperature, num_samples, seed, batch_size, prompt, score, progress
        )
        batch = self._check(vectors, options)
        return collected(run(*self._parts, batch, options, table=True), batch.shape)

    def explain_iter(
        self, vectors: VectorsLike, *, stream: bool = False, **options: Any
    ) -> Iterator[Explanation]:
        """Like `explain`, yielding one explanation at a time as they finish, in input order.

        What has been yielded is yours whatever happens later. Bad input is refused by the call
        itself, not by the first step of the loop.

        With `stream`, a vector's text is also yielded after each of its tokens: flagged `partial`,
        unscored and not `complete`; what comes last for a vector is what `explain` gives. Vectors
        still come one after the other: those of a batch are written side by side, so the next one
        begins with what is there of it by then (`batch_size=1`: with its first token). It costs
        the decoding of one text a token, and the scoring of texts one by one.

        Args:
            vectors: As in `explain`; several leading axes come in row-major order.
            stream: Yield partial texts, too; for engines in this process.
            **options: As in `explain`.

        Raises:
            NLAError: As in `explain`; or the engine gives whole answers only.
        """
        wishes = Options.of(options)
        if stream:
            self.verbalizer.check_streams()
        return run(*self._parts, self._check(vectors, wishes), wishes, stream=stream)

    def _check(self, vectors: VectorsLike, options: Options) -> VectorBatch:
        self.check_options(options)
        return check_vectors(vectors, self.spec.d_model)

    def check_options(self, options: Options) -> None:
        """Raises an NLAError for options of `explain` that cannot work."""
        options.check(has_reconstructor=self.reconstructor is not None)
        if options.prompt is not None:
            self.verbalizer.custom_prompt(options.prompt)

    def explain_text(
        self,
        text: Text,
        positions: Positions = None,
        model: Any = None,
        generate: int = 0,
        **options: Any,
    ) -> Explanations:
        """Runs the source model on a text up to block K and explains what it holds.

        Args:
            text: A string, or a list of chat messages for the chat template.
            positions: Which tokens: indices, negative ones from the end, or a slice; None is all.
            model: A loaded model or a checkpoint directory; None is `spec.source_model`, loaded at
                the first call and kept.
            generate: Let the model go on writing (argmax) for this many tokens and explain those,
                too. On a terminal or in a notebook each explanation is shown while it is written.
            **options: As in `explain`.

        Returns:
            `Explanations` of shape `[n_positions + n_generated]`.

        Raises:
            NLAError: No source model is known, or a position the text does not have.
        """
        wishes = Options.of(options)
        self.check_options(wishes)
        resid = self._source.read(text, positions, model, generate, wishes.progress)
        batch = check_vectors(resid, self.spec.d_model)
        written = run(*self._parts, batch, wishes, table=True, live=generate > 0)
        explained = collected(written, batch.shape)
        if not isinstance(explained, Explanations):
            raise NLAError(f"expected one explanation per position, found {explained!r}")
        return explained

    def open_source(self, model: Any = None, *, whole: bool = False) -> Source:
        """The model whose residual stream is read; see `OwnSource.open`."""
        return self._source.open(model, whole=whole)

    def encode(self, x: VectorsLike, **options: Any) -> list[str]:
        """Texts of vectors, in row-major order: the SAE verb for `explain`."""
        score = None if options.get("num_samples", 1) > 1 else False
        return [e.text for e in self.explain_iter(x, **{"score": score, **options})]

    def __call__(self, x: VectorsLike, **options: Any) -> Tensor:
        """AR(AV(x)), the reconstruction of x in x's shape; float32 on the CPU, AR's own norm."""
        self._need_reconstructor()
        batch = check_vectors(x, self.spec.d_model)
        return self.decode(self.encode(x, **options)).reshape(*batch.shape, self.spec.d_model)

    def steering_vector(self, explanation: Explanation | str, edited: str) -> Tensor:
        """What an edit of an explanation means as a direction.

        Args:
            explanation: The original, or its text.
            edited: The text after the edit.

        Returns:
            `AR(edited) - AR(explanation)`, `[d]` float32, which knows its layer; adding it to the
            residual stream steers the source model (`nla_lens.steer`).
        """
        difference_D = self._need_reconstructor().difference(str(explanation), edited)
        origin = replace(Origin.unknown(()), hook_name=self.spec.hook_name, nla=self)
        return ResidualTensor.wrap(difference_D, origin)
