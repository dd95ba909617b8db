"""Draws docs/quantizers/METHOD.svg from the methods themselves: python docs/make_quantizers.py

Each picture shows what a method's binarizers give for values from -2 to 2, and the gradient that comes back through them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import bidensify as bd
from bidensify.methods import LayerSpec, get_method

FOLDER = Path(__file__).with_name("quantizers")
POINTS = 161


def names() -> list[str]:
    """The library's own methods."""
    return [name for name in bd.available_methods() if get_method(name).parts.__module__.startswith("bidensify.")]


def curves(name: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns {"activations", "weights": (values, what is given, the gradient of its sum)} of a method as it starts."""
    method = get_method(name)
    kind = "conv2d" if method.takes("conv2d") else "linear"
    found = {}
    for what, inputs in (("activations", 1), ("weights", POINTS)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values = torch.linspace(-2, 2, POINTS)
            weight = values.view(1, -1, 1, 1) if kind == "conv2d" else values.view(1, -1)
            spec = LayerSpec(kind, inputs, 1, dim=1 if kind == "conv2d" else -1, weight=weight if inputs > 1 else None)
            parts = method.parts(spec, bd.BidensifyConfig(method=name))
        shape = (1, -1, 1, 1) if what == "weights" else (1, 1, 1, -1)
        if kind == "linear":
            shape = (1, -1) if what == "weights" else (1, -1, 1)  # type: ignore[assignment]
        x = values.view(shape).clone().requires_grad_()
        part = parts.binarizer if what == "activations" else parts.weight_binarizer
        part.train()
        given = part(x)
        given.sum().backward()
        assert x.grad is not None
        found[what] = (values, given.detach().reshape(-1), x.grad.reshape(-1))
    return found


def draw(name: str, path: Path) -> None:
    """Writes a method's picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text as text, and the same bytes each time.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bidensify", "font.size": 9}):
        figure, axes = pyplot.subplots(1, 2, figsize=(6.4, 2.4), layout="constrained")
        for axis, (what, (values, given, gradient)) in zip(axes, curves(name).items(), strict=True):
            axis.plot(values, given, label="forward", color="#3f51b5")
            axis.plot(values, gradient, label="gradient", color="#e65100", linestyle="--")
            axis.set(title=f"{name}: {what}", ylim=(-2.2, 2.2))
            axis.axhline(0, color="#888", linewidth=0.5)
            axis.axvline(0, color="#888", linewidth=0.5)
        axes[0].legend(loc="upper left", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main() -> None:
    """Draws every method."""
    FOLDER.mkdir(exist_ok=True)
    for name in names():
        draw(name, FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
