"""The settings of the other programs: evaluating, drawing, checking, cropping, packing, exporting, the demo."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from personmae.configs import UserError, require_positive
from personmae.data.box_files import BoxFormat
from personmae.data.boxes_text import MotFlavour
from personmae.data.crop_folder import ImageKind
from personmae.data.crop_names import CropLayout, IdScope
from personmae.data.crops import CropRules
from personmae.data.mannequins import MannequinsConfig
from personmae.data.packs.examining import DuplicateKind, PackSettings
from personmae.data.packs.transcoding import Subsampling, Transcoding
from personmae.data.sequences import MotBoxes
from personmae.data.verdicts import MAX_PIXELS, MIN_SIDE_PX, Limits
from personmae.evaluation.gallery_index import IndexKind
from personmae.interop.exports import GraphName
from personmae.interop.initial_weights import Normalisation
from personmae.interop.targets import TargetName

# Of the command line alone: annotations are not evaluated before it is read.
with contextlib.suppress(ModuleNotFoundError):
    import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """How weights of other projects are read."""

    part: Literal["student", "teacher"] | None = None  # of a file that holds two networks
    grid: tuple[int, int] | None = None  # rows, columns of the file's positions, where their number leaves that open
    num_heads: int | None = None  # where the width does not tell
    normalisation: Literal["imagenet", "half"] | None = None  # of the pixels: ImageNet's, or 0.5 and 0.5; None: what the family is known for


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignConfig(ForeignWeights):
    """The same, and the size of the images they are scored on."""

    image_size: tuple[int, int] = (256, 128)  # height, width in pixels, to which positions are brought


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Retrieval scores of encoders on labelled sets, or of features that other code has written."""

    # Run folders, encoder.safetensors files, weights of other projects (a ViT in a .pth, .pt or .safetensors file), or timm:NAME.
    checkpoint: tuple[Path, ...] = ()
    foreign: ForeignConfig = ForeignConfig()
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
class ExportConfig:
    """Weights for another code base."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # a run folder, an encoder.safetensors, a fine-tuned model, or a ViT of another project
    to: TargetName | GraphName  # the code base, or a graph from pixels to features
    output: Path | None = None  # the file; by default ENCODER-TARGET-HEIGHTxWIDTH.pth here
    size: tuple[int, int] | None = None  # height, width of the images there, in pixels; by default those of the checkpoint
    stride: int | None = None  # pixels from patch to patch there; by default that of the checkpoint, 16 for an encoder
    norm: Normalisation | None = None  # of the pixels there, folded into the patch embedding; by default what the code base does
    foreign: ForeignWeights = ForeignWeights()
    int8: bool = False  # of onnx: weights of matrix products in 8 bits, for CPUs
    overwrite: bool = False  # a file that is there already


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """An export, held against the code that it is for."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # as for export, or an exported file
    to: TargetName  # transreid, transreid-ssl, cluster-contrast, fast-reid, torchreid or timm
    repo: Path | None = None  # a checkout of that code; not needed for timm
    size: tuple[int, int] | None = None  # as for export
    stride: int | None = None
    norm: Normalisation | None = None
    foreign: ForeignWeights = ForeignWeights()
    tolerance: float = 1e-4  # of the features, absolute, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What each code base would do with a file of weights."""

    file: Annotated[Path, tyro.conf.Positional]
    size: tuple[int, int] = (256, 128)  # height, width of the images there, in pixels
    stride: int = 16  # pixels from patch to patch there, where patches may overlap


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """How features are extracted."""

    checkpoint: Path  # a run folder, an encoder.safetensors, a fine-tuned model, an export, or a ViT of another project
    image_size: tuple[int, int] | None = None  # height, width in pixels; by default the checkpoint's
    feature: Literal["class", "mean"] = "class"  # of an encoder: class token, or mean of the patches
    flip: bool = False  # the mean with the features of the mirror image
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA
    batch_size: int = 64
    num_threads: int = 2  # that read images


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig(ExtractionConfig):
    """Features of a folder."""

    source: Annotated[Path, tyro.conf.Positional]  # a folder of images, a list of paths, or a pack
    output: Annotated[Path, tyro.conf.Positional]  # an .npz


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryConfig(ExtractionConfig):
    """How a gallery is searched."""

    index: Path | None = None  # folder in which the gallery's features are kept; by default GALLERY-index beside the gallery
    kind: IndexKind | None = None  # of a new index: flat is exact; ivf-pq is for millions; by default flat
    top: int = 10  # pictures for each query

    def __post_init__(self) -> None:
        require_positive(self, "top")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(GalleryConfig):
    """A local web page over a gallery."""

    gallery: Annotated[Path, tyro.conf.Positional]  # a folder of images
    host: str = "127.0.0.1"  # this machine alone; 0.0.0.0 for all who can reach it, without a password
    port: int = 8000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(GalleryConfig):
    """Pictures of a gallery that show who a query shows."""

    query: Annotated[Path, tyro.conf.Positional]  # an image, or a folder of images
    gallery: Annotated[Path, tyro.conf.Positional]  # a folder of images
    json: Path | None = None  # also as JSON
    page: Path | None = None  # also as an HTML page with the pictures
    quiet: bool = False  # without the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo."""

    folder: Path = Path("demo")  # the data set and the run go here
    seed: int = 0  # of the pre-training; the data set stays the same
    steps: int | None = None  # of pre-training; by default those of the vit-nano recipe
    num_unlabelled: int = 6000  # drawn for pre-training
    num_test_ids: int = 120  # identities of the test set
