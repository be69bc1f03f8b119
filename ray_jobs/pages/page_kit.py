"""Renders HTML pages from jinja2 templates, with plotly charts.

A page is a single file that loads no resources, so it works offline. Templates escape all values
but those of type `Markup`. Charts take their colors from the style sheet, as `var(--name)`.
"""

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ray_jobs.config.text import NONE, count_text, duration_text, number_text, percent_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"}
_AXIS = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False}


def render(template: str, **values: object) -> str:
    """Return a page.

    Args:
        template: Path of a template in the package `ray_jobs`, which extends `pages/base.html.j2`.
        **values: Values for the template.
    """
    environment = Environment(
        loader=PackageLoader("ray_jobs", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_text,
        "percent": percent_text,
        "duration": duration_text,
        "thousands": "{:,}".format,
    }
    environment.globals |= {"count_text": count_text, "NONE": NONE, "plotly_js": get_plotlyjs}
    page = environment.get_template(template).render(**values)
    # Lone surrogates cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def chart(figure: "Figure | None", label: str, height: int = 300) -> Markup:
    """Return a figure as HTML, in the style of the page; None gives an empty string.

    Args:
        figure: The figure; its texts are HTML, so text from the data must be escaped.
        label: Description of the chart for screen readers.
        height: Height in pixels.
    """
    if figure is None:
        return Markup()
    figure.update_layout(
        template="none",
        title=None,
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        font=_FONT,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "var(--card)", "align": "left", "font": {"color": "var(--ink)"}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    )
    figure.update_xaxes(automargin=True, **_AXIS)
    figure.update_yaxes(automargin=True, **_AXIS)
    return Markup(
        '<div class="chart" role="img" aria-label="{}" style="height:{}px" data-figure="{}"></div>'
    ).format(label, height, figure.to_json())
