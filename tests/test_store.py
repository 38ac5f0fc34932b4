"""A teacher store among processes: writers that are killed, several at once, launched ones, and a disk that fills up."""
import errno
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import PartialState

import ctrlscam.store as module
from ctrlscam import processes, records
from ctrlscam.config import Settings
from ctrlscam.data import load_table
from ctrlscam.store import StoreError, TeacherStore, check_store, open_store, record_bytes, table_digest
from ctrlscam.train import describe_data

CUB = dict(logits=(200,), map=(14, 14))
KEY = dict(teacher=dict(sha256="0" * 64), stream_seed=0)
fork = multiprocessing.get_context("fork")


def said(epoch, rows, shapes=CUB):
    """Values that differ from record to record and can be made anew anywhere."""
    return {need: torch.stack([torch.from_numpy(np.random.default_rng([epoch, int(row), len(need)]).normal(size=shape)).half() for row in rows])
            for need, shape in shapes.items()}


def assert_right(store, epoch, rows, shapes=CUB):
    """Each of `rows` is missing or right; returns how many are there."""
    there = [row for row in rows if store.read(epoch, [row]) is not None]
    for need, values in (said(epoch, there, shapes) if there else {}).items():
        assert torch.equal(values, store.read(epoch, there)[need])
    return len(there)


def write_all(folder, rows, epochs=2, order=0, written=None):
    """Write all views that are missing, in an order of its own; counts the batches in `written`."""
    store = TeacherStore(folder, KEY, rows, CUB)
    for epoch in range(epochs):
        for batch in np.array_split(np.random.default_rng(order).permutation(rows), rows // 16):
            if store.read(epoch, batch) is None:
                store.write(epoch, batch, said(epoch, batch))
                if written is not None:
                    written.value += 1


def test_a_killed_writer_leaves_a_store_that_continues(tmp_path):
    rows, found, chance = 256, [], random.Random(0)
    for attempt in range(12):
        written, enough = fork.RawValue("i"), chance.randint(1, 3)
        child = fork.Process(target=write_all, args=(tmp_path, rows), kwargs=dict(order=attempt, written=written))
        child.start()
        while written.value < enough and child.is_alive():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.002))  # into the next batch
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        store = TeacherStore(tmp_path, KEY, rows, CUB)
        found.append(sum(assert_right(store, epoch, range(rows)) for epoch in range(2)))
    assert found == sorted(found), "what was stored was lost"
    assert any(0 < count < 2 * rows for count in found), "no child was killed while it wrote"
    write_all(tmp_path, rows)
    assert store.coverage(0) == store.coverage(1) == 1
    assert check_store(store, said, sample=10**6) == 2 * 2 * rows
    assert (tmp_path / "map.bin").stat().st_size == 2 * rows * record_bytes(dict(map=(14, 14)))


def test_two_processes_write_one_store_at_once(tmp_path):
    rows = 512
    children = [fork.Process(target=write_all, args=(tmp_path, rows), kwargs=dict(order=k % 2)) for k in range(4)]  # two in step with each other, twice
    for child in children:
        child.start()
    while not (tmp_path / "map.bin").exists():
        time.sleep(0.001)
    store, looks = TeacherStore(tmp_path, KEY, rows, CUB), 0
    while any(child.is_alive() for child in children):
        assert_right(store, looks % 2, random.Random(looks).sample(range(rows), 64))
        looks += 1
    assert looks and [child.exitcode for child in children] == [0] * 4
    assert store.coverage() == 1 and check_store(store, said, sample=10**6) == 2 * 2 * rows


def test_processes_that_open_one_store_at_once_agree_on_it(tmp_path):
    gate = fork.Event()

    def work(needs):
        gate.wait()
        shapes = {need: CUB[need] for need in needs}
        TeacherStore(tmp_path / "store", KEY, 20, shapes).write(0, range(20), said(0, range(20), shapes))

    children = [fork.Process(target=work, args=(needs,)) for needs in (["logits"], ["map"], ["logits", "map"]) * 3]
    for child in children:
        child.start()
    gate.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 9
    assert assert_right(TeacherStore(tmp_path / "store", KEY, 20, CUB), 0, range(20)) == 20


def test_another_key_is_refused_field_by_field(tmp_path):
    write_all(tmp_path, 32, epochs=1)
    content = (tmp_path / "logits.bin").read_bytes()
    with pytest.raises(StoreError, match=r"key.stream_seed: 0 there, 1 wanted; key.teacher.sha256: '0000.*' there, '1111.*' wanted"):
        TeacherStore(tmp_path, dict(teacher=dict(sha256="1" * 64), stream_seed=1), 32, CUB)
    with pytest.raises(StoreError, match=r"rows: 32 there, 33 wanted"):
        TeacherStore(tmp_path, KEY, 33, CUB)
    with pytest.raises(StoreError, match=r"shapes.map: \[14, 14\] there, \[7, 7\] wanted"):
        TeacherStore(tmp_path, KEY, 32, dict(map=(7, 7)))
    text = (tmp_path / "store.json").read_text()
    (tmp_path / "store.json").write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(StoreError, match="schema_version: 9 there, 1 wanted"):
        TeacherStore(tmp_path, KEY, 32, CUB)
    (tmp_path / "store.json").unlink()
    with pytest.raises(StoreError, match="no store.json"):
        TeacherStore(tmp_path, KEY, 32, CUB)
    assert (tmp_path / "logits.bin").read_bytes() == content


