"""HTML from the jinja2 templates of the package; they escape every value."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_PACKAGE = Path(__file__).parent.parent


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The environment of all templates; a name that the caller did not give is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PACKAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template_name: str, /, **values: Any) -> str:
    """Fill a template, named by its path inside the package (``app/templates/slot_map.html.jinja``)."""
    return environment().get_template(template_name).render(values)
