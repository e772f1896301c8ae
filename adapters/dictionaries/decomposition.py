"""A residual in two languages: a dictionary's strongest latents beside the NLA's text for it.

Both reconstructions are compared with the vector in the same way, that of
`nla_lens.results.metrics`: both sides at length `mse_scale`, against the variance `var_nrm` of the
NLA's training vectors. So the dictionary is judged by its direction alone, as the NLA is, and not
by its usual explained variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nla_lens.adapters.dictionaries.features import explain_features
from nla_lens.adapters.dictionaries.latents import Latents
from nla_lens.adapters.dictionaries.loading import opened
from nla_lens.checks import is_int
from nla_lens.errors import NLAError
from nla_lens.foreign import harmless
from nla_lens.nla import NLA
from nla_lens.results import metrics
from nla_lens.results.explanation import Explanation
from nla_lens.stream.explainer import check_nla
from nla_lens.stream.injection import norms, unit
from nla_lens.stream.vectors import VectorsLike, check_vectors

if TYPE_CHECKING:
    from rich.table import Table

_LEAST_ERROR = 1e-5


@dataclass(frozen=True)
class ActiveLatent:
    """A latent in one residual.

    Attributes:
        index: The latent.
        activation: How strongly it is active.
        contribution: `activation * ||row||`, the length it adds.
        text: Its label, or the AV's text for its row.
    """

    index: int
    activation: float
    contribution: float
    text: str | None


@dataclass(frozen=True)
class Fit:
    """One reconstruction of the residual; see `nla_lens.results.metrics`.

    Attributes:
        cos: Cosine with the residual.
        mse_nrm: Mean squared difference, both at length `mse_scale`.
        fve_nrm: `1 - mse_nrm / var_nrm`; None without var_nrm.
        missed_share: `||error|| / ||x||` after the reconstruction was given its best length.
        missed_text: The AV's text for that error; None where there is none, or it was not asked.
    """

    cos: float
    mse_nrm: float
    fve_nrm: float | None
    missed_share: float
    missed_text: str | None


@dataclass(frozen=True)
class Decomposition:
    """A residual as a dictionary and as an NLA read it.

    Attributes:
        explanation: The NLA's, of the residual.
        latents: The dictionary's strongest latents, the largest contribution first.
        l0: How many latents are active.
        n_words: How many words the NLA's text has.
        sae: How the dictionary reconstructs the residual.
        nla: How the NLA does; None without a reconstructor.
        flags: `other_layer` or `unknown_place`, where the dictionary reads elsewhere.
    """

    explanation: Explanation
    latents: tuple[ActiveLatent, ...]
    l0: int
    n_words: int
    sae: Fit
    nla: Fit | None
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "explanation": self.explanation.to_dict(),
            "latents": [asdict(latent) for latent in self.latents],
            "l0": self.l0,
            "n_words": self.n_words,
            "sae": asdict(self.sae),
            "nla": None if self.nla is None else asdict(self.nla),
            "flags": list(self.flags),
        }

    def to_table(self) -> Table:
        """A table for terminals and notebooks."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            title=Text(harmless(" ".join(self.flags))) if self.flags else None,
            title_style="yellow",
        )
        table.add_column("", style="bold cyan", no_wrap=True)
        table.add_column("says", ratio=1, overflow="fold")
        table.add_column("", justify="right")
        table.add_row("NLA", Text(harmless(self.explanation.text)), f"{self.n_words} words")
        for latent in self.latents:
            table.add_row(
                f"latent {latent.index}",
                Text(harmless(latent.text or "")),
                f"{latent.contribution:.2f}",
            )
        for name, fit, size in (
            ("NLA", self.nla, f"{self.n_words} words"),
            ("SAE", self.sae, f"L0 {self.l0}"),
        ):
            if fit is None:
                continue
            fve = "" if fit.fve_nrm is None else f", fve {fit.fve_nrm:.2f}"
            table.add_section()
            table.add_row(f"{name} fits", Text(f"cos {fit.cos:.3f}{fve}"), size)
            if fit.missed_text is not None:
                missed = f"{fit.missed_share:.0%} of ||x||"
                table.add_row(f"{name} misses", Text(harmless(fit.missed_text)), missed)
        return table

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        return self.to_table()._repr_mimebundle_(*args, **kwargs)


