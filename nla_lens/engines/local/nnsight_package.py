"""nnsight, or what to install. Nothing of it is imported above: who lacks it is told so here."""

from __future__ import annotations

from typing import Any

from nla_lens.errors import NLAError


def import_nnsight() -> Any:
    """The nnsight package.

    Raises:
        NLAError: It is not installed, or too old.
    """
    try:
        import nnsight
    except ImportError as error:
        raise NLAError(
            "the engines 'nnsight' and 'ndif' need nnsight 0.8: pip install 'nla-lens[nnsight]'"
        ) from error
    if not hasattr(nnsight, "TransformersModel"):
        raise NLAError(
            f"nnsight {nnsight.__version__} has no TransformersModel: pip install 'nnsight>=0.8'"
        )
    return nnsight
