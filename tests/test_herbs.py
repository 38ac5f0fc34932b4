"""HERBS against formulations with loops over images, stages, places and classes, in double precision; its files and its errors."""
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ctrlscam.herbs import (GraphCombiner, Herbs, MultiStageHead, PyramidPath, TokenClassifier, _own_name, ensemble_logits, load_herbs_checkpoint,
                            refinement_temperature, select_tokens)
from ctrlscam.losses import background_suppression_loss, refinement_loss
from ctrlscam.maps import class_activation_map
from ctrlscam.models import count_parameters, create_backbone, freeze_batchnorm, grid_size

GRIDS, CHANNELS, PLACES = [(3, 4), (2, 3), (2, 2), (1, 2)], [3, 4, 5, 6], [12, 6, 4, 2]
SMALL = dict(image_size=64, width=8, selects=(16, 8, 2, 2))


def double(module, seed=0):
    """The module in double precision, every parameter random, so that none hides behind a zero or a one."""
    torch.manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def assert_same(one, other, inputs):
    """Equal values, and equal gradients of a random weighting of them."""
    one, other = list(one), list(other)
    weights = [torch.randn_like(value) for value in one]
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(sum((w * value).sum() for w, value in zip(weights, values)), inputs, retain_graph=True, allow_unused=True) for values in (one, other)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def linear(layer, vector):
    """A linear layer on one vector, from single products."""
    return torch.stack([sum(layer.weight[row, column] * vector[column] for column in range(len(vector))) + layer.bias[row] for row in range(len(layer.weight))])


def normalized(norm, vectors):
    """BatchNorm in training mode of a list of vectors, channel by channel."""
    channels = []
    for channel in range(len(vectors[0])):
        values = [vector[channel] for vector in vectors]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        channels.append([(value - mean) / (variance + norm.eps) ** 0.5 * norm.weight[channel] + norm.bias[channel] for value in values])
    return [torch.stack(column) for column in zip(*channels)]


def loop_path(path, stages, coarser_first):
    """The path for each image, stage and place; stages are numbered as in the formulas but from 0."""
    levels = [[[linear(project[2], linear(project[0], place).clamp(min=0)) for place in image] for image in stage] for project, stage in zip(path.project, stages)]
    for source, target in [(3, 2), (2, 1), (1, 0)] if coarser_first else [(0, 1), (1, 2), (2, 3)]:
        layer = path.across[min(source, target)]
        for image in range(len(levels[target])):
            levels[target][image] = [place + sum(layer.weight[j, i] * levels[source][image][i] for i in range(PLACES[source])) + layer.bias[j]
                                     for j, place in enumerate(levels[target][image])]
    return [torch.stack([torch.stack(image) for image in level]) for level in levels]


def loop_classifier(head, tokens):
    hidden = [vector.clamp(min=0) for vector in normalized(head.norm, [linear(head.hidden, place) for image in tokens for place in image])]
    return torch.stack([linear(head.last, vector) for vector in hidden]).view(*tokens.shape[:2], -1)


def loop_select(tokens, token_logits, n):
    """Image by image and by probabilities, as the method is told."""
    kept, selected, dropped = [], [], []
    for image, votes in zip(tokens, token_logits):
        label = votes.mean(0).softmax(0).argmax()
        order = sorted(range(len(votes)), key=lambda place: -votes[place].softmax(0)[label].item())
        kept.append(torch.stack([image[place] for place in order[:n]]))
        selected.append(torch.stack([votes[place] for place in order[:n]]))
        dropped.append(torch.stack([votes[place] for place in order[n:]]) if n < len(votes) else votes[:0])
    return torch.stack(kept), torch.stack(selected), torch.stack(dropped)


def loop_combiner(combiner, selected):
    J, together = len(combiner.adjacency), torch.cat(selected, 1)
    mixed = []
    for image in together:
        joints = [sum(combiner.join.weight[j, s] * image[s] for s in range(len(image))) + combiner.join.bias[j] for j in range(J)]
        q, k = ([linear(layer, joint).mean() for joint in joints] for layer in (combiner.query, combiner.key))
        turned = [linear(combiner.mix, joint) for joint in joints]
        mixed += [sum((combiner.adjacency[i, j] + combiner.alpha[0] * torch.tanh(q[i] - k[j])) * turned[i] for i in range(J)) for j in range(J)]
    mixed = normalized(combiner.norm, mixed)
    vectors = [sum(combiner.merge.weight[0, j] * mixed[image * J + j] for j in range(J)) + combiner.merge.bias[0] for image in range(len(together))]
    return torch.stack([linear(combiner.classifier, vector) for vector in vectors])


