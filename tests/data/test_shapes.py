"""Ray intersections against points sampled along each ray, and the renderer's depth against the solids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidensify.data.scenes import SPLITS, generate
from bidensify.data.scenes.layout import BALL, CRATE, DIE, MAX_DEPTH, MELON, PYLON, SKY, draw_layout
from bidensify.data.scenes.shapes import Box, Ellipsoid, Frustum, Solid


def solids(random: np.random.Generator) -> list[Solid]:
    x, z = float(random.uniform(-1, 1)), float(random.uniform(3, 5))
    half, height, turn = (float(v) for v in random.uniform((0.5, 0.8, 0), (1.0, 2.0, 1.5)))
    return [
        Ellipsoid(x, z, half, height, turn),
        Box(x, z, half, height, turn, float(random.uniform(0.4, 0.9))),
        Frustum(x, z, half, height, turn, float(random.uniform(0.1, 1.0))),
    ]


def contains(solid: Solid, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The solid's definition, written as an inequality."""
    x, z = x - solid.x, z - solid.z
    if isinstance(solid, Ellipsoid):
        ry = solid.height / 2
        return (x**2 + z**2) / solid.half**2 + ((y - ry) / ry) ** 2 <= 1
    inside = (y >= 0) & (y <= solid.height)
    if isinstance(solid, Box):
        c, s = np.cos(solid.turn), np.sin(solid.turn)
        return inside & (np.abs(c * x + s * z) <= solid.half) & (np.abs(c * z - s * x) <= solid.depth_half)
    assert isinstance(solid, Frustum)
    radius = solid.half * (1 - (1 - solid.taper) * y / solid.height)
    return inside & (x**2 + z**2 <= radius**2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2))
def test_hits_are_where_sampling_finds_them(seed: int, kind: int) -> None:
    random = np.random.default_rng(seed)
    solid = solids(random)[kind]
    eye = float(random.uniform(0.5, 2.6))
    # Rays that aim near the solid, from the eye.
    px = solid.x + random.uniform(-1.3, 1.3, 300)
    py = random.uniform(-0.3, solid.height + 0.5, 300)
    dx, dy = (px / solid.z).astype(np.float32), ((py - eye) / solid.z).astype(np.float32)
    t = solid.hit((np.float32(0), np.float32(eye), np.float32(0)), (dx, dy, np.float32(1)))
    steps = np.linspace(0.5, 8, 3001)
    inside = contains(solid, dx[:, None] * steps, eye + dy[:, None] * steps, np.broadcast_to(steps, (300, 3001)))
    found = inside.any(1)
    first = steps[inside.argmax(1)]
    # A ray that only grazes the solid can fall between two samples, never the other way round.
    assert np.isfinite(t[found]).all()
    assert np.abs(t[found] - first[found]).max(initial=0) < 0.03
    assert (np.isfinite(t) & ~found).mean() < 0.03


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_normals_are_units_and_face_the_eye(kind: int) -> None:
    random = np.random.default_rng(kind)
    for _ in range(5):
        solid = solids(random)[kind]
        dx = ((solid.x + random.uniform(-1, 1, 400)) / solid.z).astype(np.float32)
        dy = ((random.uniform(0, solid.height, 400) - 1.6) / solid.z).astype(np.float32)
        t = solid.hit((np.float32(0), np.float32(1.6), np.float32(0)), (dx, dy, np.float32(1)))
        hit = np.isfinite(t)
        assert hit.sum() > 50
        t, dx, dy = t[hit], dx[hit], dy[hit]
        surface = solid.surface(dx * t, 1.6 + dy * t, t)
        nx, ny, nz = surface.normal
        assert np.allclose(nx**2 + ny**2 + nz**2, 1, atol=1e-3)
        # A point on an edge may get the normal of the face beside it.
        assert ((nx * dx + ny * dy + nz) < 1e-2).mean() > 0.99
        assert np.isfinite(surface.u).all()
        assert np.isfinite(surface.v).all()


def test_depth_of_a_scene_is_that_of_its_objects() -> None:
    """Every object pixel lies on the object's surface: its depth is the nearest hit among the scene's solids."""
    height, width = 48, 64
    for index in range(6):
        random = np.random.Generator(np.random.PCG64([0, SPLITS.index("val"), index]))
        layout = draw_layout(random, height / width)
        _, mask, depth = generate(0, "val", index, (height, width))
        focal = layout.focal * width
        dx = np.broadcast_to(((np.arange(width) + 0.5) - width / 2) / focal, (height, width)).ravel()
        dy = np.repeat((layout.horizon * height - (np.arange(height) + 0.5)) / focal, width)
        origin = (np.float32(0), np.float32(layout.eye), np.float32(0))
        rays = (dx.astype(np.float32), dy.astype(np.float32), np.float32(1))
        hits = np.stack([thing.solid.hit(origin, rays) for thing in layout.things])
        nearest, owner = hits.min(0), hits.argmin(0)
        labels = np.array([thing.label for thing in layout.things])[owner]
        for label in (BALL, MELON, CRATE, DIE, PYLON):
            seen = mask.ravel() == label
            assert np.allclose(depth.ravel()[seen], nearest[seen], rtol=1e-4)
            assert (labels[seen] == label).all()
        assert (depth[mask == SKY] == 0).all()
        assert depth.max() <= MAX_DEPTH
