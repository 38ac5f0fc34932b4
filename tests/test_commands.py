"""The command forms of the README, as a user types them, on runs made tiny."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

SMOKE = ("-p", "smoke", "true", "-p", "max_images", "40", "-p", "teacher", "test_resnet", "-p", "epochs", "1", "-p", "methods", "ce,kd,ctrls_cam")


def run_files(outputs):
    """Contents of all records below `outputs`, by path relative to it."""
    return {str(path.relative_to(outputs)): path.read_bytes() for path in outputs.rglob("record.json")}


def test_all_forms_land_in_the_same_runs(papermill, tmp_path):
    outputs, executed = tmp_path / "outputs", tmp_path / "executed.ipynb"
    first = papermill("nbs/distill.ipynb", executed, "-p", "dataset", "synthbirds", *SMOKE)
    assert first.returncode == 0, first.stderr[-3000:]
    records = run_files(outputs)
    assert len(records) == 4, sorted(records)  # teacher, ce, kd, ctrls_cam
    images = [data for cell in json.loads(executed.read_text())["cells"] for output in cell.get("outputs", []) for data in output.get("data", {}) if data == "image/png"]
    assert len(images) >= 4

    second = papermill("distill.ipynb", executed, *SMOKE, folder=ROOT / "nbs")
    assert second.returncode == 0, second.stderr[-3000:]
    with open(tmp_path / "stdout.json", "w") as stdout:  # without an output path the notebook goes to standard output
        third = papermill("nbs/distill.ipynb", *SMOKE, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert third.returncode == 0, third.stderr[-3000:]
    fourth = papermill(ROOT / "nbs" / "distill.ipynb", executed, *SMOKE, folder=tmp_path)
    assert fourth.returncode == 0, fourth.stderr[-3000:]
    script = f"""
from ctrlscam import Settings, distill
config = Settings(smoke=True, max_images=40, teacher="test_resnet", epochs=1, output_dir={str(outputs)!r}, device="cpu")
assert distill(config).method == "ctrls_cam"
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    assert run_files(outputs) == records, "a second run changed a record"

    tables = papermill("nbs/tables.ipynb", executed, *SMOKE)
    assert tables.returncode == 0, tables.stderr[-3000:]
    assert run_files(outputs) == records


def test_teacher_notebook(papermill, tmp_path):
    done = papermill("nbs/teacher.ipynb", tmp_path / "executed.ipynb", *SMOKE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(run_files(tmp_path / "outputs")) == 1


def test_cam_kd_notebook(papermill, tmp_path):
    """Heat maps before, during and after training, for a teacher whose maps are Grad-CAMs as well."""
    done = papermill("nbs/cam_kd.ipynb", tmp_path / "executed.ipynb", *SMOKE, "-p", "methods", "ce,kd,cam_kd", "-p", "cam_source", "grad_cam")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "outputs").rglob("study-*/heat_maps_over_training.png")) and list((tmp_path / "outputs").rglob("cam_kd-*/seed0/record.json"))


def test_herbs_and_deit_notebooks(papermill, tmp_path):
    """Both systems on the embedded data set, each with the runs that its tables name and no others."""
    small = ("-p", "smoke", "true", "-p", "max_images", "40", "-p", "epochs", "1", "-p", "baseline_epochs", "1")
    for name, runs, picture in (("herbs_train", {"ce", "herbs_head", "herbs_refined", "herbs"}, "schedules"), ("deit", {"ce", "deit_soft", "deit_hard"}, "accuracy")):
        outputs = tmp_path / name
        done = papermill(f"nbs/{name}.ipynb", tmp_path / f"{name}.ipynb", *small, outputs=outputs)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(content) for content in run_files(outputs).values()]
        assert {record["method"] for record in records} == runs and len(records) == len(runs) + (name == "deit")  # and a teacher
        assert list(outputs.rglob(f"study-*/{picture}.png"))


