"""Runs that are killed, stopped, starved and misled: a test for each fault, named after its number, that ends in its figure.

Every run is a process of its own. All are forked from one that has imported the package and trained nothing (`serve`), so that a whole run takes a second.
Signals, limits and full disks are real; `strike` says when they come. What a run must be afterwards is what the run was that nothing happened to: bit for bit.
"""
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT
from jupyter_client.manager import start_new_kernel
from PIL import Image
from safetensors.numpy import load_file
from test_checkpoint import flip, kill_before

import ctrlscam.checkpoint
import ctrlscam.cli
import ctrlscam.images
import ctrlscam.loop
import ctrlscam.step
import ctrlscam.train
import ctrlscam.views
import ctrlscam.watch
from ctrlscam.checkpoint import load_generation
from ctrlscam.config import Settings, baseline_settings, teacher_settings
from ctrlscam.data import load_table
from ctrlscam.images import free_bytes
from ctrlscam.losses import hint_loss
from ctrlscam.maps import ControllableHint, hint_map
from ctrlscam.models import Classifier
from ctrlscam.records import run_folder
from ctrlscam.views import epoch_batches, make_batches

TOY = dict(max_classes=4, max_images=60, image_size=56, batch_size=16, teacher="test_resnet", student="test_efficientnet", epochs=2, baseline_epochs=1, teacher_epochs=1,
           device="cpu", checkpoint_minutes=0)
STEPS = 4  # of an epoch: 54 images in batches of 16
EPOCHS = {"teacher": 1, "ce": 1, "ctrls_cam": 2}


# Processes

def serve():
    """Read orders, one JSON object a line: to start a process (its number is the answer) or to wait for one (its exit status is the answer)."""
    torch.set_num_threads(1)
    ctrlscam.images.draw_bird = functools.cache(ctrlscam.images.draw_bird)  # the same birds in every run,
    ctrlscam.train.describe_environment = functools.cache(ctrlscam.train.describe_environment)  # on the same machine
    ctrlscam.train.clear_generations = lambda folder: None  # the last checkpoint stays, so that it can be compared
    make_batches(load_table(Settings(**TOY)), Settings(**TOY))
    ctrlscam.train.describe_environment(torch.device("cpu"))
    gc.collect(), gc.freeze()  # children need not look through what they inherit: that takes as long as a run
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif not (answer := os.fork()):
            live(**order)
        print(answer, flush=True)
    os._exit(0)


def live(work, arguments, log):
    """The life of a process: do `work`, leave its result beside its log, end with the status of a Python program that does it."""
    signal.alarm(120)  # none may hang
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1), os.dup2(handle, 2)
    status = 1
    try:
        Path(log).with_suffix(".json").write_text(json.dumps(globals()[work](**arguments)))
        status = 0
    except SystemExit as asked:
        status = asked.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # at once: tidying up the memory that is shared with the parent takes longer than the run


class Process:
    """A started process: `pid`, and once it has ended `status` (minus the signal that killed it), `text` (all it printed) and `result`."""

    def __init__(self, nursery, work, arguments, log):
        self.nursery, self.log = nursery, log
        self.pid = nursery.ask(work=work.__name__, arguments=arguments, log=str(log))

    @functools.cached_property
    def status(self):
        return self.nursery.ask(wait=self.pid)

    @property
    def text(self):
        return self.status is not None and self.log.read_text()

    @property
    def result(self):
        assert self.status == 0, f"exit status {self.status}\n{self.text[-4000:]}"
        return json.loads(self.log.with_suffix(".json").read_text())


