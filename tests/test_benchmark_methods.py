"""What a method costs: the record holds what it says, for every method, and for settings off the beaten track."""
import json

import pytest
import torch

from ctrlscam.benchmark_methods import against_ce, memory_of, method_case, methods_cost_figure, methods_cost_table, open_bench, time_methods
from ctrlscam.config import Settings
from ctrlscam.methods import METHODS
from ctrlscam.store import record_bytes

TINY = Settings(max_classes=4, max_images=24, image_size=56, batch_size=8, teacher="test_resnet", student="test_resnet", device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def record():
    return time_methods(TINY, rounds=2)


def test_every_method_with_a_teacher_is_timed(record):
    two_heads = [name for name, method in METHODS.items() if "deit" in method.groups]  # the student of the bench has one
    timed = [row for row in record["rows"] if "note" not in row]
    assert [row["method"] for row in timed] == ["ce", *(name for name, method in METHODS.items() if method.teacher and name not in two_heads)]
    assert {row["method"]: "has no distillation head" in row["note"] for row in record["rows"] if "note" in row} == dict.fromkeys(two_heads, True)
    for row in timed[1:]:
        assert set(row["steps"]) == {"asked", "stored"} and set(row["parts"]) == {"objective", "teacher", "answers", "read"}
        assert row["peak bytes"]["asked"] - row["peak bytes"]["stored"] > 0.9 * record["settings"]["teacher_bytes"]


def test_record_survives_json_and_can_be_shown(record):
    again = json.loads(json.dumps(record, allow_nan=False))
    table = methods_cost_table(again)
    assert len(table) == len(record["rows"]) and table.index[0] == "student alone"
    assert table["× ce, teacher asked"].iloc[0] == "1.00 (1.00–1.00)"
    assert len(methods_cost_figure(again).axes) == 3


def test_bytes_are_those_of_a_store(record, tmp_path):
    bench = open_bench(TINY, tmp_path)
    for row in (row for row in record["rows"] if row["method"] in ("fitnet", "cat", "sdd", "ctrls_cam")):
        answers = method_case(bench, row["method"]).shapes
        assert row["bytes a view"] == record_bytes(answers) == sum(file.stat().st_size for file in (tmp_path / row["method"]).glob("*.bin")) / 8


def test_differences_are_taken_within_a_round():
    figures = against_ce(torch.tensor([3.0, 30.0, 300.0]).numpy(), torch.tensor([1.0, 10.0, 100.0]).numpy())
    assert figures["ratio"] == dict(median=3.0, min=3.0, max=3.0) and figures["over ce"]["median"] == 20


@pytest.mark.parametrize("changes", [dict(cam_source="grad_cam", mixup=0.2), dict(accumulate=2, precision="bf16"), dict(teacher_epochs=0, optimizer="sgd", ema_decay=0.9)], ids=str)
def test_other_settings(changes, tmp_path):
    bench = open_bench(TINY.replace(**changes), tmp_path)
    case = method_case(bench, "cam_kd")
    before = case.state.student.linear.weight.detach().clone()
    assert {work() for work in case.works.values()} == {len(bench.batch.labels)}
    torch.testing.assert_close(case.state.student.linear.weight.detach(), before, atol=1e-6, rtol=1e-6)
    memory = memory_of(case, bench)
    assert memory["asked"] > memory["stored"] > 0


def test_a_method_that_cannot_run_has_a_note():
    rows = time_methods(TINY.replace(cat_classes=50), ["cat", "kd"], rounds=1)["rows"]
    assert [row["method"] for row in rows] == ["ce", "kd", "cat"]
    assert rows[-1]["note"].startswith("not run: ") and "there are 4" in rows[-1]["note"]


def test_unknown_method_stops_at_once():
    with pytest.raises(ValueError, match="did you mean 'fitnet'"):
        time_methods(TINY, ["fitnets"])
