"""The networks for 32 px: sizes, grids, the names of their tensors, checkpoints of the benchmarks, and the accuracy of published weights."""
import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ctrlscam.cifar import CIFAR_NETWORKS, CAMNet
from ctrlscam.config import project_root
from ctrlscam.models import Classifier, count_parameters, load_weights

# name: parameters with 100 classes, tensors of the state dict without the counters of BatchNorm, last three grids, channels of the last grid
EXPECTED = dict(
    cam_net=(103_744, 22, (16, 8, 8), 90),
    cifar_resnet8=(83_892, 47, (32, 16, 8), 64),
    cifar_resnet14=(181_108, 77, (32, 16, 8), 64),
    cifar_resnet20=(278_324, 107, (32, 16, 8), 64),
    cifar_resnet32=(472_756, 167, (32, 16, 8), 64),
    cifar_resnet44=(667_188, 227, (32, 16, 8), 64),
    cifar_resnet56=(861_620, 287, (32, 16, 8), 64),
    cifar_resnet110=(1_736_564, 557, (32, 16, 8), 64),
    cifar_resnet8x4=(1_233_540, 52, (32, 16, 8), 256),
    cifar_resnet32x4=(7_433_860, 172, (32, 16, 8), 256),
    cifar_resnet20a=(275_572, 97, (32, 16, 8), 64),
    cifar_resnet32a=(470_004, 157, (32, 16, 8), 64),
    cifar_resnet44a=(664_436, 217, (32, 16, 8), 64),
    cifar_resnet56a=(858_868, 277, (32, 16, 8), 64),
    cifar_wrn_16_1=(180_916, 69, (32, 16, 8), 64),
    cifar_wrn_16_2=(703_284, 70, (32, 16, 8), 128),
    cifar_wrn_40_1=(569_780, 189, (32, 16, 8), 64),
    cifar_wrn_40_2=(2_255_156, 190, (32, 16, 8), 128),
    cifar_vgg8=(3_965_028, 32, (8, 4, 4), 512),
    cifar_vgg13=(9_462_180, 62, (8, 4, 4), 512),
    cifar_shufflenet_v1=(949_258, 247, (16, 8, 4), 960),
    cifar_shufflenet_v2=(1_355_528, 282, (16, 8, 4), 1024),
    cifar_mobilenetv2_half=(812_836, 267, (8, 4, 2), 1280),
    cifar_resnet50=(23_705_252, 267, (16, 8, 4), 2048),
    cifar_resnet50_hidden=(27_901_604, 269, (16, 8, 4), 2048),
)
LARGE = ("cifar_resnet50", "cifar_resnet50_hidden", "cifar_resnet32x4")
NORMS = "weight bias running_mean running_var".split()
# Names as the checkpoints of mdistiller have them: layer -> shape of its weight, for 100 classes
KEYS = dict(
    cifar_resnet20={"conv1": (16, 3, 3, 3), "bn1": (16,), "layer1.0.conv1": (16, 16, 3, 3), "layer1.2.bn2": (16,), "layer2.0.downsample.0": (32, 16, 1, 1),
                    "layer2.0.downsample.1": (32,), "layer3.2.conv2": (64, 64, 3, 3), "fc": (100, 64)},
    cifar_resnet32x4={"conv1": (32, 3, 3, 3), "layer1.0.downsample.0": (64, 32, 1, 1), "layer3.4.bn2": (256,), "fc": (100, 256)},
    cifar_wrn_40_2={"conv1": (16, 3, 3, 3), "block1.layer.0.bn1": (16,), "block1.layer.0.conv1": (32, 16, 3, 3), "block1.layer.0.convShortcut": (32, 16, 1, 1),
                    "block3.layer.5.conv2": (128, 128, 3, 3), "bn1": (128,), "fc": (100, 128)},
    cifar_vgg13={"block0.0": (64, 3, 3, 3), "block0.1": (64,), "block0.3": (64, 64, 3, 3), "block4.3": (512, 512, 3, 3), "block4.4": (512,), "classifier": (100, 512)},
    cifar_shufflenet_v1={"conv1": (24, 3, 1, 1), "bn1": (24,), "layer1.0.conv1": (54, 24, 1, 1), "layer1.0.conv2": (54, 1, 3, 3), "layer1.0.conv3": (216, 18, 1, 1),
                         "layer2.7.bn3": (480,), "layer3.0.conv1": (120, 160, 1, 1), "linear": (100, 960)},
    cifar_shufflenet_v2={"conv1": (24, 3, 1, 1), "layer1.0.conv1": (24, 1, 3, 3), "layer1.0.conv5": (58, 58, 1, 1), "layer1.3.conv3": (58, 58, 1, 1),
                         "layer2.7.bn3": (116,), "conv2": (1024, 464, 1, 1), "bn2": (1024,), "linear": (100, 1024)},
    cifar_mobilenetv2_half={"conv1.0": (16, 3, 3, 3), "conv1.1": (16,), "blocks.0.0.conv.0": (16, 16, 1, 1), "blocks.0.0.conv.3": (16, 1, 3, 3),
                            "blocks.1.0.conv.6": (12, 48, 1, 1), "blocks.6.0.conv.7": (160,), "conv2.0": (1280, 160, 1, 1), "classifier.0": (100, 1280)},
    cifar_resnet50={"conv1": (64, 3, 3, 3), "layer1.0.shortcut.0": (256, 64, 1, 1), "layer1.2.conv3": (256, 64, 1, 1), "layer4.0.shortcut.1": (2048,),
                    "layer4.2.bn3": (2048,), "linear": (100, 2048)},
)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_network_is_expected_and_known_to_timm():
    assert set(CIFAR_NETWORKS) == set(EXPECTED)
    assert all(timm.is_model(name) for name in EXPECTED)
    from ctrlscam import cifar
    assert set(EXPECTED) < set(cifar.__all__) and all(hasattr(cifar, name) for name in cifar.__all__)


