"""Drawing a whole data set into a folder: layout, worker processes, and a manifest that says what is there.

Workers are separate Python programs, not forks and not children that import the calling program again: so drawing works from a notebook, from a
script without a main guard and from a process that has started threads (torch's, OpenCV's).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import simplejpeg

from personmae.configs import UserError, differences, to_plain
from personmae.data.mannequins.camera import camera_of
from personmae.data.mannequins.pictures import GALLERY, OCCLUDED, QUERY, TRAIN, UNLABELLED, MannequinsConfig, Picture, plan_pictures
from personmae.data.mannequins.render import picture_pixels
from personmae.data.worker_environment import worker_environment
from personmae.whole_files import PARTIAL_SUFFIX, whole_path

# Goes up with every change of the pictures, so that old drawings are told from new ones.
GENERATOR_VERSION = 2
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
# How a worker's exit code says that its message is for the user.
USERS_MISTAKE = 3
_REPORT_EVERY = 20


@dataclass(frozen=True)
class MannequinsLayout:
    """Where the parts of a drawn data set are."""

    root: Path  # itself in Market-1501's layout: bounding_box_train, query, bounding_box_test
    occluded: Path  # in Occluded-Duke's layout: the same three folders, Duke's file names
    unlabelled: Path  # for pre-training: a flat folder of people who are in no other part
    manifest: Path


def draw_mannequins(root: Path, config: MannequinsConfig, *, num_workers: int | None = None, progress: bool = True) -> MannequinsLayout:
    """Draw the data set `config` into the folder `root`, or say that it is there already.

    num_workers: processes; None = one per available core. The files are the same, byte for byte, for any number. An interrupted drawing is taken up
    by calling again: pictures that are there stay. Raises UserError if root holds anything else, another data set included, is not writable, or has
    no room left.
    """
    layout = MannequinsLayout(root, root / OCCLUDED, root / UNLABELLED, root / MANIFEST)
    said = {"generator": GENERATOR_VERSION, "config": to_plain(config)}
    if _is_there(root, said):
        if progress:
            print(f"mannequins: {root} holds this data set already; nothing to draw")
        return layout
    plan = plan_pictures(config)
    with _refusals_told(root):
        # The marker first: folders without it would be taken for somebody else's.
        root.mkdir(parents=True, exist_ok=True)
        _write_json(root / UNFINISHED, said)
        for folder in _folders(root, config):
            folder.mkdir(parents=True, exist_ok=True)
    num_workers = max(1, min(num_workers if num_workers is not None else len(os.sched_getaffinity(0)), len(plan)))
    report = _progress_line(len(plan)) if progress else _ignore
    if num_workers == 1:
        for _ in _draw(root, config, plan, report):
            pass
    else:
        _draw_in_workers(root, config, num_workers, report)
    with _refusals_told(root):
        # By one rename, so that there is always either the marker or the manifest.
        _write_json(root / UNFINISHED, {**said, "pictures": _counts(plan)})
        (root / UNFINISHED).replace(layout.manifest)
    return layout


@contextlib.contextmanager
def _refusals_told(root: Path) -> Iterator[None]:
    """What the system refuses (no right, no room) as a sentence with its cure."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot draw into {root}: {error.strerror or error}; give a folder that you may write and that has room, or make room and call again: "
            "what is drawn is kept"
        ) from error


