"""Fine-tuning runs, composed from the parts' own configs: one function per recipe, named as on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from personmae.configs import UserError, require_positive
from personmae.data.delivery import LoaderConfig
from personmae.data.identity_plan import ViewConfig
from personmae.models.attention import AttentionKind
from personmae.models.reid import ReidConfig
from personmae.recipes.programs import ForeignWeights
from personmae.training.blocks import CompileKind
from personmae.training.finetuning_optimisers import MALE_OPTIMISER, FinetuneOptimiserConfig
from personmae.training.identity_losses import LossConfig
from personmae.training.occlusions import OcclusionConfig
from personmae.training.schedules import MALE_SCHEDULE, FinetuneScheduleConfig

# Of the command line alone: annotations are not evaluated before it is read, and the presets serve programs without it.
with contextlib.suppress(ModuleNotFoundError):
    import tyro

RANDOM = "random:"  # before the name of an encoder: from nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all runs on labelled sets share."""

    preset: Annotated[str, tyro.conf.Suppress] = "custom"  # the recipe's name, for messages and the report
    run_dir: Path = Path("runs/finetune")  # folder that the run writes: config, metrics, checkpoints, weights, report
    data: str | None = None  # the set: NAME=FOLDER as market1501=/data/market (names: `personmae data names`), or a folder or CSV alone
    split: int = 0  # of a set that has several
    test: tuple[str, ...] = ()  # sets whose query and gallery are scored at the end; by default those of the training set
    # The weights to begin with: a run folder, an encoder.safetensors, a file of another project, timm:NAME, or random:ENCODER as random:vit-small.
    init: str | None = None
    foreign: ForeignWeights = ForeignWeights()
    model: ReidConfig = ReidConfig()
    views: ViewConfig = ViewConfig()
    occlusion: OcclusionConfig = OcclusionConfig()
    num_people: int = 16  # P of a batch (people, or clusters), over all processes and accumulation
    images_each: int = 4  # K of each
    cross_camera: bool = False  # the K images from as many cameras as there are
    accumulation: int = 1  # micro-batches in a step of each process; pairs and batch statistics stay those of the whole batch
    optimiser: FinetuneOptimiserConfig = FinetuneOptimiserConfig()
    evaluate_every: int = 10  # epochs, where there is a best to be found
    seed: int = 0
    loader: LoaderConfig = LoaderConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on a CPU
    attention: AttentionKind = "auto"
    operators: Literal["auto", "reference"] = "auto"  # auto: the Triton kernels on CUDA; reference: plain PyTorch
    compile: CompileKind = "auto"  # the blocks by torch.compile; auto: on CUDA
    checkpoint_activations: bool = False  # less memory for more time
    deterministic: bool = False  # bit-equal runs on a GPU, slower; a CPU run always is
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest good checkpoint in the run folder, if there is one
    log_every: int = 20  # steps
    checkpoint_every: int = 1  # epochs between checkpoints
    checkpoint_minutes: float = 15.0  # also after so many minutes without one; 0: by epochs alone
    keep_last: int = 2  # checkpoints

    def __post_init__(self) -> None:
        require_positive(self, "accumulation", "evaluate_every", "log_every", "checkpoint_every", "keep_last")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UserError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be a number of minutes, or 0")
        if self.views.pad_px >= min(self.model.image_size):
            raise UserError(f"views.pad_px is {self.views.pad_px}, as much as the image ({self.model.image_size}); set less")
        if self.accumulation > 1 and self.model.parts == "lem":
            raise UserError("parts lem takes batch statistics within the encoder, which accumulation would divide; set accumulation 1, or parts jpm")

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return self.num_people * self.images_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """A supervised fine-tuning run."""

    loss: LossConfig = LossConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    ema: float = 0.0  # momentum of an average of the weights, as 0.999, which is then what is scored and written; 0: none
    # The epoch whose weights are kept as the best: by mAP on held-out people, who are then not trained on; by the test sets; or none.
    best_by: Literal["no", "held-out", "test"] = "no"
    hold_out: float = 0.1  # share of the training people, with best_by held-out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; it is a momentum below 1, or 0 for no average")
        if self.best_by == "held-out" and not 0 < self.hold_out < 1:
            raise UserError(f"hold_out is {self.hold_out}; it is a share of the training people, between 0 and 1")


