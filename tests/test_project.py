"""What must hold for the project as a whole: notebooks and package are one, nothing generated or private is in git."""
import ast
import json
import re
import subprocess

import pytest
from conftest import NOTEBOOKS, PAPERMILL, ROOT

import ctrlscam
from ctrlscam.config import parameters_cell

FIXED_NAMES = """class_activation_map class_activation_maps hint_map ControllableHint standardize_maps squash_maps pool_maps binarize_maps normalize_maps
select_class_maps effective_area map_agreement kd_loss hint_loss cat_loss attention_transfer_loss dkd_loss deit_distillation_loss refinement_loss
background_suppression_loss Classifier distill train_teacher Settings""".split()


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_clean(path):
    for cell in cells(path):
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{path.name}: a cell has outputs; run make export"
        assert set(cell["metadata"]) <= {"tags"}, f"{path.name}: {cell['metadata']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exported_cells_are_short(path):
    for cell in cells(path):
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source(cell), re.M):
            assert source(cell).count("\n") < 45, f"{path.name}: split this cell\n{source(cell)[:200]}"


@pytest.mark.parametrize("name", PAPERMILL)
def test_parameters_cell_is_tagged_and_generated(name):
    tagged = [cell for cell in cells(ROOT / "nbs" / f"{name}.ipynb") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill would silently run the defaults"
    assert source(tagged[0]) == parameters_cell(**PAPERMILL[name]), f"paste the output of ctrlscam.config.parameters_cell(**{PAPERMILL[name]})"


@pytest.mark.parametrize("name", PAPERMILL)
def test_papermill_notebooks_define_nothing(name):
    for cell in cells(ROOT / "nbs" / f"{name}.ipynb"):
        if cell["cell_type"] == "code":
            assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(ast.parse(source(cell)))), f"{name}: logic belongs in a module"


@pytest.mark.parametrize("name", FIXED_NAMES)
def test_public_name(name):
    assert callable(getattr(ctrlscam, name))


def test_modules_import_only_from_above():
    order = ["config", "synthetic", "data", "images", "views", "download", "cifar", "models", "maps", "heads", "attention", "losses", "baselines", "herbs", "heatmaps", "methods", "evaluate", "breakdown", "processes", "records", "checkpoint", "store", "watch", "step", "loop", "train", "reports", "figures", "figures_methods", "figures_systems", "benchmark", "benchmark_training", "benchmark_methods", "benchmark_herbs", "cli"]
    for place, module in enumerate(order):
        text = (ROOT / "ctrlscam" / f"{module}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"^(?:from \.|import ctrlscam\.)(\w+)", text, re.M))
        assert used <= set(order[:place]), f"{module} imports {used - set(order[:place])} from below"


def test_lock_names_versions_and_nothing_else():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; [\w ='\"]+)?", line) for line in lines)
    assert not [line for line in lines if "://" in line or "+" in line]


def test_git_holds_no_data_weights_or_outputs():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".safetensors", ".pth", ".pt", ".pkl", ".npy", ".tar"))]
    assert not [name for name in tracked if name.startswith("data/") and name not in ("data/README.md", "data/sources.json")]
    assert not [name for name in tracked if name.startswith("outputs/") and not name.startswith("outputs/reference/")]


def test_nothing_is_pickled():
    for path in (ROOT / "ctrlscam").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "allow_pickle=True" not in text and "weights_only=False" not in text, path.name
