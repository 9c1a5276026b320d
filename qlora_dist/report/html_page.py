"""What all pages have in common: they need nothing else, no network either."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATPLOTLIB_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "qlora-dist", "font.size": 8, "legend.fontsize": 7}
"""Matplotlib's, for a picture in a page."""
_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def render_html(package: str, template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        package: whose `templates` hold the template, which extends `page.html.jinja`.
        template: its name.
        values: that it names.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("qlora_dist.report")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(values)


def figure_to_svg(figure: Figure) -> Markup:
    """A picture as an `<svg>` element, the same each time. Called with `MATPLOTLIB_SETTINGS` in force."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_METADATA)
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])
