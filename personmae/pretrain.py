"""Masked pre-training on a folder of person crops.

torchrun --nproc_per_node=8 personmae/pretrain.py vit-small --data.source CROPS --run-dir runs/small
python personmae/pretrain.py vit-nano --data.source CROPS          one process, on a CPU too
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personmae.configs import UserError, parse_flags, to_plain, user_errors_exit
from personmae.data.image_index import ImageIndex, build_index
from personmae.data.images import UInt8Array, sample_box
from personmae.data.kept_index import keep_index, read_kept_index
from personmae.data.loaders import RegionBatch, open_loader
from personmae.data.order import GLOBAL_ORDER, choose_order
from personmae.data.packs.manifest import is_pack
from personmae.data.packs.streaming import open_streamed_pack
from personmae.data.plan import BatchPlan, Plan
from personmae.data.remote import is_address, redacted
from personmae.models.attention import choose_attention, set_attention
from personmae.models.masked import PersonMAE, RegionInputs, longest_sequence
from personmae.models.masking import draw_masks
from personmae.models.teacher import Teacher, build_teacher
from personmae.models.vit import VisionTransformer
from personmae.models.weights import save_encoder
from personmae.recipes.pretraining import FREE_SETTINGS, PretrainConfig, pretrain_presets
from personmae.training.blocks import choose_compilation, set_blocks
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.checkpoints import list_checkpoints
from personmae.training.ema import MovingAverage
from personmae.training.environment import commit, describe_environment
from personmae.training.gradients import CaptureChoice, CapturedGradients, Compute, choose_capture, compute_gradients
from personmae.training.logbook import Logbook, check_run_dir
from personmae.training.optimisers import build_optimiser, peak_learning_rate, update_weights
from personmae.training.parallel import choose_parallel, exchange_gradients, gathered, shard, synchronised, whole_encoder, whole_state
from personmae.training.precision import autocast, check_finite, make_deterministic
from personmae.training.pretraining_metrics import pretraining_monitors, step_losses
from personmae.training.processes import Processes, StopSignal, start_processes
from personmae.training.quarantine import Quarantine
from personmae.training.resuming import checkpoint_state, load_to_resume, restore_moments, restore_weights, state_bytes
from personmae.training.schedules import ema_momentum, feature_ramp, learning_rate, num_steps
from personmae.visuals.reconstructions import reconstruction_picture
from personmae.visuals.report import write_report
from personmae.whole_files import explained_write
from personmae_kernels.launching import describe_operators, use_operators
from personmae_kernels.sample_random import Stream, sample_seeds

NUM_PICTURED = 8


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
        # What the run is over and where it stands: found by the main process, the same in all.
        index = processes.from_main(lambda: open_index(config))
        # An address may hold a password, which nothing that is written from here on is to repeat.
        config = replace(config, data=replace(config.data, source=(shown := redacted(str(config.data.source)))))
        digest = index.digest()
        checkpoints = config.run_dir / "checkpoints"
        with processes.main_first():
            windows = choose_order(config.data.order, config.data.order_window, index.storage, config.seed)
            order = windows.identity if windows else GLOBAL_ORDER
            plan = Plan(
                index.heights,
                index.widths,
                config.batch_size,
                config.seed,
                config.data.regions,
                repeats=config.data.repeats,
                order=windows,
                neighbours=windows.neighbours if windows else None,
            )
            plan.batch(0, 0, processes.world_size * config.accumulation)
            say = print if processes.is_main else silence
            allowed = config.resume == "auto"
            saved = load_to_resume(checkpoints, config, FREE_SETTINGS, digest, shown, say, allowed=allowed, order=order)
        first = saved.step if saved else 0
        processes.check_same_step(first)
        total = num_steps(config.schedule, plan.steps_per_epoch)
        peak = peak_learning_rate(config.optimiser, config.batch_size)
        pictured = plan.for_samples(0, plan.step_samples(0)[:: plan.repeats][:NUM_PICTURED])

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
            logbook.announce(f"order of the images: {order}")
            precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"

            # The model, its teacher and its optimiser.
            model, teacher = build_models(config)
            logbook.announce(f"precision: {precision}; {place_models(model, teacher, config, device, precision)}")
            logbook.announce(compile_blocks(model, teacher, config, device))
            logbook.announce(f"parallel: {choose_parallel(config.parallel, processes.world_size, config.optimiser.kind)}")
            sharded = config.parallel == "fsdp" and processes.world_size > 1
            moving_teacher = teacher if config.teacher.kind == "ema" else None
            if saved:
                restore_weights(saved, config.preset, model, moving_teacher)
            if sharded:
                shard(model, teacher)
            average = MovingAverage(teacher.encoder, model.encoder) if moving_teacher else None
            optimiser = build_optimiser(model, config.optimiser, average)
            if saved:
                restore_moments(saved, config.preset, optimiser)
                logbook.announce(f"continuing {saved.path} at step {first} of {total}")
                del saved
            trained = exchange_gradients(model) if processes.world_size > 1 else model
            capture, gradients = prepare_gradients(trained, teacher, config, device, precision, processes.world_size)
            logbook.announce(f"gradients: {capture}")

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
                local_world_size=processes.local_world_size,
                accumulation=config.accumulation,
                announce=logbook.announce,
            )
            # Kept: a stream leaves them far behind.
            images = index.readable(pictured.samples.tolist()) if processes.is_main or sharded else {}
            max_bad = config.data.loader.max_bad_ratio
            quarantine = Quarantine(config.run_dir, len(index), max_bad, processes.is_main, logbook.announce, resume_step=first)
            writer = CheckpointWriter(checkpoints, config.keep_last, logbook.announce)
            step, stopped, told = first, False, 0
            # Signals are caught from here on: before the first step there is nothing to save.
            # Under FSDP the whole state is there in host memory only while it is written.
            if processes.is_main and not sharded:
                writer.reserve(state_bytes(model, moving_teacher), device)
            with StopSignal(processes) as stop, loader, writer:
                batches = iter(loader)
                logbook.start_clock(first, loader.wait_seconds)
                while step < total and not stopped:
                    ramp = feature_ramp(step, total, config.schedule)
                    rate = learning_rate(step, total, peak, config.schedule)
                    momentum = ema_momentum(step, total, config.schedule)
                    looked_at = (step + 1) % config.log_every == 0 or step + 1 == total

                    outputs = []
                    for micro in range(config.accumulation):
                        batch = next(batches)
                        inputs = to_inputs(batch, config, device)
                        if step == first and micro == 0 and trained is not model:
                            settle_buckets(trained, gradients, inputs)
                        with synchronised(trained, micro + 1 == config.accumulation):
                            output, features = gradients(inputs, ramp)
                        outputs.append(output)
                    norm = update_weights(optimiser, model, average, rate, momentum, config.optimiser.clip_norm)
                    step += 1

                    latest: dict[str, Tensor | float] = {
                        "epoch": step / plan.steps_per_epoch,
                        "learning_rate": rate,
                        "feature_weight": ramp * config.model.feature_weight,
                        "ema_momentum": momentum,
                        "quarantined_images": float(len(quarantine)),
                    }
                    if looked_at:
                        latest |= pretraining_monitors(config.model, inputs, features)
                    # What runs a divided model, all processes have to run.
                    pictures_due = (processes.is_main or sharded) and (step % config.picture_every == 0 or step == total)
                    if pictures_due and features is not None:
                        # What the feature loss is against another image's targets: far above, or it has learned nothing of the image.
                        with torch.no_grad(), autocast(device, precision):
                            latest["loss_features_shuffled"] = model(inputs, features.roll(plan.repeats, 0)).averages[1]
                    if writer.failed:
                        stop.ask()
                    stopped = stop.requested()
                    checkpoint_due = step % config.checkpoint_every == 0 or stopped or step == total
                    line = logbook.log(
                        step,
                        {**step_losses(outputs, config.model), "gradient_norm": norm},
                        latest,
                        wait_seconds=loader.wait_seconds,
                        last=checkpoint_due,
                    )
                    if line:
                        check_finite(line, step)
                        overdue = 0 < 60 * config.checkpoint_minutes <= writer.seconds_since_save
                        met = processes.all_gather((loader.quarantine[told:], overdue))
                        told = len(loader.quarantine)
                        quarantine.add(step, [entry for entries, _ in met for entry in entries])
                        # By the main process's clock.
                        checkpoint_due |= met[0][1]
                    if checkpoint_due:
                        state = whole_state(checkpoint_state(config, digest, model, moving_teacher, optimiser, order=order), processes.is_main)
                        with processes.main_first():
                            if processes.is_main:
                                writer.save(step, state)
                                if stopped or step == total:
                                    writer.wait()
                        del state
                    if pictures_due:
                        with gathered(model), autocast(device, precision):
                            draw_reconstructions(model, images, pictured, config, device, step, save=processes.is_main)

            student = whole_encoder(model.encoder)
            follower = whole_encoder(teacher.encoder) if isinstance(teacher.encoder, VisionTransformer) and moving_teacher else None
            with processes.main_first():
                if processes.is_main:
                    logbook.announce(finish(config, student, follower, step, total))
            return step


def finish(config: PretrainConfig, student: VisionTransformer, teacher: VisionTransformer | None, step: int, total: int) -> str:
    """Write the weights and the report; returns the sentence that says how the run ended. teacher: None if it did not change."""
    notes = {"run": config.run_dir.name, "preset": config.preset, "step": str(step), "data": Path(str(config.data.source)).name, "commit": commit()}
    weights = config.run_dir / "encoder.safetensors"
    save_encoder(weights, student, notes)
    if teacher is not None:
        save_encoder(config.run_dir / "teacher.safetensors", teacher, notes)
    report = write_report(config.run_dir)
    if step < total:
        return f"stopped at step {step} of {total}; the same command continues from there"
    return f"done: {weights}, report {report}"


def build_models(config: PretrainConfig) -> tuple[PersonMAE, Teacher]:
    """The student and its teacher, freshly initialised from the seed, on the CPU."""
    if config.teacher.kind == "ema":
        model = PersonMAE(config.model, seed=config.seed)
        return model, build_teacher(config.teacher, model.encoder)
    teacher = build_teacher(config.teacher, VisionTransformer(config.model.encoder))
    return PersonMAE(config.model, feature_width=teacher.width, seed=config.seed), teacher


def place_models(model: PersonMAE, teacher: Teacher, config: PretrainConfig, device: torch.device, precision: str) -> str:
    """Puts both on the device, with the attention and the operators that serve there; returns what was chosen, and why."""
    attention = choose_attention(config.attention, device, precision, config.deterministic)
    use_operators(None if config.operators == "auto" else config.operators)
    for part in (model, teacher):
        part.to(device)
        set_attention(part, attention, longest_sequence(config.model))
    return f"attention: {attention.kind} ({attention.reason}); operators: {describe_operators(device)}"


def compile_blocks(model: PersonMAE, teacher: Teacher, config: PretrainConfig, device: torch.device) -> str:
    """Has the blocks compiled for the batches that come, where that is chosen; returns the choice in words."""
    compilation = choose_compilation(config.compile, device)
    for part in (model, teacher):
        set_blocks(part, compiled=compilation.compiled, checkpointing=config.checkpoint_activations)
    return f"blocks: {compilation}"


def prepare_gradients(
    trained: nn.Module, teacher: Teacher, config: PretrainConfig, device: torch.device, precision: str, world_size: int
) -> tuple[CaptureChoice, Compute]:
    """What computes the gradients of a batch, and how that was chosen. trained: the model, or what exchanges its gradients between processes."""
    choice = choose_capture(config.cuda_graph, device, world_size, config.accumulation)
    targets = None if config.model.losses == "pixels" else teacher
    compute = functools.partial(compute_gradients, trained, targets, scale=1.0 / config.accumulation, precision=precision)
    return choice, CapturedGradients(compute, trained.parameters(), required=config.cuda_graph == "yes") if choice.captured else compute


def settle_buckets(trained: nn.Module, gradients: Compute, inputs: RegionInputs) -> None:
    """A backward pass for nothing, after which DistributedDataParallel has put its gradients into their final order.

    Between more than two processes the order of a sum's terms depends on it: without, the first step after a resume would differ in the last bits.
    """
    gradients(inputs, 1.0)
    trained.zero_grad(set_to_none=True)


def to_inputs(batch: RegionBatch, config: PretrainConfig, device: torch.device) -> RegionInputs:
    """A loader's batch with its masks, on the device; where the target is region A, in region B's place too."""
    seeds = sample_seeds(config.seed, batch.epoch, batch.samples.numpy(), Stream.MASK, None if batch.copies is None else batch.copies.numpy())
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
    # From pageable memory a copy makes the host wait, whatever is asked.
    pinned = [tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor for tensor in inputs]
    return RegionInputs(*(tensor.to(device, non_blocking=True) for tensor in pinned))


@torch.no_grad()
def draw_reconstructions(
    model: PersonMAE, images: Mapping[int, UInt8Array], chosen: BatchPlan, config: PretrainConfig, device: torch.device, step: int, *, save: bool
) -> None:
    """A picture of the chosen samples: region A masked, region B, and B as predicted; without colour, blur or erasing.

    images: sample -> uint8 [H, W, 3]; samples without one are left out. save: False only computes.
    """
    if config.model.losses == "features":
        return
    size = config.model.encoder.image_size
    regions, rows = [], []
    for row, sample in enumerate(chosen.samples.tolist()):
        if sample in images:
            rows.append(row)
            regions.append([sample_box(images[sample], chosen.boxes[row, k], bool(chosen.flips[row, k]), size) for k in (0, 1)])
    if not rows:
        return
    pair = torch.from_numpy(np.array(regions))
    boxes, flips, samples = (torch.from_numpy(values[rows]) for values in (chosen.boxes, chosen.flips, chosen.samples))
    batch = RegionBatch((pair[:, 0], pair[:, 1]), boxes, flips, samples, samples, epoch=0, step=0, micro=0)
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
    if not save:
        return
    path = config.run_dir / "pictures" / f"reconstruction_{step:07d}.png"
    with explained_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def open_index(config: PretrainConfig) -> ImageIndex:
    """The images of the run: of a run that goes on those that it began with, else those that can be read now.

    Raises UserError if the run folder cannot be written or the source holds no image.
    """
    check_run_dir(config.run_dir)
    data = config.data
    assert data.source is not None
    if is_address(data.source):
        # It has an index of its own, as a pack on a disk has, and is there to be opened again.
        window = None if data.order == "global" else data.order_window
        return open_streamed_pack(data.source, data.stream, data.index_dir, window=window)
    source = Path(data.source).expanduser()
    kept = config.run_dir / "index.npz"
    goes_on = bool(list_checkpoints(config.run_dir / "checkpoints")) and kept.exists()
    if goes_on:
        began_with = read_kept_index(kept)
        # A pack has an index of its own, which says where its images lie now; whether they are the same ones is asked of the checkpoint.
        if began_with.source == source.absolute() and not is_pack(source):
            print(f"images: the {len(began_with.index)} that the run began with ({kept})")
            return began_with.index
    index = build_index(source, data.index_dir, verify=data.verify)
    if not goes_on:
        keep_index(source, index, kept)
    return index


def describe_run(config: PretrainConfig, index: ImageIndex, total: int, processes: Processes) -> dict[str, Any]:
    """What config.json holds: the settings, and what the run was started on."""
    images = {"images": len(index), "rejected_images": len(index.rejected)}
    started = {**describe_environment(), "machine": processes.description, **images, "steps": total}
    return {**to_plain(config), "started": started}


def silence(text: str) -> None:
    """What processes other than the main one say."""


def from_command_line(arguments: Sequence[str] | None = None, program: str = "pretrain.py") -> PretrainConfig:
    """The run that the command line describes."""
    return parse_flags(pretrain_presets(), arguments, program, "Masked pre-training on a folder of person crops.")


if __name__ == "__main__":
    with user_errors_exit():
        main(from_command_line())
