"""The Makefile and .ci/run where something is missing: with programs of a few lines in the place of Python, make and apt-get."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def write_program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)
    return path


@needs_make
def test_a_skipped_extension_is_tried_again_and_stops_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "setup.py", ".venv/.installed", "kernels/personmae_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"

    def make() -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("PY", "STACK", "MAKEFLAGS", "MAKELEVEL")}
        result = subprocess.run(["make", "install"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    write_program(python, "echo skipped")
    assert "skipped" in make()
    assert "skipped" in make()
    write_program(python, "touch kernels/personmae_kernels/_C.abi3.so", "echo built")
    assert "built" in make()
    assert "built" not in make()


@needs_make
@pytest.mark.parametrize("broken", ["nothing", "throughput.py"])
def test_on_a_gpu_one_failing_part_keeps_no_other_from_its_results(tmp_path, broken):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = write_program(tmp_path / "python", 'echo "ran $*"', f'[[ "$*" != *{broken}* ]]')
    result = subprocess.run(["make", "gpu", f"PY={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    ran = [line for line in result.stdout.splitlines() if line.startswith("ran ")]
    assert all(any(part in line for line in ran) for part in ("test_fused_model.py", "throughput.py", "operators.py", "-m gpu"))
    assert (result.returncode == 0) is (broken == "nothing")


@needs_make
def test_chosen_parts_alone_run_on_a_gpu(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = write_program(tmp_path / "python", 'echo "ran $*"')
    command = ["make", "gpu", f"PY={python}"]
    result = subprocess.run([*command, "PARTS=tests loading"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    ran = [line for line in result.stdout.splitlines() if line.startswith("ran -m") or line.startswith("ran bench")]
    assert result.returncode == 0
    assert [("-m gpu" in line, "loading.py" in line) for line in ran] == [(False, True), (True, False)]
    wrong = subprocess.run([*command, "PARTS=everything"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert wrong.returncode != 0
    assert "there is no part everything; there are: model step" in wrong.stderr


@needs_make
def test_without_a_gpu_only_a_dry_run_goes_on_and_it_keeps_the_results(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = write_program(tmp_path / "python", 'echo "ran $*"', '[[ "$1" != -c ]]')
    command = ["make", "gpu", f"PY={python}"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "no CUDA device" in refused.stderr
    assert "DRY_RUN=1" in refused.stderr
    assert "throughput.py" not in refused.stdout
    dry = subprocess.run([*command, "DRY_RUN=1"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert dry.returncode == 0, dry.stderr
    assert "throughput.py --output build/dry-run/" in dry.stdout
    assert "benchmarks/results" not in dry.stdout


@pytest.mark.parametrize(
    ("base", "has_venv", "has_headers", "there", "installed"),
    [
        ("/usr", False, False, ["make"], ["chromium", "g++", "git", "python3.11-venv", "python3.11-dev"]),
        ("/usr", True, False, ["chromium", "g++", "make", "git"], ["python3.11-dev"]),
        ("/usr/local", False, False, ["chromium", "g++", "git", "make"], []),
        (None, False, False, ["chromium", "g++", "git", "make"], ["python3", "python3-venv", "python3-dev"]),
    ],
    ids=["fresh", "no headers", "a Python from elsewhere", "no Python"],
)
def test_continuous_integration_installs_what_is_missing_and_no_more(base, has_venv, has_headers, there, installed, tmp_path):
    programs = tmp_path / "bin"
    include = tmp_path / "include"
    include.mkdir()
    if has_headers:
        (include / "Python.h").touch()
    for name in ("bash", "env", "dirname", "sleep", "touch", "chmod", "cat"):
        (programs / name).parent.mkdir(exist_ok=True)
        (programs / name).symlink_to(shutil.which(name))
    write_program(programs / "id", "echo 0")
    for name in there:
        write_program(programs / name, f'echo "{name} $*"')

    def python(venv: bool) -> list[str]:
        return [f'case "$2" in *ensurepip*) exit {0 if venv else 1};; *) printf "%s\\n" {base or "/usr"} 3.11 {include};; esac']

    if base:
        write_program(programs / "python3", *python(has_venv))
    write_program(tmp_path / "python-with-venv", *python(True))
    write_program(
        programs / "apt-get",
        '[ "$1" = install ] || exit 0',
        f'for package in "${{@:4}}"; do echo "$package" >>{tmp_path}/installed',
        'case "$package" in',
        f"  *-venv) cat {tmp_path}/python-with-venv >{programs}/python3; chmod +x {programs}/python3;;",
        f"  *-dev) touch {include}/Python.h;;",
        f"  *) touch {programs}/$package; chmod +x {programs}/$package;;",
        "esac; done",
    )
    result = subprocess.run(
        [str(programs / "bash"), str(ROOT / ".ci" / "run")], env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    record = tmp_path / "installed"
    assert (record.read_text().split() if record.exists() else []) == installed
    if "make" in there:
        assert result.stdout.splitlines()[-3:] == ["make lint", "make kernels", "make test"]