@pytest.mark.parametrize("name", EXPECTED)
def test_size_grids_and_config(name):
    parameters, tensors, grids, channels = EXPECTED[name]
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=100).eval()
        last, stages = network.forward_intermediates(torch.zeros(2, 3, 32, 32), indices=3)
    assert count_parameters(network) == parameters
    assert sum(not key.endswith("num_batches_tracked") for key in network.state_dict()) == tensors
    assert last.shape == (2, channels, grids[-1], grids[-1]) and network.num_features == channels
    assert [tuple(stage.shape) for stage in stages] == [(2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]) for info in network.feature_info[-3:]]
    assert tuple(stage.shape[2] for stage in stages) == grids
    assert all(info["module"] in dict(network.named_modules()) for info in network.feature_info)
    assert network.pretrained_cfg["input_size"] == (3, 32, 32) and not network.pretrained_cfg["fixed_input_size"]


def test_cam_net_has_the_size_of_the_published_student():
    assert count_parameters(CAMNet()) == 95_554 and round(95_554 / 1e6, 3) == 0.096
    wider = CAMNet(7, 1, widths=(8, 16))
    assert wider(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert [info["reduction"] for info in wider.feature_info] == [1, 2]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in LARGE])
def test_logits_are_the_head_of_the_features(name, images):
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    with torch.inference_mode():
        features = network.forward_features(images)
        assert torch.equal(network(images), network.forward_head(features))
        last, stages = network.forward_intermediates(images, indices=[0, -1])
        assert torch.equal(last, features) and torch.equal(stages[1], features) and len(stages) == 2
        pooled = network.forward_head(features, pre_logits=True)
        assert_close(network.get_classifier()(pooled), network(images))
        assert network(torch.randn(1, 3, 64, 40)).shape == (1, 10)
        assert_close(copy.deepcopy(network).to(memory_format=torch.channels_last)(images), network(images), rtol=1e-3, atol=1e-4)
        network.reset_classifier(0)
        assert_close(network(images), pooled)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in LARGE])
def test_classifier_gives_maps_whose_mean_is_the_logit(name, images):
    torch.manual_seed(0)
    model = Classifier(name, 10)
    model(images).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        logits, features, weight, stages = model.eval()(images, stages=True)
    maps = torch.einsum("kc,bchw->bkhw", weight, features)
    assert maps.shape == (2, 10, EXPECTED[name][2][-1], EXPECTED[name][2][-1])
    assert_close(maps.mean((2, 3)) + model.linear.bias, logits, rtol=1e-3, atol=1e-4)
    assert tuple(stage.shape[2] for stage in stages) == EXPECTED[name][2]
    assert torch.equal(stages[-1], features)


def test_hidden_layer_stands_between_pooling_and_classifier(images):
    torch.manual_seed(0)
    model = Classifier("cifar_resnet50_hidden", 10).eval()
    assert model.anatomy.head_layers == ("hidden.0", "hidden.1")
    with torch.inference_mode():
        out = model(images)
        pooled = model.backbone.forward_features(images).mean((2, 3))
        assert_close(out.logits, model.linear(model.backbone.hidden[0](pooled).relu()), rtol=1e-3, atol=1e-4)
    assert out.features.shape == (2, 2048, 4, 4)


