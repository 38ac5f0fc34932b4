"""What a run leaves on the disk: killed at any moment, damaged, out of room, asked to stop, used by two."""
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import ctrlscam.checkpoint as checkpoint
from ctrlscam.checkpoint import (CheckpointError, Interrupted, check_disk, clear_generations, interruptible, load_generation, locked, pack_tensors, save_generation)
from ctrlscam.images import free_bytes, write_bytes

SETTINGS = {"data": {"dataset": "cub200", "classes": 200, "milestones": [30, 60]}, "student": "resnet18"}


def tensors_of(step, size=200):
    numbers = torch.Generator().manual_seed(step)
    return {"student.weight": torch.randn(size, generator=numbers), "half": torch.randn(7, generator=numbers).bfloat16(), "steps": torch.tensor(step)}


def facts_of(step):
    return {"settings": SETTINGS, "step": step, "losses": [1 / (k + 3) for k in range(5)]}


def save(folder, step, position=None, **options):
    return save_generation(folder, position or (0, step), tensors_of(step, **options), facts_of(step))


def bits(tensors):
    return {name: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist()) for name, value in tensors.items()}


def loaded(folder, **options):
    """The step of the generation that is loaded, after a look at every bit of it; and the warnings on the way."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        facts, tensors = load_generation(folder, {"settings": SETTINGS})
    assert facts == facts_of(facts["step"]) and bits(tensors) == bits(tensors_of(facts["step"], **options))
    return facts["step"], [str(one.message) for one in told]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps):
    return [f"checkpoint-0000-{step:06d}.{kind}" for step in steps for kind in ("json", "safetensors")]


def forked(work):
    """Wait status of a child that does `work`: minus the signal that ended it, or its exit code (99 for an exception)."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except SystemExit as asked:
            os._exit(asked.code)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Bit for bit

def test_every_type_of_tensor_comes_back_bit_for_bit(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    payloads = torch.tensor([0x7FC1, 0x7F81, -0x0001, -0x8000, 0x0001, 0x7F80], dtype=torch.int16).view(torch.bfloat16)  # NaNs with payload, −0, subnormal, ∞
    tensors = {
        "float32": weight, "tied": weight, "float64": weight.double(), "float16": weight.half(), "bfloat16": payloads, "0-dim": torch.tensor(65536.0), "0-dim int64": torch.tensor(2**63 - 1),
        "int64": torch.tensor([-2**63, 0, 2**62 + 1]), "uint8": torch.arange(256, dtype=torch.uint8), "bool": torch.tensor([True, False]), "empty": torch.empty(0, 5),
        "expanded": torch.ones(1, 3).expand(2, 3), "transposed": torch.arange(6.0).view(2, 3).T, "parameter": torch.nn.Parameter(torch.rand(3)),
    }
    save_generation(tmp_path, (0, 0), tensors, {})
    _, back = load_generation(tmp_path, {})
    assert bits(back) == bits({name: value.detach() for name, value in tensors.items()})
    back["float32"] += 1  # they are copies that may be changed, each its own
    assert torch.equal(back["tied"], weight)


def test_facts_come_back_as_json_keeps_them(tmp_path):
    facts = {"epochs": {10: 0.1, 2: 1 / 3}, "place": (1, 2), "name": "Zaunkönig \u2028 \ud800", "none": None, "tiny": 5e-324, "large": 2**80}
    save_generation(tmp_path, (0, 0), {}, facts)
    back, tensors = load_generation(tmp_path, {"place": (1, 2)})
    assert back == {**facts, "epochs": {"10": 0.1, "2": 1 / 3}, "place": [1, 2]} and tensors == {}


def test_training_goes_on_with_the_same_bits(tmp_path):
    """The optimiser continues from a checkpoint as it would have without one, channels_last weights included."""
    def begin():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).to(memory_format=torch.channels_last)
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def train(network, optimizer, steps):
        for step in steps:
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()

    straight, resumed = begin(), begin()
    train(*straight, range(6))
    train(*resumed, range(3))
    memory = {f"{number}.{name}": value for number, values in resumed[1].state_dict()["state"].items() for name, value in values.items()}
    save_generation(tmp_path, (0, 3), {**resumed[0].state_dict(prefix="student."), **memory}, {})
    network, optimizer = begin()
    _, tensors = load_generation(tmp_path, {})
    network.load_state_dict({name.removeprefix("student."): value for name, value in tensors.items() if name.startswith("student.")})
    state = {}
    for name in memory:
        state.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = tensors[name]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    train(network, optimizer, range(3, 6))
    assert bits(network.state_dict()) == bits(straight[0].state_dict())