class Nursery:
    """The process that all others are forked from."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order):
        print(json.dumps(order), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        assert answer, "the process that all others are forked from has ended; its error is above"
        return int(answer)

    def start(self, work, **arguments):
        self.count += 1
        return Process(self, work, arguments, self.folder / f"{self.count}.log")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    nursery.server.stdin.close()
    assert nursery.server.wait(timeout=30) == 0


# What the processes do

def strike(place, epoch, step, act):
    """From now on in this process: `act()`, once, as the run comes to `place` of (epoch, step)."""
    module, name, here = {
        "before the step": (ctrlscam.loop, "train_step", lambda state, lessons, e, s: (e, s) == (epoch, step)),
        "in the step": (ctrlscam.step, "_move", lambda state: (state.progress.epoch, state.progress.step) == (epoch, step)),  # gradients are there, weights have not moved
        "after the step": (ctrlscam.loop, "_end_of_step", lambda states, *_: (states[0].progress.epoch, states[0].progress.step) == (epoch, step + 1)),
        "validation": (ctrlscam.loop, "watch_epoch", lambda state, stream, e, stop: e == epoch),
        "saving": (ctrlscam.checkpoint, "_flush_folder", lambda folder: True),  # the first tensors are written, their pointer is not
        "metrics": (ctrlscam.loop, "write_metrics", lambda folder, rows, times: len(rows) == epoch + 1),
        "evaluating": (ctrlscam.train, "evaluate_split", lambda *_: True),
        "record": (ctrlscam.train, "write_record", lambda *_: True),
        "clearing": (ctrlscam.train, "clear_generations", lambda folder: True),
        "in the step of kd": (ctrlscam.step, "_move", lambda state: (state.config.method, state.progress.epoch, state.progress.step) == ("kd", epoch, step)),
        "saving kd": (ctrlscam.loop, "save_generation", lambda folder, position, *_: (folder.parent.name[:3], *position) == ("kd-", epoch, step)),
        "finishing kd": (ctrlscam.train, "finish_run", lambda state, *_: state.config.method == "kd"),
    }[place]
    function, waiting = getattr(module, name), [True]

    def struck(*arguments, **options):
        if waiting and here(*arguments, **options):
            waiting.clear()
            act()
        return function(*arguments, **options)

    setattr(module, name, struck)


def send(name):
    """A function that sends a signal to this process."""
    return functools.partial(os.kill, os.getpid(), signal.Signals[name])


def train_and_save_until(operation, config, run, position):
    """Train; be killed just before the given file operation of the checkpoint at `position`, counted from 1."""
    save = ctrlscam.loop.save_generation

    def save_and_die(folder, at, *content):
        if at == tuple(position):
            kill_before(operation, folder)
        return save(folder, at, *content)

    ctrlscam.loop.save_generation = save_and_die
    train(config, run)


def train(config, run="ctrls_cam", at=None, signal="SIGKILL"):
    """Train one of the runs of `config`, and those it builds on; the signal comes `at` (place, epoch, step)."""
    if at is not None:
        strike(*at, send(signal))
    config = Settings(**config)
    record = ctrlscam.train.train_teacher(config) if run == "teacher" else ctrlscam.train.distill(config.replace(method=run))
    return record.model_dump(mode="json")


def lose_a_loader(config, when):
    """Train the teacher with loader processes, one of which is killed: while a step is under way, or while it makes the views of row 20. Returns what the error says and after how long."""
    config = Settings(**config)

    def kill_a_loader():
        began.append(time.monotonic())
        os.kill(random.Random(0).choice(multiprocessing.active_children()).pid, signal.SIGKILL)

    def view(picture, width, height, size, key, make=ctrlscam.views.deit_view):
        if key[-1] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(picture, width, height, size, key)

    began = []
    if when == "in the step":
        strike("in the step", 0, 1, kill_a_loader)
    else:
        ctrlscam.views.deit_view, began = view, [time.monotonic()]
    try:
        ctrlscam.train.train_teacher(config)
    except RuntimeError as error:
        return str(error), time.monotonic() - began[0]


def batch_hashes(config, workers):
    """A hash for each part of each step of two epochs, and for each batch of validation and test."""
    batches = make_batches(load_table(Settings(**config)), Settings(**config, workers=workers))
    parts = [part for epoch in (0, 1) for step in batches["train"].steps(epoch) for part in step] + [batch for split in ("val", "test") for batch in batches[split]()]
    return [hashlib.sha256(b"".join(value.numpy().tobytes() for value in (part.images, part.labels, part.rows, *([] if part.targets is None else [part.targets])))).hexdigest() for part in parts]


class Diary:
    """A tracker that draws random numbers of all kinds whenever it is told something."""

    def __init__(self, file):
        self.file = file

    def start(self):
        self.write("start")

    def log(self, values, step):
        self.write(f"epoch {step}")

    def finish(self):
        self.write("finish")

    def write(self, line):
        torch.rand(3), np.random.random(), random.random()
        with open(self.file, "a") as file:
            file.write(f"{line}\n")


def train_watched(config, diary):
    """Train with a callback that draws random numbers and spoils the table it is given, and with a tracker."""
    def look(metrics):
        metrics.drop(index=metrics.index, inplace=True)
        torch.manual_seed(0), torch.rand(3), np.random.seed(0), random.seed(0)

    if find_spec("tensorboard") is None:
        ctrlscam.watch._new_tracker, ctrlscam.train.check_watchers = lambda name, config, folder: Diary(diary), lambda config: None
    return ctrlscam.train.distill(Settings(**config, watch="tensorboard"), look).model_dump(mode="json")


def train_in_little_memory(config, run, at, strict):
    """Train; from `at` on the process may not take more memory than it has, nor, if `strict`, use again what it has freed."""
    ballast = []

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, resource.RLIM_INFINITY))
        with contextlib.suppress(MemoryError):
            while strict:
                ballast.append(bytearray(2**18))

    strike(*at, limit)
    train(config, run)


def train_with_a_wrong_term(config, term, value, at):
    """Train; one loss term of the step at (epoch, step) is multiplied by `value`."""
    part_terms = ctrlscam.step.part_terms

    def wrong_terms(state, lesson):
        terms, correct = part_terms(state, lesson)
        if state.config.method == "ctrls_cam" and [state.progress.epoch, state.progress.step] == at:
            terms[term] = terms[term] * float(value)
        return terms, correct

    ctrlscam.step.part_terms = wrong_terms
    train(config)


def train_with_wrong_gradients(config, at, asked):
    """Train; the loss of the step at (epoch, step) is finite, but one number of its gradient is not. The process may be asked to stop, and so to save, at that very step."""
    def spoil(state, move=ctrlscam.step._move):
        if state.config.method == "ctrls_cam" and [state.progress.epoch, state.progress.step] == at:
            state.student.linear.weight.grad[0, 0] = math.nan
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)
        return move(state)

    ctrlscam.step._move = spoil
    train(config)


def train_on_constant_features(config):
    """Train a student and a teacher whose features are the same everywhere in each image; returns the metrics."""
    forward = Classifier.forward

    def flat(network, images):
        outputs = forward(network, images)
        return outputs._replace(features=outputs.features.mean((2, 3), keepdim=True).expand_as(outputs.features))

    Classifier.forward = flat
    ctrlscam.train.distill(Settings(**config))
    return [json.loads(line) for line in (folder_of(config) / "metrics.jsonl").read_text().splitlines()]


def train_and_look_at_batches(config):
    """Train; returns the number of images in each part of each step of the distilled student, and whether the statistics of the hint's BatchNorm are finite after it."""
    study, seen = ctrlscam.step._study_part, []

    def look(state, lesson):
        result = study(state, lesson)
        if state.config.method == "ctrls_cam":
            norm = state.objective.student_hint.batch_norm
            seen.append([len(lesson.batch.labels), bool(norm.running_mean.isfinite().all() and norm.running_var.isfinite().all())])
        return result

    ctrlscam.step._study_part = look
    ctrlscam.train.distill(Settings(**config))
    return seen


def train_and_look_at_the_teacher(config):
    """Train; returns the grids of teacher and student, the terms of the last epoch, and what became of the teacher: gradients, changed weights."""
    load, grids, teachers = ctrlscam.train.load_teacher, [], []

    def load_and_keep(*arguments):
        teachers.append(load(*arguments))
        return teachers[-1]

    def look(state, lesson, part_terms=ctrlscam.step.part_terms):
        if state.config.method == "ctrls_cam" and not grids:
            grids.append([list(lesson.teaching["map"].shape[1:]), list(state.student(lesson.batch.images).features.shape[2:])])
        return part_terms(state, lesson)

    ctrlscam.train.load_teacher, ctrlscam.step.part_terms = load_and_keep, look
    ctrlscam.train.distill(Settings(**config))
    (teacher,), kept = teachers, load_file(folder_of(config, "teacher") / "picked.safetensors")
    last = json.loads((folder_of(config) / "metrics.jsonl").read_text().splitlines()[-1])
    return dict(grids=grids[0], terms={name: last[f"train_{name}"] for name in ("ce", "kd", "hint")}, gradients=sum(parameter.grad is not None for parameter in teacher.parameters()),
                changed=sum(not np.array_equal(value.numpy(), kept[name]) for name, value in teacher.state_dict().items()))


