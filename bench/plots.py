"""Colours and ticks of all plots: blue is MEGALODON, orange a Transformer, grey the same work in plain torch."""

from typing import Any

INK, GREY, LIGHT = "#24292f", "#8c959f", "#eaeef2"
BLUE, ORANGE, GREEN, RED = "#2f6fb0", "#d9822b", "#3a8f5c", "#b5433f"


def plain_ticks(*axes: Any) -> None:
    """Label logarithmic axes (matplotlib's `Axis`) with plain numbers: powers of ten; on short axes also 2 and 5 times them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_minor_formatter(NullFormatter())
