"""An HTML page from a template beside this file, in a file of its own that needs no other."""

from pathlib import Path
from typing import Any

import jinja2


def write_html(template: str, out: Path, **values: Any) -> Path:
    """``out``, now the template with these values, text escaped. Folders that are missing are made."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