# Settings of a run that may change when it is continued: they change where and how fast it runs, or what is reported, not what is learned.
FREE_SETTINGS = (
    "preset",
    "run_dir",
    "data",
    "test",
    "init",
    "foreign",
    "loader",
    "accumulation",
    "device",
    "attention",
    "operators",
    "compile",
    "checkpoint_activations",
    "deterministic",
    "resume",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_last",
)


# timm's random erasing in the mode "pixel", as TransReID's and MALE's code has it.
PIXEL_ERASING = OcclusionConfig(prob=0.5, scale=(0.02, 1 / 3), border_prob=0.0, fill="noise")


def transreid() -> FinetuneConfig:
    """TransReID-SSL's recipe: SGD, BNNeck, cross-entropy and soft triplet, 16 people x 4 images, 120 epochs."""
    return FinetuneConfig(views=ViewConfig(erasing_prob=0.0), occlusion=PIXEL_ERASING)


def transreid_384() -> FinetuneConfig:
    """The same at 384x128."""
    return replace(transreid(), model=ReidConfig(image_size=(384, 128)))


def transreid_jpm() -> FinetuneConfig:
    """TransReID itself: patches that overlap (stride 12), camera embeddings, jigsaw parts; for weights of supervised ImageNet."""
    model = ReidConfig(stride_px=12, parts="jpm", camera_weight=3.0)
    return replace(transreid(), model=model, optimiser=FinetuneOptimiserConfig(learning_rate=8e-3), schedule=FinetuneScheduleConfig(warmup_epochs=5))


def male() -> FinetuneConfig:
    """MALE's recipe for masked pre-training: AdamW, layer decay 0.4, 8 people x 8 images, no neck, 100 epochs."""
    return FinetuneConfig(
        model=ReidConfig(neck="none"),
        views=ViewConfig(erasing_prob=0.0),
        occlusion=PIXEL_ERASING,
        loss=LossConfig(id_weight=0.5, triplet_weight=0.5),
        num_people=8,
        images_each=8,
        optimiser=MALE_OPTIMISER,
        schedule=MALE_SCHEDULE,
    )


def male_lem() -> FinetuneConfig:
    """MALE with its locality enhanced module, which has a neck."""
    return replace(male(), model=ReidConfig(parts="lem"))


def nano() -> FinetuneConfig:
    """For `vit-nano` and a laptop's CPU: AdamW, 8 people x 4 images, 128x64."""
    return FinetuneConfig(
        model=ReidConfig(image_size=(128, 64), feature="class+mean", drop_path=0.0),
        views=ViewConfig(pad_px=4, erasing_prob=0.3),
        num_people=8,
        images_each=4,
        optimiser=FinetuneOptimiserConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.05, bias_lr_factor=1.0),
        schedule=FinetuneScheduleConfig(epochs=30, warmup_epochs=3, warmup_start=0.0, final_ratio=0.0, by="step", cosine_from="warmup"),
        best_by="held-out",
        hold_out=0.1,
        evaluate_every=5,
    )


def occluded(config: FinetuneConfig) -> FinetuneConfig:
    """The same recipe for occluded sets: half of the images are covered in part by another person's, and boxes are erased with the mean colour."""
    return replace(config, occlusion=OcclusionConfig(prob=0.5), views=replace(config.views, erasing_prob=config.views.erasing_prob or 0.5))


_RECIPES: tuple[Callable[[], FinetuneConfig], ...] = (nano, transreid, transreid_384, transreid_jpm, male, male_lem)


def finetuning_presets(task: Literal["holistic", "occluded"]) -> dict[str, tuple[str, FinetuneConfig]]:
    """Name on the command line -> (what it is, config)."""
    presets = {}
    for recipe in _RECIPES:
        name = recipe.__name__.replace("_", "-")
        config = recipe() if task == "holistic" else occluded(recipe())
        presets[name] = (recipe.__doc__ or "").strip(), replace(config, preset=name, run_dir=Path(f"runs/{task}-{name}"))
    return presets