def train_with_overflow(config, scale, at=None):
    """Train the baseline in fp16 with this loss scale at first; be killed `at` (place, epoch, step). Returns record, metrics and the scale at the end."""
    ctrlscam.step.torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=float(scale))
    scales = []

    def look(state, *arguments, finish=ctrlscam.train.finish_run):
        scales.append(state.scaler.get_scale())
        return finish(state, *arguments)

    ctrlscam.train.finish_run = look
    record = train(config, "ce", at)
    return record, [json.loads(line) for line in (folder_of(config, "ce") / "metrics.jsonl").read_text().splitlines()], scales


def train_all(config, at=None):
    """Train the runs of the table of `config`, be killed `at` (place, epoch, step); returns how often each was continued, and with how many others it was trained at last."""
    if at is not None:
        strike(*at, send("SIGKILL"))
    records = ctrlscam.train.distill_all(Settings(**config))
    return {row: (found[0].resumed, found[0].training["students_together"]) for row, found in records.items()}


def command(words):
    """The command `ctrlscam` with these words."""
    sys.argv[1:] = words
    ctrlscam.cli.main()


def fill(disk, leave):
    """Put a file on `disk` that leaves so many bytes free."""
    (Path(disk) / "filler").write_bytes(b"x" * (free_bytes(Path(disk)) - leave))


def train_until_full(config, run, disk, at, leave):
    """Train; `at` (place, epoch, step) the disk fills up."""
    strike(*at, lambda: fill(disk, leave))
    train(config, run)


def draw(config, path):
    """Draw the curves of a run that is finished."""
    from ctrlscam.figures import save_figure, training_curves_figure
    figure = training_curves_figure(ctrlscam.train.read_metrics([Settings(**config)]))
    save_figure(figure, path, "Loss terms over epochs")


# What is compared

def folder_of(config, run="ctrls_cam"):
    """The folder of one of the runs of `config`."""
    config = Settings(**config)
    return run_folder(teacher_settings(config) if run == "teacher" else baseline_settings(config) if run == "ce" else config.replace(method=run))


def outcome(folder):
    """All that a finished run left, but for times: file contents by name, the last checkpoint's tensors among them."""
    last = max(folder.glob("checkpoint-*.json"), key=lambda path: path.name)
    files = {"checkpoint": folder / json.loads(last.read_text())["file"]}
    files |= {name: folder / name for name in ("last.safetensors", "picked.safetensors", "metrics.jsonl", "metrics.csv", "predictions.csv")}
    files |= {f"maps/{path.name}": path for path in folder.glob("maps/*.npy")}
    return {name: file.read_bytes() for name, file in files.items()}


def difference(folder, other):
    """The largest absolute difference between the weights, averages and optimiser states of two runs; inf if one has other tensors."""
    largest = 0.0
    for name in ("last.safetensors", "picked.safetensors", max(path.name for path in other.glob("checkpoint-*.safetensors"))):
        ours, theirs = (load_file(place / name) if (place / name).is_file() else None for place in (folder, other))
        if ours is None or {key: value.shape for key, value in ours.items()} != {key: value.shape for key, value in theirs.items()}:
            return float("inf")
        largest = max([largest, *(float(np.abs(ours[key].astype(float) - theirs[key].astype(float)).max()) for key in ours if ours[key].size)])
    return largest


class Tally:
    """How many runs are bit for bit what they should be, and the largest difference of all."""

    def __init__(self):
        self.same, self.largest = 0, 0.0

    def compare(self, folder, other):
        ours, theirs = outcome(folder), outcome(other)
        self.same += ours == theirs
        self.largest = max(self.largest, difference(folder, other))
        assert ours.keys() == theirs.keys()

    @property
    def figure(self):
        return self.same, self.largest