# Damage

def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("kind, mismatch", [("safetensors", "hash mismatch"), ("json", "checksum mismatch")])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_damage_is_named_and_the_generation_before_is_used(tmp_path, kind, mismatch, how):
    for step in (1, 2):
        save(tmp_path, step)
    file = tmp_path / f"checkpoint-0000-000002.{kind}"
    content, rng = file.read_bytes(), np.random.default_rng(0)
    damaged = [content[:place] for place in (0, *rng.choice(len(content), 8, replace=False), len(content) - 1)] if how == "cut" else \
        [flip(content, bit) for bit in (0, *rng.choice(8 * len(content), 8, replace=False), 8 * len(content) - 1)]
    figures = []
    for bad in damaged:
        file.write_bytes(bad)
        step, told = loaded(tmp_path)
        figures.append((step, len(told) == 1 and f"{file} is damaged: {mismatch}" in told[0] and told[0].endswith("checkpoint-0000-000001.json is used instead")))
    assert figures == [(1, True)] * 10
    file.write_bytes(content)
    assert loaded(tmp_path) == (2, [])


def test_every_single_bit_of_a_pointer_counts(tmp_path, monkeypatch):
    path = save_generation(tmp_path, (0, 1), {}, {"loss": 0.1})
    content, passed = path.read_bytes(), []
    for bit in range(8 * len(content)):
        monkeypatch.setattr(Path, "read_bytes", lambda path: flip(content, bit))
        try:
            passed.append(checkpoint._read_pointer(path))
        except CheckpointError:
            pass
    assert passed == [] and len(content) > 250


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"null", b'"checksum"', b"{}", b'{"checksum": 1}', b"\xff\xfe", b'{"a": NaN, "checksum": ""}'])
def test_a_pointer_that_is_something_else(tmp_path, content):
    save(tmp_path, 1)
    save(tmp_path, 2).write_bytes(content)
    assert loaded(tmp_path)[0] == 1


