"""What a recipe may say, as a whole; its parts are in ``sections``.

A recipe describes two runs that share model, data and task: the full-precision teacher (section ``teacher``) and the
1-bit student (``binarize`` and ``stages``). ``Recipe.for_teacher()`` is the recipe of the first run, the recipe itself
that of the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from bidensify.recipe.sections import (
    CalibrateSection,
    CheckpointSection,
    DataSection,
    EmaSection,
    EvaluateSection,
    LogSection,
    ModelSection,
    OptimizerSection,
    Section,
    StageSection,
    TaskSection,
    TeacherSection,
)

if TYPE_CHECKING:
    import torch

    from bidensify.config import BidensifyConfig
    from bidensify.data import DataInfo, DenseDataset
    from bidensify.tasks import Task


class Recipe(Section):
    """A whole recipe. Load one with :func:`bidensify.recipe.load_recipe`.

    ``model`` and the data sets in ``data`` may be left out where :func:`bidensify.finetune` is given a network and data
    sets of your own; what builds them from the recipe then raises a ConfigError.
    """

    name: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelSection | None = None
    data: DataSection = DataSection()
    task: TaskSection
    teacher: TeacherSection | None = None
    binarize: dict[str, Any] = Field(default_factory=dict)
    stages: list[StageSection] = Field(min_length=1)
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection | None = None
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    channels_last: bool = False
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, got {names}")
        return self

    def for_teacher(self) -> Recipe:
        """Returns the recipe of the teacher's run: the teacher's stages on the full-precision model."""
        from bidensify.recipe.build import teacher_recipe

        return teacher_recipe(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe, defaults filled in, as JSON-able data that :func:`load_recipe` takes."""
        data = self.model_dump(mode="json")
        if any(stage.binarize != "none" for stage in self.stages):
            data["binarize"] = self.config().to_dict()
        return data

    @property
    def image_size(self) -> tuple[int, int]:
        """``data.size``, (height, width) in pixels.

        Raises:
            ConfigError: the recipe does not say.
        """
        from bidensify.recipe.build import needed

        return needed(self, self.data.size, "data.size")

    def build_model(self) -> torch.nn.Module:
        """Builds the full-precision network; its fresh weights depend on ``seed`` alone."""
        from bidensify.recipe.build import build_model

        return build_model(self)

    def build_datasets(self) -> tuple[DenseDataset, DenseDataset]:
        """Builds (training, validation) data sets with their transforms."""
        from bidensify.recipe.build import build_datasets

        return build_datasets(self)

    def build_dataset(self, which: Literal["train", "val"]) -> DenseDataset:
        """Builds one of the two data sets with its transforms."""
        from bidensify.recipe.build import build_dataset

        return build_dataset(self, which)

    def build_task(self, info: DataInfo | None = None) -> Task:
        """Builds the task; classes, names and palette come from ``info`` (or from the validation data) unless given."""
        from bidensify.recipe.build import build_task

        return build_task(self, info)

    def config(self) -> BidensifyConfig:
        """Returns the configuration of the rewrite (section ``binarize``)."""
        from bidensify.config import BidensifyConfig

        return BidensifyConfig.from_dict(dict(self.binarize))
