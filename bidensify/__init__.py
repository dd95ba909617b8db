"""bidensify: existing PyTorch dense-prediction networks, turned into 1-bit networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bidensify._util.version import __version__ as __version__
from bidensify.integrations.hook import register

if TYPE_CHECKING:
    from bidensify.config import BidensifyConfig, Rule
    from bidensify.costs.summary import summary
    from bidensify.data import register_data_set
    from bidensify.deploy.between.compiled import compile
    from bidensify.deploy.export import export
    from bidensify.deploy.pack import pack
    from bidensify.deploy.pretrained import from_pretrained, save_pretrained
    from bidensify.losses import register_loss
    from bidensify.methods import available_methods, register_method
    from bidensify.models import register_source
    from bidensify.nn import calibrate
    from bidensify.precisions import allocate, sensitivity
    from bidensify.rewrite.api import bidensify, plan
    from bidensify.rewrite.least_squares import fit_scales
    from bidensify.tasks import register_task
    from bidensify.train import finetune

# Public name -> module; imported at first use so that `import bidensify` costs little beyond `import torch`.
_PUBLIC = {
    "BidensifyConfig": "bidensify.config",
    "Rule": "bidensify.config",
    "allocate": "bidensify.precisions",
    "available_methods": "bidensify.methods",
    "bidensify": "bidensify.rewrite.api",
    "calibrate": "bidensify.nn",
    "compile": "bidensify.deploy.between.compiled",
    "export": "bidensify.deploy.export",
    "finetune": "bidensify.train",
    "fit_scales": "bidensify.rewrite.least_squares",
    "from_pretrained": "bidensify.deploy.pretrained",
    "pack": "bidensify.deploy.pack",
    "plan": "bidensify.rewrite.api",
    "register_data_set": "bidensify.data",
    "register_loss": "bidensify.losses",
    "register_method": "bidensify.methods",
    "register_source": "bidensify.models",
    "register_task": "bidensify.tasks",
    "save_pretrained": "bidensify.deploy.pretrained",
    "sensitivity": "bidensify.precisions",
    "summary": "bidensify.costs.summary",
}

__all__ = [
    "BidensifyConfig",
    "Rule",
    "allocate",
    "available_methods",
    "bidensify",
    "calibrate",
    "compile",
    "export",
    "finetune",
    "fit_scales",
    "from_pretrained",
    "pack",
    "plan",
    "register_data_set",
    "register_loss",
    "register_method",
    "register_source",
    "register_task",
    "save_pretrained",
    "sensitivity",
    "summary",
]


# A checkpoint whose configuration names bidensify loads with the library that it is for once this package is imported.
register()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bidensify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
