"""Masked pre-training on a folder of person crops.

torchrun --nproc_per_node=8 personmae/pretrain.py vit-small --data.source CROPS --run-dir runs/small
python personmae/pretrain.py vit-nano --data.source CROPS          one process, on a CPU too
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personmae.configs import UserError, differences, from_plain, parse_flags, to_plain, user_errors_exit
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.images import UnreadableImage, read_image, sample_box
from personmae.data.loaders import RegionBatch, open_loader
from personmae.data.plan import Plan
from personmae.models.attention import choose_attention, set_attention
from personmae.models.masked import MaskedOutput, PersonMAE, RegionInputs
from personmae.models.masking import draw_masks
from personmae.models.teacher import Teacher, build_teacher
from personmae.models.vit import VisionTransformer
from personmae.models.weights import save_encoder
from personmae.recipes import PretrainConfig, pretrain_presets
from personmae.training.checkpoints import Checkpoint, load_newest, restore_module, restore_optimiser, save_checkpoint
from personmae.training.ema import MovingAverage
from personmae.training.environment import describe_environment
from personmae.training.logbook import Logbook, check_run_dir
from personmae.training.optimisers import build_optimiser, clip_gradients, peak_learning_rate, set_learning_rate
from personmae.training.pretraining_metrics import pretraining_monitors, step_losses
from personmae.training.processes import Processes, StopSignal, start_processes
from personmae.training.schedules import ema_momentum, feature_ramp, learning_rate, num_steps
from personmae.visuals.reconstructions import reconstruction_picture
from personmae.visuals.report import write_report
from personmae_kernels.sample_random import Stream, sample_seeds

NUM_PICTURED = 8
# Settings that may change when a run is continued: they change where and how fast it runs, not what it computes.
FREE_SETTINGS = (
    "run_dir",
    "data.source",
    "data.index_dir",
    "data.loader",
    "accumulation",
    "device",
    "attention",
    "deterministic",
    "resume",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "keep_last",
)


def main(config: PretrainConfig) -> int:
    """Run or continue a pre-training run; returns the number of steps done, fewer than planned if it was asked to stop.

    Writes the run folder: config.json, metrics.jsonl, events, checkpoints/, pictures/, encoder.safetensors (the
    student), teacher.safetensors, report.html. Raises UserError for what the user can mend.
    """
    with start_processes(config.device) as processes:
        device = processes.device
        if config.deterministic:
            make_deterministic(device)
        if config.data.source is None:
            raise UserError("no images were given; add --data.source FOLDER (or a text file with one path a line)")
        # Before the index is built: a run folder that cannot be written would waste that time.
        with processes.main_first():
            if processes.is_main:
                check_run_dir(config.run_dir)
        with processes.main_first():
            say = print if processes.is_main else silence
            index = build_index(config.data.source, config.data.index_dir, progress=processes.is_main, announce=say)
        plan = Plan(index.heights, index.widths, config.batch_size, config.seed, config.data.regions)
        total = num_steps(config.schedule, plan.steps_per_epoch)
        saved = load_to_resume(config, index, processes)
        first = saved.step if saved else 0

        logbook = Logbook(
            config.run_dir,
            num_steps=total,
            images_per_step=config.batch_size,
            log_every=config.log_every,
            resume_step=first,
            config=describe_run(config, index, total, processes) if processes.is_main else None,
            is_main=processes.is_main,
            device=device,
            reduce=processes.sum_across if processes.world_size > 1 else None,
        )
        with logbook:
            logbook.announce(f"{config.preset}: {total} steps of {config.batch_size} images on {processes.description}")
            attention = choose_attention(config.attention, device)
            logbook.announce(f"attention: {attention.kind} ({attention.reason})")
            precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
            logbook.announce(f"precision: {precision}")

            # The model, its teacher and its optimiser.
            model, teacher = build_models(config)
            for part in (model, teacher):
                part.to(device)
                set_attention(part, attention.kind)
            average = MovingAverage(teacher.encoder, model.encoder) if config.teacher.kind == "ema" else None
            optimiser = build_optimiser(model, config.optimiser)
            if saved:
                restore(saved, config, model, teacher, optimiser)
                logbook.announce(f"continuing {saved.path} at step {first} of {total}")
                del saved
            trained: nn.Module = model
            if processes.world_size > 1:
                trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

            loader = open_loader(
                index,
                plan,
                config.data.loader,
                size=config.model.encoder.image_size,
                device=device,
                first_step=first,
                last_step=total,
                rank=processes.rank,
                world_size=processes.world_size,
                accumulation=config.accumulation,
                announce=logbook.announce,
            )
            step, stopped = first, False
            # Signals are caught from here on: before the first step there is nothing to save.
            with StopSignal(processes) as stop, loader:
                batches = iter(loader)
                logbook.start_clock(first, loader.wait_seconds)
                while step < total and not stopped:
                    ramp = feature_ramp(step, total, config.schedule)
                    rate = learning_rate(
                        step, total, peak_learning_rate(config.optimiser, config.batch_size), config.schedule
                    )
                    momentum = ema_momentum(step, total, config.schedule)
                    looked_at = (step + 1) % config.log_every == 0 or step + 1 == total

                    outputs = []
                    for micro in range(config.accumulation):
                        batch = next(batches)
                        inputs = to_inputs(batch, config, device)
                        with synchronised(trained, micro + 1 == config.accumulation), autocast(device, precision):
                            features = teacher(inputs.region_b) if config.model.losses != "pixels" else None
                            output: MaskedOutput = trained(inputs, features, ramp, 1.0 / config.accumulation)
                            output.total.backward()
                        outputs.append(output._replace(total=output.total.detach()))
                    norm = clip_gradients(model, config.optimiser.clip_norm)
                    set_learning_rate(optimiser, rate)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    if average is not None:
                        average.update(momentum)
                    step += 1

                    latest: dict[str, Tensor | float] = {
                        "epoch": step / plan.steps_per_epoch,
                        "learning_rate": rate,
                        "feature_weight": ramp * config.model.feature_weight,
                        "ema_momentum": momentum,
                        "replaced_images": float(len(loader.quarantine)),
                    }
                    if looked_at:
                        latest |= pretraining_monitors(config.model, inputs, features)
                    stopped = stop.requested()
                    line = logbook.log(
                        step,
                        {**step_losses(outputs, config.model), "gradient_norm": norm},
                        latest,
                        wait_seconds=loader.wait_seconds,
                        last=stopped or step == total,
                    )
                    if line and not math.isfinite(line["loss"]):
                        raise UserError(
                            f"the loss is {line['loss']} at step {step}; nothing was saved since the last checkpoint. "
                            "Continue from it with a lower --optimiser.learning-rate in a new run, or with --precision fp32"
                        )
                    if step % config.checkpoint_every == 0 or stopped or step == total:
                        with processes.main_first():
                            if processes.is_main:
                                state = checkpoint_state(config, index, model, teacher, optimiser)
                                save_checkpoint(config.run_dir / "checkpoints", step, state, config.keep_last)
                    if processes.is_main and (step % config.picture_every == 0 or step == total):
                        draw_reconstructions(model, index, plan, config, device, step)

            if processes.is_main:
                notes = {"run": str(config.run_dir), "preset": config.preset, "step": str(step)}
                save_encoder(config.run_dir / "encoder.safetensors", model.encoder, notes)
                if config.teacher.kind == "ema":
                    save_encoder(config.run_dir / "teacher.safetensors", teacher.encoder, notes)  # type: ignore[arg-type]
                report = write_report(config.run_dir)
                if stopped and step < total:
                    logbook.announce(f"stopped at step {step} of {total}; the same command continues from there")
                else:
                    logbook.announce(f"done: {config.run_dir / 'encoder.safetensors'}, report {report}")
            processes.barrier()
            return step


def build_models(config: PretrainConfig) -> tuple[PersonMAE, Teacher]:
    """The student and its teacher, freshly initialised from the seed, on the CPU."""
    if config.teacher.kind == "ema":
        model = PersonMAE(config.model, seed=config.seed)
        return model, build_teacher(config.teacher, model.encoder)
    teacher = build_teacher(config.teacher, VisionTransformer(config.model.encoder))
    return PersonMAE(config.model, feature_width=teacher.width, seed=config.seed), teacher


def to_inputs(batch: RegionBatch, config: PretrainConfig, device: torch.device) -> RegionInputs:
    """A loader's batch with its masks, on the device; where the target is region A, in region B's place too."""
    seeds = sample_seeds(config.seed, batch.epoch, batch.samples.numpy(), Stream.MASK)
    masks = draw_masks(config.model.masking, config.model.encoder.grid, seeds)
    own = config.model.target_region == "A"
    inputs = RegionInputs(
        batch.region_a,
        batch.region_a if own else batch.region_b,
        batch.boxes[:, :1].expand(-1, 2, -1) if own else batch.boxes,
        batch.flips[:, :1].expand(-1, 2) if own else batch.flips,
        masks.mask,
        masks.visible,
    )
    return RegionInputs(*(tensor.to(device, non_blocking=True) for tensor in inputs))


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged between processes in the last micro-batch of a step alone."""
    with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@torch.no_grad()
