"""DeiT: the loss against loops, networks with two heads, positions of another grid, repeated views, attention by hand, a hint from a CNN."""
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.testing import assert_close

from ctrlscam.attention import class_token_attention
from ctrlscam.config import Settings
from ctrlscam.data import load_table
from ctrlscam.losses import deit_distillation_loss, hint_loss
from ctrlscam.maps import ControllableHint, class_activation_map, hint_map
from ctrlscam.models import Classifier, DistilledOutputs, Outputs, StagedOutputs, create_backbone, freeze_batchnorm, grid_size, load_weights
from ctrlscam.views import BatchSampler, epoch_order, make_batches

DEIT = "deit_tiny_distilled_patch16_224"


def softmax(values, temperature=1.0):
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def loss_by_loops(cls, dist, teacher, targets, kind, alpha, tau, reduction):
    """The objective of DeiT, one number at a time."""
    images, classes = cls.shape
    base = -sum(targets[b][k] * math.log(softmax(cls[b])[k]) for b in range(images) for k in range(classes)) / images
    if kind == "none":
        return base
    part = 0.0
    for b in range(images):
        if kind == "hard":
            part -= math.log(softmax(dist[b])[max(range(classes), key=lambda k: teacher[b][k])]) / images
        else:
            pairs = zip(softmax(teacher[b], tau), softmax(dist[b], tau))
            part += tau**2 * sum(p * math.log(p / q) for p, q in pairs) / (images * (classes if reduction == "element" else 1))
    return (1 - alpha) * base + alpha * part


