"""Pre-training runs, composed from the parts' own configs: one function per run, named as on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from personmae.configs import UserError, require_positive
from personmae.data.loaders import LoaderConfig
from personmae.data.order import OrderKind
from personmae.data.packs.manifest import Verify
from personmae.data.region_draws import RegionConfig
from personmae.data.shard_cache import StreamConfig
from personmae.models.attention import AttentionKind
from personmae.models.decoders import DecoderConfig
from personmae.models.masked import MaskedConfig
from personmae.models.masking import MaskingConfig
from personmae.models.teacher import TeacherConfig
from personmae.models.zoo import ENCODERS
from personmae.training.blocks import CompileKind
from personmae.training.gradients import CaptureKind
from personmae.training.optimisers import OptimiserConfig
from personmae.training.parallel import ParallelKind
from personmae.training.schedules import ScheduleConfig

# Of the command line alone: annotations are not evaluated before it is read, and the presets serve programs without it.
with contextlib.suppress(ModuleNotFoundError):
    import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the person crops are and how regions are cut from them."""

    # A folder of images (any depth), a text file with one path a line, a pack, or the address of a pack: s3://, gs://, https://, file://.
    source: str | None = None
    index_dir: Path | None = None  # where the index of the source is kept; by default in the user's cache
    verify: Verify = "auto"  # the shards of a pack, at the start: by SHA-256 once (auto) or each time (always), or by length alone (no)
    # Images shuffled over the whole set (global), or shards and then the images of some shards (windows); auto: windows for an address, else global.
    order: OrderKind = "auto"
    order_window: int = 16  # shards whose images are shuffled together
    regions: RegionConfig = RegionConfig()
    repeats: int = 1  # pairs of regions drawn of each image in a step, from one decoding; an epoch shows each image so many times
    loader: LoaderConfig = LoaderConfig()
    stream: StreamConfig = StreamConfig()

    def __post_init__(self) -> None:
        require_positive(self, "order_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training run."""

    preset: Annotated[str, tyro.conf.Suppress] = "custom"  # the recipe's name, for messages and the report
    run_dir: Path = Path("runs/pretrain")  # folder that the run writes: config, metrics, checkpoints, pictures, report
    data: DataConfig = DataConfig()
    model: MaskedConfig = MaskedConfig()
    teacher: TeacherConfig = TeacherConfig()
    batch_size: int = 2048  # pairs of regions of one optimiser step (images, if data.repeats is 1), over all processes and accumulation
    accumulation: int = 1  # micro-batches in a step of each process
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on a CPU
    attention: AttentionKind = "auto"
    operators: Literal["auto", "reference"] = "auto"  # auto: the Triton kernels on CUDA; reference: plain PyTorch
    compile: CompileKind = "auto"  # the blocks by torch.compile; auto: on CUDA
    cuda_graph: CaptureKind = "auto"  # forward and backward pass launched as one CUDA graph; auto: for one process without accumulation
    parallel: ParallelKind = "ddp"  # fsdp: each process holds a part of weights, moments and teacher (FSDP2), for models that do not fit otherwise
    checkpoint_activations: bool = False  # less memory for more time: activations are dropped, and computed again in the backward pass
    deterministic: bool = False  # bit-equal runs on a GPU, slower; a CPU run always is
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest good checkpoint in the run folder, if there is one
    log_every: int = 20  # steps
    picture_every: int = 2000  # steps between reconstruction pictures
    checkpoint_every: int = 1000  # steps between checkpoints, which are written beside the training, from a copy of the state in host memory
    checkpoint_minutes: float = 15.0  # also after so many minutes without one, with the next line of the log; 0: by steps alone
    keep_last: int = 3  # checkpoints

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "accumulation", "log_every", "picture_every", "checkpoint_every", "keep_last")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UserError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be a number of minutes, or 0")


