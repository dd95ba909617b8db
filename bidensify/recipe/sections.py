"""The sections of a recipe: one pydantic model each, unknown keys forbidden."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, TypeAdapter, model_validator
from typing_extensions import TypedDict

from bidensify.losses import LOSSES, Loss


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
    """Training augmentation: random zoom and crop to ``data.size``, horizontal flip, colour jitter, rotation (degrees)."""

    hflip: bool = True
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 1.0)
    color_jitter: float = Field(default=0.0, ge=0, lt=1)
    rotate: float = Field(default=0.0, ge=0, le=180)


class DataSection(Section):
    """Data of both runs. ``batch_size`` is global: over all processes and all accumulated micro-batches.

    Validation images come to ``size`` as ``evaluate.resize`` says; training crops have ``train_size``, by default the
    same: smaller crops of images at the scale of ``size`` make cheaper steps. ``augment.scale`` is relative to the image.

    ``mean`` and ``std`` are on images scaled to [0, 1] and default to the data set's. ``in_channels`` is the number of
    channels of an image, by default as many as ``mean`` has entries, or 3; it goes to data sets that have such an option.

    ``train``, ``val`` and ``size`` are for data that the recipe builds; ``finetune`` takes data sets of your own.
    """

    train: DatasetSection | None = None
    val: DatasetSection | None = None
    root: str | None = None
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    train_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    in_channels: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    accumulate: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)
    augment: AugmentSection = AugmentSection()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_target_size(cls, value: Any) -> Any:
        """Reads recipes from before metrics were always taken at the size of the image's own mask or depth map."""
        if isinstance(value, Mapping) and "keep_target_size" in value:
            value = dict(value)
            if not value.pop("keep_target_size"):
                message = (
                    "data.keep_target_size is gone: metrics are taken at the size of each image's own mask or depth map, and "
                    "images keep their aspect ratio unless evaluate.resize is squash; figures may differ from before"
                )
                warnings.warn(message, UserWarning, stacklevel=2)
        return value

    @model_validator(mode="after")
    def _divides(self) -> DataSection:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class TaskSection(Options):
    """The task by name (``segmentation``, ``depth``) and its options."""

    name: str


def _terms(value: Any) -> Any:
    """Reads ``losses`` with the registered terms; the task's own loss is there unless ``task: null`` leaves it out."""
    if not isinstance(value, Mapping):
        return value
    known = {name: Annotated[LOSSES[name] | None, BeforeValidator(_number_is_weight)] for name in LOSSES.names()}
    make: Any = TypedDict  # the names are known at run time alone
    kind = make("Losses", known, total=False)
    kind.__pydantic_config__ = ConfigDict(extra="forbid")
    given = {"task": {}, **value}
    read: dict[str, Any] = TypeAdapter(kind).validate_python(given)
    if not any(read.values()):
        raise ValueError(f"no loss is left; give at least one of {', '.join(known)}")
    return {name: read[name] for name in given}


class StageSection(Section):
    """One stage of a run: what is binarized, for how long, at which learning rate, with which losses.

    ``losses`` maps the names of registered terms to a weight, or to ``weight`` and the term's own options.
    """

    name: str
    binarize: Literal["none", "activations", "all"]
    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: Literal["onecycle", "cosine", "linear", "constant"] = "onecycle"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    losses: Annotated[dict[str, SerializeAsAny[Loss] | None], BeforeValidator(_terms)] = {}
    weight_decay: float | None = Field(default=None, ge=0)
    latent_weight_decay: float | None = Field(default=None, ge=0)

    @property
    def terms(self) -> dict[str, Loss]:
        """The loss terms by name."""
        return {name: term for name, term in self.losses.items() if term is not None}

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return any(term.distils for term in self.terms.values())

    @property
    def layers(self) -> list[str]:
        """Patterns of the layers whose outputs the terms compare."""
        return [pattern for term in self.terms.values() for pattern in getattr(term, "layers", ())]


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


class DistributedSection(Section):
    """Runs of several processes (``accelerate launch``).

    ``strategy`` is "ddp" (each process has the whole network) or "fsdp" (FSDP2: shares of weights, gradients and optimizer
    state). ``sync_norms`` takes the statistics of batch norms over all processes, so that a run does not depend on their
    number; without, each process takes those of its own samples.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    sync_norms: bool = True


class CalibrateSection(Section):
    """Batches for thresholds and norm statistics at the start of the student, and for norm statistics at the end.

    ``least_squares``: at the start scales and shifts are fitted to the teacher's activations too (``bidensify.fit_scales``).
    """

    batches: int = Field(default=8, ge=0)
    each_stage: bool = True
    at_end: bool = True
    least_squares: bool = False


class EvaluateSection(Section):
    """Evaluation on the validation split every ``every`` epochs, and which epoch's weights are the result.

    "best" is by the task's primary metric. ``teacher`` measures the teacher too, once at the start. ``resize`` says how an
    image comes to ``data.size``: "letterbox" (as large as fits, padded), "pad" (its own size, padded), "native" (its own
    size, padded to a multiple of ``multiple`` pixels), "cover" (the smallest that covers ``data.size``, padded like native)
    or "squash" (stretched); predictions are measured at the image's own size.

    ``window`` [height, width] slides over the network's input by ``stride`` (two thirds of it); ``flip`` adds the mirror
    image, ``scales`` other sizes of the input; see :class:`bidensify.tasks.Views`.
    """

    every: int = Field(default=1, ge=1)
    select: Literal["best", "last"] = "best"
    teacher: bool = True
    resize: Literal["letterbox", "pad", "native", "cover", "squash"] = "letterbox"
    multiple: int = Field(default=32, ge=1)
    window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    stride: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    flip: bool = False
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)


class CheckpointSection(Section):
    """A checkpoint is written at the end of each ``every``-th epoch and, if given, every ``steps`` steps."""

    every: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)


class LogSection(Section):
    """A line of log.jsonl every ``every`` steps; TensorBoard on or off."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = True


class TeacherSection(Section):
    """The full-precision teacher: where its weights are (see ``bidensify.models.load_weights``), and how it is trained.

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
            if stage.distils:
                raise ValueError(f"stages[{index}].losses distil; a teacher has no teacher of its own")
        return self