@contextlib.contextmanager
def workplace():
    """A folder for runs, in memory if there is enough: a run flushes its files 30 times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() and free_bytes(memory) > 10**9 else None) as folder:
        yield folder


@pytest.fixture(scope="module")
def undisturbed(nursery):
    """Settings of a teacher, a baseline and a distilled student that nothing happened to."""
    with workplace() as folder:
        assert nursery.start(train, config={**TOY, "output_dir": folder}).result["resumed"] == 0
        yield {**TOY, "output_dir": folder}


@pytest.fixture(scope="module")
def halfway(nursery):
    """The folder of a baseline that was killed after two steps, of which both checkpoints are there."""
    with workplace() as folder:
        config = {**TOY, "output_dir": folder}
        assert nursery.start(train, config=config, run="ce", at=("before the step", 0, 2)).status == -signal.SIGKILL
        yield folder_of(config, "ce")


@pytest.fixture
def begin(undisturbed):
    """Make settings with a folder of their own, in which those of the undisturbed runs that are named are finished."""
    with workplace() as place:
        def begin(*finished, **changes):
            config = {**TOY, **changes, "output_dir": tempfile.mkdtemp(dir=place)}
            for run in finished:
                there, here = folder_of(undisturbed, run).parent, folder_of(config, run).parent
                here.parent.mkdir(exist_ok=True)
                here.symlink_to(there)  # a finished run is only read
            return config

        yield begin


def others(run):
    """The finished runs that `run` builds on."""
    return ("teacher", "ce") if run == "ctrls_cam" else ()


# 1 to 5: killed, stopped, interrupted (5, papermill and kernel killed, is in test_commands.py)

def test_fault_01_sigkill_at_a_random_step(nursery, undisturbed, begin):
    rng, tally = np.random.default_rng(1), Tally()
    for _ in range(20):
        run = rng.choice(list(EPOCHS))
        at = (rng.choice(["before the step", "in the step", "after the step"]), int(rng.integers(EPOCHS[run])), int(rng.integers(STEPS)))
        config = begin(*others(run))
        victim = nursery.start(train, config=config, run=run, at=at)
        assert victim.status == -signal.SIGKILL, victim.text
        assert not (folder_of(config, run) / "record.json").exists()
        record = nursery.start(train, config=config, run=run).result
        assert record["resumed"] == (at[1:] != (0, 0)), at  # before the first checkpoint there is nothing to continue
        tally.compare(folder_of(config, run), folder_of(undisturbed, run))
        shutil.rmtree(config["output_dir"])
    assert tally.figure == (20, 0.0)


def test_fault_01_sigkill_at_the_end_of_a_run(nursery, undisturbed, begin):
    """In the last evaluation, before the record is written, and after that."""
    tally, resumed = Tally(), []
    for place in ("evaluating", "record", "clearing"):
        config = begin()
        assert nursery.start(train, config=config, run="ce", at=(place, 0, 0)).status == -signal.SIGKILL
        resumed.append(nursery.start(train, config=config, run="ce").result["resumed"])
        tally.compare(folder_of(config, "ce"), folder_of(undisturbed, "ce"))
        assert not list(folder_of(config, "ce").rglob(".*.part")) + list(folder_of(config, "ce").glob("picked-*"))
    assert (resumed, *tally.figure) == ([1, 1, 0], 3, 0.0)


def test_fault_02_sigkill_while_a_checkpoint_is_written(nursery, undisturbed, halfway, begin):
    """Before each of the first 20 file operations of a save: temporary files, flushes, renames, removals."""
    tally, continued = Tally(), []
    for operation in range(1, 21):
        config = begin()
        folder = shutil.copytree(halfway, folder_of(config, "ce"))
        victim = nursery.start(train_and_save_until, operation=operation, config=config, run="ce", position=(0, 3))
        assert victim.status == -signal.SIGKILL, victim.text
        again = nursery.start(train, config=config, run="ce")
        continued.append(int(re.search(r"in epoch 1 after (\d) steps", again.text)[1]))
        assert again.result["resumed"] == continued[-1] - 1 and "damaged" not in again.text
        tally.compare(folder, folder_of(undisturbed, "ce"))
        shutil.rmtree(folder)
    assert continued == sorted(continued) and set(continued) == {2, 3}  # the generation before, until the new pointer has its name
    assert tally.figure == (20, 0.0)


@pytest.mark.parametrize("run, signal, status, places", [
    ("ce", "SIGTERM", 143, [("before the step", 0, 0), ("in the step", 0, 2), ("validation", 0, 0), ("in the step", 0, STEPS - 1), ("saving", 1, 0), ("evaluating", 0, 0)]),
    ("ctrls_cam", "SIGTERM", 143, [("in the step", 1, 1)]), ("ctrls_cam", "SIGINT", 1, [("validation", 1, 0)])], ids=["baseline", "student", "SIGINT"])
def test_fault_03_asked_to_stop(nursery, undisturbed, begin, run, signal, status, places):
    """At the first batch, in mid-epoch, in validation, at the last batch, while saving, and while the finished run is evaluated. No checkpoint is due within the epochs."""
    tally, told = Tally(), 0
    for at in places:
        config = begin(*others(run), checkpoint_minutes=10)
        asked = nursery.start(train, config=config, run=run, at=at, signal=signal)
        assert asked.status == status, asked.text
        told += "Traceback" not in asked.text if signal == "SIGTERM" else asked.text.endswith("\nKeyboardInterrupt: asked to stop by SIGINT\n")
        assert not (folder_of(config, run) / "record.json").exists() and list(folder_of(config, run).glob("checkpoint-*.json"))
        assert nursery.start(train, config=config, run=run).result["resumed"] == 1
        tally.compare(folder_of(config, run), folder_of(undisturbed, run))
        shutil.rmtree(config["output_dir"])
    assert (told, *tally.figure) == (len(places), len(places), 0.0)


KERNEL = """
import time
from pathlib import Path
import torch
torch.set_num_threads(1)
import ctrlscam.loop, ctrlscam.train
from ctrlscam.config import Settings
from ctrlscam.figures import LiveCurve
ctrlscam.train.clear_generations = lambda folder: None
config, train_step = Settings(**{config!r}), ctrlscam.loop.train_step

def wait_in_step(state, lessons, epoch, step):
    if (state.config.method, epoch, step) == ("ctrls_cam", 1, 1):
        Path({ready!r}).touch()
        while not Path({asked!r}).exists():
            time.sleep(0.01)
    return train_step(state, lessons, epoch, step)

