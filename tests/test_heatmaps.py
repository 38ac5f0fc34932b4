"""Product Grad-CAM of HERBS against loops over hooks and finite differences, on networks of several layouts; pictures of one's own; the two notebooks."""
import numpy as np
import pytest
import torch
from PIL import Image

from ctrlscam.config import Settings
from ctrlscam.data import DataError
from ctrlscam.heatmaps import _as_grid, _watched_modules, find_images, head_score, multiply_maps, place_maps, product_grad_cam, read_images
from ctrlscam.herbs import Herbs
from ctrlscam.synthetic import draw_bird

NETWORKS = {"test_resnet": (64, (16, 8, 4, 2)), "test_convnext": (64, (16, 8, 4, 2)), "test_efficientnet": (64, (16, 8, 4, 2)), "test_vit": (160, (20, 20, 20, 20)),
            "swin_tiny_patch4_window7_224": (64, (16, 8, 4, 2)), "mobilenetv2_100": (64, (16, 8, 4, 2))}


def network_of(name, width=8, classes=5):
    size, selects = NETWORKS[name]
    torch.manual_seed(0)
    network = Herbs(name, classes, image_size=size, width=width, selects=selects).eval()
    return network, torch.randn(2, 3, size, size), torch.tensor([1, 4])


def by_hooks(network, images, labels):
    """The twelve maps image by image and place by place, from retained gradients."""
    modules, shapes = _watched_modules(network, images[:1])
    maps = [[] for _ in modules]
    for image, label in zip(images, labels):
        kept = {}
        hooks = [module.register_forward_hook(lambda module, _, output: (output.retain_grad(), kept.__setitem__(module, output))[0]) for module in modules]
        outputs = network(image[None].requires_grad_())
        for hook in hooks:
            hook.remove()
        sum(torch.softmax(logits[0], 0)[label] for logits in outputs.heads.values()).backward()
        for place, (module, shape) in enumerate(zip(modules, shapes)):
            values, slopes = (_as_grid(tensor, shape)[0] for tensor in (kept[module].detach(), kept[module].grad))
            found = torch.zeros(shape[1:], dtype=values.dtype)
            for channel in range(shape[0]):
                found += (slopes[channel].mean() * values[channel]).clamp(min=0)
            maps[place].append(found)
    return [torch.stack(one).float() for one in maps]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_maps_against_hooks_in_double_precision(name):
    network, images, labels = network_of(name)
    network, images = network.double(), images.double()
    for ours, reference in zip(place_maps(network, images, labels), by_hooks(network, images, labels)):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6 * max(reference.max().item(), 1e-12))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_stage_is_found_in_the_backbone(name):
    """So that a gradient counts the way through later stages too, also where the pyramid is handed a rearranged copy."""
    network, images, _ = network_of(name)
    modules, shapes = _watched_modules(network, images[:1])
    inside = {module: path for path, module in network.backbone.named_modules()}
    assert all(module in inside for module in modules[:4]) and len(set(modules)) == 12
    assert modules[4:] == list(network.places)[4:]
    assert [tuple(shape[1:]) for shape in shapes] == [tuple(grid) for grid in network.grids] * 3


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_gradient_of_a_stage_is_that_of_the_whole_network(name):
    """Move the output of the module that makes the first stage along a direction: the score changes as the gradient says."""
    network, images, labels = network_of(name)
    network, images = network.double(), images.double()
    first, push = _watched_modules(network, images[:1])[0][0], {"step": 0.0}
    kept, direction = {}, {}

    def move(_, __, output):
        direction.setdefault("d", torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1)))
        kept["output"] = output + push["step"] * direction["d"]
        return kept["output"]

    handle = first.register_forward_hook(move)
    score = head_score(network(images.requires_grad_()), labels).sum()
    slope = (torch.autograd.grad(score, kept["output"])[0] * direction["d"]).sum().item()
    ends = []
    with torch.no_grad():
        for push["step"] in (1e-6, -1e-6):
            ends.append(head_score(network(images), labels).sum().item())
    handle.remove()
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=2e-3, abs=1e-9)