def _is_there(root: Path, said: dict[str, Any]) -> bool:
    """True if the data set is complete, False if the folder is free or holds an unfinished drawing of it."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give a new or empty folder to draw into")
    for name in (MANIFEST, UNFINISHED):
        if not (root / name).is_file():
            continue
        found = _read_json(root / name)
        changes = differences({key: found.get(key) for key in said}, said)
        if changes:
            raise UserError(
                f"{root} holds another data set of mannequins ({'; '.join(changes)}); give another folder, or remove this one to draw anew"
            )
        return name == MANIFEST
    # A marker that was being written is all that an end before anything else leaves.
    if any(entry.name != UNFINISHED + PARTIAL_SUFFIX for entry in root.iterdir()):
        raise UserError(f"{root} holds files that are no data set of mannequins (no {MANIFEST}); give a new or empty folder to draw into")
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} to draw anew") from error
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_path(path, shared=False) as partial:
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _folders(root: Path, config: MannequinsConfig) -> list[Path]:
    parts = [root] + ([root / OCCLUDED] if config.num_occluded_train_ids + config.num_occluded_test_ids else [])
    return [part / folder for part in parts for folder in (TRAIN, QUERY, GALLERY)] + [root / UNLABELLED]


def _counts(plan: Iterable[Picture]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for picture in plan:
        folder = picture.path.rpartition("/")[0]
        counts[folder] = counts.get(folder, 0) + 1
    return counts


def _draw(root: Path, config: MannequinsConfig, plan: list[Picture], report: Callable[[int], None]) -> Iterable[None]:
    since = 0
    for picture in plan:
        path = root / picture.path
        if not _is_whole(path):
            quality = camera_of(config.draw_seed, config.city, picture.camera).jpeg_quality
            content = simplejpeg.encode_jpeg(picture_pixels(config, picture), quality=quality, colorspace="RGB", colorsubsampling="420")
            with _refusals_told(root), whole_path(path, flush=False, shared=False) as partial:
                partial.write_bytes(content)
        since += 1
        if since == _REPORT_EVERY:
            report(since)
            since = 0
        yield
    if since:
        report(since)


def _is_whole(path: Path) -> bool:
    """Whether a picture is there. Pictures get their names when they are whole; but a machine that lost power may have kept the name alone."""
    return path.is_file() and path.stat().st_size > 0


def draw_share(root: Path, config: MannequinsConfig, share: int, num_shares: int, report: Callable[[int], None]) -> None:
    """Draw every num_shares-th picture, beginning with number `share`: what one worker does. `report` gets numbers of pictures done."""
    for _ in _draw(root, config, plan_pictures(config)[share::num_shares], report):
        pass


def _draw_in_workers(root: Path, config: MannequinsConfig, num_workers: int, report: Callable[[int], None]) -> None:
    environment = worker_environment()
    command = [sys.executable, "-P", "-m", "personmae.data.mannequins.worker"]
    with contextlib.ExitStack() as stack:
        workers: list[tuple[subprocess.Popen[str], str, IO[str]]] = []
        for share in range(num_workers):
            job = json.dumps({"root": str(root.resolve()), "config": to_plain(config), "share": share, "num_shares": num_workers})
            # A file: nobody reads a pipe while the counts are read, so a talkative worker would fill it and wait for ever.
            complaints = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment, text=True)
            stack.callback(_end, worker)
            workers.append((worker, job, complaints))
        problems: list[Exception] = []
        threads = [threading.Thread(target=_follow, args=(*parts, report, problems), daemon=True) for parts in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            # A join with a time limit lets Ctrl-C through.
            while thread.is_alive():
                thread.join(0.2)
    if problems:
        raise problems[0]


def _end(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is None:
        worker.terminate()
    worker.wait()


def _follow(worker: subprocess.Popen[str], job: str, complaints: IO[str], report: Callable[[int], None], problems: list[Exception]) -> None:
    """Hand a worker its job, pass its counts on, and keep what it says if it fails."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(job)
        worker.stdin.close()
    for line in worker.stdout:
        report(int(line))
    if worker.wait() == 0:
        return
    complaints.seek(0)
    said = complaints.read().strip() or f"exit code {worker.returncode}"
    if worker.returncode == USERS_MISTAKE:
        # Above the sentence stands what else the worker has said.
        problems.append(UserError(said.splitlines()[-1]))
    else:
        problems.append(RuntimeError(f"a worker that draws mannequins ended with an error:\n{said}"))


def _progress_line(total: int) -> Callable[[int], None]:
    """A counter on standard error: in place on a terminal, every tenth of the work elsewhere."""
    lock, begin, live = threading.Lock(), time.monotonic(), sys.stderr.isatty()
    state = {"done": 0, "told": 0}

    def report(num_done: int) -> None:
        with lock:
            state["done"] += num_done
            done = state["done"]
            if live or done == total or done >= state["told"] + total / 10:
                state["told"] = done
                rate = done / max(1e-9, time.monotonic() - begin)
                left = (total - done) / max(1e-9, rate)
                end = "\n" if not live or done == total else ""
                print(
                    f"{chr(13) if live else ''}mannequins: {done:,} of {total:,} pictures, {rate:.0f}/s, {left:.0f} s left ",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )

    return report


def _ignore(num_done: int) -> None:
    """No progress wanted."""