def draw_reconstructions(
    model: PersonMAE, index: ImageIndex, plan: Plan, config: PretrainConfig, device: torch.device, step: int
) -> None:
    """A picture of the same few images at every call: region A masked, region B, and B as predicted."""
    if config.model.losses == "features":
        return
    chosen = plan.for_samples(0, plan.step_samples(0)[:NUM_PICTURED])
    size = config.model.encoder.image_size
    regions, rows = [], []
    for row, sample in enumerate(chosen.samples):
        try:
            image = read_image(index.path(int(sample)))
        except UnreadableImage:
            continue  # gone bad since it was indexed; the loader reports such files
        rows.append(row)
        regions.append([sample_box(image, chosen.boxes[row, k], bool(chosen.flips[row, k]), size) for k in (0, 1)])
    if not rows:
        return
    images = torch.from_numpy(np.array(regions))
    boxes, flips, samples = (torch.from_numpy(values[rows]) for values in (chosen.boxes, chosen.flips, chosen.samples))
    batch = RegionBatch(images[:, 0], images[:, 1], boxes, flips, samples, samples, epoch=0, step=0, micro=0)
    inputs = to_inputs(batch, config, device)
    picture = reconstruction_picture(
        inputs.region_a.cpu(),
        inputs.mask.cpu(),
        inputs.region_b.cpu(),
        model.predict_image(inputs).cpu(),
        config.model.encoder.patch_px,
        boxes=inputs.boxes.cpu(),
        flips=inputs.flips.cpu(),
        title=f"{config.preset}, step {step}",
        target=config.model.target_region,
    )
    path = config.run_dir / "pictures" / f"reconstruction_{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def checkpoint_state(
    config: PretrainConfig, index: ImageIndex, model: PersonMAE, teacher: Teacher, optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """What a checkpoint holds. Order, boxes, flips and masks need no state: they follow from the seed and the step."""
    return {
        "config": to_plain(config),
        "index": index.digest(),
        "model": model.state_dict(),
        "teacher": teacher.state_dict() if config.teacher.kind == "ema" else None,
        "optimiser": optimiser.state_dict(),
    }