@pytest.mark.parametrize("coarser_first", [True, False])
def test_a_path_is_its_formula(coarser_first):
    path = double(PyramidPath(CHANNELS, GRIDS, 4, coarser_first=coarser_first))
    stages = [torch.randn(2, places, c, dtype=torch.double, requires_grad=True) for places, c in zip(PLACES, CHANNELS)]
    assert_same(path(stages), loop_path(path, stages, coarser_first), [*stages, *path.parameters()])


def test_a_classifier_is_its_formula():
    head, tokens = double(TokenClassifier(4, 5)), torch.randn(2, 6, 4, dtype=torch.double, requires_grad=True)
    assert_same([head(tokens)[0]], [loop_classifier(head, tokens)], [tokens, *head.parameters()])


def test_selector_chooses_as_a_loop_does():
    torch.manual_seed(1)
    for case in range(100):
        B, S, D, K = (int(torch.randint(1, top, ())) for top in (6, 50, 8, 30))
        n, spread = int(torch.randint(1, S + 1, ())), (0.1, 1.0, 5.0)[case % 3]
        tokens, votes = torch.randn(B, S, D, dtype=torch.double), spread * torch.randn(B, S, K, dtype=torch.double)
        for ours, theirs in zip(select_tokens(tokens, votes, n), loop_select(tokens, votes, n), strict=True):
            assert torch.equal(ours, theirs), case


def test_selector_gradients():
    torch.manual_seed(0)
    tokens, votes = (torch.randn(3, 7, size, dtype=torch.double, requires_grad=True) for size in (4, 5))
    assert_same(select_tokens(tokens, votes, 3), loop_select(tokens, votes, 3), [tokens, votes])


def test_selector_keeps_the_order_of_equal_places():
    votes = torch.zeros(2, 9, 3)
    votes[..., 1] = 100.0  # every probability rounds to 1
    numbered = torch.arange(9).expand(2, 9)[..., None]
    assert select_tokens(numbered, votes, 4)[0][..., 0].tolist() == [[0, 1, 2, 3]] * 2
    votes[:, 7, 0] = -1000.0  # equal again: the others were 0 and round away
    assert select_tokens(numbered, votes.bfloat16(), 2)[0][..., 0].tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("selects, joints", [((70, 40, 15, 3), 2), ((3, 2, 1, 1), 1)])
def test_the_combiner_is_its_formula(selects, joints):
    combiner = double(GraphCombiner(selects, 4, 3))
    combiner.dropout.eval()
    assert combiner.adjacency.shape == (joints, joints)
    selected = [torch.randn(3, n, 4, dtype=torch.double, requires_grad=True) for n in selects]
    assert_same([combiner(selected)], [loop_combiner(combiner, selected)], [*selected, *combiner.parameters()])


def test_the_graph_starts_as_published():
    combiner = GraphCombiner((256, 128, 64, 32), 8, 3)
    assert combiner.adjacency.shape == (7, 7) and combiner.alpha.tolist() == [0.0] and combiner.dropout.p == 0.1
    torch.testing.assert_close(combiner.adjacency.detach(), torch.full((7, 7), 0.01) + 0.01 * torch.eye(7))


def test_the_whole_head_is_the_sum_of_its_parts():
    head = double(MultiStageHead(CHANNELS, GRIDS, 5, width=4, selects=(5, 3, 2, 1)))
    head.combiner.dropout.eval()
    grids = [torch.randn(2, c, *grid, dtype=torch.double, requires_grad=True) for c, grid in zip(CHANNELS, GRIDS)]
    out = head(grids)
    tokens = [torch.stack([grid[:, :, row, column] for row in range(grid.shape[2]) for column in range(grid.shape[3])], 1) for grid in grids]
    level = loop_path(head.top_down, tokens, True)
    coarse = [loop_classifier(one, stage) for one, stage in zip(head.coarse_heads, level)]
    level = loop_path(head.bottom_up, level, False)
    fine = [loop_classifier(one, stage) for one, stage in zip(head.fine_heads, level)]
    kept, selected, dropped = zip(*(loop_select(*stage) for stage in zip(level, fine, (5, 3, 2, 1))))
    combined = loop_combiner(head.combiner, kept)
    nine = [votes.mean(1) for votes in (*coarse, *fine)] + [combined]
    logits = (sum(one.softmax(1) for one in nine) / 9).log()
    expected = [logits, *coarse, *fine, *selected, *dropped, combined, *nine]
    ours = [out.logits, *out.coarse, *out.fine, *out.selected, *out.dropped, out.combined, *out.heads.values()]
    assert_same(ours, expected, [*grids, *head.parameters()])
    assert out.weight.shape == (5, 16) and out.features.shape == (2, 16, *GRIDS[2])


