"""A vector added to the residual stream while a model runs.

>>> direction = nla.steering_vector(explanation, "... in Oslo ...")
>>> with nla_lens.steer(model, direction, strength=1.0):
...     model.generate(**inputs)

At each chosen position `resid + strength * ||resid|| * vector / ||vector||`: strength is in units
of the residual's own norm there. By the hooks of the framework: the hook point of TransformerLens,
the hand-off of an nnsight module, a forward hook of a transformers block.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nla_lens.checks import is_int, is_number, plain
from nla_lens.errors import NLAError, NLAWarning
from nla_lens.models.anatomy import blocks_of, width_of
from nla_lens.models.turns import turn
from nla_lens.stream.explainer import Explainer, check_nla
from nla_lens.stream.frameworks import find_adapter
from nla_lens.stream.hook_point import ResidPost
from nla_lens.stream.injection import norms, unit
from nla_lens.stream.patching import patched, watched
from nla_lens.stream.residual import ResidualTensor
from nla_lens.stream.trail import Pass, Trail, Wanted, check_wanted, chosen, columns_alone, indices
from nla_lens.stream.vectors import check_vectors


def steer(
    model: Any,
    vector: Any,
    *,
    positions: Wanted = -1,
    strength: float = 1.0,
    steps: Wanted = None,
    layer: int | None = None,
    nla: Explainer | None = None,
) -> Steering:
    """Adds a vector to the residual stream of a model, as a `with` block.

    Only passes of the thread that enters it are steered. Several at once add up, each in units of
    the residual as it is without those of the same block. What is recorded meanwhile (caches,
    `hidden_states`, `.output` of a trace) is the steered residual; with transformers 4.57 the entry
    of `hidden_states` for the block itself is as it was before.

    Args:
        model: A transformers model (PEFT-wrapped too), TransformerBridge, HookedTransformer or
            nnsight model, loaded in this process.
        vector: `[d]`, a direction: its length does not matter.
        positions: Of each row's text, from 0 and without padding, as they are explained; a list, a
            slice, or None for all. Negative ones count from the end of what a step reads: -1 is the
            prompt's last token and then each token that is written, with a key-value cache as
            without; -3 is in the prompt alone.
        strength: In units of the residual's norm at each position; negative ones steer away.
        steps: Which steps of a generation: 0 is the prompt, k the k-th token written; None: all.
        layer: K, the block behind which it is added; None: that of the vector, else of `nla`.
        nla: Whose layer it is, where the vector does not know.

    Returns:
        What is entered. It may be entered again, also in itself, where it goes on as it is.

    Raises:
        NLAError: A vector of another width, not finite or zero; no such block, or none known;
            positions, steps or a strength that are none; a model that is not in this process.
    """
    if not is_number(strength) or not math.isfinite(strength):
        raise NLAError(f"strength={strength!r} must be a finite number")
    positions, steps = plain(positions), plain(steps)
    check_wanted("positions", positions, from_end=True)
    check_wanted("steps", steps, from_end=False)
    if nla is not None:
        check_nla(nla)
    d_model, n_blocks = _size(model)
    vector_D, place = _direction(vector, d_model), _place(vector, layer, nla)
    if not 0 <= place.layer < n_blocks:
        raise NLAError(
            f"layer {place.layer} does not exist: this {type(model).__name__} has "
            f"{n_blocks} blocks (0 to {n_blocks - 1})"
        )
    return Steering(model, place, vector_D, float(strength), positions, steps)


@dataclass(eq=False, repr=False)
class Steering:
    """See `steer`.

    Attributes:
        model: What is steered.
        place: Where.
        vector_D: The direction, float32 of norm 1.
        strength: In units of the residual's norm.
        positions: As asked for.
        steps: As asked for.
    """

    model: Any
    place: ResidPost
    vector_D: Tensor
    strength: float
    positions: Wanted
    steps: Wanted
    _inside: list[tuple[int, _Steered]] = field(default_factory=list, init=False)

    def __enter__(self) -> Steering:
        me = threading.get_ident()
        steered = _steered(self.model, self.place)
        # In a list: one that is entered again acts once, and until its first entry is over.
        steered.add(self)
        self._inside.append((me, steered))
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        me = threading.get_ident()
        own = [entry for entry in self._inside if entry[0] == me] or self._inside
        self._inside.remove(own[-1])
        acted = own[-1][1].remove(self)
        if not acted and kind is None:
            warnings.warn(NLAWarning(f"{self!r} changed nothing: {_NOWHERE}"), stacklevel=2)

    def __reduce__(self) -> Any:
        """Raises an NLAError: what it changes is in this process."""
        raise NLAError("a steering belongs to a model in this process and cannot be pickled")

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps!r}"
        return (
            f"Steering({type(self.model).__name__}, {self.place.name}, "
            f"positions={self.positions!r}, strength={self.strength:g}{steps})"
        )

    def check_reach(self, seen: Pass) -> None:
        """Refuses positions that a prompt does not have.

        Raises:
            NLAError: Names them.
        """
        if seen.step or self.positions is None or isinstance(self.positions, slice):
            return
        longest = int(seen.real_BT.sum(-1).max())
        for index in indices(self.positions):
            if index < -longest:
                raise NLAError(f"position {index} is not in a text of {longest} tokens")

    def acts_on(self, seen: Pass) -> Tensor:
        """`[B, T]`: which positions of a pass it changes."""
        return (
            seen.real_BT
            & chosen(self.positions, seen.position_BT, seen.from_end_BT)
            & chosen(self.steps, seen.step_BT)
        )


_NOWHERE = "none of its positions came up in what the model read"


class _Steered:
    """All that steers one thread's passes at one place: one edit, whatever there is to be added."""

    def __init__(self, model: Any, place: ResidPost, key: _Key) -> None:
        self._key, self._trail = key, Trail()
        self._members: list[Steering] = []
        self._acted: dict[int, bool] = {}
        self._passes: list[Pass | None] = []
        self._undo = contextlib.ExitStack()
        try:
            self._undo.enter_context(watched(model, place, self))
            self._undo.enter_context(patched(model, place, self.edit))
        except BaseException:
            self._undo.close()
            raise

    def add(self, steering: Steering) -> None:
        """One more, or one that is there once more."""
        self._members.append(steering)

    def remove(self, steering: Steering) -> bool:
        """One less; whether it had changed something where it could have."""
        with turn(Steering):
            self._members.remove(steering)
            if not self._members:
                _active.pop(self._key, None)
                self._undo.close()
        if any(member is steering for member in self._members):
            return True
        return self._acted.pop(id(steering), True)

    def begin(self, where_BT3: Tensor | None, n_past: int) -> None:
        """See `Watcher.begin`."""
        seen = None
        if where_BT3 is not None:
            # A pass that somebody's hook makes in the middle of another is none of its steps.
            trail = Trail() if self._passes else self._trail
            seen = trail.step(where_BT3, n_past)
        self._passes.append(seen)
        if seen is not None:
            for member in self._members:
                member.check_reach(seen)

    def end(self) -> None:
        """See `Watcher.end`."""
        if self._passes:
            self._passes.pop()

    def edit(self, resid_BTD: Tensor) -> Tensor:
        """The residual stream with everything added."""
        if resid_BTD.ndim != 3:
            raise NLAError(
                f"a residual stream of shape {tuple(resid_BTD.shape)} has no rows and positions to "
                "be steered at"
            )
        seen = self._passes[-1] if self._passes else None
        if seen is None or seen.position_BT.shape != resid_BTD.shape[:2]:
            seen = columns_alone(resid_BTD.shape[:2], resid_BTD.device)
        wide_BTD = resid_BTD if resid_BTD.dtype == torch.float64 else resid_BTD.float()
        norm_BT1 = norms(resid_BTD)
        changed_BT = torch.zeros(resid_BTD.shape[:2], dtype=torch.bool, device=resid_BTD.device)
        added_BTD = torch.zeros_like(wide_BTD)
        # An equal one is the same: `Steering` compares by identity.
        for member in dict.fromkeys(self._members):
            here_BT = member.acts_on(seen).to(resid_BTD.device)
            scale_BT1 = member.strength * norm_BT1 * here_BT[..., None]
            added_BTD = added_BTD + scale_BT1 * member.vector_D.to(resid_BTD.device)
            changed_BT |= here_BT
            acted = self._acted.get(id(member), False)
            self._acted[id(member)] = acted or bool(here_BT.any())
        steered_BTD = (wide_BTD + added_BTD).to(resid_BTD.dtype)
        return torch.where(changed_BT[..., None], steered_BTD, resid_BTD)