def load_to_resume(config: PretrainConfig, index: ImageIndex, processes: Processes) -> Checkpoint | None:
    """The newest good checkpoint of the run folder, checked against this run; None to start from nothing.

    Every process reads the same file. Raises UserError if it is of other settings or other images, or if the folder
    holds checkpoints and the run was told not to continue.
    """
    folder = config.run_dir / "checkpoints"
    saved: Checkpoint | None = None
    with processes.main_first():
        saved = load_newest(folder, print if processes.is_main else silence)
        if saved is None:
            return None
        if config.resume == "never":
            raise UserError(f"{folder} holds checkpoints and --resume is never; choose another --run-dir, or remove it")
        changed = changed_settings(from_plain(PretrainConfig, saved.state["config"]), config)
        if changed:
            raise UserError(
                f"{saved.path} is of a run with other settings ({'; '.join(changed[:5])}); "
                "choose another --run-dir, or give the settings of that one"
            )
        if saved.state["index"] != index.digest():
            raise UserError(
                f"{saved.path} was trained on other images than {config.data.source} holds now; "
                "choose another --run-dir, or restore the images"
            )
    return saved


def changed_settings(saved: PretrainConfig, config: PretrainConfig) -> list[str]:
    """The settings that make it another run, one line each."""
    return [
        line
        for line in differences(saved, config)
        if not any(line.startswith((f"{name}:", f"{name}.")) for name in FREE_SETTINGS)
    ]


def restore(
    saved: Checkpoint, config: PretrainConfig, model: PersonMAE, teacher: Teacher, optimiser: torch.optim.Optimizer
) -> None:
    """Load a checkpoint into the parts of the run."""
    names = {"source": saved.path, "saved_preset": saved.state["config"]["preset"], "preset": config.preset}
    restore_module(model, saved.state["model"], part="model", **names)
    if config.teacher.kind == "ema":
        restore_module(teacher, saved.state["teacher"], part="teacher", **names)
    restore_optimiser(optimiser, saved.state["optimiser"], **names)


def describe_run(config: PretrainConfig, index: ImageIndex, total: int, processes: Processes) -> dict[str, Any]:
    """What config.json holds: the settings, and what the run was started on."""
    images = {"images": len(index), "rejected_images": len(index.rejected)}
    started = {**describe_environment(), "machine": processes.description, **images, "steps": total}
    return {**to_plain(config), "started": started}


def silence(text: str) -> None:
    """What processes other than the main one say."""


def make_deterministic(device: torch.device) -> None:
    """Bit-equal runs on a GPU, at the price of speed."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def from_command_line(arguments: Sequence[str] | None = None, program: str = "pretrain.py") -> PretrainConfig:
    """The run that the command line describes."""
    return parse_flags(pretrain_presets(), arguments, program, "Masked pre-training on a folder of person crops.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