def test_maps_are_the_sum_of_the_stages_votes():
    """On grids that divide evenly, the mean over cells of the class activation map is the sum of the four stages' answers without bias."""
    torch.manual_seed(0)
    network, labels = Herbs("test_resnet", 5, **SMALL).eval(), torch.tensor([3, 0])
    with torch.no_grad():
        out = network(torch.randn(2, 3, 64, 64))
    answers = sum(out.heads[f"bottom-up {stage}"] - head.last.bias for stage, head in enumerate(network.head.fine_heads, 1))
    maps = class_activation_map(out.features, out.weight, labels)
    assert maps.shape == (2, 4, 4) and grid_size(network, 64) == (4, 4)
    torch.testing.assert_close(maps.mean((1, 2)), answers[[0, 1], labels].detach(), rtol=1e-4, atol=1e-5)


def test_ensemble_is_exact_far_from_zero():
    heads = [torch.tensor([[1000.0, 0.0, -1000.0]]), torch.tensor([[0.0, 1000.0, -1000.0]])]
    torch.testing.assert_close(ensemble_logits(heads), torch.tensor([[0.5, 0.5, 0.0]]).log().clamp(min=-2000), rtol=0, atol=1e-4)
    assert ensemble_logits([head.half() for head in heads]).dtype == torch.float32


def test_temperatures():
    assert [refinement_temperature(epoch) for epoch in (0, 9, 10, 25, 79)] == [64, 64, 32, 16, 0.5]
    with pytest.raises(ValueError, match="start above 0"):
        refinement_temperature(0, start=0)


def test_plug_in_size_of_the_paper():
    with torch.device("meta"):
        network = Herbs("swin_large_patch4_window12_384", 200, image_size=384)
    assert network.grids == [(48, 48), (24, 24), (12, 12), (12, 12)]
    assert round(count_parameters(network.head) / 1e6, 1) == 58.9


FAMILIES = {"mobilenetv2_050": [(16, 16), (8, 8), (4, 4), (2, 2)], "resnet10t": [(16, 16), (8, 8), (4, 4), (2, 2)], "convnext_atto": [(16, 16), (8, 8), (4, 4), (2, 2)],
            "test_efficientnet": [(16, 16), (8, 8), (4, 4), (2, 2)], "swin_tiny_patch4_window7_224": [(8, 8), (4, 4), (2, 2), (2, 2)], "test_vit": [(4, 4)] * 4,
            "cam_net": [(64, 64), (32, 32), (16, 16), (16, 16)]}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family(name):
    """Shapes, a gradient for every parameter in plain and mixed precision, channels last, batches of two."""
    torch.manual_seed(0)
    network = Herbs(name, 5, image_size=64, width=8, selects=(8, 4, 2, 1))
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert network.grids == FAMILIES[name] and len(network.places) == 12
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            out = network(images)
        assert out.logits.dtype == torch.float32
        assert [votes.shape for votes in out.fine] == [(2, rows * columns, 5) for rows, columns in network.grids]
        loss(out, torch.tensor([0, 4])).backward()
        assert not [key for key, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]


def loss(out, labels, temperature=4.0):
    total = F.cross_entropy(out.combined, labels)
    for coarse, fine, dropped in zip(out.coarse, out.fine, out.dropped):
        total = total + 0.3 * F.cross_entropy(fine.mean(1), labels) + 5 * background_suppression_loss(dropped) + 1.375 * refinement_loss(coarse, fine, temperature)
    return total


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_loss_falls(name):
    torch.manual_seed(0)
    network, images, labels = Herbs(name, 4, image_size=64, width=16, selects=(8, 4, 2, 1)), torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    optimizer, values = torch.optim.AdamW(network.parameters(), lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        values.append(loss(network(images), labels))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


def test_nothing_dropped():
    network = Herbs("test_vit", 3, image_size=64, width=8, selects=(16, 16, 16, 16))
    out = network(torch.randn(2, 3, 64, 64))
    assert [votes.shape for votes in out.dropped] == [(2, 0, 3)] * 4
    out.logits.sum().backward()


def test_frozen_batchnorm_is_that_of_the_backbone():
    network = freeze_batchnorm(Herbs("test_resnet", 3, **SMALL))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()(torch.randn(2, 3, 64, 64))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("head.") for key in changed)


