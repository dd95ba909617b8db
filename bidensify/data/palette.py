"""Colours for classes."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]


def default_palette(classes: int) -> tuple[Colour, ...]:
    """Returns ``classes`` well separated colours (golden-angle hues at three brightness levels)."""
    colours = []
    for index in range(classes):
        rgb = colorsys.hsv_to_rgb((index * 0.61803399) % 1.0, 0.55 + 0.3 * (index % 2), 0.95 - 0.2 * (index % 3))
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return tuple(colours)
