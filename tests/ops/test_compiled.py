"""Loading the compiled operators: what is said where they are missing or do not fit."""

import importlib
import os

import pytest

from personmae_kernels import compiled


def why_missing_when(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    def fail(name: str) -> None:
        assert name == "personmae_kernels._C"
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    return compiled.why_missing.__wrapped__()


def test_missing_binary_is_said_with_the_cure(monkeypatch):
    sentence = why_missing_when(monkeypatch, ModuleNotFoundError("No module named 'personmae_kernels._C'"))
    assert "not built" in sentence
    assert "setup.py build_ext --inplace" in sentence


def test_a_binary_that_does_not_load_is_said_with_its_error_and_the_cure(monkeypatch):
    sentence = why_missing_when(monkeypatch, ImportError("undefined symbol: torch_library_impl"))
    assert "undefined symbol: torch_library_impl" in sentence
    assert "setup.py build_ext --inplace" in sentence


def test_available_agrees_with_why_missing():
    assert compiled.available() == (compiled.why_missing() == "")


@pytest.mark.skipif(os.environ.get("PERSONMAE_REQUIRE_COMPILED") != "1", reason="PERSONMAE_REQUIRE_COMPILED is not 1")
def test_built_where_it_has_to_be():
    assert compiled.why_missing() == ""
