"""A binarization method of your own, compared with BiDense under one recipe.

    python examples/own_method.py

Weights are a sign times their mean size, activations a sign, PReLU behind: BNN with the scales of XNOR-Net, no bypass.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

import bidensify as bd
from bidensify.compare import comparison, read_run, write_report
from bidensify.methods import LayerParts, LayerSpec
from bidensify.nn import SignBinarizer, WeightBinarizer
from bidensify.recipe import load_recipe
from bidensify.train import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "scenes_segmentation.yaml"


@bd.register_method("mine", activation=lambda channels, dim: nn.PReLU(channels))
def mine(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """sign(x) on activations, mean|w| * sign(w) per output channel on weights."""
    return LayerParts(
        binarizer=SignBinarizer(spec.in_channels, spec.dim),
        weight_binarizer=WeightBinarizer(transposed=spec.transposed, groups=spec.groups),
    )


def main(out: Path = Path("runs/methods"), settings: tuple[str, ...] = ()) -> dict[str, float]:
    """Returns each run's mIoU; ``settings`` change the recipe, as ``--set`` does on the command line."""
    teacher = out / "teacher"
    miou = {"teacher": run_recipe(load_recipe(RECIPE, settings), teacher, role="teacher").metrics["miou"]}
    for method in ("bidense", "mine"):
        recipe = load_recipe(RECIPE, [*settings, f"name={method}", f"binarize.method={method}"])
        miou[method] = run_recipe(recipe, out / method, teacher_weights=teacher).metrics["miou"]

    write_report(comparison([read_run(out / name) for name in miou]), out / "report.html")
    return miou


if __name__ == "__main__":
    print(main())
