"""DeiT and HERBS in real training: terms against loops, presets, schedules, interruptions, a HERBS teacher, joint sets."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ctrlscam.config import Settings, SettingsError, teacher_settings
from ctrlscam.data import class_count, load_table
from ctrlscam.herbs import Herbs
from ctrlscam.methods import find_method, method_table
from ctrlscam.models import create_backbone
from ctrlscam.records import find_records, public_settings, run_folder, table_runs
from ctrlscam.reports import open_network
from ctrlscam.step import build_optimizer, build_student, learning_rates, load_network
from ctrlscam.train import check_inputs, distill, distill_all, distill_together, load_teacher, read_maps

HERBS = dict(student_output_stride=32, herbs_width=16, herbs_selects=[32, 16, 4, 2], herbs_halving=1)
VIT = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def tiny(tmp_path):
    """Settings of runs that take a second or two."""
    return Settings(dataset="synthbirds", max_classes=4, max_images=48, image_size=64, batch_size=16, teacher_epochs=1, baseline_epochs=1, epochs=2, device="cpu",
                    stream_seed=0, teacher_seed=0, output_dir=str(tmp_path / "outputs"))


def softmax(values, temperature=1.0):
    weights = [np.exp((value - max(values)) / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def cross_entropy(logits, label):
    return -np.log(softmax(logits)[label])


def herbs_terms_by_loops(outputs, labels, config, epoch):
    """The four terms of HERBS, written with loops over stages, images, places and classes."""
    said = {name: [part.detach().double().numpy() for part in getattr(outputs, name)] for name in ("coarse", "fine", "dropped")}
    combined, temperature = outputs.combined.detach().double().numpy(), config.herbs_temperature * 0.5 ** (epoch // config.herbs_halving)
    terms = dict(combine=np.mean([cross_entropy(row, label) for row, label in zip(combined, labels)]), stages=0.0, refine=0.0, background=0.0)
    for coarse, fine, dropped in zip(*said.values()):
        terms["stages"] += 0.3 * np.mean([cross_entropy(sum(row) / len(row), label) for row, label in zip(fine, labels)])
        parts = []
        for own, goal in zip(coarse.reshape(-1, coarse.shape[-1]), fine.reshape(-1, fine.shape[-1])):
            parts += [p * (np.log(p) - np.log(q)) for p, q in zip(softmax(goal, temperature), softmax(own, temperature))]
        terms["refine"] += 1.375 * sum(parts) / len(parts)
        cells = [(np.tanh(value) + 1) ** 2 for value in dropped.flatten()]
        terms["background"] += 5 * sum(cells) / len(cells)
    return terms


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_herbs_terms_equal_loops(epoch):
    torch.manual_seed(epoch)
    config = Settings(method="herbs", image_size=64, **HERBS)
    network = build_student(config, 5).double().eval()
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # heads that disagree
    outputs, labels = network(torch.randn(3, 3, 64, 64, dtype=torch.float64)), torch.tensor([4, 0, 2])
    objective = find_method("herbs").objective(config, network)
    objective.start_epoch(epoch)
    terms, expected = objective(outputs, {}, labels), herbs_terms_by_loops(outputs, labels.tolist(), config, epoch)
    assert list(terms) == list(expected)
    for name in terms:
        assert terms[name].item() == pytest.approx(expected[name], rel=1e-6), name
    for name, kept in (("herbs_refined", 3), ("herbs_head", 2)):
        fewer = find_method(name).objective(config, network)
        fewer.start_epoch(epoch)
        assert {key: value.item() for key, value in fewer(outputs, {}, labels).items()} == pytest.approx(dict(list(expected.items())[:kept]), rel=1e-6)


def test_refinement_teaches_the_top_down_path_only():
    """No gradient of the refinement goes through the bottom-up logits, and the suppression touches dropped places alone."""
    config = Settings(method="herbs", image_size=64, **HERBS)
    network = build_student(config, 4)
    outputs = network(torch.randn(4, 3, 64, 64))
    terms = find_method("herbs").objective(config, network)(outputs, {}, torch.tensor([0, 1, 2, 3]))
    fine = torch.autograd.grad(terms["refine"], outputs.fine, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in fine)
    assert all(gradient.any() for gradient in torch.autograd.grad(terms["refine"], outputs.coarse, retain_graph=True))
    selected = torch.autograd.grad(terms["background"], outputs.selected, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in selected)


@pytest.mark.parametrize("name, size", [("resnet50", 128), ("swin_tiny_patch4_window7_224", 224), ("convnext_tiny", 128), ("efficientnet_b0", 128), ("mobilenetv3_large_100", 160), ("vit_tiny_patch16_224", 128)])
def test_whole_loss_falls_on_common_backbones(name, size):
    """Real networks at real sizes: four steps on four images, with all terms of the method."""
    config = Settings(dataset="synthbirds", method="herbs", student=name, student_weights="scratch", image_size=size, herbs_width=64, herbs_selects=[24, 16, 8, 4], optimizer="adamw", student_output_stride=32)
    network = build_student(config, 4).train()
    objective = find_method("herbs").objective(config, network)
    optimizer, images, labels, losses = torch.optim.AdamW(network.parameters(), 5e-4), torch.randn(4, 3, size, size), torch.arange(4), []
    for _ in range(4):
        terms = objective(network(images), {}, labels)
        losses.append(sum(terms.values()))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses


def test_herbs_study_needs_no_teacher(tiny):
    config = tiny.replace(methods=["ce", "herbs_head", "herbs_refined", "herbs"], method="herbs", **HERBS)
    records = distill_all(config)
    assert list(records) == list(table_runs(config)) == config.methods
    alone, five, nine, full = (records[name][0].networks["parameters"] for name in config.methods)
    assert alone < five < nine == full  # without refinement nothing would teach the top-down heads
    assert read_maps(config).shape[1:] == (4, 4)  # the grid of the third stage
    assert {row: len(found) for row, found in find_records(config).items()} == dict.fromkeys(config.methods, 1)
    for name in ("herbs_width", "herbs_selects", "herbs_halving", "herbs_background_weight"):
        other = config.replace(**{name: [8, 4, 4, 1] if name == "herbs_selects" else 8})
        assert run_folder(other) != run_folder(config) and run_folder(other.replace(method="ce")) == run_folder(config.replace(method="ce"))


def test_schedule_of_steps_and_halving_survive_interruptions(tiny, with_stops):
    whole = tiny.replace(method="herbs", epochs=3, schedule="cosine_steps", warmup_steps=4, warmup_epochs=0, optimizer="nesterov", checkpoint_minutes=0, accumulate=2, **HERBS)
    distill(whole)
    again = whole.replace(output_dir=f"{tiny.output_dir}/again")
    with_stops(lambda: distill(again), (2, 6))
    ours, theirs = (load_file(run_folder(run) / "last.safetensors") for run in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = [(run_folder(run) / "metrics.csv").read_text() for run in (whole, again)]
    assert metrics[0] == metrics[1] and "train_background" in metrics[0]


def test_published_schedules():
    """HERBS: 1,500 batches of warm-up, then the first part of a cosine over all 60,000. DeiT: as it was run, the rate rises; as it was meant, it falls."""
    rates = learning_rates(Settings(dataset="cub200", recipe="herbs", warmup_steps=1500), 750)
    expected = [1e-9 + (5e-4 - 1e-9) * k / 1500 if k < 1500 else 2.5e-4 * (1 + np.cos(np.pi * (k - 1500) / 60_000)) for k in range(60_000)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-15)
    assert f"{rates[-1]:.1e}" == "7.7e-07"
    faithful, corrected = (learning_rates(Settings(dataset="cub200", recipe="deit_distilled", preset=preset), 10) for preset in ("faithful", "corrected"))
    assert faithful[0] == pytest.approx(1.5625e-6) and faithful[-1] == pytest.approx(1e-5, rel=1e-3) and (np.diff(faithful) >= 0).all()
    assert corrected[0] == pytest.approx(5e-5) and corrected[-1] < 1.1e-6 and (np.diff(corrected) <= 0).all()


def test_recipes_hold_the_published_values():
    for name in ("cub200", "nabird"):
        herbs = Settings(dataset=name, recipe="herbs")
        assert (herbs.image_size, herbs.resize_to, herbs.batch_size // herbs.accumulate, herbs.accumulate, herbs.optimizer, herbs.momentum) == (384, 510, 8, 4, "nesterov", 0.9)
        assert (herbs.learning_rate, herbs.weight_decay, herbs.epochs, herbs.warmup_steps * herbs.accumulate) == (5e-4, 3e-4, 80, 1500)
        assert (herbs.herbs_width, herbs.herbs_selects, herbs.herbs_temperature, herbs.herbs_halving) == (1536, [256, 128, 64, 32], 64, 10)
        assert [herbs.herbs_refinement_weight, herbs.herbs_stage_weight, herbs.herbs_select_weight, herbs.herbs_background_weight, herbs.herbs_combine_weight] == [1.375, 0.3, 0, 5, 1]
    joint = "cub200+standog"
    for name in ("deit_baseline", "deit_distilled", "deit_imagenet", "deit_foodx"):
        deit = Settings(dataset=joint, recipe=name, preset="corrected")
        assert (deit.image_size, deit.batch_size, deit.learning_rate, deit.epochs, deit.weight_decay) == (384, 16, 5e-5, 30 if name == "deit_foodx" else 60, 1e-8)
        assert (deit.student_drop_path, deit.mixup, deit.cutmix, deit.erasing, deit.label_smoothing, deit.ema_decay, deit.deit_alpha, deit.deit_tau) == (0.8, 0, 0, 0.25, 0.1, 0.99996, 0.5, 1)
        assert Settings(dataset=joint, recipe=name).repeated_augmentation == "original"
    teacher = teacher_settings(Settings(dataset=joint, recipe="deit_teacher"))
    assert (teacher.student_layer_decay, teacher.student_head_scale, teacher.student_drop_path, teacher.learning_rate, teacher.min_learning_rate) == (0.7 ** (13 / 37), 1e-3, 0.8, 5e-5, 1e-6)
    assert (teacher.batch_size, teacher.accumulate, teacher.ema_decay, teacher.repeated_augmentation) == (32, 2, 0, "off")
    assert Settings(dataset=joint, recipe="deit_imagenet").start == "weights"


def test_herbs_teaches_small_networks(tiny):
    """Its ensemble logits and its maps serve kd and ctrls_cam, asked anew or from the store."""
    base = tiny.replace(teacher_method="herbs", teacher_output_stride=32, methods=["ce", "kd", "ctrls_cam"], together=2, **{**HERBS, "student_output_stride": 8})
    records = distill_all(base)
    assert records["teacher"][0].method == "herbs" and records["kd"][0].method == "kd"
    table = load_table(base)
    teacher = load_teacher(base, class_count(table), torch.device("cpu"))
    assert isinstance(teacher, Herbs) and not teacher.training
    outputs = teacher(torch.zeros(2, 3, 64, 64))
    shares = torch.stack([logits.softmax(1) for logits in outputs.heads.values()])
    torch.testing.assert_close(outputs.logits.exp(), shares.mean(0), rtol=1e-4, atol=1e-6)
    stored = base.replace(methods=["kd"], teacher_store=True)
    assert distill_all(stored)["kd"][0].picked.top1 == pytest.approx(records["kd"][0].picked.top1, abs=0.2)
    assert run_folder(base.replace(method="kd", herbs_width=8)) != run_folder(base.replace(method="kd"))  # another teacher
    assert run_folder(base.replace(method="kd", teacher_method="ce", herbs_width=8)) == run_folder(base.replace(method="kd", teacher_method="ce"))


def test_two_heads_learn_from_label_and_teacher(tiny):
    config = tiny.replace(student=VIT, student_output_stride=32, methods=["ce", "deit_soft", "deit_hard", "ctrls_cam"], start="weights", together=3, label_smoothing=0.1, ema_decay=0.5,
                          student_drop_path=0.1, repeated_augmentation="on", max_images=80)
    records = distill_all(config)
    assert [len(found) for found in records.values()] == [1] * 5
    for name in ("deit_soft", "deit_hard"):
        metrics = (run_folder(config.replace(method=name)) / "metrics.csv").read_text().splitlines()
        row = dict(zip(metrics[0].split(","), metrics[-1].split(",")))
        assert float(row["train_ce"]) > 0 < float(row["train_token"]) and 0 <= float(row["train_top1"]) <= 1  # shares of the images that were shown, repeated ones each time
    network = load_network(config.replace(method="deit_hard"), 4, run_folder(config.replace(method="deit_hard")) / "picked.safetensors")
    images = torch.randn(2, 3, 64, 64)
    network.train()
    for module in network.modules():
        module.drop_prob = 0.0
    pair = network(images)
    torch.testing.assert_close(pair.logits, (pair.class_logits + pair.distillation_logits) / 2)
    torch.testing.assert_close(network.eval()(images).logits, pair.logits, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_at_once(tiny):
    with pytest.raises(ValueError, match="has no distillation head"):
        check_inputs(tiny.replace(method="deit_hard"))
    with pytest.raises(ValueError, match="give student_output_stride=32"):
        check_inputs(tiny.replace(method="herbs", **{**HERBS, "student_output_stride": 8}))
    with pytest.raises(ValueError, match="herbs_selects"):
        check_inputs(tiny.replace(method="herbs", **{**HERBS, "herbs_selects": [512, 16, 4, 2]}))
    with pytest.raises(SettingsError, match="builds on other runs"):
        check_inputs(tiny.replace(teacher_method="kd"))
    with pytest.raises(ValueError, match="known methods"):
        check_inputs(tiny.replace(teacher_method="herb"))
    with pytest.raises(SettingsError, match="would guess"):
        check_inputs(tiny.replace(teacher_method="herbs", teacher_output_stride=32, teacher_epochs=0, **{**HERBS, "student_output_stride": 8}))
    with pytest.raises(ValueError, match="student_bias = False is for networks with one linear head"):
        check_inputs(tiny.replace(method="herbs", student_bias=False, **HERBS))
    with pytest.raises(ValueError, match="no single last grid for a Grad-CAM"):
        check_inputs(tiny.replace(teacher_method="herbs", teacher_output_stride=32, method="cam_kd", methods=["cam_kd"], cam_source="grad_cam", **{**HERBS, "student_output_stride": 8}))
    with pytest.raises(ValueError, match="(?i)stages"):
        check_inputs(tiny.replace(teacher_method="herbs", teacher_output_stride=32, method="at", methods=["at"], **{**HERBS, "student_output_stride": 8}))


def test_layer_decay_and_frozen_parts_leave_the_new_heads_free(tiny):
    """The plug-in learns at the full rate, and its BatchNorm moves, while the backbone's layers learn slowly or not at all."""
    config = tiny.replace(method="herbs", student_layer_decay=0.5, student_frozen_batchnorm=True, optimizer="adamw", **HERBS)
    network = build_student(config, 4).train()
    optimizer = build_optimizer(network, find_method("herbs").objective(config, network), config)
    rates = {id(parameter): group.get("lr_scale", 1) for group in optimizer.param_groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == sum(parameter.requires_grad for parameter in network.parameters()) and all((decays[id(one)] > 0) == (one.ndim > 1) for one in network.parameters() if one.requires_grad)
    alone = build_student(config.replace(method="ce"), 4)
    plain = build_optimizer(alone, find_method("ce").objective(config, alone), config.replace(method="ce"))
    scales = {id(parameter): group["lr_scale"] for group in plain.param_groups for parameter in group["params"]}
    theirs = {name: scales[id(parameter)] for name, parameter in alone.named_parameters() if parameter.requires_grad}
    shared = [(rates[id(parameter)], theirs[name]) for name, parameter in network.named_parameters() if parameter.requires_grad and name in theirs]
    assert len(shared) > 15 and all(one == pytest.approx(other) for one, other in shared)  # the backbone learns as fast as under a classifier of its own
    own = [parameter for name, parameter in network.named_parameters() if not name.startswith("backbone.")]
    assert own and all(rates[id(parameter)] == 1 for parameter in own) and min(rates.values()) < 0.2
    norms = {name: module.training for name, module in network.named_modules() if "BatchNorm" in type(module).__name__}
    assert any(name.startswith("backbone.") for name in norms) and all(training != name.startswith("backbone.") for name, training in norms.items())
    frozen = build_student(config.replace(student_frozen_backbone=True), 4)
    assert not any(parameter.requires_grad for parameter in frozen.backbone.parameters()) and all(parameter.requires_grad for name, parameter in frozen.named_parameters() if not name.startswith("backbone."))


def test_first_classes_of_each_part_of_a_joint_set(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    names, rows = [f"{k + 1:03}.Bird_{k}" for k in range(4)], []
    cub = tmp_path / "CUB_200_2011"
    for k, name in enumerate(names):
        for number in range(6):
            path = cub / "images" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(path)
            rows.append((f"{name}/{number}.jpg", k + 1, int(number < 4)))
    for file, values in {"images.txt": [row[0] for row in rows], "image_class_labels.txt": [row[1] for row in rows], "train_test_split.txt": [row[2] for row in rows]}.items():
        (cub / file).write_text("".join(f"{k + 1} {value}\n" for k, value in enumerate(values)))
    (cub / "bounding_boxes.txt").write_text("".join(f"{k + 1} 0.0 0.0 20.0 20.0\n" for k in range(len(rows))))
    (cub / "classes.txt").write_text("".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
    food = tmp_path / "foodx251"
    (food / "annot").mkdir(parents=True)
    for split, images in (("train", 6), ("val", 2)):
        (food / f"{split}_set").mkdir()
        lines = []
        for k in range(3):
            for number in range(images):
                Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(food / f"{split}_set" / f"{split}_{k}_{number}.jpg")
                lines.append(f"{split}_{k}_{number}.jpg,{k}\n")
        (food / "annot" / f"{split}_info.csv").write_text("".join(lines))
    config = Settings(dataset="cub200+foodx251", recipe="small", data_dir=str(tmp_path), validation_share=0.25)
    assert class_count(load_table(config)) == 7
    table = load_table(config.replace(max_classes=2))
    assert sorted(table.label.unique()) == [0, 1, 2, 3]
    assert set(table[table.path.str.startswith("CUB")].label) == {0, 1} and set(table[table.path.str.startswith("foodx")].label) == {2, 3}
    with pytest.raises(ValueError, match="has 3 classes in one of its parts"):
        load_table(config.replace(max_classes=4))


def test_method_table_names_the_new_methods():
    table = method_table(Settings(dataset="cub200"))
    assert set(table.loc[["herbs_head", "herbs_refined", "herbs"], "of the teacher"]) == {"–"}
    assert "herbs_background_weight=5" in table.loc["herbs", "settings"] and "deit_alpha=0.5" in table.loc["deit_hard", "settings"]


def test_shares_of_classes_in_place_of_labels():
    """Mixed images: whole shares are labels, and halves are the mean of both labels' terms where the term is linear in them."""
    torch.manual_seed(0)
    config = Settings(method="herbs", image_size=64, herbs_select_weight=0.5, **HERBS)
    network = build_student(config, 4).eval()
    outputs, labels = network(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])
    objective = find_method("herbs").objective(config, network)
    whole, shares = objective(outputs, {}, labels), objective(outputs, {}, labels, F.one_hot(labels, 4).float())
    other, halves = objective(outputs, {}, labels.flip(0)), objective(outputs, {}, labels, (F.one_hot(labels, 4) + F.one_hot(labels.flip(0), 4)) / 2)
    for name in whole:
        torch.testing.assert_close(shares[name], whole[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(halves[name], (whole[name] + other[name]) / 2, rtol=1e-5, atol=1e-6)


def test_a_backbone_is_no_trained_network(tiny, tmp_path):
    """A file that holds the backbone alone leaves the heads to chance, so it is no checkpoint to evaluate."""
    config = tiny.replace(method="herbs", **HERBS)
    network = build_student(config, 4)
    torch.save(create_backbone(config.student, 0).state_dict(), tmp_path / "backbone.pth")
    torch.save({"model": network.state_dict(), "epoch": 3}, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="would be guesses"):
        open_network(config, 4, tmp_path / "backbone.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(open_network(config, 4, tmp_path / "whole.pt")(images).logits, network.eval()(images).logits)


def test_own_swin_file_comes_back(tmp_path):
    """Swin's layers are renamed when a checkpoint of the original is read; a file of our own must stay as it is."""
    config = Settings(method="herbs", student="swin_tiny_patch4_window7_224", image_size=64, student_weights="scratch", student_output_stride=32, herbs_width=8, herbs_selects=[4, 2, 1, 1])
    network = build_student(config, 3).eval()
    torch.save(network.state_dict(), tmp_path / "own.pt")
    again = build_student(config.replace(student_weights=str(tmp_path / "own.pt"), seed=1), 3).eval()
    assert not again.load_report.missing and not again.load_report.mismatched_shapes
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images).logits, network(images).logits)


def test_local_paths_stay_out_of_records_and_other_runs(tiny):
    config = tiny.replace(checkpoint="weights/mine.pt", image="pictures")
    assert not {"checkpoint", "image"} & public_settings(config).keys()
    assert all(one.checkpoint is None and one.image is None for runs in table_runs(config).values() for one in runs)
