"""What a recipe may say, as a whole; its parts are in ``sections``.

A recipe describes two runs that share model, data and task: the full-precision teacher (section ``teacher``) and the
1-bit student (``binarize`` and ``stages``). ``Recipe.for_teacher()`` is the recipe of the first run, the recipe itself
that of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, model_validator

from bidensify._util.seeding import seeded
from bidensify.config import BidensifyConfig
from bidensify.errors import ConfigError
from bidensify.precisions import Budget, read_budget
from bidensify.recipe.sections import (
    CalibrateSection,
    CheckpointSection,
    DataSection,
    DistributedSection,
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
    from torch import Tensor

    from bidensify.data import DataInfo, DenseDataset, ImageReader, Transforms
    from bidensify.data.fit import Resize
    from bidensify.tasks import Task, Views

Value = TypeVar("Value")


class Recipe(Section):
    """A whole recipe. Load one with :func:`bidensify.recipe.load_recipe`.

    ``model`` and the data sets in ``data`` may be left out where :func:`bidensify.finetune` is given a network and data
    sets of your own; what builds them from the recipe then raises a ConfigError.

    ``compile`` sends the student's (or teacher's) training step through ``torch.compile``.

    ``imports`` are modules of your own ("my_package.my_module", "file.py") that register methods, losses, tasks, data sets
    or model sources; the working directory is on the path, as with ``python -m``.
    """

    name: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    imports: list[str] = Field(default_factory=list)
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
    compile: bool = False
    distributed: DistributedSection = DistributedSection()
    calibrate: CalibrateSection = CalibrateSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    # Whether somebody who runs it wrote it, or gave it; a recipe in a run's folder may be from anywhere.
    _trusted: bool = PrivateAttr(default=True)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, got {names}")
        return self

    def for_teacher(self) -> Recipe:
        """Returns the recipe of the teacher's run: the teacher's stages on the full-precision model.

        Raises:
            ConfigError: the recipe does not say how to train its teacher.
        """
        teacher = self.teacher
        if teacher is None or not teacher.stages:
            raise ConfigError(f"recipe {self.name!r} has no teacher.stages; add them to train its teacher")
        changes: dict[str, Any] = {
            "stages": teacher.stages,
            "teacher": None,
            "name": f"{self.name}_teacher",
            "binarize": {},
        }
        for key in ("optimizer", "ema", "evaluate"):
            if key in teacher.model_fields_set:
                value = getattr(teacher, key)
                changes[key] = Recipe.model_fields[key].get_default() if value is None else value
        if teacher.augment is not None:
            changes["data"] = self.data.model_copy(update={"augment": teacher.augment})
        return self.model_copy(update=changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe, defaults filled in, as JSON-able data that :func:`load_recipe` takes."""
        data = self.model_dump(mode="json")
        if any(stage.binarize != "none" for stage in self.stages):
            budget = {key: value for key, value in self.binarize.items() if key == "budget"}
            data["binarize"] = {**self.config().to_dict(), **budget}
        return data

    def config(self) -> BidensifyConfig:
        """Returns the configuration of the rewrite (section ``binarize``); a budget's rules are not in it."""
        return BidensifyConfig.from_dict({key: value for key, value in self.binarize.items() if key != "budget"})

    @property
    def budget(self) -> Budget | None:
        """``binarize.budget``: what the student may cost or lose; who gets which precision is then found at the run's start.

        Raises:
            ConfigError: it breaks its schema.
        """
        given = self.binarize.get("budget")
        return None if given is None else read_budget(given)

    def needed(self, value: Value | None, key: str) -> Value:
        """Returns ``value``, the recipe's ``key``.

        Raises:
            ConfigError: it is None: the recipe is for a network and data sets of the caller's own.
        """
        if value is None:
            raise ConfigError(
                f"recipe {self.name!r} has no {key}, so it cannot be built from the recipe alone; add {key}, or give your "
                "own network and data sets to bidensify.finetune"
            )
        return value

    @property
    def image_size(self) -> tuple[int, int]:
        """``data.size``, (height, width) in pixels.

        Raises:
            ConfigError: the recipe does not say.
        """
        return self.needed(self.data.size, "data.size")

    @property
    def in_channels(self) -> int | None:
        """``data.in_channels``, else as many as ``data.mean`` has entries; None where neither is given."""
        return self.data.in_channels or (len(self.data.mean) if self.data.mean else None)

    def build_model(self, *, weights: bool = True) -> torch.nn.Module:
        """Builds the full-precision network; its fresh weights depend on ``seed`` alone.

        The network of a recipe that came with a run's folder is built without code that only that recipe names; see
        :func:`bidensify.models.rebuild_model`.

        Args:
            weights: without, pretrained weights that the options name are left out.
        """
        from bidensify.models import build_model, rebuild_model

        section = self.needed(self.model, "model.source")
        with seeded(self.seed):
            if self._trusted and weights:
                return build_model(section.source, **section.options)
            return rebuild_model(section.source, section.options, f"recipe {self.name!r}", trust=self._trusted)

    def build_datasets(self) -> tuple[DenseDataset, DenseDataset]:
        """Builds (training, validation) data sets with their transforms."""
        return self.build_dataset("train"), self.build_dataset("val")

    def build_dataset(self, which: Literal["train", "val"]) -> DenseDataset:
        """Builds one of the two data sets with its transforms; normalisation is the recipe's, else the data set's own."""
        from bidensify.data import build_transforms

        data = self.data
        # The transforms need what the data set says about itself, so they come second.
        dataset = self._dataset(which)
        mean, std = self._normalisation(dataset.info)
        if which == "val":
            dataset.transforms = self._fit(mean, std)
            return dataset
        options = {key: getattr(data.augment, key) for key in ("hflip", "scale", "color_jitter", "rotate")}
        size, ignore_index = data.train_size or self.image_size, dataset.info.ignore_index
        dataset.transforms = build_transforms(True, size, mean, std, ignore_index=ignore_index, **options)
        return dataset

    def _normalisation(self, info: DataInfo) -> tuple[Sequence[float], Sequence[float]]:
        return self.data.mean or info.mean, self.data.std or info.std

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Returns mean and std per channel of an image scaled to [0, 1]: the recipe's, else the validation data set's."""
        data = self.data
        if data.mean and data.std:
            return data.mean, data.std
        return None if data.val is None else self._normalisation(self.data_info())

    def _fit(self, mean: Sequence[float], std: Sequence[float]) -> Transforms:
        from bidensify.data import build_transforms

        how = self.evaluate
        return build_transforms(False, self.image_size, mean, std, resize=how.resize, multiple=how.multiple)

    def calibration_images(self, size: tuple[int, int], count: int = 32) -> list[Tensor]:
        """Up to ``count`` training images (1, C, *size), spread over the data, as evaluation brings them to the network.

        Where evaluation leaves images of several sizes, they are letterboxed to the one that a quantizer asks for.
        """
        from bidensify.data import build_transforms

        dataset = self._dataset("train")
        mean, std = self._normalisation(dataset.info)
        resize: Resize = "squash" if self.evaluate.resize == "squash" else "letterbox"
        dataset.transforms = build_transforms(False, size, mean, std, resize=resize)
        step = max(1, len(dataset) // count)
        return [dataset[index]["image"][None] for index in range(0, min(len(dataset), step * count), step)]

    def image_input(self) -> tuple[ImageReader, Transforms]:
        """Returns what reads an image file, and what brings it to the network as evaluation does.

        The validation data set is asked where the recipe does not give mean and std.
        """
        from bidensify.data import ImageReader

        data = self.data
        if data.mean and data.std:
            image_max = data.val.options.get("image_max") if data.val is not None else None
            return ImageReader(data.in_channels or len(data.mean), image_max), self._fit(data.mean, data.std)
        info = self.data_info()
        return ImageReader(info.channels, info.image_max), self._fit(*self._normalisation(info))

    def data_info(self) -> DataInfo:
        """Returns what the validation data set says about itself; no sample is read."""
        return self._dataset("val", cache=False).info

    def _dataset(self, which: Literal["train", "val"], **changes: Any) -> DenseDataset:
        from bidensify.data import build_dataset, dataset_options

        section = self.needed(getattr(self.data, which), f"data.{which}")
        known = dataset_options(section.name)
        options = section.options | {key: value for key, value in changes.items() if key in known}
        shared: dict[str, Any] = {"root": self.data.root, "channels": self.in_channels}
        if section.name == "scenes":
            shared["size"] = self.image_size
        options = {**{key: value for key, value in shared.items() if value is not None and key in known}, **options}
        if "root" in known and "root" not in options:
            raise ConfigError(
                f"recipe {self.name!r}: data.root is not set; give the folder, e.g. --set data.root=FOLDER"
            )
        return build_dataset(section.name, section.split, **options)

    def views(self) -> Views:
        """Returns how evaluation looks at an image (section ``evaluate``).

        Raises:
            ConfigError: the section's options do not go together.
        """
        from bidensify.tasks import Views

        how = self.evaluate
        return Views(how.window, how.stride, how.flip, how.scales, how.multiple)

    def build_task(self, info: DataInfo | None = None) -> Task:
        """Builds the task; classes, names and palette come from ``info`` (or from the validation data) unless given."""
        from bidensify.tasks import build_task, missing_options

        name, options = self.task.name, self.task.options
        if info is None and (missing := missing_options(name, options)):
            self.needed(self.data.val, f"task.{missing[0]}")
            info = self.data_info()
        return build_task(name, info, **options)
