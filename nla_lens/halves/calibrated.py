"""The calibration of a loaded NLA: found beside its checkpoint, or given to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.releases import EMBEDDED_DIRS
from nla_lens.errors import NLAError, NLAWarning
from nla_lens.results.calibration import Calibration

if TYPE_CHECKING:
    from nla_lens.checkpoints.spec import NLASpec
    from nla_lens.halves.reconstructor import Reconstructor
    from nla_lens.halves.verbalizer import Verbalizer

_ENTRIES: Final = 8


class Calibrated:
    """What an `NLA` knows of how far it can be trusted.

    Attributes:
        spec: What was loaded.
        verbalizer: The AV.
        reconstructor: The AR, where there is one.
        home: The folder its verbalizer was loaded from, where that is one of the user's own.
    """

    spec: NLASpec
    verbalizer: Verbalizer
    reconstructor: Reconstructor | None
    home: Path | None = None
    _calibration: Calibration | None = None

    @property
    def calibration(self) -> Calibration | None:
        """What `Explanation.trust` comes from; None: there is no trust.

        Raises:
            NLAError: On setting: it was fitted on another NLA.
        """
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            if not isinstance(calibration, Calibration):
                raise NLAError(
                    f"a calibration is a nla_lens.Calibration, found {calibration!r:.80}; of a "
                    "file, Calibration.load(path)"
                )
            calibration.check_fits(self.identity())
        self._calibration = calibration

    @property
    def _parts(self) -> tuple[Verbalizer, Reconstructor | None, Calibration | None]:
        """What a run needs."""
        return self.verbalizer, self.reconstructor, self._calibration

    def identity(self) -> dict[str, Any]:
        """What tells it from another NLA, in any dtype and engine."""
        spec, ar = self.spec, self.reconstructor
        found: dict[str, Any] = {
            "d_model": spec.d_model,
            "hook_name": spec.hook_name,
            "injection": spec.injection,
            "injection_scale": spec.injection_scale,
            "var_nrm": spec.var_nrm,
        }
        if ar is not None:
            flat = ar.weight_DD.flatten()
            entries = flat[:: max(1, len(flat) // _ENTRIES)][:_ENTRIES]
            found["value_head"] = [float(f"{float(entry):.6g}") for entry in entries]
        return {name: value for name, value in found.items() if value is not None}

    def find_calibration(self, av: Checkpoint) -> None:
        """Takes the calibration that lies beside a verbalizer.

        One that cannot be used is no reason not to load an NLA: a warning says why there is no
        trust.
        """
        self.home = _own_folder(av)
        path = av.calibration_path
        if path is None or self.reconstructor is None:
            return
        try:
            self.calibration = Calibration.load(path)
        except NLAError as error:
            warnings.warn(
                NLAWarning(f"{error}; {path} is not used, and there is no trust"), stacklevel=4
            )


def _own_folder(av: Checkpoint) -> Path | None:
    """Where a verbalizer lies, if that is a directory that the caller named and may change."""
    named = Path(av.name).expanduser()
    inside = any(map(named.resolve().is_relative_to, EMBEDDED_DIRS))
    return av.path if named.is_dir() and not inside else None