_Key = tuple[int, int, ResidPost]
_active: dict[_Key, _Steered] = {}
"""By thread, model and place; a model lives while it is in here, so its id is its own."""


def _steered(model: Any, place: ResidPost) -> _Steered:
    key = threading.get_ident(), id(model), place
    with turn(Steering):
        found = _active.get(key)
        if found is None:
            found = _active[key] = _Steered(model, place, key)
        return found


def _size(model: Any) -> tuple[int, int]:
    """Width and number of blocks of a model that is in this process.

    Raises:
        NLAError: It is not, or it is none.
    """
    adapter = find_adapter(model)
    own = getattr(adapter, "size_of", None)
    if own is not None:
        found: tuple[int, int] = own(model)
        return found
    return width_of(model), len(blocks_of(model))


def _direction(vector: Any, d_model: int) -> Tensor:
    shape = tuple(getattr(vector, "shape", ()))
    if shape and shape[-1] != d_model:
        raise NLAError(
            f"the vector has shape {shape}, and the residual stream of the model d_model={d_model}"
        )
    batch = check_vectors(vector, d_model)
    if len(batch) != 1:
        raise NLAError(f"a model is steered by one vector [d], found {len(batch)}; pick one")
    return unit(batch.vectors_ND)[0]


def _place(vector: Any, layer: int | None, nla: Explainer | None) -> ResidPost:
    if layer is not None:
        if not is_int(layer) or layer < 0:
            raise NLAError(f"layer={layer!r} must be the index of a block, from 0")
        return ResidPost(int(layer))
    origin = vector.known_origin() if isinstance(vector, ResidualTensor) else None
    place = None if origin is None else ResidPost.find(vector.hook_name)
    if place is None and nla is not None and nla.spec.layer is not None:
        place = ResidPost(nla.spec.layer)
    if place is None:
        raise NLAError(
            "behind which block to steer is not known from the vector; pass layer=, or nla= for "
            "the one that it reads"
        )
    return place
