"""Supervised fine-tuning, which the tasks share: P people with K images each in a step, one loop for one process or many.

An encoder with a neck and a classifier of the training people; identity and triplet losses over the whole batch; plan, loaders, log, checkpoints and
report as in pre-training. The last epoch's weights are scored on the test sets, and those of the best one where a best was asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from personmae.configs import UserError, to_plain
from personmae.data.identity_plan import IdentityPlan
from personmae.data.labelled import LabelledImages, TrainingSets, hold_out, open_labelled
from personmae.data.loaders import open_loader
from personmae.data.reid.sets import ReidSet
from personmae.models.attention import choose_attention, set_attention
from personmae.models.identity_head import IdentityHead, IdentityHeadConfig
from personmae.models.reid import ReidEncoder
from personmae.models.vit import VisionTransformer
from personmae.recipes.finetuning import FREE_SETTINGS, FinetuneConfig
from personmae.tasks.finetuning_results import finish, mean_average_precision
from personmae.tasks.model_scores import camera_notes
from personmae.tasks.model_setup import copy_buffers, initial_encoder, place_model, silence, to_micro
from personmae.tasks.retrieval import count_warnings, open_sets
from personmae.training.best_epoch import BestEpoch
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.ema import MovingAverage
from personmae.training.environment import describe_environment
from personmae.training.finetuning_optimisers import build_finetuning_optimiser
from personmae.training.identity_step import identity_gradients
from personmae.training.logbook import Logbook, check_run_dir
from personmae.training.optimisers import update_weights
from personmae.training.precision import check_finite, make_deterministic
from personmae.training.processes import Processes, StopSignal, start_processes
from personmae.training.quarantine import Quarantine
from personmae.training.resuming import checkpoint_state, load_to_resume, restore_moments, restore_weights, state_bytes
from personmae.training.schedules import finetuning_rate


def main(config: FinetuneConfig) -> int:
    """Run or continue a fine-tuning run; returns the number of steps done, fewer than planned if it was asked to stop.

    Writes the run folder: config.json, metrics.jsonl, events, checkpoints/, reid.safetensors (encoder and head of the last epoch), best.safetensors,
    encoder.safetensors (for timm; not with overlapping patches or camera embeddings), evaluation.json, report.html. Raises UserError for what the
    user can mend.
    """
    with start_processes(config.device) as processes:
        device = processes.device
        if config.deterministic:
            make_deterministic(device)
        sets = processes.from_main(lambda: open_training_sets(config))
        train, checkpoints = sets.train, config.run_dir / "checkpoints"
        with processes.main_first():
            plan = IdentityPlan(train, config.num_people, config.images_each, config.seed, config.views, cross_camera=config.cross_camera)
            plan.batch(0, 0, num_parts := processes.world_size * config.accumulation)
            if config.occlusion.prob > 0 and config.occlusion.fill == "others" and config.num_people // num_parts < 2:
                raise UserError(f"occlusion.fill others needs 2 people in each of {num_parts} parts of a batch; set a larger --num-people, or noise")
            say = print if processes.is_main else silence
            allowed, digest = config.resume == "auto", sets.digest()
            saved = load_to_resume(checkpoints, config, FREE_SETTINGS, digest, config.data or "", say, allowed=allowed)
            # The weights to begin with are read where a run goes on, too: they have the sizes.
            initial, origin = initial_encoder(config)
        first = saved.step if saved else 0
        processes.check_same_step(first)
        steps_per_epoch = plan.steps_per_epoch
        total = config.schedule.epochs * steps_per_epoch

        logbook = Logbook(
            config.run_dir,
            num_steps=total,
            images_per_step=config.batch_size,
            log_every=config.log_every,
            resume_step=first,
            config=describe_run(config, sets, total, processes) if processes.is_main else None,
            is_main=processes.is_main,
            device=device,
        )
        with logbook:
            logbook.announce(f"{config.preset}: {total} steps ({config.schedule.epochs} epochs) on {processes.description}")
            logbook.announce(f"training: {train.describe()}; {config.num_people} people x {config.images_each} images in a step")
            logbook.announce(f"initial weights: {origin}")
            precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
            encoder, head = build_model(config, initial, train)
            model = nn.ModuleDict({"encoder": encoder, "head": head})
            logbook.announce(f"precision: {precision}; {place_model(model, encoder, config, device, precision)}")
            shadow = build_model(config, initial, train) if config.ema else None
            followers = nn.ModuleDict({"encoder": shadow[0], "head": shadow[1]}).to(device) if shadow else None
            if shadow:
                set_attention(shadow[0], choose_attention(config.attention, device, precision, config.deterministic), encoder.num_tokens)
            if saved:
                restore_weights(saved, config.preset, model, followers)
            average = MovingAverage(followers, model) if followers else None
            optimiser = build_finetuning_optimiser(encoder, head, config.optimiser)
            best = BestEpoch(config.run_dir / "best.safetensors")
            if saved:
                restore_moments(saved, config.preset, optimiser)
                best.restore(saved.state["best"])
                logbook.announce(f"continuing {saved.path} at step {first} of {total}")
                del saved
            scored, scored_head = shadow if shadow else (encoder, head)
            labels = torch.from_numpy(train.labels)

            loader = open_loader(
                train.index,
                plan,
                config.loader,
                size=config.model.image_size,
                device=device,
                first_step=first,
                last_step=total,
                rank=processes.rank,
                world_size=processes.world_size,
                local_world_size=processes.local_world_size,
                accumulation=config.accumulation,
                announce=logbook.announce,
            )
            quarantine = Quarantine(
                config.run_dir, len(train.index), config.loader.max_bad_ratio, processes.is_main, logbook.announce, resume_step=first
            )
            writer = CheckpointWriter(checkpoints, config.keep_last, logbook.announce)
            if processes.is_main:
                writer.reserve(state_bytes(model, followers), device)
            step, stopped, told = first, False, 0
            model.train()
            with StopSignal(processes) as stop, loader, writer:
                batches = iter(loader)
                logbook.start_clock(first, loader.wait_seconds)
                while step < total and not stopped:
                    epoch, within = divmod(step, steps_per_epoch)
                    rate = finetuning_rate(epoch, within / steps_per_epoch, config.optimiser.learning_rate, config.schedule)
                    parts = [to_micro(next(batches), micro, encoder, train, config, processes) for micro in range(config.accumulation)]
                    # By the plan: what replaces an unreadable image is of the same person.
                    wanted = labels[torch.from_numpy(plan.step_samples(step))].to(device, non_blocking=True)
                    losses = identity_gradients(
                        encoder, head, parts, wanted, config.loss, precision=precision, rank=processes.rank, world_size=processes.world_size
                    )
                    norm = update_weights(optimiser, model, average, rate, config.ema, config.optimiser.clip_norm)
                    step += 1
                    if writer.failed:
                        stop.ask()
                    stopped = stop.requested()
                    epoch_done = epoch + 1 if step % steps_per_epoch == 0 else 0
                    latest: dict[str, Tensor | float] = {
                        "epoch": step / steps_per_epoch,
                        "learning_rate": rate,
                        "quarantined_images": float(len(quarantine)),
                    }
                    if epoch_done and config.best_by != "no" and (epoch_done % config.evaluate_every == 0 or step == total):
                        if followers:
                            copy_buffers(followers, model)
                        found = processes.from_main(lambda: mean_average_precision(scored, judges(sets, config), sets, config, device))
                        model.train()
                        latest["judged_map"] = found
                        if best.is_better(found, epoch + 1) and processes.is_main:
                            about = {"run": str(config.run_dir), "preset": config.preset, "by": config.best_by}
                            best.save(scored, scored_head, {**about, **camera_notes(sets)})
                    checkpoint_due = stopped or step == total or (epoch_done > 0 and epoch_done % config.checkpoint_every == 0)
                    values = {
                        "loss": losses.total,
                        "loss_id": losses.id,
                        "loss_triplet": losses.triplet,
                        "accuracy": losses.accuracy,
                        "distance_positive": losses.positive_distance,
                        "distance_negative": losses.negative_distance,
                        "gradient_norm": norm,
                    }
                    line = logbook.log(step, values, latest, wait_seconds=loader.wait_seconds, last=checkpoint_due or "judged_map" in latest)
                    if line:
                        check_finite(line, step)
                        overdue = 0 < 60 * config.checkpoint_minutes <= writer.seconds_since_save
                        met = processes.all_gather((loader.quarantine[told:], overdue))
                        told = len(loader.quarantine)
                        quarantine.add(step, [entry for entries, _ in met for entry in entries])
                        checkpoint_due |= met[0][1]
                    if checkpoint_due:
                        with processes.main_first():
                            if processes.is_main:
                                state = checkpoint_state(config, digest, model, followers, optimiser)
                                writer.save(step, {**state, "best": best.state()})
                                if stopped or step == total:
                                    writer.wait()
            with processes.main_first():
                if processes.is_main:
                    if followers:
                        copy_buffers(followers, model)
                    start = build_model(config, initial, train)[0]
                    logbook.announce(finish(config, scored, scored_head, start, best, sets, device, step, total, logbook.announce))
            return step


def open_training_sets(config: FinetuneConfig) -> TrainingSets:
    """The sets of a run. Raises UserError for what is no labelled set, has no training part, or leaves nobody to train on or to test."""
    check_run_dir(config.run_dir)
    if config.data is None:
        raise UserError("no labelled set was given; add --data NAME=FOLDER, as --data market1501=/data/market (`personmae data names` lists them)")
    if config.init is None:
        raise UserError("no weights to begin with; add --init RUN (a run folder, a weights file or timm:NAME), or --init random:vit-small for none")
    ((name, whole),) = open_sets([config.data], config.split)
    print(whole.describe())
    for note in [*whole.notes, *count_warnings(whole)]:
        print(f"  {note}")
    if not whole.train:
        raise UserError(f"{name} has no training part: it is for testing alone; give it as --test, and another set as --data")
    divided = hold_out(whole, config.hold_out, config.seed) if config.best_by == "held-out" else None
    train = open_labelled((divided or whole).train, config.run_dir / "train.txt", print)
    if config.model.camera_weight > 0 and not whole.has_cameras:
        raise UserError(f"{name} does not tell its cameras, and --model.camera-weight needs them; set it to 0")
    tests = open_sets(config.test, config.split) if config.test else [(name, whole)]
    return TrainingSets(whole.name, train, divided, tests)


def judges(sets: TrainingSets, config: FinetuneConfig) -> list[ReidSet]:
    """The sets by which the best epoch is chosen."""
    if config.best_by == "held-out":
        assert sets.held_out is not None
        return [sets.held_out]
    return [reid_set for _, reid_set in sets.tests]


def build_model(config: FinetuneConfig, initial: VisionTransformer, train: LabelledImages) -> tuple[ReidEncoder, IdentityHead]:
    """Encoder and head, what is new in them drawn from the seed, on the CPU."""
    encoder = ReidEncoder(initial, config.model, train.num_cameras, seed=config.seed)
    head = IdentityHead(IdentityHeadConfig(widths=encoder.widths, num_people=train.num_people, neck=config.model.neck), seed=config.seed)
    return encoder, head


def describe_run(config: FinetuneConfig, sets: TrainingSets, total: int, processes: Processes) -> dict[str, Any]:
    """What config.json holds: the settings, and what the run was started on."""
    train = sets.train
    numbers = {"images": len(train), "people": train.num_people, "cameras": train.num_cameras, "rejected_images": len(train.index.rejected)}
    return {**to_plain(config), "started": {**describe_environment(), "machine": processes.description, **numbers, "steps": total}}