def decompose(
    nla: NLA,
    sae: Any,
    residual: VectorsLike,
    *,
    top: int = 8,
    labels: Mapping[int, str] | None = None,
    explain_latents: bool = True,
    explain_errors: bool = True,
    **options: Any,
) -> Decomposition | list[Decomposition]:
    """Reads residuals with a dictionary and with the NLA, and compares the two.

    Args:
        nla: The NLA.
        sae: A dictionary, as `load_dictionary` takes or gives it.
        residual: `[d]`, or `[..., d]`; best a `ResidualTensor`, which knows its tokens.
        top: How many latents are shown.
        labels: Texts for latents from elsewhere, by index.
        explain_latents: Let the AV read the rows of latents that have no label.
        explain_errors: Let the AV read what each reconstruction misses.
        **options: Those of `NLA.explain`.

    Returns:
        A `Decomposition` for `[d]`, else a list in row-major order.

    Raises:
        NLAError: Another width, a dictionary outside the residual stream, or a vector that cannot
            be explained.
    """
    check_nla(nla)
    latents = Latents(opened(sae))
    flags = latents.place_flags(nla)
    if not is_int(top) or top < 1:
        raise NLAError(f"top={top!r} must be a positive integer")
    _check_labels(labels, latents.d_sae)
    batch = check_vectors(residual, nla.spec.d_model)
    # One after the other: greedy texts are the same in any batch.
    explained = list(nla.explain_iter(residual, **options))
    x_ND = batch.vectors_ND
    acts_NF = latents.encode(x_ND)
    strongest = [_strongest(latents, acts_F, top) for acts_F in acts_NF]
    texts = dict(labels or {})
    if explain_latents:
        needed = sorted({i for found in strongest for i, _, _ in found} - set(texts))
        wished = {**options, "score": False}
        texts |= {e.index: e.text for e in explain_features(nla, latents, needed, **wished)}
    sae_fits = _fits(nla, latents.reconstruct(x_ND), x_ND, explain_errors, options)
    nla_fits: Sequence[Fit | None] = [None] * len(x_ND)
    if nla.reconstructor is not None:
        said_ND = nla.reconstruct([e.text for e in explained])
        nla_fits = _fits(nla, said_ND, x_ND, explain_errors, options)
    found = [
        Decomposition(
            explanation=explained[n],
            latents=tuple(ActiveLatent(i, a, c, texts.get(i)) for i, a, c in strongest[n]),
            l0=int(acts_NF[n].ne(0).sum()),
            n_words=len(explained[n].text.split()),
            sae=sae_fits[n],
            nla=nla_fits[n],
            flags=flags,
        )
        for n in range(len(x_ND))
    ]
    return found if batch.shape else found[0]


def _check_labels(labels: Any, d_sae: int) -> None:
    """Raises an NLAError unless they are texts by index; in JSON every index is a text."""
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise NLAError(f"labels are a {type(labels).__name__}; expected texts by latent")
    for index, text in labels.items():
        if not is_int(index) or not 0 <= index < d_sae or not isinstance(text, str):
            raise NLAError(
                f"labels has {index!r:.80}: {text!r:.80}; expected a text by a latent's number, "
                f"an integer from 0 to {d_sae - 1}"
            )


def _strongest(latents: Latents, acts_F: Tensor, top: int) -> list[tuple[int, float, float]]:
    """(latent, activation, contribution) of the largest contributions."""
    active = acts_F.ne(0).nonzero()[:, 0].tolist()
    lengths = norms(latents.rows(active))[:, 0].tolist() if active else []
    if getattr(getattr(latents.source, "cfg", None), "scale_by_decoder_norm", False):
        # Their activations are lengths already.
        lengths = [1.0] * len(active)
    sized = [
        (i, float(acts_F[i]), float(acts_F[i]) * length)
        for i, length in zip(active, lengths, strict=True)
    ]
    return sorted(sized, key=lambda latent: -abs(latent[2]))[:top]


def _fits(
    nla: NLA, pred_ND: Tensor, x_ND: Tensor, explain_errors: bool, options: Mapping[str, Any]
) -> list[Fit]:
    spec = nla.spec
    scores = metrics.score(pred_ND, x_ND, mse_scale=spec.mse_scale, var_nrm=spec.var_nrm)
    # The length that leaves least over: AR gives a direction, and no length to blame it for.
    error_ND = x_ND - (x_ND * unit(pred_ND)).sum(-1, keepdim=True) * unit(pred_ND)
    share_N = norms(error_ND)[:, 0] / norms(x_ND)[:, 0]
    missed: list[str | None] = [None] * len(x_ND)
    readable = [n for n in range(len(x_ND)) if explain_errors and share_N[n] > _LEAST_ERROR]
    if readable:
        wished = {**options, "score": False, "progress": False}
        for n, e in zip(readable, nla.explain_iter(error_ND[readable], **wished), strict=True):
            missed[n] = e.text
    return [
        Fit(
            cos=float(scores.cos[n]),
            mse_nrm=float(scores.mse_nrm[n]),
            fve_nrm=None if scores.fve_nrm is None else float(scores.fve_nrm[n]),
            missed_share=float(share_N[n]),
            missed_text=missed[n],
        )
        for n in range(len(x_ND))
    ]
