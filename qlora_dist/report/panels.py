"""Figures of several panels, drawn with matplotlib for pages and files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Callable[[Any], None]
"""A function that draws on one of matplotlib's axes."""
MATPLOTLIB_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "qlora-dist", "font.size": 8, "legend.fontsize": 7}
"""Settings for a picture in a page."""
_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def draw_panels(panels: Sequence[Panel], width: float, row_height: float, columns: int = 2) -> Figure:
    """Draw panels on a grid in reading order. Sizes are in inches."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width, row_height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def panels_to_svg(panels: Sequence[Panel], row_height: float) -> Markup:
    """Draw panels as a self-contained `<svg>` element, which is equal for equal panels."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(MATPLOTLIB_SETTINGS):
        draw_panels(panels, 11, row_height).savefig(file, format="svg", metadata=_METADATA)
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])


def stack_bars(axis: Any, names: Sequence[Any], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw a stack of bars for each name, with one bar for each part."""
    bottom = [0.0] * len(names)
    for label, heights in parts.items():
        axis.bar(names, heights, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    if parts:
        axis.legend()
