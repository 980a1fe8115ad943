"""Whole runs, composed from the parts' own configs: one function per run, named as on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from personmae.configs import UserError
from personmae.data.box_files import BoxFormat
from personmae.data.boxes_text import MotFlavour
from personmae.data.crop_folder import ImageKind
from personmae.data.crop_names import CropLayout, IdScope
from personmae.data.crops import CropRules
from personmae.data.loaders import LoaderConfig
from personmae.data.mannequins import MannequinsConfig
from personmae.data.packs.examining import DuplicateKind, PackSettings
from personmae.data.packs.manifest import Verify
from personmae.data.packs.transcoding import Subsampling, Transcoding
from personmae.data.plan import RegionConfig
from personmae.data.sequences import MotBoxes
from personmae.data.verdicts import MAX_PIXELS, MIN_SIDE_PX, Limits
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


def require_positive(config: object, *names: str) -> None:
    """Raises UserError naming the first of these settings that is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the person crops are and how regions are cut from them."""

    source: Path | None = None  # a folder of images (any depth), a text file with one path a line, or a pack
    index_dir: Path | None = None  # where the index of the source is kept; by default in the user's cache
    verify: Verify = "auto"  # the shards of a pack, at the start: by SHA-256 once (auto) or each time (always), or by length alone (no)
    regions: RegionConfig = RegionConfig()
    loader: LoaderConfig = LoaderConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training run."""

    preset: Annotated[str, tyro.conf.Suppress] = "custom"  # the recipe's name, for messages and the report
    run_dir: Path = Path("runs/pretrain")  # folder that the run writes: config, metrics, checkpoints, pictures, report
    data: DataConfig = DataConfig()
    model: MaskedConfig = MaskedConfig()
    teacher: TeacherConfig = TeacherConfig()
    batch_size: int = 2048  # images of one optimiser step, over all processes and accumulation
    accumulation: int = 1  # micro-batches in a step of each process
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on a CPU
    attention: AttentionKind = "auto"
    operators: Literal["auto", "reference"] = "auto"  # auto: the Triton kernels on CUDA; reference: plain PyTorch
    compile: CompileKind = "auto"  # the blocks by torch.compile; auto: on CUDA
    cuda_graph: CaptureKind = "auto"  # forward and backward pass launched as one CUDA graph; auto: for small batches of one process
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
    "data.loader",
    "accumulation",
    "device",
    "attention",
    "operators",
    "compile",
    "cuda_graph",
    "parallel",
    "checkpoint_activations",
    "teacher.fused_gelu",
    "optimiser.kind",
    "deterministic",
    "resume",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_last",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Retrieval scores of encoders on labelled sets, or of features that other code has written."""

    checkpoint: tuple[Path, ...] = ()  # run folders, or encoder.safetensors files
    data: tuple[str, ...] = ()  # sets: NAME=FOLDER as market1501=/data/market (names: `personmae data names`), or a folder or CSV alone
    features: tuple[Path, ...] = ()  # instead of both: .npz, .mat or .pt files; keys: query_features, query_people, query_cameras, and gallery_...
    # whose rules: standard, transreid, fast-reid, torchreid, cluster-contrast, market-matlab, layumi
    convention: Annotated[str, tyro.conf.arg(name="as")] = "standard"
    metric: Literal["auto", "cosine", "euclidean"] = "auto"  # auto: that of the rules
    flip: bool = False  # take in the features of the mirror images, by the rules
    rerank: Literal["no", "own", "classic", "fast-reid"] = "no"  # k-reciprocal re-ranking; own: with the parameters of the rules
    expand: bool = False  # average query expansion
    roc: bool = False  # true positive rates at fixed false positive rates, over all pairs
    num_resamples: int = 1000  # of people, for confidence intervals; 0: none
    split: int | Literal["all"] = 0  # of sets with several; all: each, and their mean
    compare: bool = True  # also the same network at random initialisation, and a colour histogram
    unlabelled: Path | None = None  # images that whitening is fitted on; by default those the run was trained on
    num_unlabelled: int = 2000  # of them, spread evenly
    output: Path | None = None  # folder for scores, tables of queries and pages; by default RUN/evaluation, none for what is no run
    page: bool = False  # a page to browse the ranked lists
    attention: bool = False  # on that page, where the encoder looks
    cache: bool = True  # keep features in the user's cache, by the content of images and weights
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA
    batch_size: int = 128
    num_threads: int = 2  # that read images

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "num_threads")
        if self.num_unlabelled < 2:
            raise UserError(f"num_unlabelled is {self.num_unlabelled}; whitening needs at least 2 images")
        if self.num_resamples < 0 or self.num_resamples == 1:
            raise UserError(f"num_resamples is {self.num_resamples}; it must be 0 (no intervals) or at least 2")
        if self.features and (self.checkpoint or self.data):
            raise UserError("features hold the labels of their set: give either --features, or --checkpoint with --data")
        if not self.features and not (self.checkpoint and self.data):
            missing = "--data SET" if self.checkpoint else "--checkpoint RUN" if self.data else "--checkpoint RUN --data SET, or --features FILE"
            raise UserError(f"nothing to evaluate: give {missing}")
        of_images = {"flip": self.flip, "page": self.page, "attention": self.attention, "unlabelled": self.unlabelled is not None}
        if self.features and any(of_images.values()):
            raise UserError(f"--{next(name for name, given in of_images.items() if given)} works on images, and --features has none")
        if self.attention and not self.page:
            raise UserError("--attention is shown on the page of ranked lists; give --page too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Drawing the built-in data set."""

    folder: Annotated[Path, tyro.conf.Positional]  # a new or empty folder; the same set in it is left as it is
    mannequins: MannequinsConfig = MannequinsConfig()
    num_workers: int | None = None  # processes; by default one for each core
    check: bool = False  # measure how hard the set is: what colours alone and a random network find


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """Checking a labelled data set."""

    name: Annotated[str, tyro.conf.Positional]  # of the set, as market1501; csv; luperson; auto finds out
    root: Annotated[Path, tyro.conf.Positional]  # the set's folder, the folder above it, or a CSV file
    split: int = 0  # of a set that has several
    decode: bool = True  # decode each image to the end; without, files are only read
    num_threads: int | None = None  # by default one for each core
    max_listed: int = 20  # problems printed

    def __post_init__(self) -> None:
        require_positive(self, "max_listed")
        if self.num_threads is not None:
            require_positive(self, "num_threads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Person crops cut from frames with given boxes."""

    folder: Annotated[Path, tyro.conf.Positional]  # a new or empty folder, or one to be taken up
    frames: tuple[Path, ...] = ()  # of each sequence: a folder of images named by frame number, or a video
    boxes: tuple[Path, ...] = ()  # of each sequence: MOT text, CSV with a header, or JSON (COCO or a list)
    mot: Path | None = None  # instead of both: a set in MOTChallenge's layout, or one sequence of it
    mot_boxes: MotBoxes = "auto"  # auto: ground truth (gt/gt.txt) where there is some, else detections (det/det.txt)
    mot_match: str = "*"  # of the sequences' names: MOT17 holds each three times, *-FRCNN takes it once
    cameras: tuple[int, ...] = ()  # of each sequence, where the boxes do not say it; by default each its own, from 1
    box_format: BoxFormat = "auto"  # auto: by the file's beginning
    mot_flavour: MotFlavour = "auto"  # what follows the confidence: gt class and visibility, det nothing of use; auto: gt if there are 9 columns
    origin: Literal[0, 1] | None = None  # of pixel coordinates; by default 1 in MOT, as its kit says, 0 elsewhere; many trackers write MOT with 0
    relative: bool = False  # boxes are in shares of the frame's width and height instead of pixels
    frame_offset: int | None = None  # added to the boxes' frame numbers; a video's first frame is 1 with MOT boxes and 0 with others
    frame_pattern: str | None = None  # its one group finds a frame's number in an image's name: 'frame_(\d+)'; by default the number that varies
    rules: Annotated[CropRules, tyro.conf.OmitArgPrefixes] = CropRules()
    layout: CropLayout = "unlabelled"  # unlabelled: SEQUENCE/FRAME_BOX; market-*: Market-1501's folders and names, for boxes with ids
    ids: IdScope = "sequence"  # an id is the same person in its own sequence alone, or in all of them
    image_format: ImageKind = "jpg"  # png: exact
    quality: int = 95  # of JPEG
    skip_bad: bool = False  # skip boxes that cannot be used and list them in rejected.tsv, instead of ending with an error
    max_unreadable: float = 0.01  # share of the frames (rounded up) that may be unreadable before it ends with an error
    num_threads: int | None = None  # by default one for each core

    def __post_init__(self) -> None:
        if self.num_threads is not None:
            require_positive(self, "num_threads")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}; it must lie between 1 and 100")
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"max_unreadable is {self.max_unreadable}; it must lie between 0 and 1")
        if self.relative and self.origin:
            raise UserError("origin counts pixels, which relative boxes have none of; leave one of them out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Packing a source of images into shards."""

    source: Annotated[Path, tyro.conf.Positional]  # a folder, a text list, a zip, tar or tar.gz archive, or an LMDB database
    folder: Annotated[Path, tyro.conf.Positional]  # a new or empty folder; what is begun in it goes on, what is done is left as it is
    images_per_shard: int = 10_000  # of the source, in each tar
    max_side_px: int = 0  # shrink images whose longer side is longer, say to 512; 0 = none
    re_encode: bool = False  # also ordinary JPEGs, which are kept byte for byte otherwise
    quality: int = 95  # of JPEGs that are encoded anew
    subsampling: Subsampling = "444"  # of their colours; 420 takes 15 to 33 % fewer bytes
    duplicates: DuplicateKind = "keep"  # or leave out: exact ones, or near ones as well
    near_bits: int = 3  # of 64: as many may differ in the difference hashes of near duplicates, at most 6
    min_side_px: int = MIN_SIDE_PX  # smaller images are left out
    max_pixels: int = MAX_PIXELS  # larger ones too, before they are decoded
    seed: int = 0  # of the order in the shards
    num_workers: int | None = None  # processes; by default one for each core

    def __post_init__(self) -> None:
        require_positive(self, "images_per_shard", "max_pixels", *(["num_workers"] if self.num_workers is not None else []))
        # Wrong values are told before anything is read.
        self.settings()

    def settings(self) -> PackSettings:
        """Those that the bytes of the pack depend on."""
        return PackSettings(
            seed=self.seed,
            images_per_shard=self.images_per_shard,
            transcoding=Transcoding(self.max_side_px, self.re_encode, self.quality, self.subsampling),
            limits=Limits(min_side_px=self.min_side_px, max_pixels=self.max_pixels),
            duplicates=self.duplicates,
            near_bits=self.near_bits,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo."""

    folder: Path = Path("demo")  # the data set and the run go here
    seed: int = 0  # of the pre-training; the data set stays the same
    steps: int | None = None  # of pre-training; by default those of the vit-nano recipe
    num_unlabelled: int = 6000  # drawn for pre-training
    num_test_ids: int = 120  # identities of the test set


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
