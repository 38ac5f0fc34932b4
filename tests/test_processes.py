"""Several processes that share a batch, as real processes that `torchrun` starts on the CPU."""
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ctrlscam import processes
from ctrlscam.config import Settings

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8")

SHARED = """
import json, sys, torch
from pathlib import Path
from ctrlscam.config import Settings
from ctrlscam.processes import any_process, barrier, gather_rows, is_main, main_first, pick_device, rank, sum_over_processes, world_size

folder, me = Path(sys.argv[1]), rank()
assert not torch.distributed.is_initialized(), "asking who one is connects nobody"
found = dict(rank=me, world=world_size(), main=is_main(), device=str(pick_device(Settings(device="cpu"))), backend=torch.distributed.get_backend())


def numbers(process):
    \"\"\"Tensors of many shapes and types, other ones in each process.\"\"\"
    draw = torch.Generator().manual_seed(process)
    shapes = [(), (5,), (2, 3, 4, 4), (0, 3)]
    whole = [torch.randint(100, shape, generator=draw).to(getattr(torch, name)) for name in sys.argv[2].split(",") for shape in shapes]
    return [*whole, torch.randn(3, 4, 5, 5, generator=draw).to(memory_format=torch.channels_last), torch.randn(6, 4, generator=draw)[:, ::2]]


mine, alone = numbers(me), [first + second for first, second in zip(numbers(0), numbers(1))]
places = [tensor.data_ptr() for tensor in mine]
sum_over_processes(mine)
found["sums"] = all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(mine, alone))
found["in_place"] = places == [tensor.data_ptr() for tensor in mine]
weights = torch.nn.Parameter(torch.full((2,), me + 1.0))
sum_over_processes([weights, weights.detach()[:0]])
found["parameter"] = weights.tolist(), weights.requires_grad, weights.grad_fn is None
sum_over_processes([])


def rows(process, count, kind):
    return (10 * process + torch.arange(count)).to(kind)


def all_rows(counts, kind):
    return gather_rows(rows(me, counts[me], kind), rows(me, counts[me], kind)[:, None].expand(-1, 3), rows(me, 2 - me, kind))


def expected(counts, kind):
    one = torch.cat([rows(process, count, kind) for process, count in enumerate(counts)])
    return one, one[:, None].expand(-1, 3), torch.cat([rows(0, 2, kind), rows(1, 1, kind)])


found["rows"] = []
for counts in ((3, 3), (5, 2), (0, 4), (3, 0), (0, 0)):
    for name in [*sys.argv[2].split(","), "bool"]:
        kind = getattr(torch, name)
        pairs = list(zip(all_rows(counts, kind), expected(counts, kind)))
        if not all(torch.equal(one, other) and one.dtype == kind for one, other in pairs):
            found["rows"].append([counts, name])

found["any"] = [any_process(flag) for flag in (False, me == 0, me == 1, True)]
with main_first():
    with open(folder / "order", "a") as file:
        file.write(str(me))
barrier()
(folder / f"{me}.json").write_text(json.dumps(found))
"""


def start(folder, script, *words, launcher=(*TORCHRUN, "--nproc-per-node", "2")):
    """The finished launcher of `script` in `folder`, and the seconds it took."""
    (folder / "script.py").write_text(script)
    began = time.monotonic()
    done = subprocess.run([*launcher, str(folder / "script.py"), str(folder), *words], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done, time.monotonic() - began


def test_two_processes(tmp_path):
    done, _ = start(tmp_path, SHARED, ",".join(TYPES))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["rank"], one["world"], one["main"]) for one in found] == [(0, 2, True), (1, 2, False)]
    assert all(one["device"] == "cpu" and one["backend"] == "gloo" for one in found)
    assert all(one["sums"] and one["in_place"] for one in found), "the sum differs from the sum in one process"
    assert all(one["parameter"] == [[3.0, 3.0], True, True] for one in found)
    assert all(one["rows"] == [] for one in found)
    assert all(one["any"] == [False, True, True, True] for one in found)
    assert (tmp_path / "order").read_text() == "01", "the main process goes first"


FAILING = """
import sys, time, torch
from pathlib import Path
from ctrlscam.processes import barrier, gather_rows, main_first, rank, sum_over_processes
folder, place = Path(sys.argv[1]), sys.argv[2]
sum_over_processes([torch.zeros(1)])
if place == "main_first":
    with main_first():
        if rank() == 0:
            (folder / "began").write_text(str(time.time()))
            raise OSError("disk full in the main process")
elif rank() == 1:
    (folder / "began").write_text(str(time.time()))
    raise OSError("disk full in process 1")
try:
    gather_rows(torch.zeros(3))
except BaseException as error:
    (folder / "ended").write_text(str(time.time()))
    raise
"""


@pytest.mark.parametrize("place", ["sum", "main_first"])
def test_an_error_of_one_process_ends_the_others(tmp_path, place):
    """Without a word from the dead one, and long before anybody's patience is over."""
    done, seconds = start(tmp_path, FAILING, place)
    assert done.returncode != 0 and "disk full in" in done.stderr
    assert seconds < 60
    if place == "sum":  # the other one was in the middle of a message
        assert float((tmp_path / "ended").read_text()) - float((tmp_path / "began").read_text()) < 10


def test_a_single_process_connects_to_nobody():
    tensors = [torch.arange(3.0), torch.tensor(True)]
    before = [tensor.clone() for tensor in tensors]
    processes.sum_over_processes(tensors)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before))
    assert all(one is other for one, other in zip(processes.gather_rows(*tensors), tensors))
    with processes.main_first():
        processes.barrier()
    assert [processes.any_process(flag) for flag in (0, 1)] == [False, True]
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    processes.process_state()
    assert not torch.distributed.is_initialized()


def test_accelerate_is_imported_by_those_who_need_it_only():
    script = ("import sys; from ctrlscam.config import Settings; from ctrlscam import processes; processes.pick_device(Settings(device='cpu')); "
              "processes.barrier(); processes.any_process(True); sys.exit('accelerate' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.fixture
def launched(monkeypatch):
    """The environment of process 1 of 4 on one machine, connected to nobody; returns what `process_state` was asked for."""
    for name, value in dict(LOCAL_RANK=1, RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    asked = []
    monkeypatch.setattr(processes, "process_state", lambda cpu: asked.append(cpu) or SimpleNamespace(device=torch.device("cpu" if cpu else "cuda:1")))
    return asked


def test_devices_of_several_processes(monkeypatch, launched):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes.pick_device(Settings()), processes.pick_device(Settings(device="cpu"))) == (torch.device("cuda:1"), torch.device("cpu"))
    assert launched == [False, True]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were started on a machine with 2 GPUs"):
        processes.pick_device(Settings(device="cuda"))
    monkeypatch.setattr(processes, "process_state", lambda cpu: SimpleNamespace(device=torch.device("cuda:1")))
    with pytest.raises(ValueError, match="already connected to the others on cuda"):
        processes.pick_device(Settings(device="cpu"))


def test_no_several_processes_on_mps(monkeypatch, launched):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.pick_device(Settings()) == torch.device("cpu")
    with pytest.raises(ValueError, match="device = 'mps' is not available here for several processes"):
        processes.pick_device(Settings(device="mps"))


def test_a_world_size_without_a_launcher_is_somebody_elses(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (processes.rank(), processes.world_size()) == (0, 1)
