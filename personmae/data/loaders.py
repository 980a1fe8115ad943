"""Chooses the loader that executes a plan, and says which."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from personmae.configs import UserError
from personmae.data.decoded_file import open_decoded
from personmae.data.delivery import Loader, LoaderConfig, RegionBatch, available_cores, part_plans
from personmae.data.image_index import ImageIndex
from personmae.data.loader_threads import ThreadLoader
from personmae.data.plan import Plan
from personmae.data.shards_ahead import ShardsAhead
from personmae.data.streamed_storage import StreamedStorage

__all__ = ["Loader", "LoaderConfig", "RegionBatch", "open_loader"]

# Beyond these, threads of one process wait for Python's lock more than they work.
MOST_THREADS = 4
_DALI_COMMAND = "pip install nvidia-dali-cuda120"


def open_loader(
    index: ImageIndex,
    plan: Plan,
    config: LoaderConfig,
    *,
    size: tuple[int, int],
    device: torch.device,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    local_world_size: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> Loader:
    """A loader of the micro-batches of one process, from step `first_step` up to but without `last_step`.

    index, plan: of the same images. size: (H, W) of the regions. device: where the regions are delivered. rank, world_size: of this process.
    accumulation: micro-batches of a step; each has plan.batch_size / (world_size * accumulation) images. local_world_size: processes on this machine
    that share its cores (world_size if not given). announce: receives one line, which loader and why; by default printed on rank 0.

    Raises UserError if the batch cannot be cut into equal parts, or if DALI is asked for and missing. Close the loader, or use it in a `with`.
    """
    if len(index) != plan.num_samples:
        raise ValueError(f"the plan is for {plan.num_samples} images, the index has {len(index)}")
    if announce is None:
        announce = print if rank == 0 else _say_nothing
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if first_step < last_step:
        # What is wrong with the parts is better said here than in a thread, later.
        plan.batch(first_step, rank, world_size * accumulation)
    parts = part_plans(plan, first_step=first_step, last_step=last_step, rank=rank, world_size=world_size, accumulation=accumulation)
    sharers = local_world_size or world_size
    ahead = None
    if isinstance(index.storage, StreamedStorage) and first_step < last_step:
        ahead = ShardsAhead(index.storage, plan, first_step, last_step, max(1, index.storage.fetches // sharers))
        parts = ahead.watch(parts)
    num_threads = config.num_threads or max(1, available_cores() // sharers)
    kind, why = choose_loader(config.kind, device, num_threads, is_decoded=config.decoded_dir is not None)
    loader: Loader
    if kind == "dali":
        # DALI is optional, and slow to import.
        from personmae.data.loader_dali import DaliLoader

        loader = DaliLoader(index, plan, config, parts, size=size, device=device, num_threads=num_threads)
    else:
        decoded = None
        if config.decoded_dir is not None and first_step < last_step:
            decoded = open_decoded(index, config.decoded_dir, num_threads, announce)
        loader = ThreadLoader(
            index, plan, config, parts, size=size, device=device, num_threads=num_threads, in_processes=kind == "processes", decoded=decoded
        )
    if ahead is not None:
        loader.ends_with(ahead.close)
    announce(f"loader: {loader.description} ({why})")
    return loader


def choose_loader(kind: str, device: torch.device, num_threads: int, *, is_decoded: bool = False) -> tuple[str, str]:
    """The loader for a kind of `LoaderConfig`, a training device and so many threads: ("dali", "threads" or "processes", why). is_decoded: images lie
    in a file of pixels. Raises UserError if DALI is asked for and missing."""
    if kind == "dali" and not has_dali():
        raise UserError(f'the loader "dali" needs NVIDIA DALI, which is not installed: {_DALI_COMMAND}, or choose the loader "threads"')
    if kind != "auto":
        return kind, "as asked"
    on_host = "threads" if num_threads <= MOST_THREADS else "processes"
    if is_decoded:
        return on_host, "images are decoded already"
    if device.type != "cuda":
        return on_host, "the faster one on a CPU"
    if has_dali():
        return "dali", "decodes on the CPU, crops and resizes on the GPU"
    return on_host, f"DALI is not installed; to use it: {_DALI_COMMAND}"


def has_dali() -> bool:
    """Whether DALI is installed; does not import it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _say_nothing(message: str) -> None:
    del message
