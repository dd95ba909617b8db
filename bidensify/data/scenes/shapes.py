"""Solids of the generated scenes and their intersection with rays.

World: x to the right, y up, z away from the camera; the ground is y = 0, lengths are metres. A bundle of rays is an origin
(three scalars or (K,) arrays) and directions (three (K,) arrays); the ray parameter t counts directions. The camera's
directions have z = 1, so that t of a hit, seen from the camera, is its depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Ray = tuple[Any, Any, Any]

MISS = np.float32(np.inf)


class Surface(NamedTuple):
    """What is known of points on a surface; all (K,)."""

    normal: tuple[Array, Array, Array]
    u: Array  # texture coordinates, in units of which a texture has a few periods per object
    v: Array


@dataclass(frozen=True)
class Solid:
    """A convex solid standing on the ground.

    Attributes:
        x, z: position of its centre on the ground.
        half: half of its width (ellipsoid, frustum: its radius at the base).
        height: of its top.
        turn: rotation about the vertical, radians.
    """

    x: float
    z: float
    half: float
    height: float
    turn: float

    @property
    def reach(self) -> float:
        """Radius of the smallest upright cylinder that holds the solid."""
        return self.half

    def hit(self, origin: Ray, direction: Ray) -> Array:
        """Returns t of the first hit in front of the origin, (K,); infinite where the ray misses."""
        raise NotImplementedError

    def surface(self, px: Array, py: Array, pz: Array) -> Surface:
        """Returns normals and texture coordinates at points (K,) on the surface."""
        raise NotImplementedError


def _first_root(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Returns both roots of a t² + 2 b t + c = 0 in ascending order; infinite where there is none."""
    disc = b * b - a * c
    root = np.sqrt(np.maximum(disc, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (-b - root) / a, (-b + root) / a
    miss = (disc < 0) | (a == 0)
    one[miss] = MISS
    two[miss] = MISS
    return np.minimum(one, two), np.maximum(one, two)


@dataclass(frozen=True)
class Ellipsoid(Solid):
    """An ellipsoid of revolution about the vertical, touching the ground."""

    def hit(self, origin: Ray, direction: Ray) -> Array:
        """See :meth:`Solid.hit`."""
        ry = self.height / 2
        ox, oy, oz = (origin[0] - self.x) / self.half, (origin[1] - ry) / ry, (origin[2] - self.z) / self.half
        dx, dy, dz = direction[0] / self.half, direction[1] / ry, direction[2] / self.half
        a = np.asarray(dx * dx + dy * dy + dz * dz, np.float32)
        near, _ = _first_root(a, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1)
        return np.where(near > 1e-3, near, MISS)

    def surface(self, px: Array, py: Array, pz: Array) -> Surface:
        """See :meth:`Solid.surface`; u runs along the equator, v along a meridian of a tilted axis."""
        ry = self.height / 2
        x, y, z = (px - self.x) / self.half, (py - ry) / ry, (pz - self.z) / self.half
        nx, ny, nz = x / self.half, y / ry, z / self.half
        scale = 1 / np.sqrt(nx * nx + ny * ny + nz * nz)
        tilt = np.float32(self.turn)
        cos, sin = np.cos(tilt), np.sin(tilt)
        x, y = cos * x - sin * y, sin * x + cos * y
        u = np.arctan2(x, -z) / np.float32(np.pi / 2)
        v = np.arcsin(np.clip(y, -1, 1)) / np.float32(np.pi / 2)
        return Surface((nx * scale, ny * scale, nz * scale), u, v)


@dataclass(frozen=True)
class Box(Solid):
    """A box, turned about the vertical; ``half`` by ``depth_half`` on the ground."""

    depth_half: float

    @property
    def reach(self) -> float:
        """See :attr:`Solid.reach`."""
        return float(np.hypot(self.half, self.depth_half))

    def _local(self, x: Any, z: Any) -> tuple[Any, Any]:
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        return cos * x + sin * z, cos * z - sin * x

    def hit(self, origin: Ray, direction: Ray) -> Array:
        """See :meth:`Solid.hit` (slab method)."""
        ox, oz = self._local(origin[0] - self.x, origin[2] - self.z)
        dx, dz = self._local(direction[0], direction[2])
        near, far = np.float32(1e-3), MISS
        slabs = (
            (ox, dx, -self.half, self.half),
            (origin[1], direction[1], 0.0, self.height),
            (oz, dz, -self.depth_half, self.depth_half),
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            for o, d, low, high in slabs:
                one, two = (low - o) / d, (high - o) / d
                near = np.maximum(near, np.minimum(one, two))
                far = np.minimum(far, np.maximum(one, two))
        # A ray inside a slab's plane divides 0 by 0; NaN compares false and counts as a miss.
        return np.where((near <= far) & (near > 1e-3), near, MISS).astype(np.float32)

    def surface(self, px: Array, py: Array, pz: Array) -> Surface:
        """See :meth:`Solid.surface`; each face has its own coordinates from −1 to 1."""
        x, z = self._local(px - self.x, pz - self.z)
        x, z, y = x / self.half, z / self.depth_half, py / (self.height / 2) - 1
        ax, ay, az = np.abs(x), np.abs(y), np.abs(z)
        on_x, on_y = (ax >= ay) & (ax >= az), (ay > ax) & (ay >= az)
        sx, sz = np.where(on_x, np.sign(x), 0), np.where(on_x | on_y, 0, np.sign(z))
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        normal = (
            (cos * sx - sin * sz).astype(np.float32),
            np.where(on_y, np.sign(y), 0).astype(np.float32),
            (sin * sx + cos * sz).astype(np.float32),
        )
        return Surface(normal, np.where(on_x, z, x), np.where(on_y, z, y))


@dataclass(frozen=True)
class Frustum(Solid):
    """An upright truncated cone, from a cylinder (``taper`` = 1) to a cone (``taper`` = 0)."""

    taper: float

    def hit(self, origin: Ray, direction: Ray) -> Array:
        """See :meth:`Solid.hit`."""
        ox, oy, oz = origin[0] - self.x, origin[1], origin[2] - self.z
        dx, dy, dz = direction
        # The radius falls linearly: r(y) = half - slope * y.
        slope = np.float32(self.half * (1 - self.taper) / self.height)
        radius = self.half - slope * oy
        a = np.asarray(dx * dx + dz * dz - (slope * dy) ** 2, np.float32)
        b = ox * dx + oz * dz + radius * slope * dy
        c = ox * ox + oz * oz - radius * radius
        best = np.full_like(a, MISS)
        for t in _first_root(a, b, c):
            with np.errstate(invalid="ignore"):
                y = oy + t * dy
            best = np.where((t > 1e-3) & (t < best) & (y >= 0) & (y <= self.height), t, best)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.height - oy) / dy
            cx, cz = ox + t * dx, oz + t * dz
            top = (t > 1e-3) & (t < best) & (cx * cx + cz * cz <= (self.half * self.taper) ** 2)
        return np.where(top, t, best).astype(np.float32)

    def surface(self, px: Array, py: Array, pz: Array) -> Surface:
        """See :meth:`Solid.surface`; u runs around, v upwards; on the top, outwards."""
        x, z = px - self.x, pz - self.z
        distance = np.maximum(np.sqrt(x * x + z * z), np.float32(1e-6))
        slope = np.float32(self.half * (1 - self.taper) / self.height)
        scale = 1 / np.sqrt(1 + slope * slope)
        top = py > self.height * np.float32(0.999)
        normal = (
            np.where(top, 0, x / distance * scale).astype(np.float32),
            np.where(top, 1, slope * scale).astype(np.float32),
            np.where(top, 0, z / distance * scale).astype(np.float32),
        )
        u = (np.arctan2(x, -z) + np.float32(self.turn)) / np.float32(np.pi / 2)
        v = np.where(top, distance / self.half, py / (self.height / 2) - 1)
        return Surface(normal, u, v.astype(np.float32))
