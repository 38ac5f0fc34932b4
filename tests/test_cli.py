"""The command `ctrlscam` as a user types it: what it prints, where, and with which exit code."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_download import Site, answer, cub_body, cub_files, cub_sources, image, lies_in, whole
from typer.testing import CliRunner

from ctrlscam.cli import app
from ctrlscam.config import DATASETS
from ctrlscam.download import Archive


def run(*words):
    """The result of `ctrlscam data …`, which must not end in a traceback."""
    done = CliRunner().invoke(app, ["data", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_sources(file, sources):
    file.write_text(json.dumps({name: origin.model_dump() for name, origin in sources.items()}))
    return file


@pytest.fixture
def tiny(tmp_path):
    """A whole set in CUB's layout under `data/`, and the list of addresses that expects just that."""
    put(tmp_path / "data" / "CUB_200_2011", cub_files())
    archive = Archive(url="https://example.org/cub.tgz", bytes=1000, md5="0" * 32, most_files=10, most_bytes=10_000)  # never asked for
    return ["--data-dir", tmp_path / "data", "--sources", write_sources(tmp_path / "sources.json", cub_sources(archive))]


def test_get_end_to_end(tmp_path):
    """The command in a process of its own, from a loopback server to a complete data set."""
    body, words = cub_body(), [sys.executable, "-m", "ctrlscam.cli", "data", "get", "cub_200_2011", "--data-dir", str(tmp_path / "data"), "--sources", str(tmp_path / "sources.json")]
    with Site({"/cub.tgz": whole(body)}) as site:
        write_sources(tmp_path / "sources.json", cub_sources(site.offer("/cub.tgz", body, strip="CUB_200_2011")))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'data' / 'CUB_200_2011'} is complete\n", "")
        assert set(lies_in(tmp_path / "data" / "CUB_200_2011")) == {*cub_files(), "attributes.txt"}
        again = run(*words[4:])
        assert (again.exit_code, again.stdout, len(site.seen)) == (0, done.stdout, 1)


def test_get_says_what_went_wrong(tmp_path):
    with Site({"/cub.tgz": lambda request: answer(request, b"<html>Log in</html>")}) as site:
        done = run("get", "cub200", "--data-dir", tmp_path / "data", "--sources", write_sources(tmp_path / "sources.json", cub_sources(site.offer("/cub.tgz"))))
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("error: cub.tgz: the server answered with a web page") and "by hand" in done.stderr


@pytest.mark.parametrize("name, words", [("nabird", "https://dl.allaboutbirds.org/nabirds"), ("stanford_cars", "Put cars_test_annos_withlabels.mat beside these folders")])
def test_get_by_hand(tmp_path, name, words):
    done = run("get", name, "--data-dir", tmp_path)
    assert done.exit_code == 1 and words in done.stderr and "└── " in done.stderr
    assert not list(tmp_path.iterdir())


def test_get_where_nothing_is_to_be_got(tmp_path):
    assert run("get", "synthbirds", "--data-dir", tmp_path).exit_code == 0
    done = run("get", f"folder:{tmp_path}")
    assert done.exit_code == 1 and "a folder of your own" in done.stderr


