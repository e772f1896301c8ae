"""Filling the prompt templates of downloaded files; needs no torch."""

from __future__ import annotations

from nla_lens.errors import NLAError


def fill(template: str, placeholder: str, value: str) -> str:
    """Puts `value` where the one `placeholder` stands.

    Not `str.format`: a template comes from a downloaded file, and format fields read attributes.

    Raises:
        NLAError: The placeholder is not there exactly once.
    """
    count = template.count(placeholder)
    if count != 1:
        raise NLAError(
            f"the prompt template must contain {placeholder} exactly once, found {count}: "
            f"{template[:120]!r}"
        )
    return template.replace(placeholder, value)