def test_score_is_nine_times_the_ensemble():
    network, images, labels = network_of("test_resnet")
    with torch.no_grad():
        outputs = network(images)
        torch.testing.assert_close(head_score(outputs, labels), 9 * outputs.logits.exp()[torch.arange(2), labels])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_network_is_left_as_it_was(name):
    network, images, labels = network_of(name)
    before = {path: value.clone() for path, value in network.state_dict().items()}
    expected = product_grad_cam(network, images, labels)
    network.train().requires_grad_(False)
    with torch.inference_mode():
        found = product_grad_cam(network, images, labels)
    torch.testing.assert_close(found.maps, expected.maps)
    assert network.training and not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(value, before[path]) for path, value in network.state_dict().items())
    assert not found.maps.requires_grad and all(parameter.grad is None for parameter in network.parameters())


def test_images_do_not_see_each_other():
    network, images, labels = network_of("test_efficientnet")
    together = product_grad_cam(network, images, labels)
    for place in range(2):
        alone = product_grad_cam(network, images[place:place + 1], labels[place:place + 1])
        torch.testing.assert_close(alone.places, together.places[place:place + 1], rtol=1e-3, atol=1e-4)


def test_product_against_loops():
    rng = np.random.default_rng(0)
    maps = [rng.random((3, side, side + 1)) for side in (4, 8, 8, 2)]
    maps[1][2] = 0                                                                     # silent in one image
    found = multiply_maps([torch.from_numpy(one) for one in maps], (8, 9))
    for image in range(3):
        product = np.ones((8, 9))
        for number, one in enumerate(maps):
            if one[image].max() > 0:
                large = torch.nn.functional.interpolate(torch.from_numpy(one[image] / one[image].max())[None, None], size=(8, 9), mode="bilinear")[0, 0].numpy()
                assert np.allclose(found.places[image, number], large / large.max(), atol=1e-6)
                product *= large / large.max()
        assert np.allclose(found.maps[image], product / product.max(), atol=1e-6)
    assert found.places[2, 1].max() == 0


def test_pictures_of_many_kinds(tmp_path):
    """Formats, folders in folders, and a message that names each of the damaged ones."""
    config, bird = Settings(image_size=48, resize_to=56), draw_bird(0, "test", 0, size=80).image
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.fromarray(bird).save(tmp_path / "one.png")
    Image.fromarray(bird[:, :50]).convert("L").save(tmp_path / "a" / "two.jpg")
    Image.fromarray(bird).convert("RGBA").save(tmp_path / "a" / "b" / "three.webp")
    (tmp_path / "notes.txt").write_text("nothing to see")
    paths = find_images(tmp_path)
    assert [path.name for path in paths] == ["three.webp", "two.jpg", "one.png"]
    pictures = read_images(paths, config)
    assert pictures.shape == (3, 48, 48, 3) and pictures.dtype == np.uint8
    for broken in ("x.png", "y.jpg"):
        (tmp_path / broken).write_bytes((tmp_path / "one.png").read_bytes()[:200])
    with pytest.raises(DataError, match="(?s)2 of 5 images cannot be used.*x.png.*y.jpg"):
        read_images(find_images(tmp_path), config)
    (tmp_path / "empty").mkdir()
    for wrong, message in (("empty", "holds no image"), ("nothing.jpg", "no such file or folder")):
        with pytest.raises(DataError, match=message):
            find_images(tmp_path / wrong)


def test_notebooks_read_one_run(papermill, tmp_path):
    """Evaluation trains the run that is not there; the heat maps of a folder then only read it."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(draw_bird(0, "test", 1, size=64).image).save(pictures / "bird.png")
    small = ["-p", "smoke", "True", "-p", "max_images", "20", "-p", "epochs", "1"]
    done = papermill("nbs/herbs_evaluate.ipynb", tmp_path / "evaluate.ipynb", *small)
    assert done.returncode == 0, done.stderr[-2000:]
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("record.json")}
    done = papermill("nbs/herbs_heatmap.ipynb", tmp_path / "heatmap.ipynb", *small, "-p", "image", pictures)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(records) == 1 and records == {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("record.json")}
    study = next((tmp_path / "outputs" / "synthbirds").glob("study-*/herbs-seed0"))
    for written in ("heads.png", "heads.csv", "families.png", "confusion.png", "heat_maps/bird_png.png"):
        assert (study / written).is_file(), written
