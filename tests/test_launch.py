"""Trainings at the command line as processes of their own: one, two that a launcher starts, one that is asked to stop."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_cli import TINY, train

COMMAND = str(Path(sys.executable).with_name("ctrlscam"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--no_python"],
}


def weights(outputs):
    return {str(path.relative_to(outputs)): path.read_bytes() for path in sorted(outputs.rglob("*")) if path.name in ("last.safetensors", "picked.safetensors", "predictions.csv")}


def launch(launcher, *words):
    """The finished launcher of `ctrlscam …`."""
    program, *options = LAUNCHERS[launcher]
    return subprocess.run([str(Path(sys.executable).with_name(program)), *options, COMMAND, *map(str, words)], capture_output=True, text=True, env=ONE_THREAD)


def test_teacher_in_one_process_and_in_two(tmp_path):
    """The same weights and predictions, to the last bit; the main process alone prints."""
    alone = train("teacher", *TINY, "-p", "output_dir", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    several = launch("torchrun", "teacher", *TINY, "-p", "output_dir", tmp_path / "several")
    assert several.returncode == 0, several.stderr[-3000:]
    rows = [[line for line in done.stdout.splitlines() if line.startswith("teacher ")] for done in (alone, several)]
    assert rows[0] == rows[1] and len(rows[0]) == 1
    assert json.loads(next((tmp_path / "several").rglob("record.json")).read_text())["training"]["processes"] == 2
    assert weights(tmp_path / "several") == weights(tmp_path / "alone") != {}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_say_once_what_is_wrong(launcher):
    done = launch(launcher, "distill", "-p", "epocs", "3")
    assert done.returncode != 0 and done.stderr.count("did you mean 'epochs'") == 1
    assert "local_rank: 1" in done.stderr or "rank      : 1" in done.stderr, "there were not two"


def test_sigterm_ends_with_143_and_the_same_command_continues(tmp_path):
    """Fault 3, at the command line."""
    words = [sys.executable, "-m", "ctrlscam.cli", "teacher", *TINY, "-p", "checkpoint_minutes", "0", "-p", "batch_size", "4"]
    outputs = tmp_path / "stopped"
    process = subprocess.Popen([*words, "-p", "output_dir", str(outputs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(outputs.rglob("checkpoint-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert not list(outputs.rglob("record.json")) and list(outputs.rglob("checkpoint-*.json"))
    again = train(*words[3:], "-p", "output_dir", outputs)
    assert again.exit_code == 0 and "continuing" in again.stdout, again.output
    assert json.loads(next(outputs.rglob("record.json")).read_text())["resumed"] == 1
