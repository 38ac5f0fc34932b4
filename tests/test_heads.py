"""The convolutional head against the networks themselves, and Grad-CAM against its formula in plain algebra."""
import pytest
import torch
from torch import nn

from ctrlscam.cifar import CIFAR_NETWORKS
from ctrlscam.heads import ConvolutionalHead, grad_cam
from ctrlscam.maps import class_activation_map, class_activation_maps
from ctrlscam.models import Classifier

SMALL = sorted(set(CIFAR_NETWORKS) - {"cifar_resnet110", "cifar_resnet50", "cifar_resnet50_hidden", "cifar_resnet32x4"})


def network_and_images(name, classes=6, size=32, **options):
    """A network whose head is neither zero nor without bias, with BatchNorm statistics of its own, and three images."""
    torch.manual_seed(0)
    network, images = Classifier(name, classes, **options), torch.randn(3, 3, size, size)
    nn.init.normal_(network.linear.weight, std=0.3)
    if network.linear.bias is not None:
        nn.init.normal_(network.linear.bias)
    with torch.no_grad():
        network.train()(images)
    return network.eval(), images


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1e-3, other.abs().max().item()))


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_the_view_are_those_of_the_network(name):
    network, images = network_and_images(name)
    with torch.no_grad():
        logits, maps = ConvolutionalHead(network)(images)
        assert_close(logits, network.backbone(images))
        assert_close(maps.mean((2, 3)), logits)
        bare = ConvolutionalHead(network, keep_bias=False)(images)
        assert_close(bare.logits, network.backbone(images) - network.linear.bias)


def test_a_network_without_bias():
    network, images = network_and_images("cifar_resnet8", bias=False)
    with torch.no_grad():
        kept, dropped = (ConvolutionalHead(network, keep_bias=keep)(images) for keep in (True, False))
    assert torch.equal(kept.maps, dropped.maps)
    assert_close(kept.logits, network.backbone(images))


def test_a_step_through_the_view_is_a_step_of_the_network():
    """A loss on logits and maps has the same gradients on both ways, in training mode."""
    gradients = []
    for use_view in (True, False):
        network, images = network_and_images("cam_net")
        network.train()
        if use_view:
            logits, maps = ConvolutionalHead(network, keep_bias=False)(images)
        else:
            out = network(images)
            logits, maps = out.logits - network.linear.bias.detach(), class_activation_maps(out.features, out.weight)
        (nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])) + maps.square().mean()).backward()
        gradients.append({name: one.grad for name, one in network.named_parameters() if one.grad is not None and one is not network.linear.bias})
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        assert_close(one, gradients[1][name])


@pytest.mark.parametrize("name, size, options", [
    ("cifar_resnet50_hidden", 32, {}), ("test_vit", 64, {"image_size": 64}), ("deit_tiny_distilled_patch16_224", 64, {"image_size": 64}), ("test_mambaout", 96, {}), ("mobilenetv3_small_050", 96, {}),
])
def test_networks_without_such_a_head_are_refused(name, size, options):
    network, images = network_and_images(name, size=size, **options)
    with pytest.raises(ValueError, match=f"{name} has no convolutional head.*grad_cam"):
        ConvolutionalHead(network)
    maps = grad_cam(network, images, torch.tensor([0, 5, 2]))
    assert maps.isfinite().all() and (maps.std((1, 2)) > 0).all(), "the way out must be one"


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "cifar_vgg8", "cifar_shufflenet_v2", "cam_net"])
def test_grad_cam_of_one_linear_layer_is_the_map_over_its_cells(name):
    network, images = network_and_images(name)
    labels = torch.tensor([0, 5, 2])
    with torch.no_grad():
        out = network(images)
        expected = class_activation_map(out.features, out.weight, labels)
    assert_close(grad_cam(network, images, labels), expected / expected[0].numel())


def test_grad_cam_of_a_hidden_layer():
    """z = W relu(V p + a) + b for the pooled p, so dz_y/dp = Vᵀ(1[V p + a > 0] ∘ W_y), and each cell has a share of 1/(HW) in p."""
    network, images = network_and_images("cifar_resnet50_hidden")
    labels, layer = torch.tensor([0, 5, 2]), network.backbone.hidden[0]
    with torch.no_grad():
        grid = network.backbone.forward_features(images)                                # B×C×H×W
        alive = grid.mean((2, 3)) @ layer.weight.T + layer.bias > 0                      # B×C
        slope = (alive * network.linear.weight[labels]) @ layer.weight                   # B×C
        written_out = (slope[:, :, None, None] * grid).sum(1) / grid[0, 0].numel()
    assert 0.05 < alive.float().mean() < 0.95, "without dead units the layer would be linear"
    assert_close(grad_cam(network, images, labels), written_out)


@pytest.mark.parametrize("name, size, options", [("cifar_resnet8", 32, {}), ("test_vit", 64, {"image_size": 64})])
def test_grad_cam_leaves_everything_as_it_was(name, size, options):
    network, images = network_and_images(name, size=size, **options)
    labels, reference = torch.tensor([0, 5, 2]), grad_cam(network, images, torch.tensor([0, 5, 2]))
    network.train()
    next(network.backbone.children()).eval()  # one part in another mode
    before, modes, hooks = {key: value.clone() for key, value in network.state_dict().items()}, [one.training for one in network.modules()], [len(one._forward_hooks) for one in network.modules()]
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            inside = images * 1.0  # a tensor of the caller's mode
            assert torch.equal(grad_cam(network, inside, labels), reference)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = grad_cam(network, images, labels)
    assert mixed.dtype == torch.float32 and (mixed - reference).norm() < 0.1 * reference.norm()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert [one.training for one in network.modules()] == modes and [len(one._forward_hooks) for one in network.modules()] == hooks
    assert all(one.grad is None and one.requires_grad for one in network.parameters())
    assert torch.equal(grad_cam(network.requires_grad_(False), images, labels), reference)