def test_benchmark_notebook(papermill, tmp_path):
    done = papermill("nbs/benchmark.ipynb", tmp_path / "executed.ipynb", "-p", "smoke", "true", "-p", "max_images", "16")
    assert done.returncode == 0, done.stderr[-3000:]
    results = {name: json.loads((tmp_path / "outputs" / "benchmark" / f"{name}.json").read_text()) for name in ("hints", "step", "input", "store", "scaling", "methods", "herbs")}
    assert {row["workers"] for row in results["input"]["rows"]} == {0, 2} and all(row["images/s"] > 0 for row in results["input"]["rows"])
    assert all(row["operations"] <= 75 and row["host reads"] == 0 for row in results["hints"]["rows"] if row["candidate"] == "ours")
    assert {row["note"] for row in results["step"]["rows"] if row.get("note")} <= {"not run: no GPU"}
    assert results["store"]["bytes"]["a view, 200 classes and 14×14 cells"] == 800
    assert {row["over"] for row in results["scaling"]["exponents"]} == {"image_size", "batch_size", "classes", "epochs"}
    assert results["scaling"]["processes"]["largest difference of a weight, same threads"] == 0


@pytest.mark.parametrize("words, message", [
    (["-p", "epocs", "3"], "did you mean 'epochs'"),
    (["-p", "epochs", "3.5"], "epochs = 3.5"),
    (["-p", "dataset", "cub20"], "did you mean 'cub200'"),
    (["-p", "dataset", "cub200+cifar10"], "a joint set needs"),
    (["-p", "methods", "ctrlscam"], "did you mean 'ctrls_cam'"),
    (["-p", "teacher", "resnet5"], "resnet50"),
], ids=lambda value: value[1] if isinstance(value, list) else "")
def test_bad_parameters_stop_at_once(papermill, tmp_path, words, message):
    done = papermill("nbs/distill.ipynb", tmp_path / "executed.ipynb", *words)
    assert done.returncode == 1
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
    assert not (tmp_path / "outputs").exists()


def test_bad_settings_are_refused_without_torch():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "from ctrlscam.config import Settings; Settings(epocs=3)"], capture_output=True, text=True)
    assert "did you mean 'epochs'" in done.stderr
    assert time.perf_counter() - began < 3, "the check must not wait for torch"


def test_killed_papermill_continues(papermill, tmp_path):
    """SIGKILL in the middle of an epoch, first to the kernel alone, then to papermill and its kernel; the same command finishes with the weights of an undisturbed run."""
    words = ["nbs/distill.ipynb", tmp_path / "executed.ipynb", "-p", "max_classes", "5", "-p", "max_images", "60", "-p", "teacher_epochs", "10", "-p", "baseline_epochs", "2",
             "-p", "methods", "ce", "-p", "checkpoint_minutes", "0"]
    undisturbed = tmp_path / "undisturbed"
    assert papermill(*words, outputs=undisturbed).returncode == 0
    outputs = tmp_path / "outputs"
    command = [str(Path(sys.executable).with_name("papermill")), *map(str, words), "-p", "output_dir", str(outputs), "-p", "device", "cpu"]
    for epoch, everyone in ((1, False), (4, True)):
        victim = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(outputs.rglob(f"checkpoint-{epoch:04}-000001.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        family = [psutil.Process(victim.pid)] * everyone + psutil.Process(victim.pid).children(recursive=True)  # papermill and its kernel
        for process in family:
            process.kill()
        assert victim.wait(timeout=60) != 0
        psutil.wait_procs(family, timeout=30)
        assert list(outputs.rglob("checkpoint-*-*[1-9].json")), "nothing was under way when the kill came"
    again = papermill(*words)
    assert again.returncode == 0, again.stderr[-3000:]
    ours, theirs = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("last.safetensors")} for folder in (outputs, undisturbed))
    assert ours == theirs and len(ours) == 2
    assert sum(json.loads(path.read_text())["resumed"] for path in outputs.rglob("record.json")) == 2, "the run started anew instead of continuing"
