"""The report of a run: one self-contained HTML page, styles and pictures inside, without scripts and requests.

What a run did not write is said on the page, not left out in silence. All text from files is escaped.
"""

from __future__ import annotations

import datetime
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import personmae
from personmae.configs import UserError
from personmae.visuals.curves import Metrics, draw_curves, keys_not_drawn, read_metrics
from personmae.visuals.report_parts import (
    MIME,
    STYLE,
    data_uri,
    definitions,
    entries,
    figure,
    is_number,
    missing,
    setting,
    text,
)
from personmae.visuals.report_scores import score_section
from personmae.whole_files import write_whole

REPORT_NAME = "report.html"
MAX_RECONSTRUCTIONS = 7

# Settings that a reader wants before the whole list: path in config.json, label.
SUMMARY_SETTINGS = (
    ("preset", "preset"),
    ("data.source", "images"),
    ("data", "labelled set"),
    ("init", "initial weights"),
    ("num_people", "people in a batch"),
    ("images_each", "images of each"),
    ("started.people", "number of people"),
    ("best_by", "best epoch chosen by"),
    ("model.encoder.image_size", "region, height x width in px"),
    ("model.image_size", "image, height x width in px"),
    ("model.stride_px", "stride of the patches in px"),
    ("model.feature", "feature"),
    ("model.parts", "parts"),
    ("schedule.epochs", "epochs"),
    ("model.encoder.patch_px", "patch in px"),
    ("model.encoder.width", "encoder width"),
    ("model.encoder.depth", "encoder blocks"),
    ("model.encoder.num_heads", "attention heads"),
    ("model.masking.kind", "masks"),
    ("model.target_region", "predicted region"),
    ("model.predict", "predicted patches"),
    ("model.losses", "losses"),
    ("batch_size", "batch size"),
    ("started.steps", "steps planned"),
    ("started.images", "number of images"),
    ("optimiser.learning_rate", "base learning rate"),
    ("precision", "precision"),
    ("device", "device"),
    ("seed", "seed"),
)


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run's folder from what lies there, and return its path.

    Read, each if it is there: config.json (its "started" says versions, machine, commit, date), metrics.jsonl,
    evaluation.json, pictures/reconstruction_*.png and the ranked lists that evaluation.json names.

    Raises UserError if there is no such folder, or the report cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"no such run folder: {run_dir}; give the folder that a run has written")
    config, config_problem = _read_json(run_dir / "config.json", "config.json was not written.")
    content, evaluation_problem = _read_json(run_dir / "evaluation.json", "No evaluation was run.")
    # One for each set; without any, what is missing is said once.
    evaluations = entries(content, "evaluations") or [{}]
    metrics = read_metrics(run_dir / "metrics.jsonl")
    sections = [
        ("scores", "Scores", "".join(score_section(evaluation, evaluation_problem) for evaluation in evaluations)),
        ("run", "What was run", _summary(config, config_problem, metrics)),
        ("curves", "Curves", _curves(metrics)),
        ("reconstructions", "Reconstructions", _reconstructions(run_dir, config)),
        ("clusters", "Clusters", _clusters(run_dir)),
        ("ranked-lists", "Ranked lists", _ranked_lists(run_dir, evaluations)),
        ("notes", "Notes", _notes(evaluations)),
        ("environment", "Versions and machine", _environment(config)),
    ]
    # What another kind of run has none of is not missed.
    sections = [section for section in sections if section[2]]
    page = _page(run_dir.resolve().name, _subtitle(config, metrics, evaluations), sections)
    report = run_dir / REPORT_NAME
    write_whole(report, page)
    return report


def _page(name: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections)
    # The policy forbids the page every request, whatever text has got into it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(name)} - PersonMAE run</title>
