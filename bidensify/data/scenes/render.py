"""Renders a layout to an image, a mask and a depth map by casting one ray per pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bidensify.data.scenes import textures
from bidensify.data.scenes.layout import GROUND, MAX_DEPTH, SKY, WALL, Layout, Look, Thing
from bidensify.data.scenes.shapes import MISS, Array
from bidensify.data.scenes.textures import Generator

Rendered = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], Array]


class _Canvas:
    """Per-pixel buffers of one picture, (H, W) each; rays leave the eye with z = 1."""

    def __init__(self, layout: Layout, height: int, width: int) -> None:
        self.layout = layout
        self.height, self.width = height, width
        self.focal = layout.focal * width
        self.ray_x = ((np.arange(width, dtype=np.float32) + np.float32(0.5)) - np.float32(width / 2)) / np.float32(
            self.focal
        )
        rows = np.arange(height, dtype=np.float32) + np.float32(0.5)
        self.ray_y = (np.float32(layout.horizon * height) - rows) / np.float32(self.focal)
        self.depth = np.full((height, width), MISS, np.float32)
        self.label = np.full((height, width), SKY, np.uint8)
        self.albedo = np.empty((height, width, 3), np.float32)
        self.normal = np.zeros((3, height, width), np.float32)
        self.gloss = np.zeros((height, width), np.float32)
        self.owner = np.full((height, width), -1, np.int16)

    def paint(self, where: Any, look: Look, u: Array, v: Array) -> None:
        """Sets the albedo of the pixels ``where``, given their texture coordinates."""
        weight = look.texture(u, v)[..., None]
        self.albedo[where] = look.colours[0] + weight * (look.colours[1] - look.colours[0])


def render(random: Generator, layout: Layout, height: int, width: int) -> Rendered:
    """Renders a scene.

    Returns:
        image uint8 (H, W, 3); mask uint8 (H, W); depth float32 (H, W) in metres, 0 where there is none (sky, and
        ground beyond ``MAX_DEPTH``).
    """
    canvas = _Canvas(layout, height, width)
    _sky(random, canvas)
    _ground(random, canvas)
    _walls(canvas)
    for index, thing in enumerate(layout.things):
        _thing(canvas, index, thing)
    image = _light(random, canvas)
    depth = np.where(canvas.depth <= MAX_DEPTH, canvas.depth, np.float32(0))
    return _sensor(random, image, layout), canvas.label, depth


def _sky(random: Generator, canvas: _Canvas) -> None:
    low, high = canvas.layout.sky
    up = np.clip(canvas.ray_y * 2, 0, 1)[:, None, None]
    clouds = textures.smooth_noise(random, (canvas.height, canvas.width), (6, 5))
    clouds = clouds + 0.5 * textures.smooth_noise(random, (canvas.height, canvas.width), (14, 10))
    amount = np.clip(clouds * 2 - np.float32(random.uniform(1.0, 2.2)), 0, 1)[..., None] * np.float32(0.8)
    base = low + up * (high - low)
    canvas.albedo[:] = base + amount * (np.float32(0.85) - base)


def _ground(random: Generator, canvas: _Canvas) -> None:
    first = int(np.searchsorted(-canvas.ray_y, 0, side="right"))
    if first >= canvas.height:
        return
    z = np.float32(canvas.layout.eye) / -canvas.ray_y[first:]
    depth = np.broadcast_to(z[:, None], (len(z), canvas.width))
    x = canvas.ray_x * depth
    canvas.depth[first:] = depth
    canvas.label[first:] = GROUND
    canvas.normal[1, first:] = 1
    where = np.s_[first:]
    canvas.paint(where, canvas.layout.ground, x, np.ascontiguousarray(depth))
    # A texture finer than a pixel would alias: far ground fades to the mean colour.
    fade = np.clip(1.6 - z / 9, 0, 1)[:, None, None]
    mean = canvas.layout.ground.colours.mean(0)
    canvas.albedo[where] = mean + fade * (canvas.albedo[where] - mean)
    grain = textures.smooth_noise(random, (len(z), canvas.width), (max(2, len(z) // 3), 24))
    canvas.albedo[where] *= (np.float32(0.85) + np.float32(0.3) * grain)[..., None]


def _walls(canvas: _Canvas) -> None:
    eye = canvas.layout.eye
    for wall in canvas.layout.walls:
        columns = np.flatnonzero((canvas.ray_x >= wall.low) & (canvas.ray_x <= wall.high))
        inverse = wall.a + wall.b * canvas.ray_x[columns]
        columns = columns[inverse > 1 / MAX_DEPTH]
        if not len(columns):
            continue
        z = 1 / inverse[inverse > 1 / MAX_DEPTH].astype(np.float32)
        y = eye + canvas.ray_y[:, None] * z
        block = np.s_[:, columns[0] : columns[-1] + 1]
        seen = (y >= 0) & (y <= wall.height) & (z < canvas.depth[block])
        # Along the wall, lengths grow with the slant.
        along = canvas.ray_x[columns] * z * np.float32(np.hypot(1, wall.b / wall.a))
        u, v = np.broadcast_to(along, y.shape)[seen], y[seen]
        rows, cols = np.nonzero(seen)
        where = (rows, cols + columns[0])
        canvas.depth[where] = np.broadcast_to(z, y.shape)[seen]
        canvas.label[where] = WALL
        normal = np.array([-wall.b, 0, -wall.a]) / np.hypot(wall.a, wall.b)
        for axis in range(3):
            canvas.normal[axis][where] = normal[axis]
        canvas.paint(where, wall.look, u, v)


def _thing(canvas: _Canvas, index: int, thing: Thing) -> None:
    solid, eye = thing.solid, canvas.layout.eye
    near = max(solid.z - solid.reach, 0.3)
    # The solid's bounding cylinder, seen from the eye: its columns at its nearest, its rows at both ends.
    sides = [(solid.x + side * solid.reach) / z for side in (-1, 1) for z in (near, solid.z + solid.reach)]
    left, right = np.searchsorted(canvas.ray_x, [min(sides), max(sides)])
    high = max((solid.height - eye) / z for z in (near, solid.z + solid.reach))
    top, bottom = np.searchsorted(-canvas.ray_y, [-high, eye / near])
    if left >= right or top >= bottom:
        return
    block = np.s_[top:bottom, left:right]
    shape = (bottom - top, right - left)
    dx = np.broadcast_to(canvas.ray_x[left:right], shape).ravel()
    dy = np.broadcast_to(canvas.ray_y[top:bottom, None], shape).ravel()
    t = solid.hit((np.float32(0), np.float32(eye), np.float32(0)), (dx, dy, np.float32(1)))
    hit = np.flatnonzero(t < canvas.depth[block].ravel())
    if not len(hit):
        return
    t, dx, dy = t[hit], dx[hit], dy[hit]
    surface = solid.surface(dx * t, np.float32(eye) + dy * t, t)
    where = (hit // shape[1] + top, hit % shape[1] + left)
    canvas.depth[where] = t
    canvas.label[where] = thing.label
    canvas.owner[where] = index
    canvas.gloss[where] = thing.look.gloss
    for axis in range(3):
        canvas.normal[axis][where] = surface.normal[axis]
    canvas.paint(where, thing.look, surface.u, surface.v)


def _light(random: Generator, canvas: _Canvas) -> Array:
    """Shades every surface: ambient and diffuse light, cast shadows, a highlight, haze."""
    layout = canvas.layout
    solid = np.flatnonzero(canvas.label.ravel() != SKY)
    depth = np.minimum(canvas.depth.ravel()[solid], np.float32(MAX_DEPTH * 4))
    rows, columns = solid // canvas.width, solid % canvas.width
    dx, dy = canvas.ray_x[columns], canvas.ray_y[rows]
    px, py, pz = dx * depth, np.float32(layout.eye) + dy * depth, depth
    nx, ny, nz = (canvas.normal[axis].ravel()[solid] for axis in range(3))
    lx, ly, lz = (np.float32(value) for value in layout.light)
    facing = np.clip(nx * lx + ny * ly + nz * lz, 0, 1)
    lit = np.ones_like(facing)
    owner = canvas.owner.ravel()[solid]
    for index, thing in enumerate(layout.things):
        _shadow(lit, index, thing, owner, (px, py, pz), (lx, ly, lz))
    # Where an object meets the ground, little ambient light arrives.
    ambient = np.float32(layout.ambient) * (np.float32(0.75) + np.float32(0.25) * np.clip(py, 0, 1))
    shade = ambient + (1 - np.float32(layout.ambient)) * np.float32(1.25) * facing * lit
    albedo = canvas.albedo.reshape(-1, 3)
    colour = albedo[solid] * shade[:, None]
    gloss = canvas.gloss.ravel()[solid]
    shiny = np.flatnonzero((gloss > 0) & (lit > 0.5))
    if len(shiny):
        scale = 1 / np.sqrt(dx[shiny] ** 2 + dy[shiny] ** 2 + 1)
        hx, hy, hz = lx - dx[shiny] * scale, ly - dy[shiny] * scale, lz - scale
        cosine = nx[shiny] * hx + ny[shiny] * hy + nz[shiny] * hz
        cosine /= np.sqrt(hx * hx + hy * hy + hz * hz)
        colour[shiny] += (gloss[shiny] * np.clip(cosine, 0, 1) ** 24)[:, None]
    haze = np.clip(depth / np.float32(MAX_DEPTH * 2), 0, np.float32(0.5))[:, None]
    albedo[solid] = colour + haze * (layout.sky.mean(0) - colour)
    return canvas.albedo


def _shadow(
    lit: Array, index: int, thing: Thing, owner: npt.NDArray[np.int16], point: tuple[Array, ...], light: tuple[Any, ...]
) -> None:
    """Darkens in ``lit`` the points whose way to the light ``thing`` blocks."""
    solid = thing.solid
    px, py, pz = point
    lx, ly, lz = light
    # Only points near the vertical plane through the solid along the light can be in its shadow.
    level = max(float(np.hypot(lx, lz)), 1e-6)
    sx, sz = lx / level, lz / level
    rx, rz = solid.x - px, solid.z - pz
    along, across = rx * sx + rz * sz, rx * sz - rz * sx
    reach = np.float32(solid.reach)
    limit = np.float32(solid.height * level / ly) + reach
    near = np.flatnonzero(
        (np.abs(across) <= reach) & (along >= -reach) & (along <= limit) & (py < solid.height) & (owner != index)
    )
    if not len(near):
        return
    dx, dy, dz = (np.full(len(near), value, np.float32) for value in light)
    t = solid.hit((px[near], py[near], pz[near]), (dx, dy, dz))
    lit[near[t < MISS]] *= np.float32(0.15)


def _sensor(random: Generator, image: Array, layout: Layout) -> npt.NDArray[np.uint8]:
    """What the camera makes of the light: blur, vignette, white balance, exposure, gamma, noise, 8 bits."""
    height, width = image.shape[:2]
    for axis in (0, 1):
        image = _blur(image, axis, np.float32(random.uniform(0.1, 0.22)))
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    vignette = 1 - np.float32(random.uniform(0, 0.2)) * (x * x + y * y)
    gain = np.float32(random.uniform(0.8, 1.25)) * layout.tint
    image = image * vignette[..., None] * gain
    image = np.sqrt(np.clip(image, 0, 1)) if random.random() < 0.5 else np.clip(image, 0, 1) ** np.float32(0.65)
    sigma = np.float32(random.uniform(0.008, 0.04))
    image += random.standard_normal(image.shape, dtype=np.float32) * sigma
    pixels: npt.NDArray[np.uint8] = np.clip(image * 255 + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels


def _blur(image: Array, axis: int, weight: np.float32) -> Array:
    """Mixes each pixel with its two neighbours on ``axis``; the border stays."""
    out = image.copy()
    inner, before, after = (
        tuple(slice(None) if a != axis else s for a in range(2)) for s in (np.s_[1:-1], np.s_[:-2], np.s_[2:])
    )
    out[inner] = image[inner] * (1 - 2 * weight) + (image[before] + image[after]) * weight
    return out
