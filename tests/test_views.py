"""Batches from files of every kind: the same whatever loads them, and good enough to train on with every family of views."""
import hashlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from PIL import Image

from ctrlscam.benchmark import fresh_copy
from ctrlscam.config import Settings, SettingsError
from ctrlscam.data import load_table
from ctrlscam.download import check_dataset
from ctrlscam.images import open_pictures
from ctrlscam.train import distill, train_teacher
from ctrlscam.views import ViewDataset, make_batches

TINY = dict(recipe="synthbirds", batch_size=8, validation_share=0.25, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """A `folder:` data set of 4 classes with JPEG files of different shapes, smooth enough to survive compression."""
    rng = np.random.default_rng(0)
    for number in range(64):
        split, name = ("train", "test")[number // 4 % 2], "abcd"[number % 4]
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        place = tmp_path / "photos" / split / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((60 + number, 90 - number // 2), Image.Resampling.BICUBIC).save(place / f"{number:02d}.jpg")
    return dict(dataset=f"folder:{tmp_path / 'photos'}", data_dir=str(tmp_path))


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10 in the owners' binary form, 24 images a file, each class with a colour of its own."""
    root, rng = tmp_path / "cifar-10-batches-bin", np.random.default_rng(0)
    root.mkdir()
    (root / "batches.meta.txt").write_text("\n".join("airplane automobile bird cat deer dog frog horse ship truck".split()) + "\n\n")
    for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
        labels = np.arange(40, dtype=np.uint8) % 10
        pixels = rng.integers(0, 60, (40, 3072), dtype=np.uint8) + 18 * labels[:, None]
        (root / name).write_bytes(np.concatenate([labels[:, None], pixels], 1).astype(np.uint8).tobytes())
    return dict(dataset="cifar10", data_dir=str(tmp_path))


def hashes(config):
    """A hash for every batch of two training epochs and of the test views."""
    table = load_table(config)
    splits, result = make_batches(table, config), []
    for split, epoch in (("train", 0), ("train", 1), ("test", -1)):
        for batch in splits[split](epoch):
            result.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch[:4] if part is not None)).hexdigest())
    return result


@pytest.mark.parametrize("family", [dict(), dict(augment="deit", erasing=0.25, mixup=0.8, cutmix=1.0)], ids=["fgvc", "deit"])
@pytest.mark.parametrize("store", [dict(), dict(cache_gigabytes=0)], ids=["copy", "files"])
def test_fault_07_equal_batches_for_any_number_of_workers(photos, family, store):
    config = Settings(**TINY, **photos, **family, image_size=48)
    reference = hashes(config)
    assert len(reference) == 3 + 3 + 4 and len(set(reference)) == len(reference)
    for changed in (dict(workers=1), dict(workers=4), dict(workers=4, prefetch=1), dict(workers=2, prefetch=8)):
        assert hashes(config.replace(**changed, **store)) == reference, changed


def test_a_training_view_does_not_depend_on_how_much_is_trained_on(photos):
    """The views of a row are those of the row, whatever the batch size."""
    config = Settings(**TINY, **photos, image_size=48)
    seen = []
    for batch_size in (4, 8):
        batches = make_batches(load_table(config), config.replace(batch_size=batch_size))["train"](1)
        seen.append({int(row): image.numpy().tobytes() for batch in batches for row, image in zip(batch.rows, batch.images)})
    assert seen[0] == seen[1]


def test_check_knows_copies_of_every_size(photos, tmp_path):
    for size in (dict(image_size=48), dict(image_size=600), dict(image_size=48, augment="deit"), dict(image_size=32, augment="cifar")):
        config = Settings(**TINY, **photos, **size)
        pictures = open_pictures(load_table(config), config)
    assert sorted(check_dataset(photos["dataset"], tmp_path, progress=False).copies.values()) == ["sound"] * 4
    with open(pictures.filename, "r+b") as file:
        file.seek(-2000, 2)
        byte = file.read(1)[0]
        file.seek(-2000, 2)
        file.write(bytes([255 - byte]))
    states = check_dataset(photos["dataset"], tmp_path, progress=False).copies.values()
    assert sum("1 pictures were altered" in state for state in states) == 1 and list(states).count("sound") == 3


def test_benchmark_reads_a_set_behind_a_link(photos, tmp_path):
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    for split in ("train", "test"):
        for number, name in enumerate("abcd", 1):
            (tmp_path / "elsewhere" / split / name).rename(tmp_path / "elsewhere" / split / f"{number:03}.{name}")
    (tmp_path / "CUB_200_2011").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with fresh_copy(Settings(dataset="cub200", data_dir=str(tmp_path))) as config:
        assert len(load_table(config)) == 64


def test_training_with_every_deit_augmentation(photos, tmp_path):
    config = Settings(**TINY, **photos, image_size=48, augment="deit", erasing=0.25, mixup=0.8, cutmix=1.0, methods="ctrls_cam",
                      epochs=1, baseline_epochs=1, teacher_epochs=1, output_dir=str(tmp_path / "outputs"))
    record = distill(config)
    assert record.picked.n == 32 and record.settings["mixup"] == 0.8


def test_training_on_cifar_in_its_binary_form(cifar, tmp_path):
    config = Settings(**{**cifar, "validation_share": 0.2}, batch_size=20, teacher="test_resnet", student="test_efficientnet", methods="kd", method="kd", device="cpu",
                      epochs=1, baseline_epochs=1, teacher_epochs=1, learning_rate=1e-3, baseline_learning_rate=1e-3, teacher_learning_rate=1e-3, output_dir=str(tmp_path / "outputs"))
    assert (config.image_size, config.augment) == (32, "cifar")
    record = distill(config)
    assert (record.picked.n, record.data["classes"], record.data["train"]) == (40, 10, 160)


def test_settings_that_would_train_on_black_borders_are_refused():
    for augment in ("fgvc", "cifar", "deit"):
        with pytest.raises(SettingsError, match="resize_to = 48: crops of image_size = 64 do not fit"):
            Settings(image_size=64, resize_to=48, augment=augment)


def test_reduced_training_leaves_validation_test_and_outputs_alone(cifar):
    config = Settings(**cifar, validation_share=0.2)
    whole, table = load_table(config), load_table(config.replace(train_classes=6, train_share=0.5))
    assert table.path.equals(whole.path) and table.label.max() == 9
    for split in ("val", "test"):
        assert table.index[table.split == split].equals(whole.index[whole.split == split])
    train = table[table.split == "train"]
    assert sorted(set(train.label)) == list(range(6))
    rows = whole[whole.split != "test"]
    early = rows[(rows.groupby("label").cumcount() < 10) & (rows.label < 6)]  # the first half of 20 images a class
    assert list(train.index) == list(early.index[early.split == "train"])


def test_a_reduced_student_has_a_teacher_that_saw_everything(photos, tmp_path):
    config = Settings(**TINY, **photos, image_size=48, train_share=0.5, method="kd", methods="kd", epochs=1, baseline_epochs=1, teacher_epochs=1, output_dir=str(tmp_path / "outputs"))
    teacher, student = train_teacher(config), distill(config)
    assert (teacher.data["train"], teacher.data.get("unused")) == (24, None)
    assert student.data["train"] + student.data["unused"] == 24 and student.data["val"] == teacher.data["val"] == 8


def test_a_loader_that_is_not_forked_gets_no_pixels(photos):
    config = Settings(**TINY, **photos, image_size=48)
    dataset = ViewDataset(load_table(config), config)
    assert dataset.pictures.nbytes > 100_000 and len(ForkingPickler.dumps(dataset)) < 40_000


@pytest.fixture
def joint(tmp_path):
    """Two small sets of image files in their owners' forms, 3 classes each, to be joined: CUB and FoodX."""
    rng, cub, food = np.random.default_rng(0), tmp_path / "CUB_200_2011", tmp_path / "foodx251"

    def picture(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 60, (50, 60, 3)) + 30 * colour).astype(np.uint8)).save(path)

    names = {k: f"{k:03}.Bird_{k}" for k in (1, 2, 3)}
    rows = [(number, 1 + number % 3, number // 3 % 2) for number in range(36)]
    for number, k, _ in rows:
        picture(cub / "images" / names[k] / f"{number}.jpg", k)
    texts = {"classes": [f"{k} {name}" for k, name in names.items()], "images": [f"{n + 1} {names[k]}/{n}.jpg" for n, k, _ in rows],
             "image_class_labels": [f"{n + 1} {k}" for n, k, _ in rows], "train_test_split": [f"{n + 1} {train}" for n, _, train in rows],
             "bounding_boxes": [f"{n + 1} 1.0 1.0 40.0 40.0" for n, _, _ in rows]}
    for name, lines in texts.items():
        (cub / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for part in ("train", "val"):
        for number in range(18):
            picture(food / f"{part}_set" / f"{part}_{number}.jpg", 4 + number % 3)
        (food / "annot").mkdir(exist_ok=True)
        (food / "annot" / f"{part}_info.csv").write_text("".join(f"{part}_{number}.jpg,{number % 3}\n" for number in range(18)))
    return dict(dataset="cub200+foodx251", data_dir=str(tmp_path))


def test_training_on_a_joint_set(joint, tmp_path):
    config = Settings(**TINY, **joint, image_size=48, method="kd", methods="kd", epochs=1, baseline_epochs=1, teacher_epochs=1, output_dir=str(tmp_path / "outputs"))
    record = distill(config)
    assert (record.data["classes"], record.picked.n, record.data["train"] + record.data["val"]) == (6, 36, 36)
    table = load_table(config)
    assert table.groupby(table.path.str.split("/").str[0]).label.agg(["min", "max"]).values.tolist() == [[0, 2], [3, 5]]