ORIGINAL = r"""backbone\..+ | fpn_(down|up)\.Proj_layer[1-4]\.[02]\.(weight|bias) | fpn_down\.Uplayer[2-4]\.(weight|bias) | fpn_up\.Downlayer[1-3]\.(weight|bias)
    | fpn_classifier_(down|up)_layer[1-4]\.([03]\.(weight|bias)|1\.(weight|bias|running_mean|running_var|num_batches_tracked))
    | combiner\.((param_pool[01]|conv1|conv_q1|conv_k1|classifier)\.(weight|bias) | batch_norm1\.(weight|bias|running_mean|running_var|num_batches_tracked) | adj1 | alpha1)"""


def as_original(network):
    """The state of a network under the original's names: listed one by one, not by turning our table round."""
    own, state = network.state_dict(), {}
    for key in own:
        if key.startswith("backbone."):
            state[re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)] = own[key]
    for i in range(1, 5):
        for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
            state[f"fpn_down.Proj_layer{i}.{part}"] = own[f"head.top_down.project.{i - 1}.{part}"]
            state[f"fpn_up.Proj_layer{i}.{part}"] = own[f"head.bottom_up.project.{i - 1}.{part}"]
        for theirs, ours in (("down", "coarse"), ("up", "fine")):
            for number, part in (("0", "hidden"), ("1", "norm"), ("3", "last")):
                for tensor in [key.split(".")[-1] for key in own if key.startswith(f"head.{ours}_heads.{i - 1}.{part}.")]:
                    value = own[f"head.{ours}_heads.{i - 1}.{part}.{tensor}"]
                    state[f"fpn_classifier_{theirs}_layer{i}.{number}.{tensor}"] = value[..., None] if value.ndim == 2 else value
    for i in range(1, 4):
        for tensor in ("weight", "bias"):
            up, down = own[f"head.top_down.across.{i - 1}.{tensor}"], own[f"head.bottom_up.across.{i - 1}.{tensor}"]
            state[f"fpn_down.Uplayer{i + 1}.{tensor}"] = up[..., None] if up.ndim == 2 else up
            state[f"fpn_up.Downlayer{i}.{tensor}"] = down[..., None] if down.ndim == 2 else down
    combiner = "head.combiner."
    for theirs, ours in (("param_pool0", "join"), ("param_pool1", "merge"), ("conv1", "mix"), ("conv_q1", "query"), ("conv_k1", "key"), ("batch_norm1", "norm"), ("classifier", "classifier")):
        for key in [key for key in own if key.startswith(f"{combiner}{ours}.")]:
            value = own[key]
            state[f"combiner.{theirs}.{key.split('.')[-1]}"] = value[..., None] if theirs.startswith("conv") and value.ndim == 2 else value
    return state | {"combiner.adj1": own[combiner + "adjacency"], "combiner.alpha1": own[combiner + "alpha"]}


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    network = Herbs("swin_tiny_patch4_window7_224", 5, **SMALL)
    torch.nn.init.normal_(network.head.combiner.alpha)
    network.train()(torch.randn(2, 3, 64, 64))  # statistics of its own
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_the_original(swin, tmp_path, prefix):
    state = as_original(swin)
    assert len(state) == len(swin.state_dict()) and all(re.fullmatch(ORIGINAL, key, re.X) for key in state)
    state["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(1)  # buffers of the old Swin
    state["backbone.norm.weight"] = torch.zeros(768)
    torch.save({"model": {prefix + key: value for key, value in state.items()}, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, tmp_path / "best.pt")
    network = Herbs(swin.name, 5, weights=tmp_path / "best.pt", **SMALL).eval()
    report = network.load_report
    assert (report.missing, report.unexpected, report.mismatched_shapes) == ((), ("backbone.norm.weight",), ())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images).logits, swin(images).logits)


