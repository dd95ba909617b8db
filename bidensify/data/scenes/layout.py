"""What stands where in a generated scene: camera, light, backdrop and objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bidensify.data.scenes import textures
from bidensify.data.scenes.shapes import Array, Box, Ellipsoid, Frustum, Solid
from bidensify.data.scenes.textures import Generator, Texture

CLASS_NAMES = ("sky", "ground", "wall", "ball", "melon", "crate", "die", "pylon")
PALETTE = (
    (120, 190, 240),
    (130, 120, 105),
    (190, 165, 140),
    (225, 70, 70),
    (75, 175, 85),
    (235, 165, 50),
    (110, 95, 210),
    (240, 110, 200),
)
SKY, GROUND, WALL, BALL, MELON, CRATE, DIE, PYLON = range(len(CLASS_NAMES))
MAX_DEPTH = 40.0


@dataclass(frozen=True)
class Look:
    """How a surface looks: two linear colours (2, 3) mixed by a texture, and a gloss from 0 to 1."""

    colours: Array
    texture: Texture
    gloss: float = 0.0


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    label: int
    solid: Solid
    look: Look


@dataclass(frozen=True)
class Wall:
    """A vertical plane of the backdrop: depth 1 / (a + b · u) at u = (column − centre) / focal length.

    Attributes:
        a, b: of the inverse depth, 1 / metres.
        low, high: range of u that it covers.
        height: metres.
    """

    a: float
    b: float
    low: float
    high: float
    height: float
    look: Look


@dataclass(frozen=True)
class Layout:
    """A whole scene.

    Attributes:
        eye: height of the camera, metres.
        focal: focal length in image widths.
        horizon: row of the horizon as a share of the image's height.
        light: unit vector towards the light.
        ambient: share of the light that comes from everywhere.
    """

    eye: float
    focal: float
    horizon: float
    light: tuple[float, float, float]
    ambient: float
    tint: Array
    ground: Look
    sky: Array
    walls: tuple[Wall, ...]
    things: tuple[Thing, ...]


def draw_layout(random: Generator, aspect: float) -> Layout:
    """Draws a scene for an image of ``aspect`` = height / width."""
    eye = float(random.uniform(1.3, 2.2))
    focal = float(random.uniform(0.85, 1.15))
    horizon = float(random.uniform(0.22, 0.5))
    azimuth, elevation = random.uniform(-1.0, 1.0) * np.pi * 0.8, np.deg2rad(random.uniform(28, 65))
    light = (
        float(np.cos(elevation) * np.sin(azimuth)),
        float(np.sin(elevation)),
        float(-np.cos(elevation) * np.cos(azimuth)),
    )
    ground_texture = (textures.plain, textures.tiles, textures.stripes, textures.spots)[random.integers(4)]
    ground = Look(textures.colour_pair(random, 0.1), ground_texture(random, float(random.uniform(1.0, 2.5))))
    walls = _draw_walls(random, focal)
    things = _draw_things(random, focal, aspect, eye, horizon, walls)
    return Layout(
        eye=eye,
        focal=focal,
        horizon=horizon,
        light=light,
        ambient=float(random.uniform(0.3, 0.5)),
        tint=random.uniform(0.85, 1.15, 3).astype(np.float32),
        ground=ground,
        sky=textures.colour_pair(random, 0.15),
        walls=walls,
        things=things,
    )


def _draw_walls(random: Generator, focal: float) -> tuple[Wall, ...]:
    edge = 0.5 / focal
    walls = []
    kind = random.random()
    if kind < 0.15:
        spans = []
    elif kind < 0.4:
        spans = [(-edge, edge)]
    else:
        cuts = np.sort(random.uniform(-edge, edge, 2 * int(random.integers(1, 3))))
        spans = [(float(a), float(b)) for a, b in cuts.reshape(-1, 2) if b - a > 0.12]
        spans = [(-edge if random.random() < 0.3 else a, edge if random.random() < 0.3 else b) for a, b in spans[:2]]
    for low, high in spans:
        inverse = 1 / random.uniform(11, 24)
        slope = random.uniform(-0.6, 0.6) * inverse / edge
        height = float(random.uniform(2.5, 9.0))
        kinds = (textures.bricks, textures.bricks, textures.plain, textures.stripes, textures.spots)
        texture = kinds[random.integers(5)](random, float(random.uniform(1.0, 2.2)))
        walls.append(Wall(inverse, slope, low, high, height, Look(textures.colour_pair(random, 0.1), texture)))
    return tuple(walls)


def _draw_things(
    random: Generator, focal: float, aspect: float, eye: float, horizon: float, walls: tuple[Wall, ...]
) -> tuple[Thing, ...]:
    things: list[Thing] = []
    taken: list[tuple[float, float, float]] = []
    # Nearest depth whose ground is still in the image, so that most objects are seen with their base.
    nearest = max(3.2, eye * focal / ((1 - horizon) * aspect))
    for _ in range(int(random.integers(4, 9))):
        label = int(random.integers(BALL, PYLON + 1))
        for _ in range(6):
            z = float(nearest + (10.5 - nearest) * random.random() ** 1.3)
            x = float(random.uniform(-0.5, 0.5) / focal * z)
            solid = _SOLIDS[label](random, x, z)
            room = all(1 / (w.a + w.b * x / z) > z + solid.reach + 0.3 for w in walls if w.a + w.b * x / z > 0)
            if room and all(np.hypot(x - a, z - b) > solid.reach + r for a, b, r in taken):
                taken.append((x, z, solid.reach))
                things.append(Thing(label, solid, _look(random, label)))
                break
    return tuple(things)


def _look(random: Generator, label: int) -> Look:
    if label == PYLON:
        texture = (textures.stripes, textures.spots)[random.integers(2)]
    else:
        texture = textures.spots if label in (BALL, DIE) else textures.stripes
    periods = float(random.uniform(2.6, 4.2))
    return Look(textures.colour_pair(random, 0.28), texture(random, periods), float(random.uniform(0, 0.6)))


def _ellipsoid(random: Generator, x: float, z: float) -> Solid:
    half = float(random.uniform(0.5, 1.0))
    return Ellipsoid(x, z, half, 2 * half * float(random.uniform(0.75, 1.15)), float(random.uniform(-1.2, 1.2)))


def _box(random: Generator, x: float, z: float) -> Solid:
    half, depth_half = (float(value) for value in random.uniform(0.45, 0.85, 2))
    return Box(x, z, half, float(random.uniform(0.9, 1.7)), float(random.uniform(0, np.pi / 2)), depth_half)


def _frustum(random: Generator, x: float, z: float) -> Solid:
    half = float(random.uniform(0.4, 0.75))
    return Frustum(
        x, z, half, float(random.uniform(1.3, 2.4)), float(random.uniform(0, 6.3)), float(random.uniform(0.1, 0.9))
    )


_SOLIDS: dict[int, Callable[[Generator, float, float], Solid]] = {
    BALL: _ellipsoid,
    MELON: _ellipsoid,
    CRATE: _box,
    DIE: _box,
    PYLON: _frustum,
}