ctrlscam.loop.train_step = wait_in_step
"""


def test_fault_04_interrupted_kernel(undisturbed, begin, tmp_path):
    """The stop button of Lab in mid-epoch, on a real kernel: the curves of the finished epoch stay, and running the same cell again finishes."""
    config, ready, asked, messages = begin("teacher", "ce"), tmp_path / "ready", tmp_path / "asked", []
    cell = "record = ctrlscam.train.distill(config, on_epoch=LiveCurve(seconds=0)); print(record.resumed)"
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    with contextlib.ExitStack() as stack:
        stack.callback(manager.shutdown_kernel, now=True)
        stack.callback(client.stop_channels)
        run = functools.partial(client.execute_interactive, timeout=120, output_hook=messages.append)
        assert run(KERNEL.format(config=config, ready=str(ready), asked=str(asked)))["content"]["status"] == "ok"

        def press_stop():
            while not ready.exists():
                time.sleep(0.01)
            manager.interrupt_kernel()
            asked.touch()

        (button := threading.Thread(target=press_stop, daemon=True)).start()
        stopped = run(cell)["content"]
        button.join(timeout=60)
        assert (stopped["status"], stopped["ename"], stopped["evalue"]) == ("error", "KeyboardInterrupt", "asked to stop by SIGINT")
        shown = [message["content"]["data"] for message in messages if message["msg_type"] == "display_data"]
        assert [kind for data in shown for kind in data if kind == "image/png"] == ["image/png"]
        assert "stopped: ctrls_cam seed 0 in epoch 2 after 2 steps" in text_of(messages)
        rows = (folder_of(config) / "metrics.jsonl").read_text().splitlines()
        assert rows == (folder_of(undisturbed) / "metrics.jsonl").read_text().splitlines()[:1]  # the finished epoch
        assert run(cell)["content"]["status"] == "ok", text_of(messages)
        assert text_of(messages).endswith("\n1\n")  # continued once
    tally = Tally()
    tally.compare(folder_of(config), folder_of(undisturbed))
    assert tally.figure == (1, 0.0)


def text_of(messages):
    return "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")


# 6 to 9: loaders, repetition, watchers

@pytest.mark.parametrize("when", ["in the step", "in its work"])
def test_fault_06_a_loader_process_dies(nursery, begin, when):
    config = begin(augment="deit", workers=2, prefetch=1, batch_size=8)
    message, seconds = nursery.start(lose_a_loader, config=config, when=when).result
    table, named = load_table(Settings(**config)), re.findall(r"train/\d+", message)
    order = epoch_batches(np.flatnonzero(table.split == "train"), 8, 0, 0)
    meant = [batch for batch in order if named and {*named} <= {*table.path[batch]}]
    assert len(meant) == 1 and (when == "in the step" or 20 in meant[0]), message
    assert "a loader process stopped before it had made the views of" in message and seconds < 10


@pytest.mark.parametrize("family", [dict(accumulate=2), dict(augment="deit", erasing=0.25, mixup=0.8, cutmix=1.0)], ids=["fgvc", "deit"])
def test_fault_07_any_number_of_workers(nursery, family):
    alone, *several = [nursery.start(batch_hashes, config={**TOY, **family}, workers=workers).result for workers in (0, 1, 4)]
    assert len(set(alone)) == len(alone) == 2 * STEPS * family.get("accumulate", 1) + 1 + 4
    assert sum(a != b for hashes in several for a, b in zip(alone, hashes, strict=True)) == 0


def test_fault_08_the_same_seed_twice(undisturbed, begin):
    """In a fresh interpreter that hashes otherwise, in another time zone and language."""
    config, tally = begin("teacher"), Tally()
    code = f"import torch, ctrlscam.train as t; torch.set_num_threads(1); t.clear_generations = lambda folder: None; t.distill(t.Settings(**{config!r}))"
    elsewhere = dict(PYTHONHASHSEED="8", TZ="Asia/Kathmandu", LC_ALL="C")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **elsewhere}, check=True, stdout=subprocess.DEVNULL)
    for run in ("ce", "ctrls_cam"):
        tally.compare(folder_of(config, run), folder_of(undisturbed, run))
    assert tally.figure == (2, 0.0)


def test_fault_09_whoever_watches_changes_nothing(nursery, undisturbed, begin, tmp_path):
    config, tally = begin("teacher"), Tally()
    nursery.start(train_watched, config=config, diary=str(tmp_path / "diary")).result
    for run in ("ce", "ctrls_cam"):
        tally.compare(folder_of(config, run), folder_of(undisturbed, run))
    if find_spec("tensorboard") is None:
        assert (tmp_path / "diary").read_text().split("\n") == ["start", "epoch 0", "finish", "start", "epoch 0", "epoch 1", "finish", ""]
    else:
        assert list(folder_of(config).rglob("events.out.tfevents*"))
    assert tally.figure == (2, 0.0)


def test_fault_09_fewer_test_images_change_nothing(nursery, undisturbed, begin, tmp_path):
    used, whole = (load_table(Settings(**{**TOY, "max_images": most})).query("split == 'test'").path for most in (60, None))
    (tmp_path / "left out.txt").write_text("".join(f"{path}\n" for path in whole if path not in used.tolist()[:40]))
    config = begin(leave_out=str(tmp_path / "left out.txt"))
    assert nursery.start(train, config=config, run="ce").result["picked"]["n"] == 40
    assert difference(folder_of(config, "ce"), folder_of(undisturbed, "ce")) == 0.0


# 10 to 14: what lies on the disk, who else is there, what there is room for

@pytest.mark.parametrize("damage", ["cut short", "one bit flipped"])
def test_fault_10_damaged_checkpoint(nursery, undisturbed, halfway, begin, damage):
    """The newest generation, its tensors five times and its pointer five times."""
    rng, tally, named = np.random.default_rng(10), Tally(), 0
    for name in ["checkpoint-0000-000002.safetensors", "checkpoint-0000-000002.json"] * 5:
        config = begin()
        folder = shutil.copytree(halfway, folder_of(config, "ce"))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:rng.integers(len(content))] if damage == "cut short" else flip(content, int(rng.integers(8 * len(content)))))
        again = nursery.start(train, config=config, run="ce")
        assert again.result["resumed"] == 1
        named += bool(re.search(rf"{name} is damaged: (hash|checksum) mismatch.*; checkpoint-0000-000001.json is used instead", again.text))
        tally.compare(folder, folder_of(undisturbed, "ce"))
        shutil.rmtree(folder)
    assert (named, *tally.figure) == (10, 10, 0.0)


def test_fault_10_nothing_whole_is_left(nursery, halfway, begin):
    """Then the run is neither continued nor begun anew."""
    config = begin()
    folder = shutil.copytree(halfway, folder_of(config, "ce"))
    for file in folder.glob("checkpoint-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {file.name: file.read_bytes() for file in folder.glob("checkpoint-*")}
    again = nursery.start(train, config=config, run="ce")
    assert again.status == 1 and f"CheckpointError: no checkpoint in {folder} can be used" in again.text and again.text.count("is damaged: hash mismatch") == 2
    assert {file.name: file.read_bytes() for file in folder.glob("checkpoint-*")} == before


@pytest.mark.parametrize("changes, field", [
    (dict(max_classes=5), "identity.max_classes: 4 in the checkpoint, 5 now"), (dict(student="test_resnet"), "identity.student: 'test_efficientnet' in the checkpoint, 'test_resnet' now"),
    (dict(image_size=64), "identity.image_size: 56 in the checkpoint, 64 now"), (dict(seed=1), "seed: 0 in the checkpoint, 1 now"),
    (dict(accumulate=2), "identity.accumulate: not in the checkpoint, 2 now"), (dict(baseline_learning_rate=0.01), "identity.learning_rate: 0.003 in the checkpoint, 0.01 now"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_fault_11_checkpoint_of_other_settings(nursery, halfway, begin, changes, field):
    config = begin(**changes)
    shutil.copytree(halfway, folder_of(config, "ce"))
    refused = nursery.start(train, config=config, run="ce")
    told = refused.text.split("CheckpointError: ")[1].splitlines()
    assert refused.status == 1 and "was written with other settings than those of now:" in told[0]
    assert [line.strip() for line in told[1:-1] if line.startswith(("  identity.", "  seed:"))] == [field]


@pytest.mark.parametrize("run", EPOCHS)
def test_fault_11_checkpoint_of_another_run(nursery, begin, undisturbed, run):
    """A finished checkpoint of each of the three runs in the folder of a fourth."""
    config = begin("teacher", "ce", scale=2.0)
    shutil.copytree(folder_of(undisturbed, run), folder_of(config), ignore=shutil.ignore_patterns("record.json"))
    refused = nursery.start(train, config=config)
    fields = set(re.findall(r"^  identity\.(\w+): ", refused.text, re.M))
    wanted = {"teacher": {"method", "student", "scale", "kd_weight"}, "ce": {"method", "scale", "kd_weight"}, "ctrls_cam": {"scale"}}[run]
    assert refused.status == 1 and wanted <= fields and (run != "ctrls_cam" or fields == wanted)


def test_fault_11_checkpoint_of_other_images(nursery, begin, tmp_path):
    """The folder of the data set has other images than when the run began."""
    rng = np.random.default_rng(11)
    for split, name, number in itertools.product(("train", "test"), "ab", range(12)):
        path = tmp_path / "photos" / split / name / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    config = begin(dataset=f"folder:{tmp_path / 'photos'}", recipe="synthbirds", data_dir=str(tmp_path), validation_share=0.25, batch_size=4, max_classes=2)
    assert nursery.start(train, config=config, run="ce", at=("before the step", 0, 2)).status == -signal.SIGKILL
    for name in ("a", "b"):
        (tmp_path / "photos" / "train" / name / "00.png").unlink()
    again = nursery.start(train, config=config, run="ce")
    assert (again.status, "CheckpointError" in again.text) == (1, True), "a run that began with other images was continued"


def test_fault_12_two_processes_on_one_folder(nursery, undisturbed, begin):
    """The second is refused, whether the first goes on or is dead by then the folder is free."""
    tally = Tally()
    for end in ("SIGCONT", "SIGKILL"):
        config = begin()
        first = nursery.start(train, config=config, run="ce", at=("before the step", 0, 2), signal="SIGSTOP")
        while psutil.Process(first.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.01)
        second = nursery.start(train, config=config, run="ce")
        assert second.status == 1 and f"FolderInUse: {folder_of(config, 'ce')} is in use by another process (its number is {first.pid})" in second.text
        os.kill(first.pid, signal.Signals[end])
        assert first.status == (0 if end == "SIGCONT" else -signal.SIGKILL)
        third = nursery.start(train, config=config, run="ce").result  # reads the record, or takes over the stale lock and continues
        assert third["resumed"] == (0 if end == "SIGCONT" else 1)
        tally.compare(folder_of(config, "ce"), folder_of(undisturbed, "ce"))
    assert tally.figure == (2, 0.0)


@pytest.mark.parametrize("at", [("before the step", 0, 0), ("before the step", 0, 3), ("validation", 0, 0), ("evaluating", 0, 0)], ids=["first step", "last step", "validation", "test"])
def test_fault_13_out_of_memory(nursery, undisturbed, begin, at):
    """Whichever allocation is the first to fail, the message says what to do; nothing is made smaller in silence."""
    config, tally, told, failed = begin(), Tally(), 0, 0
    for strict in (True, False):
        starved = nursery.start(train_in_little_memory, config=config, run="ce", at=at, strict=strict)
        failed += starved.status == 1
        last = starved.text.splitlines()[-1]
        told += bool(re.match(r"MemoryError: out of memory on cpu with up to \d+\.\d\d GB in use\. Nothing was changed; run again with .*a smaller batch_size", last))
        assert starved.status == 0 or told == failed, last
    assert failed  # with a heap that has room left the second may get through
    assert nursery.start(train, config=config, run="ce").result["settings"]["batch_size"] == TOY["batch_size"]
    tally.compare(folder_of(config, "ce"), folder_of(undisturbed, "ce"))
    assert tally.figure == (1, 0.0)


def test_fault_14_moved_folder(nursery, undisturbed, begin, tmp_path):
    config, tally = begin("teacher", "ce"), Tally()
    assert nursery.start(train, config=config, at=("in the step", 1, 1)).status == -signal.SIGKILL
    moved = {**config, "output_dir": str(tmp_path / "somewhere" / "else")}
    shutil.move(config["output_dir"], moved["output_dir"])
    assert nursery.start(train, config=moved).result["resumed"] == 1
    tally.compare(folder_of(moved), folder_of(undisturbed))
    assert tally.figure == (1, 0.0)


# 15 to 19: numbers

@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("term", ["ce", "kd", "hint"])
def test_fault_15_a_loss_term_is_not_finite(nursery, undisturbed, begin, term, value):
    config, tally = begin("teacher", "ce"), Tally()
    stopped = nursery.start(train_with_a_wrong_term, config=config, term=term, value=value, at=[1, 2])
    assert stopped.status == 1 and f"FloatingPointError: ctrls_cam seed 0, epoch 2, step 3: the loss term {term} is not finite. The last checkpoint is good" in stopped.text
    bundle = folder_of(config) / "autopsy"
    report, steps, batch = json.loads((bundle / "report.json").read_text()), pd.read_csv(bundle / "steps.csv"), load_file(bundle / "batch.safetensors")
    assert (report["terms"], report["epoch"], report["step"], len(report["paths"])) == ([term], 1, 2, 16)
    assert [name for name in ("ce", "kd", "hint") if not np.isfinite(steps[name].iloc[-1])] == [term] and str(steps[term].iloc[-1]) == value
    assert batch["images"].shape == (16, 3, 56, 56) and all(np.isfinite(tensor).all() for tensor in batch.values())
    assert batch["labels"].tolist() == load_table(Settings(**config)).set_index("path").label[report["paths"]].tolist()
    again = nursery.start(train, config=config)  # what injected it is gone
    assert again.result["resumed"] == 1 and "continuing ctrls_cam seed 0 in epoch 2 after 2 steps" in again.text
    tally.compare(folder_of(config), folder_of(undisturbed))
    assert tally.figure == (1, 0.0)


def test_fault_15_a_gradient_is_not_finite(nursery, undisturbed, begin):
    """The loss of that step is finite and the weights after it are not. They must not be saved, not at the end of an epoch and not when the process is asked to stop."""
    tally = Tally()
    for step, minutes, asked in ((1, 0, False), (STEPS - 1, 0, False), (STEPS - 1, 10, False), (1, 10, True)):
        config = begin("teacher", "ce", checkpoint_minutes=minutes)
        stopped = nursery.start(train_with_wrong_gradients, config=config, at=[0, step], asked=asked)
        assert (asked and stopped.status == 143) or (stopped.status == 1 and "FloatingPointError" in stopped.text), stopped.text
        again = nursery.start(train, config=config)
        assert again.status == 0, f"step {step}: {again.text.splitlines()[-1]}"
        tally.compare(folder_of(config), folder_of(undisturbed))
    assert tally.figure == (4, 0.0)


@pytest.mark.parametrize("grid", [(7, 7), (1, 1)])
@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("squash", ["tanh", "sigmoid"])
def test_fault_16_constant_features(grid, batchnorm, squash):
    """Maps without any deviation: dead features, and the same features everywhere. Hint, loss and gradients stay finite, in every precision of the features."""
    finite, cases = 0, 0
    for level, dtype in itertools.product((0.0, 1.0, 1e4), (torch.float32, torch.bfloat16, torch.float16)):
        features = torch.full((4, 8, *grid), level, dtype=dtype, requires_grad=True)
        weight, labels = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(), torch.arange(4)
        hint = ControllableHint(8, scale=8.0, squash=squash, batchnorm=batchnorm).train()
        student = hint(features, weight, labels)
        loss = hint_loss(student, hint_map(torch.ones(4, 8, 14, 14), torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), labels, scale=8.0, squash=squash))
        loss.backward()
        gradients = [tensor.grad for tensor in (features, weight, *hint.parameters()) if tensor.grad is not None]
        finite += all(bool(tensor.isfinite().all()) for tensor in (student, loss, *gradients, *hint.buffers()))
        cases += 1
    assert (finite, cases) == (9, 9)


def test_fault_16_training_on_constant_features(nursery, begin):
    rows = nursery.start(train_on_constant_features, config=begin("teacher", "ce")).result
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[0]["train_hint"] == 0.0  # two constant maps agree


def test_fault_17_fp16_overflows(nursery, begin):
    """Steps whose gradients overflow are left out and counted, each halves the scale, and the run finishes. Killed on the way, it counts and scales on."""
    config, tally, scale = begin(precision="fp16"), Tally(), 2**17
    record, metrics, (last,) = nursery.start(train_with_overflow, config=config, scale=scale).result
    skipped = record["training"]["skipped_steps"]
    assert 0 < skipped < STEPS and (metrics[0]["skipped_steps"], last) == (skipped, scale / 2**skipped)
    killed = begin(precision="fp16")
    assert nursery.start(train_with_overflow, config=killed, scale=scale, at=("before the step", 0, 1)).status == -signal.SIGKILL
    again, _, (last_again,) = nursery.start(train_with_overflow, config=killed, scale=scale).result
    assert (again["resumed"], again["training"]["skipped_steps"], last_again) == (1, skipped, last)
    tally.compare(folder_of(killed, "ce"), folder_of(config, "ce"))
    assert tally.figure == (1, 0.0)


def test_fault_18_batch_of_one_at_the_end_of_an_epoch(nursery, begin):
    """49 images in batches of 16 leave one over; it joins the batch before it, so that BatchNorm always sees two images or more. With parts, too."""
    config = begin(max_images=54, start="weights", epochs=1)
    assert nursery.start(train_and_look_at_batches, config=config).result == [[16, True], [16, True], [17, True]]
    parts = nursery.start(train_and_look_at_batches, config=begin(max_images=54, start="weights", epochs=1, accumulate=8)).result
    assert [size for size, _ in parts] == [*[2] * 8, *[2] * 8, 3, *[2] * 7] and all(finite for _, finite in parts)


@pytest.mark.parametrize("changes, grids", [
    (dict(image_size=112, teacher_output_stride=8, student_output_stride=16), [[14, 14], [7, 7]]), (dict(image_size=112, teacher_output_stride=16, student_output_stride=8), [[7, 7], [14, 14]]),
    (dict(image_size=112, teacher="test_vit", teacher_output_stride=32), [[7, 7], [14, 14]]), (dict(image_size=112, student="test_vit", student_output_stride=32), [[14, 14], [7, 7]]),
], ids=["coarse student", "fine student", "ViT teacher", "ViT student"])
def test_fault_19_grids_that_differ(nursery, begin, changes, grids):
    looked = nursery.start(train_and_look_at_the_teacher, config=begin(**changes, epochs=1, max_images=24, start="weights")).result
    assert np.isfinite(list(looked["terms"].values())).all() and looked["terms"]["hint"] > 0
    assert (looked["grids"], looked["gradients"], looked["changed"]) == (grids, 0, 0)


# 32 and 33: no room, no right

def trained(text):
    """Whether there is a line about an epoch in what a process printed."""
    return re.search(r"epoch +\d+/\d+ ", text) is not None


@pytest.mark.parametrize("form", ["function", "command"])
@pytest.mark.parametrize("place", ["all runs", "the data set", "the student", "the seed", "a disk that is mounted to be read"])
def test_fault_32_outputs_cannot_be_written(nursery, begin, request, place, form):
    """A file where a folder should be, or a read-only disk. Also where the teacher, which comes first, could be written: nobody wants to hear of it hours later."""
    config = begin()
    outputs, run = Path(config["output_dir"]) / "outputs", folder_of({**config, "output_dir": str(Path(config["output_dir"]) / "outputs")})
    wrong = {"all runs": outputs, "the data set": run.parents[1], "the student": run.parent, "the seed": run}.get(place)
    if wrong is None:
        outputs = wrong = request.getfixturevalue("read_only_disk")
    else:
        wrong.parent.mkdir(parents=True, exist_ok=True)
        wrong.touch()
    config["output_dir"] = str(outputs)
    began = time.monotonic()
    words = ["distill", *(word for name, value in {**config, "methods": "ctrls_cam"}.items() for word in ("-p", name, str(value)))]
    refused = nursery.start(train, config=config) if form == "function" else nursery.start(command, words=words)
    assert refused.status == 1, refused.text
    assert time.monotonic() - began < 5
    assert str(wrong) in refused.text.splitlines()[-1] and not trained(refused.text), refused.text
    assert list(outputs.rglob("checkpoint-*")) == list(outputs.rglob("record.json")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 megabytes in memory; skipped where it may not be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


NO_ROOM = r"OSError: (\[Errno 28\] )?{file} cannot be written \(No space left on device\): [\d,]+ bytes are needed, [\d,]+ are free"


@pytest.mark.parametrize("file, at, leave", [
    ("checkpoint-0000-000002.safetensors", ("after the step", 0, 1), 10**6), ("val-0000.npy", ("validation", 0, 0), 0), ("picked-0000.safetensors", ("validation", 0, 0), 2 * 10**5),
    ("metrics.jsonl", ("metrics", 0, 0), 0), ("predictions.csv", ("evaluating", 0, 0), 0), ("record.json", ("record", 0, 0), 0)], ids=lambda value: value if isinstance(value, str) else "")
def test_fault_33_disk_full(nursery, undisturbed, begin, small_disk, file, at, leave):
    """At a checkpoint, a map, the weights, a line of metrics, the predictions, the record: the run stops and says so, and goes on when there is room."""
    config, tally = {**TOY, "output_dir": str(small_disk / "outputs")}, Tally()
    full = nursery.start(train_until_full, config=config, run="ce", disk=str(small_disk), at=at, leave=leave)
    assert full.status == 1 and re.match(NO_ROOM.format(file=f".*/{file}"), full.text.splitlines()[-1]), full.text
    assert load_generation(folder_of(config, "ce"), {}) is not None and not list(small_disk.rglob("*.part"))
    (small_disk / "filler").unlink()
    assert nursery.start(train, config=config, run="ce").result["resumed"] == 1
    tally.compare(folder_of(config, "ce"), folder_of(undisturbed, "ce"))
    assert tally.figure == (1, 0.0)


def test_fault_33_disk_full_at_a_figure(nursery, undisturbed, small_disk):
    fill(small_disk, 0)
    full = nursery.start(draw, config=undisturbed, path=str(small_disk / "curves"))
    assert full.status == 1 and re.match(NO_ROOM.format(file=f"{small_disk}/curves.png"), full.text.splitlines()[-1]), full.text
    assert [file.name for file in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    assert nursery.start(draw, config=undisturbed, path=str(small_disk / "curves")).status == 0
    assert sorted(file.name for file in small_disk.iterdir()) == [f"curves.{kind}" for kind in ("pdf", "png", "svg", "txt")]


def test_fault_33_disk_known_to_be_too_small(nursery, begin, small_disk):
    """What can be known before training is said before training."""
    fill(small_disk, 10**6)
    refused = nursery.start(train, config={**TOY, "output_dir": str(small_disk / "outputs")})
    assert refused.status == 1 and not trained(refused.text)
    assert re.match(r"OSError: (\[Errno 28\] )?ce until the end: \d+\.\d MB are needed in .*, \d+ kB are free", refused.text.splitlines()[-1]), refused.text


# Killed and continued in other forms of training

@pytest.mark.parametrize("changes", [dict(accumulate=2), dict(ema_decay=0.9), dict(teacher_store=True), dict(augment="deit", workers=2, mixup=0.8, cutmix=1.0, erasing=0.25)], ids=lambda changes: next(iter(changes)))
def test_killed_and_continued_with(nursery, begin, changes):
    config, other, tally = begin(**changes, start="weights", epochs=1), begin(**changes, start="weights", epochs=1), Tally()
    assert nursery.start(train, config=config).status == 0
    shutil.copytree(folder_of(config, "teacher"), folder_of(other, "teacher"))
    for at in (("in the step", 0, 1), ("before the step", 0, 3)):
        assert nursery.start(train, config=other, at=at).status == -signal.SIGKILL
    assert nursery.start(train, config=other).result["resumed"] == 2
    tally.compare(folder_of(other), folder_of(config))
    assert tally.figure == (1, 0.0)


def test_killed_and_continued_side_by_side(nursery, undisturbed, begin):
    """Three students behind one teacher, killed where they are at one step, at different steps, in different epochs, and where one of them is finished. Each is what it is alone."""
    config, tally = begin("teacher", "ce", methods="ce_longer,kd,ctrls_cam", together=3), Tally()
    places = [("in the step of kd", 0, 1), ("saving kd", 0, 3), ("saving kd", 1, 0), ("finishing kd", 0, 0)]
    for at in places:
        assert nursery.start(train_all, config=config, at=at).status == -signal.SIGKILL
    assert nursery.start(train_all, config=config).result == dict(teacher=[0, 1], ce_longer=[3, 3], kd=[4, 2], ctrls_cam=[4, 2])
    single = begin("teacher", "ce")
    for run in ("ce_longer", "kd"):
        assert nursery.start(train, config=single, run=run).status == 0
        tally.compare(folder_of(config, run), folder_of(single, run))
    tally.compare(folder_of(config), folder_of(undisturbed))
    assert tally.figure == (3, 0.0)


if __name__ == "__main__":
    serve()
