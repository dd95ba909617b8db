"""`import bidensify` is light: it imports no library that only some of its parts need."""

from __future__ import annotations

import subprocess
import sys

import bidensify

HEAVY = (
    "torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers", "accelerate", "torchmetrics",
    "pydantic", "matplotlib", "jinja2", "typer", "rich", "tensorboard", "yaml", "PIL",
)  # fmt: skip


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_brings_nothing_heavy() -> None:
    out = run(f"import sys, bidensify; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert out.strip() == "[]"


def test_rewrite_works_without_the_optional_libraries() -> None:
    out = run(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('timm', 'segmentation_models_pytorch', 'transformers', 'torchvision'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch, bidensify as bd\n"
        "net = torch.nn.Sequential(*[torch.nn.Conv2d(c, d, 3, padding=1) for c, d in ((3, 8), (8, 8), (8, 2))])\n"
        "packed = bd.pack(bd.bidensify(net), kernel='reference')\n"
        "print(packed(torch.zeros(1, 3, 16, 16)).shape)\n"
    )
    assert "[1, 2, 16, 16]" in out


def test_every_public_name_exists() -> None:
    for name in bidensify.__all__:
        assert callable(getattr(bidensify, name)), name
    assert set(bidensify.__all__) <= set(dir(bidensify))