@pytest.mark.parametrize("name", KEYS)
def test_names_of_the_tensors_are_those_of_the_benchmarks(name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=100).state_dict()
    for layer, shape in KEYS[name].items():
        assert tuple(state[f"{layer}.weight"].shape) == shape, layer
        if len(shape) == 1:
            assert all(f"{layer}.{part}" in state for part in (*NORMS, "num_batches_tracked")), layer
    with_bias = {key.removesuffix(".bias") for key in state if key.endswith(".bias") and key.replace("bias", "running_var") not in state}
    last = name == "cifar_vgg13" and {key.removesuffix(".weight") for key, value in state.items() if value.ndim == 4} or set()
    assert with_bias == {list(KEYS[name])[-1], *last}  # only VGG's convolutions have a bias


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["cifar_resnet8x4", "cifar_wrn_16_2", "cifar_shufflenet_v2", "cifar_mobilenetv2_half"])
def test_a_checkpoint_of_the_benchmarks_loads_as_it_is(name, prefix, tmp_path, images):
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=100).eval()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.05, momentum=0.9)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"epoch": 240, "model": state, "optimizer": optimizer.state_dict(), "best_acc": torch.tensor(72.5)}, tmp_path / "ckpt_epoch_240.pth")
    model = Classifier(name, 100, weights=tmp_path / "ckpt_epoch_240.pth").eval()
    report = model.load_report
    assert (report.missing, report.unexpected, report.mismatched_shapes) == ((), (), ())
    with torch.inference_mode():
        assert torch.equal(model(images).logits, source(images))
    other_classes = Classifier(name, 10, weights=tmp_path / "ckpt_epoch_240.pth").load_report
    assert len(other_classes.mismatched_shapes) == 2  # the head only
    with pytest.raises(ValueError, match="does not fit"):
        Classifier("cifar_resnet20", 100, weights=tmp_path / "ckpt_epoch_240.pth")


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path):
    network = timm.create_model("cifar_resnet8")
    before = copy.deepcopy(network.state_dict())
    torch.save({"model": network.state_dict(), "best_acc": Hostile(tmp_path / "was_run")}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="holds more than tensors.*exec.*Nothing in it was run"):
        load_weights(network, tmp_path / "hostile.pth")
    assert not (tmp_path / "was_run").exists()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_options_a_and_b_do_not_take_each_others_files(tmp_path):
    save_file(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="downsample"):
        Classifier("cifar_resnet20a", 10, weights=tmp_path / "b.safetensors")


def test_wrong_options_say_so():
    with pytest.raises(ValueError, match="cannot be built with output_stride=8"):
        Classifier("cifar_resnet20", 10, output_stride=8)
    with pytest.raises(ValueError, match="publishes no weights for cifar_resnet20"):
        Classifier("cifar_resnet20", 10, pretrained=True)
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        timm.create_model("cam_net").forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")


DATA = project_root() / "data"
GIVEN = {depth: DATA / "weights" / f"cifar10_resnet{depth}.safetensors" for depth in (20, 32, 44, 56)}


@pytest.mark.skipif(not all(path.is_file() for path in GIVEN.values()), reason="the four weight files are not in data/weights")
@pytest.mark.parametrize("depth", GIVEN)
def test_given_weights_fit_name_by_name(depth):
    model = Classifier(f"cifar_resnet{depth}a", 10, weights=GIVEN[depth])
    report = model.load_report
    assert (report.loaded, report.missing, report.unexpected, report.mismatched_shapes) == (len(load_file(GIVEN[depth])), (), (), ())


@pytest.fixture(scope="module")
def cifar_images():
    """Every tenth picture of CIFAR-10's test part (JPEG), normalised as the given weights want it, and its class number."""
    classes = sorted(path for path in (DATA / "cifar10_jpeg" / "test").iterdir() if path.is_dir())
    files = [(file, number) for number, folder in enumerate(classes) for file in sorted(folder.iterdir())[::10]]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files]))
    config = timm.get_pretrained_cfg("cifar_resnet20a")
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std, torch.tensor([number for _, number in files])


@pytest.mark.skipif(not all(path.is_file() for path in GIVEN.values()) or not (DATA / "cifar10_jpeg" / "test").is_dir(),
                    reason="the weight files or the JPEG form of CIFAR-10 are not in data/")
@pytest.mark.parametrize("depth", GIVEN)
def test_given_weights_have_their_accuracy_on_jpeg_pictures(depth, cifar_images):
    images, labels = cifar_images
    assert len(labels) == 1000
    model = Classifier(f"cifar_resnet{depth}a", 10, weights=GIVEN[depth]).eval()
    with torch.inference_mode():
        correct = torch.cat([model(part).logits.argmax(1) for part in images.split(100)]) == labels
    assert 0.78 < correct.float().mean() < 0.86  # 81.0, 82.6, 82.7 and 83.2 % of all 10,000; the deviation of a thousand is 1.2