def test_an_edited_pointer_is_refused(tmp_path):
    path = save(tmp_path, 1)
    path.write_text(path.read_text().replace('"step": 1', '"step": 9'))
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        load_generation(tmp_path, {})


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for path in [save(tmp_path, step) for step in (1, 2)]:
        path.with_suffix(".safetensors").write_bytes(b"x" * 300)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .*000002\.safetensors is damaged: hash mismatch.*\(it has 300 bytes of .*000001\.safetensors is damaged.*Move the folder away"):
        load_generation(tmp_path, {})


def test_missing_tensors_count_as_damage(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-0000-000002.safetensors").unlink()
    step, told = loaded(tmp_path)
    assert step == 1 and "cannot be read (No such file" in told[0]


@pytest.mark.parametrize("next_step", [2, 3, 4], ids=["before the damaged one", "in its place", "after it"])
@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_damaged_generation_is_not_one_of_those_kept(tmp_path, next_step, kind):
    for step in (1, 3):
        save(tmp_path, step)
    file = tmp_path / f"checkpoint-0000-000003.{kind}"
    file.write_bytes(flip(file.read_bytes(), 1000))
    assert loaded(tmp_path)[0] == 1
    save(tmp_path, next_step)
    assert len(names(tmp_path)) == 4 and loaded(tmp_path) == (next_step, [])
    newest = tmp_path / json.loads((tmp_path / f"checkpoint-0000-{next_step:06d}.json").read_text())["file"]
    newest.write_bytes(b"")
    assert loaded(tmp_path)[0] == 1


# Killed while saving

def kill_before(target, folder):
    """From now on in this process: the system kills it just before file operation number `target` in `folder`."""
    count, flush = 0, os.fsync

    def watch(event, arguments):
        nonlocal count
        if event == "flush" or event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == target:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: (watch("flush", ()), flush(handle))
    sys.addaudithook(watch)


@pytest.mark.parametrize("before, position, least", [((), (0, 9), 9), ((1,), (0, 9), 11), ((1, 2), (0, 9), 20), ((1, 9), (0, 9), 18)],
                         ids=["the first", "the second", "the third", "the same position again"])
def test_killed_at_every_point_of_a_save(tmp_path, before, position, least):
    """Before the temporary file, before and after the flush, between write and rename, between rename and pointer, before each removal."""
    seen, status = [], None
    while status != 0:
        folder = tmp_path / str(len(seen))
        for step in before:
            save(folder, step)
        work = partial(save, folder, 5, position)
        status = forked(lambda: (kill_before(len(seen) + 1, folder), work()))
        assert status in (0, -signal.SIGKILL)
        if before:
            step, told = loaded(folder)
            assert told == []
        else:
            step = None if load_generation(folder, {}) is None else loaded(folder)[0]
        seen.append(step)
        save(folder, 6, (9, 9))
        assert loaded(folder) == (6, []) and len([name for name in names(folder)]) == (4 if before or step else 2)
    old = seen.index(5)
    assert seen == [before[-1] if before else None] * old + [5] * (len(seen) - old) and 0 < old
    assert len(seen) - 1 >= least, "fewer points than there were: has the order of a save changed?"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("victim", ["safetensors", "json"])
def test_killed_in_the_middle_of_a_write(tmp_path, share, victim):
    """The system ends the process at a given byte of a file, as it does when a limit on file sizes is reached."""
    for step in (1, 2):
        save(tmp_path, step)
    sizes = {kind: (tmp_path / f"checkpoint-0000-000002.{kind}").stat().st_size for kind in ("safetensors", "json")}
    content = pack_tensors(tensors_of(3, size=1 if victim == "json" else 200))
    facts = facts_of(3) | ({"filler": "x" * 2000} if victim == "json" else {})
    assert victim == "safetensors" or len(content) < 0.3 * 2000

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = max(int(share * sizes["safetensors"]), 1) if victim == "safetensors" else len(content) + int(share * 2000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save_generation(tmp_path, (0, 3), tensors_of(3, size=1 if victim == "json" else 200), facts)

    assert forked(work) == -signal.SIGXFSZ
    assert [name for name in names(tmp_path) if re.match(rf"\.checkpoint-0000-000003\.{victim}\.\w+\.part", name)]
    assert loaded(tmp_path) == (2, [])
    save(tmp_path, 4)
    assert names(tmp_path) == files_of(2, 4)


def test_killed_while_clearing(tmp_path):
    seen, status = [], None
    while status != 0:
        folder = tmp_path / str(len(seen))
        for step in (1, 2):
            save(folder, step)
        status = forked(lambda: (kill_before(len(seen) + 1, folder), clear_generations(folder)))
        seen.append(None if load_generation(folder, {}) is None else loaded(folder))
        assert status == 0 or len(seen) < 50
    assert seen[0] == (2, []) and seen[-1] is None and all(one in (seen[0], seen[-1]) for one in seen) and names(folder) == []


# What a folder holds

def test_files_and_pointer_have_the_stated_form(tmp_path):
    path = save(tmp_path / "new" / "folder", 120, (3, 120))
    assert path.name == "checkpoint-0003-000120.json" and names(path.parent) == ["checkpoint-0003-000120.json", "checkpoint-0003-000120.safetensors"]
    pointer, content = json.loads(path.read_text()), path.with_suffix(".safetensors").read_bytes()
    assert list(pointer) == ["schema_version", "file", "sha256", "bytes", "facts", "checksum"]
    assert (pointer["schema_version"], pointer["file"], pointer["bytes"]) == (1, "checkpoint-0003-000120.safetensors", len(content))


def test_two_generations_stay_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "metrics.csv").touch()
    (tmp_path / "picked-0001.safetensors").touch()
    for epoch in range(5):
        save(tmp_path, epoch, (epoch, 0))
    assert names(tmp_path) == [f"checkpoint-000{epoch}-000000.{kind}" for epoch in (3, 4) for kind in ("json", "safetensors")] + ["metrics.csv", "picked-0001.safetensors"]
    clear_generations(tmp_path)
    assert names(tmp_path) == ["metrics.csv", "picked-0001.safetensors"] and load_generation(tmp_path, {}) is None


def test_a_moved_folder_is_continued(tmp_path):
    save(tmp_path / "here", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert loaded(tmp_path / "there") == (1, [])


@pytest.mark.parametrize("facts", [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": torch.ones(1)}, {"names": {1, 2}}])
def test_facts_that_are_no_json_change_nothing(tmp_path, facts):
    save(tmp_path, 1)
    with pytest.raises((TypeError, ValueError)):
        save_generation(tmp_path, (0, 2), tensors_of(2), facts)
    assert names(tmp_path) == files_of(1)


# Other settings

@pytest.mark.parametrize("path, value, line", [
    (("data", "dataset"), "stanford cars", "settings.data.dataset: 'cub200' in the checkpoint, 'stanford cars' now"),
    (("data", "classes"), 196, "settings.data.classes: 200 in the checkpoint, 196 now"),
    (("student",), "resnet34", "settings.student: 'resnet18' in the checkpoint, 'resnet34' now"),
    (("data", "milestones"), [30], "settings.data.milestones: [30, 60] in the checkpoint, [30] now"),
    (("data",), None, "settings.data: {'dataset': 'cub200'"),
    (("new",), 1, "settings.new: not in the checkpoint, 1 now")], ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
def test_other_settings_are_refused_with_the_field(tmp_path, path, value, line):
    save(tmp_path, 1)
    wanted = json.loads(json.dumps(SETTINGS))
    place = wanted
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(CheckpointError) as refused:
        load_generation(tmp_path, {"settings": wanted})
    text = str(refused.value)
    assert line in text and text.count("in the checkpoint, ") == 1 and "checkpoint-0000-000001.json was written with other settings" in text


def test_only_what_is_expected_is_compared(tmp_path):
    save(tmp_path, 1)
    for expected in ({}, {"step": 1}):
        assert load_generation(tmp_path, expected) is not None


def test_a_setting_that_only_the_checkpoint_has_is_a_difference(tmp_path):
    """Settings that stand at their defaults may be left out of what is expected; a checkpoint with other values must not pass for that."""
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="settings.student: .* in the checkpoint, none now"):
        load_generation(tmp_path, {"settings": {"data": {"classes": 200, "milestones": (30, 60)}}})


def test_all_fields_that_differ_are_listed_even_if_the_tensors_are_damaged(tmp_path):
    save(tmp_path, 1).with_suffix(".safetensors").unlink()
    with pytest.raises(CheckpointError) as refused:
        load_generation(tmp_path, {"settings": {"data": {"dataset": "x", "classes": 1, "milestones": (30, 60)}, "student": "y"}})
    assert str(refused.value).count("in the checkpoint, ") == 3


def test_another_schema_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 2)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="schema version 2, but this version of the package writes and reads 1"):
        load_generation(tmp_path, {})


# The lock

def test_the_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    with locked(tmp_path):
        def second():
            with pytest.raises(RuntimeError, match=rf"in use by another process \(its number is {os.getppid()}\)"):
                locked(tmp_path).__enter__()
        assert forked(second) == 0
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert forked(lambda: locked(tmp_path).__enter__()) == 0


def test_the_lock_of_a_dead_process_is_reclaimed_even_if_its_children_live(tmp_path):
    def die_holding():
        with locked(tmp_path):
            if os.fork() == 0:
                time.sleep(1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die_holding) == -signal.SIGKILL
    assert int((tmp_path / ".lock").read_text()) != os.getpid()
    with locked(tmp_path):
        assert int((tmp_path / ".lock").read_text()) == os.getpid()


def test_a_child_neither_holds_nor_frees_the_lock(tmp_path):
    def child():
        assert not checkpoint._held

    with locked(tmp_path):
        assert forked(child) == 0
        with pytest.raises(RuntimeError, match="in use"):
            locked(tmp_path).__enter__()
    assert not checkpoint._held


def test_a_folder_that_cannot_be_written_or_locked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*; choose another output_dir"):
        locked(tmp_path / "file").__enter__()
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with pytest.raises(OSError, match=r"odd cannot be written \(Is a directory\)"):
        locked(tmp_path / "odd").__enter__()

    def unsupported(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="on a file system that cannot lock files"):
        locked(tmp_path).__enter__()
    assert not checkpoint._held


# Asked to stop

LOOP = """
import sys, time
from pathlib import Path
import torch
from ctrlscam.checkpoint import Interrupted, interruptible, load_generation, locked, save_generation
folder = Path(sys.argv[1])
found = load_generation(folder, {})
count = found[1]["count"] if found else torch.tensor(0)
with locked(folder), interruptible() as stop:
    try:
        while count < int(sys.argv[2]):
            count += 1
            print("step", int(count), flush=True)
            time.sleep(0.05)
            stop.check()
    except Interrupted as asked:
        save_generation(folder, (0, int(count)), {"count": count}, {"step": int(count)})
        asked.leave()
"""


def start_python(folder, told):
    """A fresh interpreter that runs the loop; its process number."""
    with told.open("w") as output:
        return subprocess.Popen([sys.executable, "-c", LOOP, str(folder), "1000000"], cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL).pid


def start_fork(folder, told):
    """The same in a fork of this process, which spares the imports."""
    told.touch()
    if (child := os.fork()) == 0:
        sys.argv, sys.stdout = ["", str(folder), "1000000"], told.open("w")
        try:
            exec(LOOP, {})
        except SystemExit as asked:
            os._exit(asked.code)
        finally:
            os._exit(99)
    return child


@pytest.mark.parametrize("start, number, end", [(start_python, signal.SIGINT, -signal.SIGINT), (start_fork, signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_process_that_is_asked_to_stop_saves_and_leaves(tmp_path, start, number, end):
    """What was saved is the last step that the process told of."""
    told, run, deadline = tmp_path / "told", tmp_path / "run", time.monotonic() + 60
    child = start(run, told)
    while told.read_text().count("step") < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == end
    facts, tensors = load_generation(run, {})
    assert facts["step"] == int(tensors["count"]) == int(told.read_text().split()[-1]) >= 3
    assert names(run) == [".lock"] + files_of(facts["step"])


def ask(*numbers, hear=True):
    """In a child: receive the signals within the block, and look for them or not."""
    with interruptible() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
        if hear:
            try:
                stop.check()
            except Interrupted as asked:
                asked.leave()


@pytest.mark.parametrize("hear", [True, False])
def test_how_a_process_ends(hear):
    assert forked(partial(ask, hear=hear)) == 0
    assert forked(partial(ask, signal.SIGTERM, hear=hear)) == 143
    assert forked(partial(ask, signal.SIGINT, signal.SIGTERM, hear=hear)) == 143
    assert forked(partial(ask, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, hear=hear)) == 143
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        ask(signal.SIGINT, hear=hear)
    with pytest.raises(KeyboardInterrupt, match="twice"):
        ask(signal.SIGINT, signal.SIGINT, hear=hear)


def test_other_errors_pass_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), interruptible() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        1 / 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before and checkpoint._active is None


def test_nested_blocks_share_the_note_of_the_outer_one():
    with pytest.raises(Interrupted) as asked, interruptible() as outer:
        with interruptible() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)  # the end of the inner block did not restore the handlers
        inner.check()
    assert asked.value.signal == signal.SIGTERM and not isinstance(asked.value, Exception)


def test_nothing_happens_in_another_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruptible() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM) == before))
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, True)]