<style>{STYLE}</style>
</head>
<body>
<header><p class="kind">PersonMAE run</p><h1>{text(name)}</h1><p class="subtitle">{subtitle}</p></header>
<nav aria-label="Sections">{links}</nav>
<main>{body}</main>
<footer>Written by personmae {text(personmae.__version__)} on {_now()}.</footer>
</body>
</html>
"""


def _subtitle(config: Any, metrics: Metrics, evaluations: Sequence[Any]) -> str:
    parts = []
    if metrics.rows:
        last = metrics.rows[-1]
        done, planned = last["step"], setting(config, "started.steps") or setting(config, "schedule.steps")
        steps = f"{done:,} steps"
        if isinstance(planned, int) and done < planned:
            steps = f"{done:,} of {planned:,} steps: not finished, or stopped early"
        parts.append(steps)
        batch_size = setting(config, "batch_size")
        if isinstance(batch_size, int):
            parts.append(f"{done * batch_size:,} images seen")
        if is_number(last.get("epoch")):
            parts.append(f"epoch {round(last['epoch'], 1):g}")
    else:
        parts.append("no training was logged")
    sets = [str(reid_set) for evaluation in evaluations if (reid_set := setting(evaluation, "set"))]
    parts.append(f"evaluated on {text(', '.join(sets))}" if sets else "not evaluated")
    return " · ".join(parts)


def _summary(config: Any, problem: str, metrics: Metrics) -> str:
    if problem:
        return missing(problem)
    rows = []
    for path, label in SUMMARY_SETTINGS:
        value = setting(config, path)
        if value is not None and not isinstance(value, Mapping):
            rows.append((label, " x ".join(map(str, value)) if isinstance(value, list) else value))
    speeds = sorted(row["images_per_second"] for row in metrics.rows if is_number(row.get("images_per_second")))
    if speeds:
        rows.append(("median speed", f"{speeds[len(speeds) // 2]:,.4g} images/s"))
    settings = {key: value for key, value in config.items() if key != "started"}
    whole = text(json.dumps(settings, indent=2, ensure_ascii=False))
    return f"{definitions(rows)}<details><summary>The whole configuration</summary><pre>{whole}</pre></details>"


def _curves(metrics: Metrics) -> str:
    problems = "".join(missing(f"{problem[:1].upper()}{problem[1:]}.") for problem in metrics.problems)
    if not metrics.rows:
        return problems or missing("metrics.jsonl is empty.")
    light, dark = draw_curves(metrics.rows, "light"), draw_curves(metrics.rows, "dark")
    if not light:
        return problems + missing("metrics.jsonl holds no curve that this page knows.")
    figures = []
    for day, night in zip(light, dark, strict=True):
        picture = f'<img alt="{text(day.description)}" src="{data_uri(day.svg.encode(), ".svg")}">'
        # On paper a chart is light, whatever the reader's screen is.
        other = (
            f'<source media="screen and (prefers-color-scheme: dark)" srcset="{data_uri(night.svg.encode(), ".svg")}">'
        )
        figures.append(
            f"<figure><figcaption>{text(day.title)}</figcaption><picture>{other}{picture}</picture></figure>"
        )
    note = "Thin line: as logged; thick line: moving mean."
    if any("mean_patch_loss" in row or "mean_feature_loss" in row for row in metrics.rows):
        note += " Kinds of patches of region B: seen in A, hidden in A, outside A. Mean: the loss of predicting the mean, which needs no learning."
    others = keys_not_drawn(metrics.rows)
    rest = f'<p class="small">Also in metrics.jsonl: {text(", ".join(others))}.</p>' if others else ""
    return f'{problems}<p class="small">{note}</p><div class="charts">{"".join(figures)}</div>{rest}'


def _reconstructions(run_dir: Path, config: Any) -> str:
    numbered = []
    for path in (run_dir / "pictures").glob("reconstruction_*.png"):
        match = re.fullmatch(r"reconstruction_(\d+)\.png", path.name)
        if match:
            numbered.append((int(match[1]), path))
    if not numbered:
        return "" if setting(config, "num_people") else missing("No reconstruction was drawn.")
    numbered.sort()
    count = min(MAX_RECONSTRUCTIONS, len(numbered))
    # Evenly spread over the run, with the first and the last.
    shown = [numbered[round(number * (len(numbered) - 1) / max(count - 1, 1))] for number in range(count)]
    itself = setting(config, "model.target_region") == "A"
    target = "region A itself" if itself else "region B, another crop of the same image"
    note = f"Grey patches of region A are hidden from the network. From the others it predicts {target}."
    note += " The newest picture first, then the way to it."
    if count < len(numbered):
        note += f" {count} of {len(numbered)} pictures; the others are in the run's folder."
    figures: list[str] = []
    for step, path in (shown[-1], *shown[:-1]):
        description = f"Reconstructions at step {step:,}: region A as seen, the target, the prediction"
        figures.append(figure(path, f"Step {step:,}", description, wide=not figures))
    earlier = f'<div class="earlier">{"".join(figures[1:])}</div>' if figures[1:] else ""
    return f'<p class="small">{note}</p>{figures[0]}{earlier}'


def _clusters(run_dir: Path) -> str:
    """What an unsupervised run found: the table of each epoch, the sheets of the first and the last, and what other eps would have given."""
    path = run_dir / "clusters.jsonl"
    if not path.is_file():
        return ""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        return missing(f"{path.name} could not be read: {error}.")
    names = ("epoch", "eps", "clusters", "outliers", "nmi", "ari", "purity", "clustered")
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    cells = ("".join(f'<td class="number">{_short(row.get(name))}</td>' for name in names) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    note = "Clusters at the start of each epoch. NMI, ARI and purity compare them with the set's labels, which the training does not use."
    table = f'<div class="scroll"><table><caption>{note}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    sheets = sorted((run_dir / "pictures").glob("clusters_*.png"))
    shown = [sheets[-1], sheets[0]] if len(sheets) > 1 else sheets
    figures = [figure(sheet, f"Epoch {int(sheet.stem[9:])}", "A row for each of some clusters; images of others in vermilion") for sheet in shown]
    eps = run_dir / "eps.txt"
    others = f"<details><summary>Other eps, before the first epoch</summary><pre>{text(eps.read_text())}</pre></details>" if eps.is_file() else ""
    return table + "".join(figures) + others


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if is_number(value) else "&ndash;"


def _ranked_lists(run_dir: Path, evaluations: Sequence[Any]) -> str:
    figures = []
    for evaluation in evaluations:
        page = setting(evaluation, "page")
        if isinstance(page, str) and (run_dir / page).resolve().is_relative_to(run_dir.resolve()):
            link = f'<a href="{text(urllib.parse.quote(page))}">All ranked lists on {text(setting(evaluation, "set"))}, to browse</a>'
            figures.append(f"<p>{link}: worst queries first, by camera and person.</p>")
    for name in [name for evaluation in evaluations for name in entries(evaluation, "ranked_lists")]:
        path = (run_dir / str(name)).resolve()
        title = path.stem.replace("_", " ").capitalize()
        if path.is_relative_to(run_dir.resolve()) and path.suffix in MIME:
            description = f"{title}: queries with their nearest gallery images, right ones ticked, wrong ones crossed"
            figures.append(figure(path, title, description))
        else:
            figures.append(missing(f"{name} is not a picture in the run's folder and was left out."))
    return "".join(figures) or missing("No ranked list was drawn.")


def _notes(evaluations: Sequence[Any]) -> str:
    said = dict.fromkeys(str(note) for evaluation in evaluations for note in entries(evaluation, "notes"))
    notes = "".join(f"<li>{text(note)}</li>" for note in said)
    return f"<ul>{notes}</ul>" if notes else '<p class="quiet">None.</p>'


def _environment(config: Any) -> str:
    started = setting(config, "started")
    if not isinstance(started, Mapping) or not started:
        return missing("Versions, machine, commit and date were not recorded.")
    return definitions([(str(name).replace("_", " "), value) for name, value in started.items()])


def _read_json(path: Path, absent: str) -> tuple[Any, str]:
    """The content and an empty text, or None and what is wrong. absent: what to say if there is no such file."""
    if not path.is_file():
        return None, absent
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, f"{path.name} could not be read: {error}."
    if not isinstance(content, dict):
        return None, f"{path.name} could not be read: it holds no JSON object."
    return content, ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
