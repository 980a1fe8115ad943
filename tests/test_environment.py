"""What a run says it was started on."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from personmae.training import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.invalid"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a copy of the file, which believes to lie there."""
    git(tmp_path, "init", "-q")
    copy = Path(shutil.copy(environment.__file__, tmp_path / "environment.py"))
    monkeypatch.setattr(environment, "__file__", str(copy))
    (tmp_path / "other.txt").write_text("theirs")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-qm", "theirs")
    return tmp_path


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ(repository):
    git(repository, "add", "environment.py")
    git(repository, "commit", "-qm", "ours")
    revision = git(repository, "rev-parse", "HEAD")
    assert environment.commit() == revision
    (repository / "other.txt").write_text("changed")
    assert environment.commit() == f"{revision} with changes"


def test_a_copy_inside_somebody_elses_repository_has_no_commit(repository):
    assert environment.commit() == "unknown"


def test_versions_are_told():
    assert environment.describe_environment()["torch"] == torch.__version__
