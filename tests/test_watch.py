"""Metrics files, trackers and the autopsy bundle. Trackers are optional: `pip install tensorboard wandb trackio` lets their tests run, which are skipped otherwise."""
import json
import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from ctrlscam import watch
from ctrlscam.config import Settings
from ctrlscam.watch import Watchers, check_watchers, open_watchers, write_autopsy, write_metrics

ROWS = [{"epoch": epoch, "learning_rate": 0.1 / 3 ** epoch, "train_ce": math.pi / (epoch + 1), "val_top1": epoch / 7, "test_n": 60} for epoch in range(4)]
TIMES = [{"epoch": epoch, "seconds": 1.5 + epoch, "images_per_second": 100 / (1 + epoch)} for epoch in range(4)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_metrics_are_the_same_bytes_however_often_a_run_was_interrupted(tmp_path):
    write_metrics(tmp_path / "whole", ROWS, TIMES)
    rows = []
    for row in ROWS:  # an interruption after every epoch: the rows go through the JSON of a checkpoint
        rows = [*json.loads(json.dumps(rows)), row]
        write_metrics(tmp_path / "parts", rows, TIMES[:len(rows)])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") and sorted(contents(tmp_path / "whole")) == ["metrics.csv", "metrics.jsonl", "times.csv"]
    slow = [{**row, "seconds": 99.0} for row in TIMES]
    write_metrics(tmp_path / "slow", ROWS, slow)
    differ = {name for name, content in contents(tmp_path / "slow").items() if content != contents(tmp_path / "whole")[name]}
    assert differ == {"times.csv"}, "a clock got into the metrics"


def test_metrics_keep_every_digit_and_say_nan(tmp_path):
    rows = [*ROWS, {**ROWS[0], "epoch": 4, "val_loss": math.nan, "train_ce": math.inf}]
    write_metrics(tmp_path, rows, [])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[:4] == ROWS and (lines[4]["val_loss"], lines[4]["train_ce"]) == ("nan", "inf")
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table.learning_rate.tolist() == [row["learning_rate"] for row in rows] and table.train_ce[4] == math.inf and math.isnan(table.val_loss[4])


def test_metrics_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    write_metrics(tmp_path, ROWS[:2], TIMES[:2])
    before = contents(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="metrics.jsonl cannot be written"):
        write_metrics(tmp_path, ROWS, TIMES)
    assert contents(tmp_path) == before


def test_autopsy_is_readable(tmp_path):
    images = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    tensors = {"images": images, "part": images[1:3], "labels": torch.arange(4), "teacher.map": torch.full((4, 2, 2), math.nan, dtype=torch.float16), "scale": torch.tensor(2.0, requires_grad=True)}
    report = dict(terms=["hint"], step=7, loss=math.nan, spread=[math.inf, -math.inf, 1.5], paths=["ä b.jpg"], folder=tmp_path, scaler=torch.tensor(65536.0),
                  steps=[dict(step=6, hint=0.1), dict(step=7, hint=math.nan, kd=math.inf)])
    bundle = write_autopsy(tmp_path, report, tensors)
    assert bundle == tmp_path / "autopsy" and sorted(contents(bundle)) == ["batch.safetensors", "report.json", "steps.csv"]
    told = json.loads((bundle / "report.json").read_text(), parse_constant=pytest.fail)
    assert told == dict(terms=["hint"], step=7, loss="nan", spread=["inf", "-inf", 1.5], paths=["ä b.jpg"], folder=str(tmp_path), scaler=65536.0)
    steps = pd.read_csv(bundle / "steps.csv")
    assert steps.step.tolist() == [6, 7] and math.isnan(steps.hint[1]) and steps.kd[1] == math.inf
    batch = load_file(bundle / "batch.safetensors")
    assert all(torch.equal(batch[name].nan_to_num(), tensor.nan_to_num()) and batch[name].dtype == tensor.dtype for name, tensor in tensors.items())
    write_autopsy(tmp_path, dict(step=9), {})  # a later accident takes the place of the first
    assert json.loads((bundle / "report.json").read_text()) == dict(step=9) and load_file(bundle / "batch.safetensors") == {}


def test_trackers_are_off_and_not_imported_by_default(tmp_path):
    script = """
import sys
import timm  # imports wandb by itself wherever it finds it
before = set(sys.modules)
from pathlib import Path
from ctrlscam.config import Settings
from ctrlscam.watch import check_watchers, open_watchers
check_watchers(Settings())
watchers = open_watchers(Settings(), Path(sys.argv[1]))
watchers.log({"loss": 1.0}, 0)
watchers.finish()
print([name for name in ("accelerate", "tensorboard", "wandb", "trackio") if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_tracker_is_named_with_the_command(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # a mere folder is no package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(watch, "find_spec", lambda name: None if name != "wandb" else __import__("importlib.machinery").machinery.PathFinder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(ValueError, match="wandb and trackio not installed here; run pip install wandb trackio, or leave them out"):
        check_watchers(Settings(watch="wandb,trackio"))
    with pytest.raises(ValueError, match="allowed: tensorboard, wandb, trackio|Input should be 'tensorboard', 'wandb' or 'trackio'"):
        Settings(watch="tensorbord")


class Meddler:
    """A tracker that prints, draws random numbers, seeds everything and fails when told to."""

    def __init__(self, fails=()):
        self.fails, self.calls = fails, []

    def meddle(self, call):
        self.calls.append(call)
        print("I am here")
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        if call in self.fails:
            raise RuntimeError(f"lost at {call}")

    def start(self):
        self.meddle("start")

    def log(self, values, step):
        self.meddle(step)
        assert all(type(value) is float for value in values.values())

    def finish(self):
        self.meddle("finish")


def states():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails, calls", [((), ["start", 0, 1, "finish"]), (("start",), ["start"]), ((0,), ["start", 0]), (("finish",), ["start", 0, 1, "finish"])], ids=str)
def test_a_tracker_cannot_disturb(monkeypatch, tmp_path, capsys, fails, calls):
    meddler, before = Meddler(fails), states()
    monkeypatch.setattr(watch, "_new_tracker", lambda name, config, folder: meddler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watchers = open_watchers(Settings(watch="trackio"), tmp_path)
        watchers.log({"loss": torch.tensor(1.0), "n": 3, "lr": np.float32(0.5)}, 0)
        watchers.log({"loss": math.nan}, 1)
        watchers.finish()
        watchers.finish()
    assert meddler.calls == calls and states() == before and capsys.readouterr().out == ""
    assert [str(warning.message) for warning in caught] == [f"trackio failed and is left out from here on, training continues: RuntimeError: lost at {call}" for call in fails]


def test_only_the_main_process_has_trackers(monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "is_main", lambda: False)
    assert open_watchers(Settings(watch="tensorboard,wandb"), tmp_path).trackers == {}


def test_one_tracker_fails_and_the_other_goes_on():
    good, bad = Meddler(), Meddler(fails=(1,))
    watchers = Watchers({"bad": bad, "good": good})
    with pytest.warns(UserWarning, match="bad failed"):
        for step in range(3):
            watchers.log({"loss": 1.0}, step)
    assert (good.calls, bad.calls) == ([0, 1, 2], [0, 1])


@pytest.mark.parametrize("fails", [(), ("start",), (1,)], ids=["meddles", "fails at the start", "fails in epoch 2"])
def test_a_tracker_changes_no_bit_of_the_training(monkeypatch, tmp_path, fails):
    """Fault 9: what a run leaves is the same with and without a tracker that meddles with everything."""
    from ctrlscam.train import train_teacher
    torch.set_num_threads(1)
    tiny = Settings(smoke=True, max_images=24, teacher="test_resnet", image_size=32, device="cpu", output_dir=str(tmp_path / "plain"))
    meddler = Meddler(fails)
    monkeypatch.setattr(watch, "find_spec", lambda name: json.__spec__)
    monkeypatch.setattr(watch, "_new_tracker", lambda name, config, folder: meddler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_teacher(tiny)
        train_teacher(tiny.replace(watch="trackio", output_dir=str(tmp_path / "watched")))
    assert meddler.calls[0] == "start" and (fails == ("start",) or {0, 1} <= set(meddler.calls))
    for name in ("last.safetensors", "picked.safetensors", "metrics.jsonl", "metrics.csv", "predictions.csv"):
        plain, watched = (next((tmp_path / folder).rglob(name)).read_bytes() for folder in ("plain", "watched"))
        assert plain == watched, name


# The real trackers, in a process of their own: no account, no home, and a network that leads nowhere.
REAL = """
import sys
from pathlib import Path
from ctrlscam.config import Settings
from ctrlscam.watch import check_watchers, open_watchers
name, outputs = sys.argv[1], Path(sys.argv[2])
config = Settings(watch=name, output_dir=str(outputs))
check_watchers(config)
for first_step in (0, 2):  # the second round is the same runs continued
    runs = [open_watchers(config, outputs / "synthbirds" / method / "seed0") for method in ("kd-a-b-123", "ctrls_cam-a-b-456")]  # side by side
    for step in (first_step, first_step + 1):
        for number, run in enumerate(runs):
            run.log({"train_ce": 1 / (step + 1) + number, "val_top1": float("nan") if step == 1 else 0.25}, step)
    for run in runs:
        assert list(run.trackers) == [name]
        run.finish()
print("done")
"""


@pytest.fixture
def real(tmp_path):
    def run(name):
        pytest.importorskip(name, reason=f"pip install {name} lets this test run")
        quiet = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_", "HF_"))}
        nowhere = {proxy: "http://127.0.0.1:9" for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        done = subprocess.run([sys.executable, "-W", "error::UserWarning:__main__", "-c", REAL, name, str(tmp_path / "outputs")], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              env={**quiet, **nowhere, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
        assert "failed and is left out" not in done.stderr, done.stderr
        return tmp_path / "outputs"
    return run


def test_tensorboard(real):
    outputs = real("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for number, method in enumerate(("kd-a-b-123", "ctrls_cam-a-b-456")):
        events = EventAccumulator(str(outputs / "synthbirds" / method / "seed0" / "tensorboard")).Reload()
        assert [(event.step, round(event.value, 3)) for event in events.Scalars("train_ce")] == [(step, round(1 / (step + 1) + number, 3)) for step in range(4)]


def test_wandb(real):
    outputs = real("wandb")
    for method in ("kd-a-b-123", "ctrls_cam-a-b-456"):
        runs = sorted((outputs / "synthbirds" / method / "seed0" / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(runs) == 2 and len({path.name for path in runs}) == 1, "a continued run has one name"
        assert all(b"train_ce" in path.read_bytes() for path in runs)


def test_trackio(real):
    import sqlite3
    outputs = real("trackio")
    with sqlite3.connect(outputs / "trackio" / "ctrlscam-synthbirds.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by run_name desc, step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [(name, step) for name in ("kd-a-b-123-seed0", "ctrls_cam-a-b-456-seed0") for step in range(4)]
    assert json.loads(rows[1][2]) == {"train_ce": 0.5, "val_top1": "NaN"}
