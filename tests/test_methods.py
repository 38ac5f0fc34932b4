"""Every method of the registry in real training: alone, side by side, from a store, after an interruption; the published presets; the linear probe."""
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
from ctrlscam.methods import METHODS, TEACHINGS, Method, Said, add_method, find_method, method_table, teach, wants_stages
from ctrlscam.models import Classifier
from ctrlscam.processes import pick_device
from ctrlscam.records import run_folder
from ctrlscam.step import Stream, build_student, joint_needs, load_network, part_terms, start_run
from ctrlscam.train import distill, distill_together

DISTILLING = [name for name, method in METHODS.items() if method.teacher and "deit" not in method.groups]  # those need two heads: test_systems.py


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


def test_ramps_and_own_parameters_survive_interruptions(tiny, with_stops):
    """Stopped twice in the middle of an epoch, weights that rise and layers that belong to the method go on as if nothing had happened."""
    runs = [tiny.replace(method=name, together=3, epochs=3, sdd_ramp=1, dkd_ramp=1, checkpoint_minutes=0) for name in ("sdd", "fitnet", "dkd")]
    distill_together(runs)
    others = [one.replace(output_dir=f"{tiny.output_dir}/again") for one in runs]
    shutil.copytree(Path(tiny.output_dir) / "synthbirds", Path(others[0].output_dir) / "synthbirds", ignore=lambda folder, names: [one for one in names if one.startswith(("sdd-", "fitnet-", "dkd-"))])
    with_stops(lambda: distill_together(others), (7, 20))
    for one, other in zip(runs, others):
        ours, theirs = (load_file(run_folder(run) / "last.safetensors") for run in (one, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), one.method


@pytest.mark.parametrize("name", ["sdd", "cat_kd", "fitnet"])
def test_second_student_learns_from_the_store_without_the_teacher(tiny, monkeypatch, name):
    config = tiny.replace(method=name, teacher_store=True)
    distill(config)
    first = load_file(run_folder(config) / "last.safetensors")
    shutil.rmtree(run_folder(config))
    monkeypatch.setattr("ctrlscam.train.check_store", lambda *_, **__: 0)  # it asks the teacher for a sample
    ask = Stream.ask  # one image tells the shapes
    monkeypatch.setattr(Stream, "ask", lambda stream, batch: ask(stream, batch) if len(batch.labels) == 1 else pytest.fail("the teacher was asked"))
    distill(config)
    second = load_file(run_folder(config) / "last.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_all_teachings_under_autocast(precision):
    network, images = Classifier("cifar_resnet8", 5).eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        with torch.autocast("cpu", precision):
            outputs = network(images, stages=True)
        needs = {name: {"class_maps": {"resolution": 2}, "local_logits": {"grids": [1, 2]}}.get(name, {}) for name in TEACHINGS}
        said = teach(Said(outputs, torch.tensor([1, 2]), network, images), needs)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in said.values())


def test_half_precision_answers_change_little(tiny):
    """What a store rounds away moves no loss by more than two in a hundred."""
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


PUBLISHED = {  # learning rate, weight of the maps, cells per side, normalised
    "cat_resnet110_resnet32": (.05, 1.8, 2, False), "cat_resnet56_resnet20": (.05, 0.7, 2, False), "cat_resnet32x4_resnet8x4": (.05, 15, 2, False),
    "cat_wrn_40_2_wrn_16_2": (.05, 12, 2, False), "cat_wrn_40_2_wrn_40_1": (.05, 1.5, 2, False), "cat_vgg13_vgg8": (.05, 4.5, 2, False),
    "cat_resnet32x4_shufflenet_v1": (.01, 600, 4, True), "cat_resnet32x4_shufflenet_v2": (.01, 600, 4, True), "cat_wrn_40_2_shufflenet_v1": (.01, 80, 4, True),
    "cat_resnet50_mobilenetv2": (.01, 40, 2, True), "cat_vgg13_mobilenetv2": (.01, 15, 2, True), "cat_only": (.05, 50, 2, True), "cat_only_binarized": (.05, 300, 2, True),
    "cat_only_reduced": (.05, 50, 2, True), "cat_only_partial": (.05, 300, 2, True), "cat_imagenet_resnet34_resnet18": (.2, 0.5, 4, False), "cat_imagenet_resnet50_mobilenetv1": (.2, 10, 2, True)}
EXTRA = {"cat_only_binarized": ("cat_binarize", True), "cat_only_reduced": ("train_classes", 99), "cat_only_partial": ("cat_classes", 75)}


def test_presets_hold_the_published_values():
    assert PUBLISHED.keys() == {name for name in RECIPES if name.startswith("cat_")}
    for name, values in PUBLISHED.items():
        config, imagenet = Settings(dataset="cifar100", recipe=name), "imagenet" in name
        assert (config.learning_rate, config.cat_weight, config.cat_resolution, config.cat_normalize) == values, name
        assert (config.optimizer, config.momentum, config.schedule, config.gamma) == ("sgd", 0.9, "multistep", 0.1)
        assert (config.epochs, config.milestones, config.weight_decay) == ((100, [30, 60, 90], 1e-4) if imagenet else (240, [150, 180, 210], 5e-4))
        assert (config.batch_size, config.teacher_learning_rate) == (512, 0.05) if imagenet else (64, 0.05)
        for other, (setting, value) in EXTRA.items():
            assert (getattr(config, setting) == value) == (name == other), (name, setting)
        assert Settings(dataset="cifar100", recipe=name, smoke=True).epochs == 2
    assert Settings(dataset="cifar100", recipe="cat_only_partial").cat_choice == "lowest"


@pytest.mark.parametrize("name", PUBLISHED)
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
    config = tiny.replace(teacher="cifar_resnet50_hidden", teacher_output_stride=32, student="cam_net", student_output_stride=32, image_size=16, method="cam_kd", cam_source="grad_cam",
                          max_images=8, batch_size=4, teacher_epochs=1, epochs=1)
    record = distill(config)
    row = json.loads((run_folder(config) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train_cam"] > 0 and record.networks["student"] == "cam_net"


def test_own_method_is_not_taken_for_its_former_self(tiny):
    """A changed formula trains again instead of reading the old record."""
    folders = []
    first = {"forward": lambda self, student, teaching, labels, targets=None: {"own": student.logits.abs().pow(1).mean()}}
    second = {"forward": lambda self, student, teaching, labels, targets=None: {"own": student.logits.abs().pow(2).mean()}}
    for body, needs in ((first, {}), (second, {}), (second | {"weight": 2.0}, {}), (second | {"weight": 3.0}, {}), (second | {"weight": 3.0}, {"logits": {}})):
        own = type("Own", (METHODS["ce"].objective,), body)
        add_method("own", Method("own", own, "", "", lambda config, needs=needs: needs, True, ("ce", "teaching")))
        folders.append(run_folder(tiny.replace(method="own")))
    assert len(set(folders)) == 5
    add_method("own", Method("own", own, "", "", lambda config: {"logits": {}}, True, ("ce",)))
    with pytest.raises(ValueError, match="add 'teaching' to its groups"):
        run_folder(tiny.replace(method="own"))
    add_method("own", Method("own", own, "", "", lambda config: {}, True, ("ce",)))
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
