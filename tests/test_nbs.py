"""Every notebook that defines a module runs from top to bottom; its cells hold its tests."""
import pytest
from conftest import NOTEBOOKS, PAPERMILL, ROOT
from nbdev.test import test_nb as run_notebook


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in PAPERMILL], ids=lambda path: path.stem)
def test_notebook(path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.chdir(ROOT / "nbs")
    passed, _ = run_notebook(path, skip_flags=("notest",), force_flags=(), basepath=ROOT)
    assert passed, capsys.readouterr().err[-8000:]
