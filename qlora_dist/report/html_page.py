"""Self-contained HTML pages, which need no other files and no network."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render_html(package: str, template: str, **values: Any) -> str:
    """Return the text of a page.

    Args:
        package: package whose `templates` hold the template, which extends `page.html.jinja`.
        template: name of the template.
        values: values that the template uses.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("qlora_dist.report")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(values)