@pytest.mark.parametrize("reduction", ["element", "batch"])
@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
@pytest.mark.parametrize("soft_labels", [False, True])
def test_loss_equals_loops_in_double_precision(kind, reduction, soft_labels):
    rng = np.random.default_rng(0)
    for _ in range(20):
        images, classes = rng.integers(1, 7), rng.integers(2, 12)
        cls, dist, teacher = 3 * rng.standard_normal((3, images, classes))
        alpha, tau, labels = rng.random(), rng.uniform(0.5, 5), rng.integers(0, classes, images)
        shares = rng.dirichlet(np.ones(classes), images)
        targets = shares if soft_labels else 0.9 * np.eye(classes)[labels] + 0.1 / classes
        own = deit_distillation_loss(*map(torch.from_numpy, (cls, dist, teacher, shares if soft_labels else labels)),
                                     kind=kind, alpha=alpha, tau=tau, reduction=reduction)
        assert own.item() == pytest.approx(loss_by_loops(cls, dist, teacher, targets, kind, alpha, tau, reduction), rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def deit():
    """DeiT-tiny for 112 px: 7×7 patches, 5 classes."""
    torch.manual_seed(0)
    return Classifier(DEIT, 5, image_size=112)


def test_two_heads_in_training_and_one_answer_in_evaluation(deit):
    images = torch.randn(2, 3, 112, 112)
    training = deit.train()(images)
    assert deit.two_heads and type(training) is DistilledOutputs and training.features.shape == (2, 192, 7, 7) and training.weight.shape == (5, 192)
    tokens = deit.backbone.forward_features(images)  # nothing random: no dropout, no stochastic depth
    assert_close(training.class_logits, deit.backbone.head(tokens[:, 0]))
    assert_close(training.distillation_logits, deit.backbone.head_dist(tokens[:, 1]))
    assert_close(training.logits, (training.class_logits + training.distillation_logits) / 2)
    assert type(deit(images, stages=True)) is StagedOutputs
    evaluated = deit.eval()(images)
    assert type(evaluated) is Outputs and grid_size(deit, 112) == (7, 7) and grid_size(deit, (96, 160)) == (6, 10)
    assert_close(evaluated.logits, training.logits)
    patches = tokens[:, 2:].reshape(2, 7, 7, 192)
    assert_close(class_activation_map(evaluated.features, evaluated.weight, torch.tensor([4, 1])), torch.stack([patches[0] @ evaluated.weight[4], patches[1] @ evaluated.weight[1]]))


def test_each_head_learns_from_its_own_source(deit):
    deit.train().zero_grad(set_to_none=True)
    out = deit(torch.randn(3, 3, 112, 112))
    deit_distillation_loss(out.class_logits, out.distillation_logits, torch.randn(3, 5), torch.tensor([0, 1, 2]), kind="soft", alpha=1.0, tau=1.0).backward()
    assert deit.backbone.head.weight.grad.abs().max() == 0 < deit.backbone.head_dist.weight.grad.abs().max()
    assert deit.backbone.dist_token.grad.abs().max() > 0
    deit.zero_grad(set_to_none=True)
    class_activation_map(deit(torch.randn(1, 3, 112, 112)).features, deit.linear.weight, torch.tensor([2])).square().mean().backward()
    assert deit.backbone.head.weight.grad[2].abs().max() > 0 and deit.backbone.head_dist.weight.grad is None
    assert deit.backbone.blocks[-1].mlp.fc2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name, size", [("levit_128s", 224), ("efficientformerv2_s0", 224), ("swiftformer_xs", 64)])
def test_other_families_with_two_heads(name, size):
    network, images = Classifier(name, 4, image_size=size), torch.randn(2, 3, size, size)
    out = network.train()(images)
    assert network.two_heads and type(out) is DistilledOutputs and not torch.equal(out.class_logits, out.distillation_logits)
    assert type(network.eval()(images)) is Outputs


def test_head_scale_and_drop_path(tmp_path):
    torch.manual_seed(0)
    whole = Classifier(DEIT, 5, image_size=64, drop_path=0.2)
    torch.manual_seed(0)
    scaled = Classifier(DEIT, 5, image_size=64, drop_path=0.2, head_scale=0.001)
    for name, value in scaled.state_dict().items():
        assert_close(value, whole.state_dict()[name] * (0.001 if ".head" in name else 1.0))
    assert scaled.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    again = Classifier(DEIT, 5, weights=tmp_path / "whole.safetensors", image_size=64, head_scale=0.001)
    assert torch.equal(again.linear.weight, whole.linear.weight)  # a file's head is not scaled
    assert Classifier(DEIT, 5, image_size=64, bias=False).backbone.head_dist.bias is None


@pytest.mark.parametrize("size, places", [(384, (24, 24)), (112, (7, 7)), ((96, 160), (6, 10))])
def test_positions_go_to_another_grid_as_timm_resizes_them(tmp_path, size, places):
    torch.manual_seed(0)
    source = create_backbone(DEIT, 10, image_size=224)
    save_file(source.state_dict(), tmp_path / "deit.safetensors")
    network = Classifier(DEIT, 3, weights=tmp_path / "deit.safetensors", image_size=size)
    assert network.load_report.resized == (("pos_embed", (14, 14), places),)
    assert f"pos_embed from 14×14 to {places[0]}×{places[1]} places" in str(network.load_report)
    assert {name for name, *_ in network.load_report.mismatched_shapes} == {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
    theirs, own = source.pos_embed.detach(), network.backbone.pos_embed.detach()
    assert torch.equal(own, resample_abs_pos_embed(theirs, list(places), num_prefix_tokens=2))
    assert torch.equal(own[:, :2], theirs[:, :2])
    assert torch.equal(network.backbone.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    source.head, source.head_dist = network.backbone.head, network.backbone.head_dist
    images = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():  # timm resizes the same way when a network for 224 px sees another size
        assert_close(network.eval()(images).logits, source.eval()(images), rtol=1e-4, atol=1e-5)


def test_other_prefix_or_other_width_is_still_refused(tmp_path):
    save_file(create_backbone("vit_tiny_patch16_224", 3).state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="dist_token is missing"):
        load_weights(create_backbone(DEIT, 3, image_size=384), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(create_backbone("vit_small_patch16_224", 3, image_size=384), tmp_path / "plain.safetensors")


def test_frozen_batchnorm_is_that_of_the_backbone_only():
    model = Classifier("test_resnet", 5)
    model.extra = torch.nn.BatchNorm2d(3)
    freeze_batchnorm(model).train()
    assert model.extra.training and model.extra.weight.requires_grad
    assert not model.backbone.layer1[0].bn1.training and not model.backbone.layer1[0].bn1.weight.requires_grad


def sampler_of_deit(count):
    """The entries of DeiT's repeated augmentation in one process that is never told the epoch."""
    generator = torch.Generator()
    generator.manual_seed(0)
    thrice = [index for index in torch.randperm(count, generator=generator).tolist() for _ in range(3)]
    return thrice[:count // 256 * 256]


@pytest.mark.parametrize("count, different", [(5994, 1963), (17994, 5974)])
def test_original_sampler_sees_the_same_third_for_ever(count, different):
    rows = np.arange(count)
    entries = [epoch_order(rows, seed, epoch, "original", count) for seed, epoch in ((0, 0), (0, 7), (3, 59))]
    for one in entries:
        assert (one % count).tolist() == sampler_of_deit(count)
    assert len(set(sampler_of_deit(count))) == different
    anew = [epoch_order(rows, 0, epoch, "on", count) for epoch in range(20)]
    assert all(len(one) == count // 256 * 256 == len(set(one.tolist())) for one in anew)
    assert len({*np.concatenate(anew) % count}) > 0.99 * count


def test_repeats_name_rows_of_the_whole_table():
    """Keys are row + repeat·(rows of the table), not of the training split; below 256 images all entries are kept."""
    rows = np.array([3, 5, 8, 13, 21])
    order = epoch_order(rows, 0, 2, "on", 100)
    assert len(order) == 5 and set((order % 100).tolist()) <= {*rows.tolist()} and (order // 100).tolist() == [0, 1, 2, 0, 1]
    alone = BatchSampler(rows, 3, 0, parts=2, repeated="on", count=100)
    halves = [BatchSampler(rows, 3, 0, parts=2, share=(rank, 2), repeated="on", count=100) for rank in (0, 1)]
    for sampler in (alone, *halves):
        sampler.epoch = 2
    assert [np.concatenate(step).tolist() for step in alone.steps()] == [np.concatenate([*a, *b]).tolist() for a, b in zip(*(half.steps() for half in halves))]


@pytest.mark.parametrize("family", [dict(), dict(augment="deit", erasing=0.5, mixup=0.8)], ids=["fgvc", "deit"])
@pytest.mark.parametrize("mode", ["on", "original"])
def test_repeated_views(family, mode):
    """Three different views of an image in a row; the first is the one that an epoch without repetition shows; rows are real."""
    config = Settings(max_classes=4, max_images=60, image_size=48, batch_size=12, **family, repeated_augmentation=mode)
    table = load_table(config)
    batches, plain = make_batches(table, config)["train"], make_batches(table, config.replace(repeated_augmentation="off"))["train"]
    seen = {epoch: [batch for batch in batches(epoch)] for epoch in (0, 1)}
    rows = {epoch: torch.cat([batch.rows for batch in some]) for epoch, some in seen.items()}
    assert torch.equal(rows[0], rows[1]) == (mode == "original") and len(rows[0]) == batches.images and len(seen[0]) == len(batches)
    assert set(rows[0].tolist()) <= set(np.flatnonzero(table.split == "train"))
    assert len(rows[0].unique()) == -(-len(rows[0]) // 3)
    views = [crops for crops in batches.crops(0)]
    pixels = {int(key): image.numpy().tobytes() for crops in views for key, image in zip(crops.keys, crops.images)}
    assert len(set(pixels.values())) == len(pixels) == len(rows[0])
    unrepeated = {int(key): image.numpy().tobytes() for crops in plain.crops(0) for key, image in zip(crops.keys, crops.images)}
    shared = pixels.keys() & unrepeated.keys()
    assert len(shared) == len(rows[0].unique()) and all(pixels[key] == unrepeated[key] for key in shared)
    other_epoch = {int(key): image.numpy().tobytes() for crops in batches.crops(1) for key, image in zip(crops.keys, crops.images)}
    both = pixels.keys() & other_epoch.keys()
    assert sum(pixels[key] != other_epoch[key] for key in both) > 0.9 * len(both)  # two crops may fall on the same place
    again = make_batches(table, config.replace(workers=2))["train"]
    assert all(torch.equal(a.images, b.images) for a, b in zip(seen[1], again(1), strict=True))


@pytest.mark.parametrize("block, token", [(-1, 0), (-1, 1), (2, 0)])
def test_attention_is_the_softmax_of_the_block(deit, block, token):
    images, inputs = torch.randn(2, 3, 112, 112), []
    layer = deit.backbone.blocks[block].attn
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        deit.eval()(images)
        handle.remove()
        weight, bias = layer.qkv.weight.double(), layer.qkv.bias.double()
        arrived, (heads, width) = inputs[0].double(), (3, 64)
        expected = torch.zeros(2, 51, dtype=torch.float64)
        for head in range(heads):
            own, other = slice(head * width, (head + 1) * width), slice(192 + head * width, 192 + (head + 1) * width)
            query, key = arrived @ weight[own].T + bias[own], arrived @ weight[other].T + bias[other]
            expected += torch.softmax(query @ key.transpose(1, 2) / math.sqrt(width), -1)[:, token] / heads
    deit.train()
    maps = class_token_attention(deit, images, block, token)
    assert deit.training and not maps.requires_grad
    assert_close(maps.double(), expected[:, 2:].reshape(2, 7, 7), rtol=1e-4, atol=1e-6)


def test_attention_says_why_there_is_none():
    for name, reason in (("test_resnet", "no class token"), ("swin_tiny_patch4_window7_224", "no class token"), ("levit_128s", "no class token")):
        with pytest.raises(ValueError, match=reason):
            class_token_attention(Classifier(name, 3, image_size=224), torch.zeros(1, 3, 224, 224))


def test_hint_from_a_convolutional_teacher_reaches_the_whole_transformer(deit):
    """Teacher 14×14, student 7×7 cells, other widths and another number of channels."""
    torch.manual_seed(0)
    teacher = Classifier("test_efficientnet", 5, output_stride=8).eval()
    images, labels = torch.randn(4, 3, 112, 112), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        seen = teacher(images)
    for hint in (ControllableHint(192), ControllableHint(192, batchnorm=False)):
        deit.train().zero_grad(set_to_none=True)
        out = deit(images)
        loss = hint_loss(hint(out.features, out.weight, labels), hint_map(seen.features, seen.weight, labels))
        loss.backward()
        assert seen.features.shape[2:] == (14, 14) and math.isfinite(loss.item()) and loss > 0
        assert all(one.grad is not None and one.grad.abs().max() > 0 for block in deit.backbone.blocks for one in block.parameters())
        assert deit.backbone.patch_embed.proj.weight.grad.abs().max() > 0
        assert deit.linear.weight.grad[:4].abs().max() > 0 == deit.linear.weight.grad[4].abs().max()
        assert deit.backbone.head_dist.weight.grad is None and deit.linear.bias.grad is None