def test_sigint_that_is_ignored_stays_ignored():
    def background():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert forked(background) == 0


def test_forked_children_end_with_sigterm_and_leave_sigint_to_the_parent():
    def send(number):
        os.kill(os.getpid(), number)
        os._exit(7)

    with interruptible():
        assert forked(partial(send, signal.SIGTERM)) == -signal.SIGTERM
        assert forked(partial(send, signal.SIGINT)) == 7
        assert forked(partial(ask, signal.SIGTERM)) == 143  # a block of its own works in a child


def test_a_signal_during_a_save_does_not_disturb_it(tmp_path, monkeypatch):
    replace = os.replace

    def asked_meanwhile(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        replace(*arguments)

    with pytest.raises(Interrupted), interruptible() as stop:
        monkeypatch.setattr(os, "replace", asked_meanwhile)
        save(tmp_path, 1)
        monkeypatch.undo()
        stop.check()
    assert loaded(tmp_path) == (1, []) and names(tmp_path) == files_of(1)


# Disk full

@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of one megabyte in memory; skipped where it may not be mounted."""
    folder = tmp_path_factory.mktemp("small")
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave):
    """Put a file onto the disk that leaves `leave` bytes free."""
    (folder / "filler").write_bytes(b"x" * (free_bytes(folder) - leave))


def test_a_disk_too_small_for_the_next_checkpoint(small_disk):
    folder = small_disk / "run"
    save(folder, 1, size=50_000)
    fill(small_disk, leave=100_000)
    with pytest.raises(OSError) as full:
        save(folder, 2, size=50_000)
    needed = len(pack_tensors(tensors_of(2, size=50_000)))
    assert full.value.errno == errno.ENOSPC
    assert f"checkpoint-0000-000002.safetensors cannot be written (No space left on device): {needed:,} bytes are needed, " in str(full.value)
    assert 90_000 < int(re.search(r"needed, ([\d,]+) are free", str(full.value))[1].replace(",", "")) <= 100_000
    assert names(folder) == files_of(1) and loaded(folder, size=50_000) == (1, [])
    (small_disk / "filler").unlink()
    save(folder, 2, size=50_000)
    assert loaded(folder, size=50_000) == (2, [])
    clear_generations(folder)


def test_whatever_room_is_left_a_whole_generation_loads(small_disk):
    """From no room at all, page by page, to room for everything: tensors fit but their pointer does not, and so on."""
    folder, seen = small_disk / "run", []
    for pages in range(9):
        for step in (1, 2):
            save(folder, step, size=3000)
        fill(small_disk, leave=4096 * pages)
        try:
            save(folder, 3, size=3000)
        except OSError as full:
            assert full.errno == errno.ENOSPC and " bytes are needed, " in str(full)
        seen.append(loaded(folder, size=3000))
        (small_disk / "filler").unlink()
        save(folder, 4, size=3000)
        assert len(names(folder)) == 4
        clear_generations(folder)
    assert seen[0] == (2, []) and seen[-1] == (3, []) and all(one in (seen[0], seen[-1]) for one in seen)


def test_a_full_disk_at_a_small_file_keeps_the_old_one(small_disk):
    file = small_disk / "metrics.csv"
    write_bytes(file, b"epoch,loss\n")
    fill(small_disk, leave=0)
    with pytest.raises(OSError, match=r"metrics.csv cannot be written \(No space left on device\): 5,000 bytes are needed, 0 are free"):
        write_bytes(file, b"x" * 5000)
    assert file.read_bytes() == b"epoch,loss\n" and [name for name in names(small_disk) if name.endswith(".part")] == []
    with locked(small_disk / "run"):  # without room for its number the lock still holds
        pass
    (small_disk / "filler").unlink()


def test_room_is_checked_beforehand(small_disk):
    check_disk(small_disk / "run", 500_000, "checkpoints")
    with pytest.raises(OSError, match=r"checkpoints: 2\.00 GB are needed in .*, 1\.0\d MB are free\. Make room") as full:
        check_disk(small_disk / "not" / "yet", 2 * 10**9, "checkpoints")
    assert full.value.errno == errno.ENOSPC


def test_errors_of_writing_name_the_path_and_leave_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    for path, kind in ((tmp_path / "folder", IsADirectoryError), (tmp_path / "file" / "x", OSError), (tmp_path / ("x" * 300), OSError)):
        with pytest.raises(kind, match=re.escape(str(path)) + r" cannot be written \(.*\): 3 bytes are needed, [\d,]+ are free"):
            write_bytes(path, b"new")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_bytes() == b"old"