@pytest.mark.parametrize("words, message", [
    (["get", "cub20"], "did you mean 'cub200'"),
    (["check", "stanford_car"], "did you mean 'stanford_cars'"),
    (["check", "cub200+cifar10"], "joint set"),
    (["check", "../../etc"], "allowed: synthbirds"),
    (["get"], "Missing argument"),
    (["fetch", "cub200"], "No such command"),
    (["check", "cub200", "--quik"], "No such option"),
    (["check", "cub200", "--quick", "--damaged", "x"], "does not go with --quick"),
    (["get", "cub200", "--patience", "0"], "--patience"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_usage(words, message):
    done = run(*words)
    assert done.exit_code == 2 and message in re.sub(r"\s+", " ", done.stderr), done.stderr


def test_list(tmp_path, tiny):
    assert json.loads(run("list", "--json", *tiny).stdout) == [{"name": "cub200", "state": "here", "train": 2, "test": 2, "classes": 2, "how": "by itself",
                                                                "download": "1.00 kB", "title": "Caltech-UCSD Birds-200-2011"}]
    done = run("list", "--data-dir", tmp_path / "none")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(DATASETS)
    assert "drawn on first use" in lines[1] and all("not here" in line for line in lines[2:])
    assert "1.15 GB" in lines[2] and "5,994" in lines[2]


def test_check_complete(tiny):
    done = run("check", "cub", *tiny)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].endswith("CUB_200_2011: complete")
    for line in ("train: 2 of 2", "test: 2 of 2", "classes: 2 of 2", "missing images: none", "damaged images: none"):
        assert line in done.stdout, done.stdout


def test_check_lists_damaged_images_and_writes_them(tmp_path, tiny):
    root = tmp_path / "data" / "CUB_200_2011"
    (root / "images/001.Wren/1.png").write_bytes(b"")
    (root / "images/002.Gull/2.png").write_bytes(b"<html>Log in</html>")
    assert run("check", "cub200", "--quick", *tiny).exit_code == 0
    done = run("check", "cub200", "--damaged", tmp_path / "bad.txt", *tiny)
    assert done.exit_code == 1 and "usable in part" in done.stdout and "leave_out" in done.stdout
    assert (tmp_path / "bad.txt").read_text() == "images/001.Wren/1.png\nimages/002.Gull/2.png\n"
    report = json.loads(run("check", "cub200", "--json", *tiny).stdout)
    assert set(report["damaged"]) == {"images/001.Wren/1.png", "images/002.Gull/2.png"} and report["verdict"] == "usable in part"
    put(root, {name: content for name, content in cub_files().items() if name.endswith(".png")})
    assert run("check", "cub200", "--damaged", tmp_path / "bad.txt", *tiny).exit_code == 0
    assert (tmp_path / "bad.txt").read_text() == "" and sorted(os.listdir(tmp_path)) == ["bad.txt", "data", "sources.json"]


def test_check_incomplete(tmp_path, tiny):
    root = tmp_path / "data" / "CUB_200_2011"
    (root / "images/002.Gull/2.png").unlink()
    done = run("check", "cub200", "--quick", *tiny)
    assert done.exit_code == 1 and "missing images: 1: images/002.Gull/2.png" in done.stdout and "train: 1 of 2" in done.stdout
    (root / "classes.txt").unlink()
    done = run("check", "cub200", "--quick", *tiny)
    assert done.exit_code == 1 and "not usable" in done.stdout and "missing: classes.txt, from CUB_200_2011.tgz" in done.stdout
    assert "image files found, to whatever class they belong: 3" in done.stdout


def test_check_cars_without_test_labels(tmp_path):
    """Fault 28: the usual mirror."""
    put(tmp_path / "stanford_cars", {"cars_train/00001.jpg": b"", "devkit/cars_meta.mat": b"", "devkit/cars_train_annos.mat": b"", "devkit/cars_test_annos.mat": b""})
    done = run("check", "stancar", "--quick", "--data-dir", tmp_path)
    assert done.exit_code == 1 and "not usable" in done.stdout
    assert "missing: cars_test_annos_withlabels.mat" in done.stdout and f"{tmp_path / 'stanford_cars'}" in done.stdout
    assert "missing: devkit" not in done.stdout


def test_check_joint_set(tmp_path):
    put(tmp_path / "data" / "CUB_200_2011", cub_files())
    put(tmp_path / "data" / "foodx251", {"annot/train_info.csv": b"a.jpg,0\nb.jpg,1\n", "annot/val_info.csv": b"c.jpg,1\n", "train_set/a.jpg": image(30), "train_set/b.jpg": image(31)})
    report = json.loads(run("check", "cub200+foodx251", "--quick", "--json", "--data-dir", tmp_path / "data").stdout)
    assert (report["train"], report["test"], report["classes"], report["whole_classes"]) == (4, 2, 4, 3)
    assert report["missing_images"] == ["foodx251/val_set/c.jpg"] and report["expected"]["classes"] == 451
    (tmp_path / "data" / "foodx251" / "annot" / "val_info.csv").unlink()
    report = json.loads(run("check", "cub200+foodx251", "--quick", "--json", "--data-dir", tmp_path / "data").stdout)
    assert report["missing_files"] == {"foodx251/annot/class_list.txt": "annot.tar", "foodx251/annot/val_info.csv": "annot.tar"}


def test_check_folder_of_ones_own(tmp_path):
    """Fault 27 as well: the same picture in training and test is reported."""
    put(tmp_path, {f"{split}/{name}/{number}.png": image(20 + 10 * number + offset) for split, offset in (("train", 0), ("test", 3)) for number, name in enumerate(["wren", "gull"])})
    done = run("check", f"folder:{tmp_path}")
    assert done.exit_code == 0 and "complete" in done.stdout and "train: 2\n" in done.stdout, done.output
    (tmp_path / "test/gull/9.png").write_bytes((tmp_path / "train/gull/1.png").read_bytes())
    done = run("check", f"folder:{tmp_path}")
    assert done.exit_code == 0 and "pictures in both training and test: 1" in done.stdout and "train/gull/1.png and test/gull/9.png: same file" in done.stdout, done.output
    assert run("check", f"folder:{tmp_path / 'nowhere'}").exit_code == 1


def test_bad_list_of_addresses(tmp_path):
    (tmp_path / "sources.json").write_text("{")
    done = run("list", "--sources", tmp_path / "sources.json")
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and "sources.json" in done.stderr


def test_help_is_quick_and_loads_nothing_heavy():
    probe = "import sys, ctrlscam.cli as cli; sys.argv = ['ctrlscam', 'data', '--help']\ntry: cli.main()\nexcept SystemExit: print(sorted({'torch', 'pandas', 'requests'} & set(sys.modules)))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert time.perf_counter() - began < 10  # half a second on an idle machine
    assert done.stdout.splitlines()[-1] == "[]" and "check" in done.stdout


def test_list_does_not_load_torch():
    probe = "import sys, ctrlscam.cli as cli; sys.argv = ['ctrlscam', 'data', 'list']\ntry: cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-1] == "False"


# Training. One tiny teacher in two parts a batch, so that two processes can share it; test_launch.py starts them.
TINY = ["-p", "smoke", "true", "-p", "max_images", "24", "-p", "teacher", "test_resnet", "-p", "image_size", "32", "-p", "device", "cpu", "-p", "accumulate", "2"]


def train(*words):
    """The result of `ctrlscam teacher …` or `ctrlscam distill …` in this process."""
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize("words, message", [
    (["-p", "epocs", "3"], "did you mean 'epochs'"),
    (["-p", "_epochs", "3"], "unknown setting '_epochs'"),
    (["-p", "epochs", "3.5"], "epochs = '3.5'"),
    (["-p", "seed", "-1"], "seed = '-1'"),
    (["-p", "learning_rate", "nan"], "learning_rate = 'nan'"),
    (["-p", "dataset", "../../etc"], "dataset = '../../etc'"),
    (["-p", "dataset", ""], "dataset"),
    (["-p", "watch", "tensorbord"], "watch = 'tensorbord'"),
    (["-p", "epochs"], "given as -p NAME VALUE, not as '-p epochs'"),
    (["epochs", "3"], "given as -p NAME VALUE"),
    (["--epochs", "3"], "given as -p NAME VALUE"),
    (["-p", "methods", "ctrlscam"], "did you mean 'ctrls_cam'"),
    (["-p", "teacher", "resnet5"], "resnet50"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_settings(tmp_path, words, message):
    for command in ("teacher", "distill"):
        done = train(command, *words, "-p", "output_dir", tmp_path / "outputs") if len(words) == 3 and words[0] == "-p" else train(command, *words)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert not (tmp_path / "outputs").exists()


def test_wrong_settings_are_refused_before_torch_is_loaded():
    probe = "import sys, ctrlscam.cli as cli; sys.argv = ['ctrlscam', 'distill', '-p', 'epocs', '3']\ntry: cli.main()\nexcept SystemExit as end: print(end.code, sorted({'torch', 'pandas'} & set(sys.modules)))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout == "2 []\n" and time.perf_counter() - began < 3


def test_errors_of_a_run_are_messages(tmp_path):
    """Fault 32: outputs that cannot be written, before any training; and a list of images that is not there."""
    (tmp_path / "file").write_text("")
    began = time.perf_counter()
    done = train("teacher", *TINY, "-p", "output_dir", tmp_path / "file")
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and str(tmp_path / "file") in done.stderr, done.output
    assert time.perf_counter() - began < 5 + 10  # ten for a busy machine
    done = train("teacher", *TINY, "-p", "leave_out", tmp_path / "none.txt")
    assert done.exit_code == 1 and "none.txt" in done.stderr


def test_sigterm_before_the_training_ends_with_143_too(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ctrlscam.train.check_inputs", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    assert train("teacher").exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
