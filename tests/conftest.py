"""Where the project is, and how a papermill run is started: shared by all tests."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test processes that share few cores must not wait for each other's threads
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores it, and so would every process that a test starts in order to interrupt it
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb"))
PAPERMILL = {  # what their parameters cells set beyond the usual
    "teacher": {}, "distill": {}, "cam_kd": {}, "tables": {}, "benchmark": {},
    "herbs_train": dict(recipe="herbs"), "herbs_evaluate": dict(recipe="herbs"), "herbs_heatmap": dict(recipe="herbs"), "deit": dict(recipe="deit_distilled"),
}


@pytest.fixture
def papermill(tmp_path):
    """Run `papermill` with the given words in `folder`; runs land below the test's own folder. Returns the finished process."""

    def start(*words, folder=ROOT, outputs=tmp_path / "outputs", **options):
        command = [str(Path(sys.executable).with_name("papermill")), *map(str, words), "-p", "output_dir", str(outputs), "-p", "device", "cpu"]
        return subprocess.run(command, cwd=folder, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              **{"capture_output": True, "stdin": subprocess.DEVNULL, **options})

    return start


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread while the tests of a module run."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def with_stops(monkeypatch):
    """Call `train` again and again: it fails right after the checkpoints with these numbers, counted over all calls, and goes on in the next call."""

    def run(train, numbers):
        import ctrlscam.loop
        save, saved = ctrlscam.loop.save_checkpoint, []

        def stopped(state):
            save(state)
            saved.append(state)
            if len(saved) in numbers:
                raise KeyError("stopped")

        monkeypatch.setattr(ctrlscam.loop, "save_checkpoint", stopped)
        for _ in numbers:
            with pytest.raises(KeyError):
                train()
        train()

    return run
