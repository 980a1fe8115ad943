"""The list of files that went bad: written once each, counted alike everywhere, and taken up by a resumed run."""

import pytest

from personmae.configs import UserError
from personmae.training.quarantine import Quarantine


def test_each_file_is_listed_and_said_once_and_a_resumed_run_knows_them(tmp_path):
    said = []
    quarantine = Quarantine(tmp_path, 100, 0.05, True, said.append)
    quarantine.add(3, [("a.jpg", "truncated"), ("b\tc.jpg", "two\nlines"), ("a.jpg", "truncated")])
    quarantine.add(4, [("a.jpg", "truncated")])
    assert (tmp_path / "quarantine.tsv").read_text() == "3\ta.jpg\ttruncated\n3\tb\\tc.jpg\ttwo lines\n"
    assert len(said) == 2
    assert "a.jpg" in said[0]
    resumed = Quarantine(tmp_path, 100, 0.05, True, said.append, resume_step=4)
    assert len(resumed) == 2
    resumed.add(9, [("a.jpg", "truncated"), ("d.jpg", "gone")])
    assert len(resumed) == 3
    assert len((tmp_path / "quarantine.tsv").read_text().splitlines()) == 3


def test_what_an_interrupted_run_met_later_is_met_again(tmp_path):
    quarantine = Quarantine(tmp_path, 100, 0.05, True, lambda text: None)
    quarantine.add(3, [("a.jpg", "gone"), ("carriage\rreturn.jpg", "gone")])
    quarantine.add(8, [("b.jpg", "gone")])
    with open(quarantine.file, "a") as file:
        file.write("9\tcut o")
    other = Quarantine(tmp_path, 100, 0.05, False, lambda text: None, resume_step=5)
    assert len(quarantine.file.read_text().splitlines()) > 3
    resumed = Quarantine(tmp_path, 100, 0.05, True, lambda text: None, resume_step=5)
    assert len(resumed) == len(other) == 2
    assert quarantine.file.read_bytes() == b"3\ta.jpg\tgone\n3\tcarriage\rreturn.jpg\tgone\n"
    resumed.add(8, [("b.jpg", "gone")])
    assert quarantine.file.read_bytes().endswith(b"\n8\tb.jpg\tgone\n")


def test_other_processes_count_and_do_not_write(tmp_path):
    said = []
    quarantine = Quarantine(tmp_path, 100, 0.05, False, said.append)
    quarantine.add(1, [("a.jpg", "gone")])
    assert len(quarantine) == 1
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_allowed_share_stops_the_run(tmp_path):
    quarantine = Quarantine(tmp_path, 100, 0.02, True, lambda text: None)
    quarantine.add(1, [("a.jpg", "gone"), ("b.jpg", "gone")])
    with pytest.raises(UserError, match=r"3 of 100 .*quarantine\.tsv"):
        quarantine.add(2, [("c.jpg", "gone")])
    assert len((tmp_path / "quarantine.tsv").read_text().splitlines()) == 3
