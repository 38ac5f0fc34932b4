"""Every method of the registry in real training: alone, side by side, from a store, after a kill; the published presets; the linear probe."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctrlscam.config import RECIPES, Settings, SettingsError, teacher_settings
from ctrlscam.data import load_table
from ctrlscam.losses import cat_loss
from ctrlscam.maps import class_activation_maps
from ctrlscam.methods import METHODS, Method, Said, add_method, find_method, method_table, teach, wants_stages
from ctrlscam.models import Classifier
from ctrlscam.processes import pick_device
from ctrlscam.records import run_folder
from ctrlscam.step import Stream, build_student, joint_needs, load_network, part_terms, start_run
from ctrlscam.train import distill, distill_together

DISTILLING = [name for name, method in METHODS.items() if method.teacher]


@pytest.fixture
def tiny(tmp_path):
    """Settings of runs that take a second."""
    return Settings(dataset="synthbirds", max_classes=4, max_images=48, image_size=64, batch_size=16, teacher_epochs=1, baseline_epochs=1, epochs=2, device="cpu",
                    stream_seed=0, teacher_seed=0, output_dir=str(tmp_path / "outputs"))


def test_all_methods_train_side_by_side_and_alone_alike(tiny):
    """One teacher's answers serve all methods at once, and each ends with the weights that it reaches alone."""
    together = distill_together([tiny.replace(method=name, together=len(DISTILLING)) for name in DISTILLING])
    assert [record.method for record in together] == DISTILLING
    rows = [json.loads((run_folder(tiny.replace(method=name)) / "metrics.jsonl").read_text().splitlines()[-1]) for name in DISTILLING]
    for name, row in zip(DISTILLING, rows):
        terms = [term for term in row if term.startswith("train_") and term not in ("train_total", "train_top1")]
        assert len(terms) >= 1 and all(row[term] > 0 for term in terms), (name, row)
        assert ("train_ce" in terms) == (name != "cat"), name
    for name in ("fitnet", "sdd"):  # one with parameters of its own, one with a weight that rises
        alone = tiny.replace(method=name, output_dir=f"{tiny.output_dir}/{name}")
        shutil.copytree(Path(tiny.output_dir) / "synthbirds", Path(alone.output_dir) / "synthbirds", ignore=lambda folder, names: [one for one in names if one.startswith(tuple(f"{m}-" for m in DISTILLING))])
        distill(alone)
        ours, theirs = (load_file(run_folder(one) / "last.safetensors") for one in (alone, tiny.replace(method=name)))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_store_gives_what_the_teacher_says(tiny):
    """All methods from a teacher store: half precision is the only difference."""
    for name in DISTILLING:
        config = tiny.replace(method=name)
        needs = find_method(name).needs(config)
        teacher = build_student(teacher_settings(config), 4).eval().requires_grad_(False)
        table = load_table(config)
        stream = Stream(config, table, pick_device(config), needs, teacher)
        lesson = next(stream.lessons(0))[0]
        state = start_run(config, table, run_folder(config), pick_device(config))
        half = lesson._replace(teaching={need: value.half().float() for need, value in lesson.teaching.items()})
        exact, stored = (sum(part_terms(state, one)[0].values()).item() for one in (lesson, half))
        assert stored == pytest.approx(exact, rel=2e-2, abs=1e-3), name
        assert all(value.isfinite().all() for value in lesson.teaching.values())


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cat_")])
def test_published_preset(name):
    """Each of the 17 settings builds its networks and takes a gradient on images of its size."""
    config = Settings(dataset="cifar100", recipe=name, teacher_weights="scratch", student_weights="scratch", image_size=32 if "imagenet" not in name else 96, resize_to=None)
    student, teacher = build_student(config, 100), build_student(teacher_settings(config), 100).eval()
    assert student.linear.bias is None and teacher.linear.bias is not None
    images, labels = torch.randn(2, 3, config.image_size, config.image_size), torch.tensor([3, 70])
    with torch.no_grad():
        teaching = teach(Said(teacher(images), labels), find_method(config.method).needs(config))
    objective = find_method(config.method).objective(config, student)
    terms = objective(student(images), teaching, labels)
    assert list(terms) == (["cat"] if name.startswith("cat_only") else ["ce", "cat"])
    sum(terms.values()).backward()
    assert student.linear.weight.grad.isfinite().all() and student.linear.weight.grad.abs().sum() > 0
    if name == "cat_only_partial":
        assert objective.classes == 76  # 75 lowest, as the original counts