def test_what_does_not_fit_is_reported(swin, tmp_path):
    """Other classes, other selection, other image size: the rest is loaded."""
    torch.save({"model": as_original(swin)}, tmp_path / "best.pt")
    network = Herbs(swin.name, 7, image_size=128, width=8, selects=(32, 16, 4, 4))
    before = network.head.top_down.across[0].weight.clone()
    report = load_herbs_checkpoint(network, tmp_path / "best.pt")
    wrong = {name: (theirs, ours) for name, theirs, ours in report.mismatched_shapes}
    assert wrong["head.top_down.across.0.weight"] == ((64, 16), (256, 64)) and wrong["head.combiner.join.weight"] == ((1, 28), (1, 56))
    assert wrong["head.fine_heads.3.last.weight"] == ((5, 8), (7, 8)) and "head.fine_heads.3.last.weight (5, 8) in the file, (7, 8) in the network" in str(report)
    assert ("backbone.layers.3.blocks.0.attn.relative_position_bias_table", (3, 3), (7, 7)) in report.resized
    assert torch.equal(network.head.top_down.across[0].weight, before)
    assert torch.equal(network.head.top_down.project[2][0].weight, swin.head.top_down.project[2][0].weight)
    assert torch.equal(network.backbone.layers[3].blocks[1].mlp.fc1.weight, swin.backbone.layers[3].blocks[1].mlp.fc1.weight)


def test_own_files(tmp_path):
    torch.manual_seed(0)
    network = Herbs("test_resnet", 5, **SMALL)
    save_file(network.state_dict(), tmp_path / "whole.safetensors")
    again = Herbs("test_resnet", 5, weights=tmp_path / "whole.safetensors", **SMALL)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    trunk = create_backbone("test_resnet", 9)
    save_file({f"backbone.{key}": value for key, value in trunk.state_dict().items()}, tmp_path / "trunk.safetensors")  # as a Classifier writes it
    fresh = Herbs("test_resnet", 5, weights=tmp_path / "trunk.safetensors", **SMALL)
    assert torch.equal(fresh.backbone.conv1[0].weight if isinstance(fresh.backbone.conv1, torch.nn.Sequential) else fresh.backbone.conv1.weight,
                       trunk.conv1[0].weight if isinstance(trunk.conv1, torch.nn.Sequential) else trunk.conv1.weight)
    assert set(fresh.load_report.missing) == {name for name, _ in fresh.named_parameters() if name.startswith("head.")}  # nothing of the backbone, all of the head


class Hostile:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_refused(swin, tmp_path):
    torch.save({"model": as_original(swin), "epoch": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    network = Herbs("test_resnet", 5, **SMALL)
    with pytest.raises(ValueError, match="holds more than tensors.*Nothing in it was run"):
        load_herbs_checkpoint(network, tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": as_original(swin)}, tmp_path / "swin.pt")
    with pytest.raises(ValueError, match="another backbone than test_resnet"):
        load_herbs_checkpoint(network, tmp_path / "swin.pt")
    state = as_original(swin)
    state["backbone.layers.2.blocks.17.attn.relative_position_bias_table"] = torch.zeros(9, 12)  # a larger Swin
    torch.save({"model": state}, tmp_path / "larger.pt")
    with pytest.raises(ValueError, match="another backbone than swin_tiny"):
        load_herbs_checkpoint(swin, tmp_path / "larger.pt")
    torch.save(create_backbone("test_resnet", 0).state_dict(), tmp_path / "trunk.pt")
    with pytest.raises(ValueError, match="no whole HERBS network"):
        load_herbs_checkpoint(network, tmp_path / "trunk.pt")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        Herbs("test_resnet", 5, weights=tmp_path / "absent.pt", **SMALL)


def test_other_names_stay():
    for name in ("backbone.conv1.weight", "combiner.unknown.weight", "fpn_down.Other1.weight", "head.combiner.alpha"):
        assert _own_name(name) == name


@pytest.mark.parametrize("options, message", [
    (dict(name="resnet81"), "resnet18"), (dict(name="levit_128s", image_size=224), "has 3 stages"), (dict(name="test_vit", image_size=100), "does not take images of 100×100"),
    (dict(selects=(256, 128, 64, 32)), r"herbs_selects asks for 128 places of stage 2, but test_resnet has a grid of 8×8"), (dict(selects=(4, 2, 0, 1)), "asks for 0 places of stage 3"),
    (dict(selects=(4, 2)), "needs 4 numbers"), (dict(width=3), "width at least 4"), (dict(num_classes=0), "num_classes must be at least 1")])
def test_what_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        Herbs(**{"name": "test_resnet", "num_classes": 5, **SMALL, **options})


def test_what_cannot_be_run():
    network = Herbs("test_resnet", 5, **SMALL)
    with pytest.raises(ValueError, match="got 64×96. Build it with image_size=\\(64, 96\\)"):
        network(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ValueError, match="shows no stages"):
        network(torch.zeros(1, 3, 64, 64), stages=True)
    with pytest.raises(ValueError, match="choose 1 to 4"):
        select_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), 5)
    with pytest.raises(ValueError, match="the same images and places"):
        select_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 5, 3), 1)
