"""The pipeline on real images, where a data set lies below `data/`: a run made tiny, and what must hold for the official files."""
import pytest
from conftest import ROOT

from ctrlscam.config import Settings
from ctrlscam.data import data_root, load_table
from ctrlscam.train import distill

REAL = {"cub200": 50, "standog": 60}


@pytest.mark.parametrize("dataset, classes", REAL.items())
def test_real_images(dataset, classes, tmp_path):
    config = Settings(dataset=dataset, max_classes=classes, recipe="small", teacher="test_resnet", teacher_weights="scratch")
    if not data_root(config).is_dir():
        pytest.skip(f"{data_root(config).relative_to(ROOT)} is not there; data/README.md says how to get it")
    table = load_table(config)
    assert table.label.nunique() == classes
    record = distill(config.replace(max_classes=5, max_images=40, epochs=1, baseline_epochs=1, teacher_epochs=1, output_dir=str(tmp_path), device="cpu"))
    assert record.picked.n == 40 and record.networks["grid"] == [8, 8]