def test_bias_of_either_head_does_not_reach_the_class_maps():
    network = Classifier("test_resnet", 5, output_stride=8).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        network.linear.bias += 3
        after = network(images)
    assert not torch.allclose(before.logits, after.logits)
    assert torch.equal(class_activation_maps(before.features, before.weight), class_activation_maps(after.features, after.weight))
    needs = {"class_maps": {"resolution": 2}, "plain_logits": {}}
    one, two = (teach(Said(outputs, torch.zeros(2, dtype=torch.long)), needs) for outputs in (before, after))
    assert cat_loss(one["class_maps"], two["class_maps"], 2) == 0 and torch.equal(one["plain_logits"], two["plain_logits"])


def test_linear_probe_trains_the_last_layer_alone(tiny):
    source = tiny.replace(method="ce", epochs=1)
    distill(source)
    weights = str(run_folder(tiny.replace(method="ce", stream_seed=None, epochs=1, learning_rate=tiny.baseline_learning_rate)) / "picked.safetensors")
    probe = tiny.replace(max_classes=3, student_weights=weights, student_frozen_backbone=True)
    record = distill(probe.replace(method="ce"))
    folder = run_folder(probe.replace(method="ce", stream_seed=None, epochs=1, learning_rate=tiny.baseline_learning_rate))
    trained, given = load_file(folder / "last.safetensors"), load_file(weights)
    changed = {name for name in trained if trained[name].shape != given[name].shape or not torch.equal(trained[name], given[name])}
    assert changed == {"backbone.classifier.weight", "backbone.classifier.bias"} and record.networks["parameters"] > 0


def test_teacher_taken_as_it_is(tiny):
    """`teacher_epochs=0` keeps the loaded weights to the bit and still leaves a record."""
    weights = teacher_settings(tiny)
    distill(tiny.replace(method="kd"))
    file = run_folder(weights) / "picked.safetensors"
    again = tiny.replace(teacher_weights=str(file), teacher_epochs=0, method="kd")
    distill(again)
    kept, given = load_file(run_folder(teacher_settings(again)) / "picked.safetensors"), load_file(file)
    assert kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in kept)


def test_teacher_with_a_hidden_layer_teaches_by_grad_cam(tiny):
    config = tiny.replace(teacher="cifar_resnet50_hidden", teacher_output_stride=32, student="cam_net", student_output_stride=32, image_size=32, method="cam_kd", cam_source="grad_cam",
                          max_images=8, batch_size=4, teacher_epochs=0, epochs=1)
    record = distill(config)
    row = json.loads((run_folder(config) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train_cam"] > 0 and record.networks["student"] == "cam_net"


def test_own_method_is_not_taken_for_its_former_self(tiny):
    """A changed formula trains again instead of reading the old record."""
    folders = []
    for power in (1, 2):
        body = {"forward": lambda self, student, teaching, labels, targets=None: {"own": student.logits.abs().pow(1).mean()}} if power == 1 else \
               {"forward": lambda self, student, teaching, labels, targets=None: {"own": student.logits.abs().pow(2).mean()}}
        own = type("Own", (METHODS["ce"].objective,), body)
        add_method("own", Method("own", own, "", "", lambda config: {}, True, ("ce",)))
        folders.append(run_folder(tiny.replace(method="own")))
    assert folders[0] != folders[1]
    assert distill(tiny.replace(method="own")).method == "own"
    del METHODS["own"]


def test_methods_with_other_forms_of_one_need_learn_apart(tiny):
    configs = [tiny.replace(method="cat_kd"), tiny.replace(method="cat_kd", cat_resolution=4)]
    with pytest.raises(ValueError, match="class_maps of the teacher is wanted"):
        joint_needs(configs)
    with pytest.raises(SettingsError, match="class_maps"):
        distill_together(configs)


def test_the_table_says_what_the_code_reads():
    table = method_table()
    assert list(table.index) == list(METHODS)
    assert "cat_weight=400" in table.loc["cat_kd", "settings"] and "temperature=3" in table.loc["ctrls_cam", "settings"]
    assert table.loc["cat", "settings"].startswith("cat_weight") and "ce_weight" not in table.loc["cat", "settings"]
    assert {name for name in METHODS if wants_stages(find_method(name).needs(Settings()))} == {"at", "fitnet"}


def test_picked_weights_of_a_student_without_bias_load(tiny):
    config = tiny.replace(method="cat_kd", student_bias=False)
    distill(config)
    network = load_network(config, 4, run_folder(config) / "picked.safetensors")
    assert network.linear.bias is None