def test_rows_without_records_and_any_order(tmp_path):
    rows = np.array([5, 2, 40])
    store = TeacherStore(tmp_path, KEY, rows, CUB)
    store.write(3, [40, 5], said(3, [40, 5]))
    assert assert_right(store, 3, [5, 2, 40]) == 2
    assert store.coverage(3) == 2 / 3
    with pytest.raises(ValueError, match=r"rows \[3\]"):
        store.read(3, [5, 3])
    again = TeacherStore(tmp_path, KEY, rows, CUB)
    assert torch.equal(again.read(3, torch.tensor([5, 40]))["map"], said(3, [5, 40])["map"])
    assert {name: (tuple(values.shape), values.dtype) for name, values in again.read(3, []).items()} == {
        "logits": ((0, 200), torch.float16), "map": ((0, 14, 14), torch.float16)}


@contextmanager
def small_disk(folder, size):
    """A file system of that size in `folder`; skips the test where none can be mounted."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_fault_33_a_full_disk_raises_and_what_is_stored_stays(tmp_path):
    def fill(folder, results):
        store = TeacherStore(folder / "store", KEY, 10_000, CUB)
        try:
            for row in range(10_000):
                store.write(0, [row], said(0, [row]))
        except OSError as error:
            results.put((error.errno, str(error), row))

    with small_disk(tmp_path / "disk", "128k") as disk:
        results = fork.Queue()
        child = fork.Process(target=fill, args=(disk, results))
        child.start()
        number, message, row = results.get(timeout=20)
        child.join()
        assert child.exitcode == 0 and number == errno.ENOSPC  # an error that is told, not the death by SIGBUS of a writer through a mapping
        assert ".bin cannot be written (No space left on device)" in message and "bytes are needed, " in message and " are free" in message
        store = TeacherStore(disk / "store", KEY, 10_000, CUB)
        assert assert_right(store, 0, range(row + 1)) == row > 50
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        store.write(0, range(row, 300), said(0, range(row, 300)))
        assert assert_right(store, 0, range(300)) == 300
        store.close()


def tiny(tmp_path, **changes):
    return Settings(dataset="synthbirds", max_classes=5, max_images=60, output_dir=str(tmp_path / "outputs"), epochs=10, method="ctrls_cam", device="cpu", **changes)


def test_the_estimate_stops_before_anything_is_written(tmp_path):
    config = tiny(tmp_path)
    table = load_table(config)
    with pytest.raises(StoreError, match=r"10 epochs × 54 training views × 800 bytes needs 432 kB, more than store_gigabytes = 0.0004"):
        open_store(config.replace(store_gigabytes=4e-4), table, "0" * 64, CUB)
    assert not (tmp_path / "outputs").exists()
    with small_disk(tmp_path / "disk", "256k") as disk:
        with pytest.raises(OSError, match="432 kB are needed.*are free") as caught:
            open_store(config.replace(output_dir=str(disk / "outputs")), table, "0" * 64, CUB)
        assert caught.value.errno == errno.ENOSPC and not list(disk.iterdir())
        open_store(config.replace(output_dir=str(disk / "outputs"), epochs=2), table, "0" * 64, CUB)


def test_what_is_there_is_not_counted_twice(tmp_path):
    with small_disk(tmp_path / "disk", "600k") as disk:
        config = tiny(tmp_path).replace(output_dir=str(disk))
        table = load_table(config)
        store = open_store(config, table, "0" * 64, CUB)
        for epoch in range(config.epochs):
            store.write(epoch, store.rows, said(epoch, store.rows))
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize < 432_000
        assert open_store(config, table, "0" * 64, CUB).coverage() == 1
        store.close()


def test_the_digest_is_that_of_the_record(tmp_path):
    table = load_table(tiny(tmp_path))
    assert table_digest(table) == describe_data(table)["digest"]


def launched(rank, port, config, results):
    """What each of two launched processes does; in a fork, since it need not import everything anew."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    PartialState._reset_state()  # of the parent, if another test has made one
    processes.process_state(cpu=True)
    write_json = records.write_json

    def checked(path, content):
        assert processes.is_main(), "only the main process writes store.json"
        write_json(path, content)

    module.write_json = checked
    table, shapes = load_table(config), dict(logits=(5,))
    store = open_store(config, table, "0" * 64, shapes)
    mine = store.rows[rank::2]
    for epoch in range(3):
        store.write(epoch, mine, dict(logits=torch.full((len(mine), 5), 1.0 + rank)))
    processes.barrier()
    with pytest.raises(StoreError):  # in all processes, so that none waits for the others
        open_store(config.replace(store_gigabytes=0), table, "0" * 64, shapes)
    results.put((store.coverage(), store.read(2, store.rows[:2])["logits"][:, 0].tolist()))


def test_launched_processes_share_a_store(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = fork.Queue()
    children = [fork.Process(target=launched, args=(rank, port, tiny(tmp_path), results)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert [results.get(timeout=5) for _ in children] == [(1, [1, 2])] * 2