# Settings of a pre-training run that may change when a run is continued: they change where and how fast it runs, not what it computes.
FREE_SETTINGS = (
    "run_dir",
    "data.source",
    "data.index_dir",
    "data.verify",
    # What these give is compared, not they: the order follows from the source too.
    "data.order",
    "data.order_window",
    "data.loader",
    "data.stream",
    "accumulation",
    "device",
    "attention",
    "operators",
    "compile",
    "cuda_graph",
    "parallel",
    "checkpoint_activations",
    "optimiser.kind",
    "deterministic",
    "resume",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_last",
)


def _person_mae(encoder: str, decoder_width: int, decoder_heads: int, decoder_depth: int = 2) -> MaskedConfig:
    decoder = DecoderConfig(width=decoder_width, num_heads=decoder_heads, depth=decoder_depth)
    return MaskedConfig(encoder=ENCODERS[encoder], pixel_decoder=decoder, feature_decoder=decoder)


def _as_mae(config: PretrainConfig) -> PretrainConfig:
    """The same run as plain MAE: the encoder's own region, masked at random at the same ratio, pixels of the hidden patches only.

    MAE's own ratio is 0.75 (`--model.masking.ratio 0.75`); for person crops 0.5 is the better one by HAP's account (Yuan et al., NeurIPS 2023).
    """
    model = replace(
        config.model,
        target_region="A",
        predict="masked",
        losses="pixels",
        masking=MaskingConfig(kind="random"),
        pixel_decoder=replace(config.model.pixel_decoder, form="mae"),
    )
    return replace(config, model=model)


def vit_tiny() -> PretrainConfig:
    """ViT-T/16, 256x128."""
    return PretrainConfig(run_dir=Path("runs/vit-tiny"), model=_person_mae("vit-tiny", 192, 6), batch_size=1024)


def vit_small() -> PretrainConfig:
    """ViT-S/16, 256x128."""
    return PretrainConfig(run_dir=Path("runs/vit-small"), model=_person_mae("vit-small", 256, 8))


def vit_base() -> PretrainConfig:
    """ViT-B/16, 256x128: the size of the paper's results."""
    return PretrainConfig(run_dir=Path("runs/vit-base"), model=_person_mae("vit-base", 512, 16), batch_size=4096)


def vit_large() -> PretrainConfig:
    """ViT-L/16, 256x128."""
    return PretrainConfig(run_dir=Path("runs/vit-large"), model=_person_mae("vit-large", 512, 16), batch_size=4096)


def vit_nano() -> PretrainConfig:
    """4 blocks of width 128, patch 16, 128x64: for a laptop's CPU; the run of the demo."""
    return PretrainConfig(
        run_dir=Path("runs/vit-nano"),
        model=_person_mae("vit-nano", 128, 4, decoder_depth=1),
        batch_size=32,
        optimiser=OptimiserConfig(learning_rate=1.6e-2),
        schedule=ScheduleConfig(steps=4000, ema_start=0.99),
        picture_every=1000,
        checkpoint_every=500,
    )


def mae_small() -> PretrainConfig:
    """Plain MAE with ViT-S/16: the baseline of `vit-small`."""
    return replace(_as_mae(vit_small()), run_dir=Path("runs/mae-small"))


def mae_base() -> PretrainConfig:
    """Plain MAE with ViT-B/16: the baseline of `vit-base`."""
    return replace(_as_mae(vit_base()), run_dir=Path("runs/mae-base"))


def mae_nano() -> PretrainConfig:
    """Plain MAE at the size of `vit-nano`."""
    return replace(_as_mae(vit_nano()), run_dir=Path("runs/mae-nano"))


_RUNS: tuple[Callable[[], PretrainConfig], ...] = (vit_nano, vit_tiny, vit_small, vit_base, vit_large, mae_nano, mae_small, mae_base)


def pretrain_presets() -> dict[str, tuple[str, PretrainConfig]]:
    """Name on the command line -> (what it is, config)."""
    names = {run.__name__.replace("_", "-"): run for run in _RUNS}
    return {name: ((run.__doc__ or "").strip(), replace(run(), preset=name)) for name, run in names.items()}
