"""Textures: from surface coordinates to a mixing weight between two colours."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from bidensify.data.scenes.shapes import Array

Generator = np.random.Generator
Texture = Callable[[Array, Array], Array]


def _edge(value: Array, sharpness: float) -> Array:
    """A soft step from 0 to 1 at value = 0."""
    step: Array = np.clip(value * np.float32(sharpness) + np.float32(0.5), 0, 1)
    return step


def stripes(random: Generator, periods: float) -> Texture:
    """Parallel stripes, ``periods`` in two units of u or v, along u, along v or slanted."""
    angle = float(random.choice([0.0, np.pi / 2, random.uniform(0.25, 0.6), -random.uniform(0.25, 0.6)]))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    frequency, phase = np.float32(np.pi * periods), np.float32(random.uniform(0, 2 * np.pi))
    duty = np.float32(random.uniform(-0.25, 0.25))
    return lambda u, v: _edge(np.sin((cos * u + sin * v) * frequency + phase) + duty, 1.8)


def spots(random: Generator, periods: float) -> Texture:
    """Round spots on a staggered grid, ``periods`` rows in two units of v."""
    frequency = np.float32(periods / 2)
    shift_u, shift_v = (np.float32(x) for x in random.uniform(0, 1, 2))
    radius = np.float32(random.uniform(0.27, 0.36))

    def texture(u: Array, v: Array) -> Array:
        y = v * frequency + shift_v
        row = np.floor(y)
        x = u * frequency + shift_u + np.float32(0.5) * (row % 2)
        dx, dy = x - np.floor(x) - np.float32(0.5), y - row - np.float32(0.5)
        return _edge(radius - np.sqrt(dx * dx + dy * dy), 7)

    return texture


def bricks(random: Generator, periods: float) -> Texture:
    """Bricks with light joints, ``periods`` courses in two units of v."""
    frequency = np.float32(periods / 2)
    length = np.float32(random.uniform(0.4, 0.6))

    def texture(u: Array, v: Array) -> Array:
        y = v * frequency
        row = np.floor(y)
        x = u * frequency * length + np.float32(0.5) * (row % 2)
        joint = np.minimum(np.abs(y - row - np.float32(0.5)), np.abs(x - np.floor(x) - np.float32(0.5)) * 2)
        return _edge(np.float32(0.43) - joint, 12)

    return texture


def tiles(random: Generator, periods: float) -> Texture:
    """A chequerboard, ``periods`` squares in two units."""
    frequency = np.float32(periods * np.pi / 2)
    return lambda u, v: _edge(np.sin(u * frequency) * np.sin(v * frequency), 3)


def plain(random: Generator, periods: float) -> Texture:
    """One colour."""
    return lambda u, v: np.full_like(u, 0.5)


def smooth_noise(random: Generator, shape: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Low-frequency noise (H, W) in [0, 1]: random values on a grid of ``cells``, interpolated smoothly."""
    grid = random.random((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    weights = []
    for length, count in zip(shape, cells, strict=True):
        position = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(count / length)
        index = np.minimum(position.astype(np.int64), count - 1)
        part = position - index
        part = part * part * (3 - 2 * part)
        matrix = np.zeros((length, count + 1), np.float32)
        rows = np.arange(length)
        matrix[rows, index] = 1 - part
        matrix[rows, index + 1] += part
        weights.append(matrix)
    noise: Array = weights[0] @ grid @ weights[1].T
    return noise


def colour_pair(random: Generator, contrast: float) -> Array:
    """Two linear colours (2, 3) of any hues whose brightness differs by at least ``contrast``, in random order.

    Every surface of a scene draws from here, so that a colour says nothing about a class.
    """
    low = random.uniform(0.12, 0.75 - contrast)
    values = [low, random.uniform(low + contrast, 0.9)]
    hue = random.uniform()
    pair = [
        colorsys.hsv_to_rgb((hue + random.uniform(-0.12, 0.12) + 0.5 * float(random.random() < 0.25)) % 1.0, s, v)
        for s, v in zip(random.uniform(0.05, 0.7, 2), values, strict=True)
    ]
    if random.random() < 0.5:
        pair.reverse()
    return np.array(pair, np.float32)
