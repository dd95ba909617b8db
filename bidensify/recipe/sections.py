"""The sections of a recipe: one pydantic model each, unknown keys forbidden."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number_is_weight(value: Any) -> Any:
    """``kl: 1.0`` is short for ``kl: {weight: 1.0}``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"weight": value}
    return value


class Section(BaseModel):
    """Base of every section: unknown keys are mistakes, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Options(BaseModel):
    """Base of the sections whose other keys are options of a data set or a task, checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the declared ones."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """The full-precision network: ``source`` as in :func:`bidensify.models.build_model`, and its options."""

    source: str
    options: dict[str, Any] = {}


class DatasetSection(Options):
    """One split: the name of a registered data set, the split, and the data set's own options."""

    name: str
    split: str


class AugmentSection(Section):
    """Training augmentation: random zoom and crop to ``data.size``, horizontal flip, colour jitter."""

    hflip: bool = True
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 1.0)
    color_jitter: float = Field(default=0.0, ge=0, lt=1)


class DataSection(Section):
    """Data of both runs. ``batch_size`` is global: over all processes and all accumulated micro-batches.

    Validation images are resized to ``size``; training crops have ``train_size``, by default the same: smaller crops
    of images at the scale of ``size`` make cheaper steps. ``augment.scale`` is relative to the image.

    ``keep_target_size`` measures validation images at the size of their own masks or depth maps instead of ``size``.
    ``mean`` and ``std`` are on images scaled to [0, 1] and default to the data set's.

    ``train``, ``val`` and ``size`` are for data that the recipe builds; ``finetune`` takes data sets of your own.
    """

    train: DatasetSection | None = None
    val: DatasetSection | None = None
    root: str | None = None
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    train_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    batch_size: int = Field(default=8, ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    accumulate: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)
    augment: AugmentSection = AugmentSection()
    keep_target_size: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _divides(self) -> DataSection:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class TaskSection(Options):
    """The task by name (``segmentation``, ``depth``) and its options."""

    name: str


class Weighted(Section):
    """A loss term with a weight."""

    weight: float = Field(default=1.0, gt=0)


class KlLoss(Weighted):
    """KL(teacher || student) of the class distributions per pixel, times temperature squared."""

    temperature: float = Field(default=1.0, gt=0)
    ignore: bool = False


class CwdLoss(Weighted):
    """Channel-wise distillation (arXiv 2011.13256) of the logits, or of the named ``layers``."""

    temperature: float = Field(default=4.0, gt=0)
    layers: list[str] = []


class FeatureLoss(Weighted):
    """Feature matching between layers of the same names in student and teacher."""

    layers: list[str] = Field(min_length=1)
    kind: Literal["mse", "attention"] = "mse"


class KdL1Loss(Weighted):
    """L1 between the student's and the teacher's depth, by default between their logarithms."""

    log: bool = True


class LossesSection(Section):
    """The loss terms of a stage, each with its weight; a term that is absent is not computed."""

    task: Annotated[Weighted | None, BeforeValidator(_number_is_weight)] = Weighted()
    kl: Annotated[KlLoss | None, BeforeValidator(_number_is_weight)] = None
    cwd: Annotated[CwdLoss | None, BeforeValidator(_number_is_weight)] = None
    features: FeatureLoss | None = None
    kd_l1: Annotated[KdL1Loss | None, BeforeValidator(_number_is_weight)] = None

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return any(term is not None for term in (self.kl, self.cwd, self.features, self.kd_l1))

    @property
    def layers(self) -> list[str]:
        """Patterns of the layers whose outputs are compared."""
        return [*(self.cwd.layers if self.cwd else ()), *(self.features.layers if self.features else ())]

    @model_validator(mode="after")
    def _something(self) -> LossesSection:
        if self.task is None and not self.distils:
            raise ValueError("no loss is left; give at least one of task, kl, cwd, features, kd_l1")
        return self


class StageSection(Section):
    """One stage of a run: what is binarized, for how long, at which learning rate, with which losses."""

    name: str
    binarize: Literal["none", "activations", "all"]
    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: Literal["onecycle", "cosine", "linear", "constant"] = "onecycle"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    losses: LossesSection = LossesSection()
    weight_decay: float | None = Field(default=None, ge=0)
    latent_weight_decay: float | None = Field(default=None, ge=0)


class OptimizerSection(Section):
    """AdamW. Weight decay leaves out norms, biases, thresholds and activations' parameters.

    ``latent_weight_decay`` is that of the latent weights of binary layers; null means 0 where weights are binarized
    and ``weight_decay`` elsewhere. ``lr_scale`` maps globs of parameter names to factors, for a pretrained encoder for
    example.
    """

    weight_decay: float = Field(default=0.01, ge=0)
    latent_weight_decay: float | None = Field(default=None, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=None, gt=0)
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = {}


class EmaSection(Section):
    """Exponential moving average of the weights; it is what is evaluated and saved."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    buffers: Literal["average", "copy"] = "average"


class CalibrateSection(Section):
    """Batches for thresholds and norm statistics at the start of the student, and for norm statistics at the end."""

    batches: int = Field(default=8, ge=0)
    each_stage: bool = True
    at_end: bool = True


class EvaluateSection(Section):
    """Evaluation on the validation split every ``every`` epochs, and which epoch's weights are the result.

    "best" is by the task's primary metric. ``teacher`` measures the teacher too, once at the start.
    """

    every: int = Field(default=1, ge=1)
    select: Literal["best", "last"] = "best"
    teacher: bool = True


class CheckpointSection(Section):
    """A checkpoint is written at the end of each ``every``-th epoch and, if given, every ``steps`` steps."""

    every: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)


class LogSection(Section):
    """A line of log.jsonl every ``every`` steps; TensorBoard on or off."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = True


class TeacherSection(Section):
    """The full-precision teacher: where its weights are (a .safetensors file or a run folder), and how it is trained.

    ``optimizer``, ``ema``, ``evaluate`` and ``augment`` default to those of the recipe.
    """

    weights: str | None = None
    stages: list[StageSection] = []
    optimizer: OptimizerSection | None = None
    ema: EmaSection | None = None
    evaluate: EvaluateSection | None = None
    augment: AugmentSection | None = None

    @model_validator(mode="after")
    def _full_precision(self) -> TeacherSection:
        for index, stage in enumerate(self.stages):
            if stage.binarize != "none":
                raise ValueError(f"stages[{index}].binarize is {stage.binarize!r}; a teacher's stages have 'none'")
            if stage.losses.distils:
                raise ValueError(f"stages[{index}].losses distil; a teacher has no teacher of its own")
        return self
