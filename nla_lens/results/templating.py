"""Our own templates for pages; everything that goes into one is escaped."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from nla_lens.foreign import harmless

if TYPE_CHECKING:
    import jinja2


@cache
def template(name: str) -> jinja2.Template:
    """A template of ours, by its file name."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nla_lens.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_spelled,
    )
    return environment.get_template(name)


def _spelled(value: Any) -> Any:
    """Text of strangers without what steers a page; what is marked as ours stays as it is."""
    is_foreign = isinstance(value, str) and not hasattr(value, "__html__")
    return harmless(value) if is_foreign else value
