"""The owners' files, real and remade: published counts, class order on any machine, and every kind of damage (faults 23 to 28).

The real metadata is looked for below `data/metadata/`; where it lies, tiny images are put under its true names. Files of the same
forms and sizes are made here in any case, so that nothing but the comparison with the real names needs the metadata.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image
from scipy.io import loadmat, savemat

from ctrlscam.config import Settings
from ctrlscam.data import (DataError, INDEXES, class_count, cub200_parts, data_root, find_strays, hierarchy, index_dataset, load_table,
                           missing_images, read_tree, set_root, tree_path)

METADATA = ROOT / "data" / "metadata"
PUBLISHED = {"cub200": (5994, 5794, 200), "nabird": (23929, 24633, 555), "stancar": (8144, 8041, 196), "standog": (12000, 8580, 120), "aircraft": (6667, 3333, 100)}
OTHERS = {"foodx251": (30, 12, 6), "cifar10": (30, 12, 6), "cifar100": (30, 12, 6)}
BIRD_FAMILIES = {"Flycatcher": (36, 42), "Gull": (58, 65), "Kingfisher": (78, 82), "Sparrow": (112, 132), "Tern": (140, 146), "Vireo": (150, 156),
                 "Warbler": (157, 181), "Woodpecker": (186, 191), "Wren": (192, 198)}  # first and last label, as HERBS reports them


# ---------------------------------------------------------------- files in the owners' forms, of any size

class Row(NamedTuple):
    """One image: a name without folder and suffix, the place of its class from 0, and its split."""
    image: str
    label: int
    split: str


def make_rows(train, test, classes, image="image {:05}".format):
    """Images spread evenly over the classes, numbered through."""
    number = count(1)
    return [Row(image(next(number)), k % classes, split) for split, total in (("train", train), ("test", test)) for k in range(total)]


def text(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def bird(label):
    family = next((name for name, (first, last) in BIRD_FAMILIES.items() if first <= label <= last), f"Bird{label}")
    return f"{label + 1:03}.Made_{label}_{family}"


def four_files(root, ids, paths, numbers, rows):
    text(root / "images.txt", *(f"{key} {path}" for key, path in zip(ids, paths)))
    text(root / "image_class_labels.txt", *(f"{key} {number}" for key, number in zip(ids, numbers)))
    text(root / "train_test_split.txt", *(f"{key} {int(row.split == 'train')}" for key, row in zip(ids, rows)))
    text(root / "bounding_boxes.txt", *(f"{key} 10 20 30 40" for key in ids))


def make_cub200(root, rows, classes, number=lambda n: n):
    ids = range(1, len(rows) + 1)
    four_files(root, ids, [f"{bird(row.label)}/{row.image}.jpg" for row in rows], [number(row.label + 1) for row in rows], rows)
    text(root / "classes.txt", *(f"{k + 1} {bird(k)}" for k in range(classes)))
    text(root / "parts" / "parts.txt", *(f"{k} part {k}" for k in range(1, 16)))
    text(root / "parts" / "part_locs.txt", *(f"{key} {part} 3.0 4.0 {part % 2}" for key in ids for part in range(1, 16)))


def bird_tree(leaves):
    """Parents and leaf numbers of a tree with gaps between the leaves; 555 leaves give 1,011 nodes: root, 22 orders, 28 families, 405 species."""
    orders, families, species = (22, 28, 405) if leaves == 555 else (2, 1, leaves - 1)
    parent = {k: 0 for k in range(1, orders + 1)} | {orders + k: 1 for k in range(1, families + 1)}
    nodes, free, made = [], count(orders + families + 1), []
    for k in range(leaves):
        if k < species:
            made.append(next(free))
            parent[made[-1]] = 1 + (k + 1) % (orders + families)
            parent[made[-1]] = parent[made[-1]] if parent[made[-1]] != 1 else orders + 1
        nodes.append(next(free))
        parent[nodes[-1]] = made[k % species]
    return parent, nodes


def make_nabird(root, rows, classes, number=lambda n: n):
    parent, leaves = bird_tree(classes)
    ids = [f"{k:08x}-0000-4000-8000-{k:012x}" for k in range(len(rows))]
    four_files(root, ids, [f"{leaves[row.label]:04}/{row.image}.jpg" for row in rows], [number(leaves[row.label]) for row in rows], rows)
    text(root / "hierarchy.txt", *(f"{node} {above}" for node, above in parent.items()))
    text(root / "classes.txt", "0 Birds", *(f"{node} Node {node} (of {above})" for node, above in parent.items()))


def make_stancar(root, rows, classes, number=lambda n: n):
    (root / "devkit").mkdir(parents=True, exist_ok=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array([[f"Make C/V {k} 2012" for k in range(classes)]], dtype=object)})
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for file, split in (("devkit/cars_train_annos.mat", "train"), ("cars_test_annos_withlabels.mat", "test")):
        entries = [(1, 2, 30, 40, number(row.label + 1), f"{row.image}.jpg") for row in rows if row.split == split]
        savemat(root / file, {"annotations": np.array(entries, dtype=[(name, object) for name in fields])[None]})


def make_standog(root, rows, classes, number=lambda n: n, folder=lambda k: f"n{2085620 + k:08}-Made_dog"):
    for split in ("train", "test"):
        names = [f"{folder(row.label)}/{row.image}" for row in rows if row.split == split]
        numbers = np.array([number(row.label + 1) for row in rows if row.split == split])
        kind = np.uint8 if 0 <= numbers.min() and numbers.max() < 256 else np.int16
        write_dog_list(root / "lists" / f"{split}_list.mat", [f"{name}.jpg" for name in names], numbers.astype(kind))


def write_dog_list(file, paths, numbers):
    """The owners' list: three columns of N cells or numbers, labels in unsigned bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = np.array(paths, dtype=object)[:, None]
    without_suffix = np.array([path.removesuffix(".jpg") for path in paths], dtype=object)[:, None]
    savemat(file, {"file_list": cells, "annotation_list": without_suffix, "labels": np.asarray(numbers)[:, None]})


def make_aircraft(root, rows, classes):
    variant = "Variant {:03} F/A".format
    level = {"variant": variant, "family": lambda k: f"Family {k * 70 // classes:02}", "manufacturer": lambda k: f"Maker {(k * 70 // classes) * 30 // 70:02}"}
    text(root / "data/variants.txt", *map(variant, range(classes)))
    text(root / "data/images_box.txt", *dict.fromkeys(f"{row.image} 1 2 30 40" for row in rows))
    for name, of_class in level.items():
        for split, part in (("train", "trainval"), ("test", "test")):
            text(root / f"data/images_{name}_{part}.txt", *(f"{row.image} {of_class(row.label)}" for row in rows if row.split == split))


def make_foodx251(root, rows, classes, number=lambda n: n):
    text(root / "annot/class_list.txt", *(f"{k} dish_{k}" for k in range(classes)))
    for split, part in (("train", "train"), ("test", "val")):
        text(root / f"annot/{part}_info.csv", *(f"{row.image}.jpg,{number(row.label)}" for row in rows if row.split == split))


def make_cifar(root, rows, classes, number=lambda n: n, files=("train.bin", "test.bin"), names="fine_label_names.txt", coarse=True):
    root.mkdir(parents=True, exist_ok=True)
    text(root / names, *(f"thing {k}" for k in range(classes)), "")
    text(root / "coarse_label_names.txt", "all", "")
    of_split = {split: [row for row in rows if row.split == split] for split in ("train", "test")}
    for k, name in enumerate(files):
        mine = of_split["test"] if name.startswith("test") else of_split["train"][k::len(files) - 1]
        labels = np.array([number(row.label) for row in mine]).astype(np.uint8)[:, None]  # the owners' bytes: −1 is written as 255
        (root / name).write_bytes(np.hstack([np.zeros_like(labels)] * coarse + [labels, np.zeros((len(mine), 3072), np.uint8)]).tobytes())


def make_cifar10(root, rows, classes, number=lambda n: n):
    make_cifar(root, rows, classes, number, (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"), "batches.meta.txt", coarse=False)


MAKERS = {"cub200": make_cub200, "nabird": make_nabird, "stancar": make_stancar, "standog": make_standog, "aircraft": make_aircraft,
          "foodx251": make_foodx251, "cifar10": make_cifar10, "cifar100": make_cifar}
FILE_SETS = [name for name in MAKERS if INDEXES[name].pixels == "files"]


def root_of(name, data):
    return data / INDEXES[name].folders[0]


def make(name, data, *, image="image{:05}".format, edit=lambda rows: rows, **options):
    """A small set in the owners' form, 6 classes, 30 + 12 images; `edit` damages its rows. Returns its root."""
    classes = 6
    MAKERS[name](root_of(name, data), edit(make_rows(30, 12, classes, image)), classes, **options)
    return root_of(name, data)


def place_images(root, table):
    """One tiny JPEG under every name of the table, by hard links."""
    root.mkdir(parents=True, exist_ok=True)
    tiny = root / "tiny"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(tiny, "JPEG")
    for folder in {os.path.dirname(path) for path in table.path}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path in table.path:
        os.link(tiny, root / path)
    tiny.unlink()


def complete(name, data, **options):
    """A small set with its images in place: root and table."""
    root = make(name, data, **options)
    table = index_dataset(name, data)
    if name in FILE_SETS:
        place_images(root, table)
    return root, table


def refuses(name, data, *said):
    """Assert that the index raises DataError with these words, and return the message."""
    with pytest.raises(DataError) as caught:
        index_dataset(name, data)
    message = str(caught.value)
    assert all(words in message for words in said), message
    return message


# ---------------------------------------------------------------- full size: counts, names, hierarchies

def copy_official(name, root):
    """The owners' metadata of a set; the lists of Stanford Dogs, which are kept as CSV, in the owners' MATLAB form."""
    source = METADATA / {"cub200": "cub_200_2011", "nabird": "nabirds", "stancar": "stanford_cars", "standog": "stanford_dogs", "aircraft": "fgvc_aircraft"}[name]
    if name != "standog":
        shutil.copytree(source, root)
        return
    for split, file in (("train", "train_val.csv"), ("test", "test.csv")):
        listed = pd.read_csv(source / file)
        write_dog_list(root / "lists" / f"{split}_list.mat", listed.dir.tolist(), (listed.class_id + 1).to_numpy(np.uint8))


SOURCES = ["owners' metadata", "generated"]


@pytest.fixture(scope="module", params=SOURCES)
def full(request, tmp_path_factory):
    """A data folder with five sets in full size, an image under every name."""
    if request.param == SOURCES[0] and not METADATA.is_dir():
        pytest.skip(f"{METADATA.relative_to(ROOT)} is not there: it holds the owners' metadata of five sets, one folder each")
    data = tmp_path_factory.mktemp("full")
    for name, sizes in PUBLISHED.items():
        if request.param == SOURCES[1]:
            MAKERS[name](root_of(name, data), make_rows(*sizes, "{:06}".format), sizes[2])
        else:
            copy_official(name, root_of(name, data))
        place_images(root_of(name, data), index_dataset(name, data))
    yield data
    shutil.rmtree(data)


def counts(table):
    return (table.split != "test").sum(), (table.split == "test").sum(), class_count(table)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(full, name):
    config = Settings(dataset=name, data_dir=str(full))
    table = load_table(config)  # raises if a single image is missing
    assert counts(table) == PUBLISHED[name]
    assert find_strays(data_root(config), table) == []
    assert (table.split == "val").sum() == round(0.1 * PUBLISHED[name][0])
    assert not table[["x0", "y0", "x1", "y1"]].isna().any(axis=None) or name == "standog"
    assert name == "standog" or ((table.x0 < table.x1) & (table.y0 < table.y1)).all()


def test_joint_set(full):
    table = load_table(Settings(dataset="cub200+standog", data_dir=str(full)))
    assert counts(table) == (5994 + 12000, 5794 + 8580, 320) == (17994, 14374, 320)
    dogs = table[table.label >= 200]
    assert dogs.path.str.startswith("stanford_dogs/images/Images/n0").all() and len(dogs) == 20580
    alone = index_dataset("standog", full)
    assert (dogs.label - 200).tolist() == alone.label.tolist()


def test_labels_agree_with_folders_and_names(full):
    """Read anew from the names alone, without the functions under test."""
    cub, birds, dogs, planes, cars = (index_dataset(name, full) for name in ("cub200", "nabird", "standog", "aircraft", "stancar"))
    assert (cub.path.str.extract(r"images/(\d{3})\.")[0].astype(int) - 1 == cub.label).all()
    assert (cub.path.str.split("/").str[1] == cub.class_name).all()
    folder = birds.path.str.extract(r"images/(\d{4})/")[0].astype(int)
    assert (folder.map({number: k for k, number in enumerate(sorted(set(folder)))}) == birds.label).all()
    folder = dogs.path.str.split("/").str[2]
    assert (folder.map({name: k for k, name in enumerate(sorted(set(folder)))}) == dogs.label).all() and (folder == dogs.class_name).all()
    names = (root_of("aircraft", full) / "data/variants.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == 100 and [names[k] for k in planes.label] == planes.class_name.tolist()
    names = [str(name) for name in loadmat(root_of("stancar", full) / "devkit/cars_meta.mat", squeeze_me=True)["class_names"]]
    assert [names[k] for k in cars.label] == cars.class_name.tolist()


@pytest.mark.parametrize("full", [SOURCES[not METADATA.is_dir()]], indirect=True)
def test_torchvision_agrees(full):
    """Where torchvision reads a set soundly, it finds the same images with the same labels."""
    from torchvision.datasets import FGVCAircraft, StanfordCars
    (full / "link").mkdir()
    for name, folder in (("stancar", "stanford_cars"), ("aircraft", "fgvc-aircraft-2013b")):
        (full / "link" / folder).symlink_to(root_of(name, full))
        table = index_dataset(name, full)
        for split in ("train", "test"):
            if name == "stancar":
                theirs = [(os.path.basename(path), label) for path, label in StanfordCars(full / "link", split)._samples]
            else:
                listed = FGVCAircraft(full / "link", {"train": "trainval", "test": "test"}[split])
                theirs = [(os.path.basename(path), label) for path, label in zip(listed._image_files, listed._labels)]
            ours = table[table.split == split]
            assert theirs == list(zip(ours.path.str.split("/").str[-1], ours.label))
    shutil.rmtree(full / "link")


def test_hierarchies(full):
    families = hierarchy("cub200", full).groupby("family").label.agg(list)
    for name, (first, last) in BIRD_FAMILIES.items():
        assert families[name] == list(range(first, last + 1))
    parent, names = read_tree(set_root("nabird", full))
    assert len(names) == 1011 and len(names.keys() - set(parent.values())) == 555
    birds = hierarchy("nabird", full)
    assert list(birds.columns) == ["label", "class_name", "species", "family", "order", "root"] and birds.order.nunique() == 22 and set(birds.root) == {"Birds"}
    leaves = sorted(names.keys() - set(parent.values()))
    assert [names[tree_path(parent, leaf)[1]] for leaf in leaves] == birds.species.tolist()
    assert [names[tree_path(parent, leaf)[-2]] for leaf in leaves] == birds.order.tolist()
    planes = hierarchy("aircraft", full)
    assert (planes.class_name.nunique(), planes.family.nunique(), planes.manufacturer.nunique()) == (100, 70, 30)


def test_parts(full):
    parts = cub200_parts(set_root("cub200", full))
    assert len(parts) == 15 * 11788 and parts.part.nunique() == 15
    assert set(parts.path) == set(index_dataset("cub200", full).path)
    assert parts.loc[parts.visible, ["x", "y"]].notna().all(axis=None) and parts.loc[~parts.visible, ["x", "y"]].isna().all(axis=None)


def test_cifar100_superclasses(tmp_path):
    make("cifar100", tmp_path)
    assert hierarchy("cifar100", tmp_path).superclass.tolist() == ["all"] * 6


# ---------------------------------------------------------------- fault 26: the same order on every machine

READ_ELSEWHERE = """
import hashlib, json, os, random, sys, types
package = types.ModuleType("ctrlscam")  # the package without its __init__, which would load the networks
package.__path__ = [sys.argv[1]]
sys.modules["ctrlscam"] = package
if sys.argv[2] == "shuffled":
    listdir, scandir = os.listdir, os.scandir
    def mixed(entries):
        return random.sample(entries, len(entries))
    class Entries(list):
        def __enter__(self): return iter(self)
        def __exit__(self, *error): pass
        def close(self): pass
    os.listdir = lambda path=".": mixed(listdir(path))
    os.scandir = lambda path=".": Entries(mixed(list(scandir(path))))
from ctrlscam.data import index_dataset
def fingerprint(table):
    return hashlib.sha256(repr([table[column].tolist() for column in table]).encode()).hexdigest()
print(json.dumps([fingerprint(index_dataset(name, data)) for name, data in json.loads(sys.argv[3])]))
"""


@pytest.mark.parametrize("full", [SOURCES[not METADATA.is_dir()]], indirect=True)
def test_fault_26_class_order_is_the_same_everywhere(full, tmp_path):
    """Three processes that differ in hash seed, locale, time zone and the order of directory listings read the same tables."""
    classes = ["Zebra finch", "ash", "\u00c4hre", "eider duck", "ost", "\u00d6re", "zebra"]
    for part, names in (("own", classes), ("CUB_200_2011", [f"{k:03}.{name}" for k, name in enumerate(classes, 1)])):
        for path in (f"{split}/{name}/{k} {name}.jpg" for split in ("train", "test") for name in names for k in range(3)):
            text(tmp_path / part / path)
    sets = json.dumps([*((name, str(full)) for name in PUBLISHED), ("cub200", str(tmp_path)), (f"folder:{tmp_path / 'own'}", str(tmp_path))])
    machines = [("0", "C.utf8", "UTC", "plain"), ("1", "C", "Asia/Tokyo", "shuffled"), ("random", "POSIX", "America/Lima", "shuffled")]
    started = []
    for seed, locale, zone, listing in machines:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "TZ": zone, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", READ_ELSEWHERE, str(ROOT / "ctrlscam"), listing, sets]
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    first, *others = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert others == [first] * 2 and len(set(first)) == len(PUBLISHED) + 2
    own, private = index_dataset(f"folder:{tmp_path / 'own'}", tmp_path), index_dataset("cub200", tmp_path)
    assert own.groupby("label").class_name.first().tolist() == sorted(classes)
    assert private.groupby("label").class_name.first().str[4:].tolist() == classes


# ---------------------------------------------------------------- fault 23: names and paths

@pytest.mark.parametrize("name", FILE_SETS)
def test_fault_23_unusual_names_are_read(name, tmp_path):
    space = "_" if name == "aircraft" else " "  # an image of Aircraft is one word
    kinds = [f"Zaunk\u00f6nig{space}\u9e1f\U0001f426{{:05}}", "{:05}" + "x" * 246, f"a{space}{space}b{space}(1){space}{{:05}}", "-{:05}'\"&;$", "{:05}\u2028\u0085\u00a0z"]
    root, table = complete(name, tmp_path, image=lambda k: kinds[k % 5].format(k))
    assert len(load_table(Settings(dataset=name, data_dir=str(tmp_path)))) == 42
    assert max(len(path.split("/")[-1]) for path in table.path) == 255 and find_strays(root, table) == []


@pytest.mark.parametrize("name", FILE_SETS)
@pytest.mark.parametrize("path", ["../../../outside", "/etc/passwd", "a/../../../../outside"])
def test_fault_23_paths_out_of_the_root_are_refused(name, path, tmp_path):
    make(name, tmp_path, edit=lambda rows: [rows[0]._replace(image=path), *rows[1:]])
    refuses(name, tmp_path, "1 of 42 images have a path that is absolute or leaves the folder of the data set", path)


@pytest.mark.parametrize("stem", ["a\nb", "\x1b[31mred\x07", os.fsdecode(b"\xff")], ids=["line break", "escape code", "not UTF-8"])
def test_fault_23_names_that_no_list_or_terminal_can_hold_are_refused(stem, tmp_path):
    for number in range(4):
        place = tmp_path / "own" / ("train", "test")[number % 2] / "ab"[number // 2]
        place.mkdir(parents=True)
        (place / (f"{stem}.jpg" if number == 3 else "a.jpg")).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        index_dataset(f"folder:{tmp_path / 'own'}", tmp_path)
    assert str(caught.value).endswith(f"in their path: test/b/{ascii(stem)[1:-1]}.jpg") and str(caught.value).isprintable()


@pytest.mark.parametrize("name", FILE_SETS)
def test_fault_23_links(name, tmp_path):
    """Links are followed, out of the root too; one that points nowhere, or to itself, is a missing image."""
    root, table = complete(name, tmp_path / "data")
    (root / table.path[0]).rename(tmp_path / "elsewhere.jpg")
    (root / table.path[0]).symlink_to(tmp_path / "elsewhere.jpg")
    assert missing_images(root, table) == []
    (tmp_path / "elsewhere.jpg").unlink()
    (root / table.path[1]).unlink()
    (root / table.path[1]).symlink_to(root / table.path[1])
    assert missing_images(root, table) == table.path[:2].tolist()
    with pytest.raises(DataError, match="2 of 42 images are missing: "):
        load_table(Settings(dataset=name, data_dir=str(tmp_path / "data")))
    outside = tmp_path / "other disk"
    root.rename(outside)
    root.symlink_to(outside, target_is_directory=True)
    assert len(missing_images(root, table)) == 2


# ---------------------------------------------------------------- fault 24: ids and images

NUMBERED = [(name, file) for name, files in {
    "cub200": ["images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"],
    "nabird": ["images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"],
    "aircraft": ["data/images_box.txt", "data/images_variant_trainval.txt", "data/images_variant_test.txt"]}.items() for file in files]


def edit_lines(file, change):
    file.write_text("".join(f"{line}\n" for line in change(file.read_text(encoding="utf-8").splitlines())), encoding="utf-8")


@pytest.mark.parametrize("name, file", NUMBERED)
def test_fault_24_ids_in_one_file_only(name, file, tmp_path):
    file = make(name, tmp_path) / file
    key = file.read_text(encoding="utf-8").split()[0]
    edit_lines(file, lambda lines: lines[1:])
    refuses(name, tmp_path, "1 images are in only one of ", f": {key}")
    edit_lines(file, lambda lines: lines[5:])
    assert refuses(name, tmp_path, "6 images are in only one of ").endswith(", …")
    make(name, tmp_path)
    edit_lines(file, lambda lines: [*lines, lines[0].replace(key, "99999", 1)])
    refuses(name, tmp_path, "1 images are in only one of ", ": 99999")


@pytest.mark.parametrize("name, file", [*NUMBERED, ("cub200", "classes.txt"), ("nabird", "classes.txt"), ("nabird", "hierarchy.txt"),
                                        ("foodx251", "annot/train_info.csv"), ("foodx251", "annot/val_info.csv"), ("foodx251", "annot/class_list.txt")])
def test_fault_24_lines_twice_unreadable_or_file_gone(name, file, tmp_path):
    file = make(name, tmp_path) / file
    edit_lines(file, lambda lines: [*lines, *lines[:6]])
    assert refuses(name, tmp_path, str(file), "6 entries come twice: ").endswith(", …")
    make(name, tmp_path)
    edit_lines(file, lambda lines: [lines[0], "one-word", *lines[1:]])
    refuses(name, tmp_path, f"{file}, line 2: 'one-word' is not '")
    file.write_bytes(b"\xff\xfe broken")
    refuses(name, tmp_path, str(file), "is not UTF-8 text")
    file.unlink()
    if file.name != "class_list.txt":  # without it classes are named by their numbers
        refuses(name, tmp_path, f"{file} is missing")


@pytest.mark.parametrize("name", FILE_SETS)
def test_fault_24_images_listed_twice(name, tmp_path):
    make(name, tmp_path, edit=lambda rows: [*rows, *rows[:6]])
    if name == "cub200" or name == "nabird":  # new ids for the same files
        refuses(name, tmp_path, "6 of 48 images are named more than once: ", ", …")
    else:
        refuses(name, tmp_path, "6 ", "once: " if name in ("stancar", "standog") else "entries come twice: ", ", …")


@pytest.mark.parametrize("name", FILE_SETS)
def test_fault_24_ids_without_image_and_images_without_id(name, tmp_path):
    root, table = complete(name, tmp_path)
    gone = sorted(table.path)[3:10]
    for path in gone:
        (root / path).unlink()
    assert sorted(missing_images(root, table)) == gone
    with pytest.raises(DataError) as caught:
        load_table(Settings(dataset=name, data_dir=str(tmp_path)))
    assert f"7 of 42 images are missing: {', '.join(gone[:5])}, …" in str(caught.value)
    stray = f"{os.path.dirname(table.path[0])}/not in the index.JPG"
    (root / stray).touch()
    assert find_strays(root, table) == [stray]
    for file in (root / table.path[20], root / table.path[21]):
        file.rename(file.with_name("renamed " + file.name))  # at once without id and without image
    assert len(find_strays(root, table)) == 3


def test_fault_24_cut_files(tmp_path):
    for name in ("cifar10", "cifar100"):
        root = make(name, tmp_path)
        file = root / ("test_batch.bin" if name == "cifar10" else "test.bin")
        file.write_bytes(file.read_bytes()[:-100])
        refuses(name, tmp_path, f"{file}: ", "bytes are not a number of whole records")
        file.unlink()
        refuses(name, tmp_path, f"{file} is missing")
    for name, file in (("stancar", "devkit/cars_train_annos.mat"), ("stancar", "devkit/cars_meta.mat"), ("standog", "lists/test_list.mat")):
        file = make(name, tmp_path) / file
        for content in (file.read_bytes()[:300], b"", b"<html>Sign in</html>" * 50):
            file.write_bytes(content)
            refuses(name, tmp_path, f"{file} is not the owners' MATLAB file")
        file.unlink()
        refuses(name, tmp_path, f"{file} is missing")
        make(name, tmp_path)
    file = tmp_path / "stanford_dogs/lists/train_list.mat"
    content = loadmat(file)
    savemat(file, {"file_list": content["file_list"], "labels": content["labels"][:-2]})
    refuses("standog", tmp_path, "30 images but 28 labels")


# ---------------------------------------------------------------- fault 25: labels

LABELLED = [name for name in MAKERS if name != "aircraft"]  # Aircraft names its classes by words
SHIFTS = {"one too small": lambda n: n - 1, "one too large": lambda n: n + 1, "negative": lambda n: -n - 1, "far too large": lambda n: n + 150,
          "with gaps": lambda n: 2 * n}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("damage", SHIFTS)
def test_fault_25_label_numbers(name, damage, tmp_path):
    make(name, tmp_path, number=SHIFTS[damage])
    message = refuses(name, tmp_path)
    assert "have a label outside" in message or "is not a leaf" in message or "with another class than their folder" in message, message
    assert " of 42 images " in message


@pytest.mark.parametrize("name", ["cub200", "nabird", "standog"])
def test_fault_25_shift_inside_the_range_is_caught_against_folders(name, tmp_path):
    """Every number is one that exists, and every class has images, yet all labels are wrong."""
    numbers = bird_tree(6)[1] if name == "nabird" else range(1, 7)
    following = dict(zip(numbers, [*numbers[1:], numbers[0]]))
    make(name, tmp_path, number=following.__getitem__)
    refuses(name, tmp_path, "42 of 42 images are labelled with another class than their folder: ", ", …")
    swapped = {**{k: k for k in numbers}, numbers[0]: numbers[1], numbers[1]: numbers[0]}
    make(name, tmp_path, number=swapped.__getitem__)
    refuses(name, tmp_path, "14 of 42 images are labelled with another class than their folder")


@pytest.mark.parametrize("name", MAKERS)
def test_fault_25_class_without_training_images(name, tmp_path):
    make(name, tmp_path, edit=lambda rows: [row for row in rows if row.label != 3 or row.split == "test"])
    refuses(name, tmp_path, "1 of 6 classes have no training image: ")


@pytest.mark.parametrize("name, file", [("cub200", "classes.txt"), ("foodx251", "annot/class_list.txt")])
def test_fault_25_class_list_shifted(name, file, tmp_path):
    file = make(name, tmp_path) / file
    edit_lines(file, lambda lines: [f"{int(line.split()[0]) + 1} {line.split(' ', 1)[1]}" for line in lines])
    refuses(name, tmp_path, f"{file}: classes are not numbered ", "without gaps")
    make(name, tmp_path)
    edit_lines(file, lambda lines: lines[:2] + lines[3:])
    refuses(name, tmp_path, "without gaps")


def test_fault_25_names_that_shift_classes(tmp_path):
    file = make("cub200", tmp_path) / "classes.txt"
    edit_lines(file, lambda lines: [f"{k} {line.split()[1]}" for k, line in enumerate(reversed(lines), 1)])
    refuses("cub200", tmp_path, "42 of 42 images are labelled with another class than their folder")
    file = make("aircraft", tmp_path) / "data/variants.txt"
    edit_lines(file, lambda lines: lines[1:])
    refuses("aircraft", tmp_path, "7 images have a class that", "variants.txt does not name")
    file = make("nabird", tmp_path) / "hierarchy.txt"
    edit_lines(file, lambda lines: lines[:-1])
    refuses("nabird", tmp_path, "2 roots where a tree has one")


@pytest.mark.parametrize("value", ["1.0", "one", "1e2", "\u0661", "1_0", "99999999999999999999"])
def test_fault_25_labels_that_are_no_whole_numbers(value, tmp_path):
    for name, file in (("cub200", "image_class_labels.txt"), ("nabird", "image_class_labels.txt"), ("foodx251", "annot/val_info.csv")):
        file = make(name, tmp_path) / file
        edit_lines(file, lambda lines: [re.sub("[0-9]+$", value, lines[0]), *lines[1:]])
        refuses(name, tmp_path, f"{file}, line 1: ", value)


@pytest.mark.parametrize("value", [1.5, np.nan, np.inf, -1e30])
def test_fault_25_matlab_labels_that_are_no_whole_numbers(value, tmp_path):
    file = make("standog", tmp_path) / "lists/train_list.mat"
    content = loadmat(file)
    savemat(file, {"file_list": content["file_list"], "labels": np.where(np.arange(30)[:, None] == 4, value, content["labels"])})
    refuses("standog", tmp_path, "1 labels are not whole numbers")
    make("stancar", tmp_path, number=lambda n: value if n == 3 else n)
    refuses("stancar", tmp_path, "1 labels are not whole numbers")


# ---------------------------------------------------------------- fault 27: one image in both splits

@pytest.mark.parametrize("name", ["cub200", "nabird", "standog", "aircraft"])
def test_fault_27_image_in_both_splits(name, tmp_path):
    """The same file listed for training and for test. (Cars, FoodX and CIFAR keep the splits in folders of their own; equal pictures there are for `overlap`.)"""
    make(name, tmp_path, edit=lambda rows: [*rows, *(row._replace(split="test") for row in rows[:6])])
    refuses(name, tmp_path, "6 of 48 images are named more than once: ", ", …")


# ---------------------------------------------------------------- fault 28: Cars without test labels; 100 variants

def test_fault_28_cars_without_test_labels(tmp_path):
    root = make("stancar", tmp_path)
    labelled = root / "cars_test_annos_withlabels.mat"
    kept = labelled.read_bytes()
    labelled.unlink()
    refuses("stancar", tmp_path, "cars_test_annos_withlabels.mat is missing: it holds the classes of the test images", f"Put it into {root} or {root / 'devkit'}")
    unlabelled = np.array([(1, 2, 30, 40, "00001.jpg")] * 12, dtype=[(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname")])
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": unlabelled[None]})
    shutil.copy(root / "devkit/cars_test_annos.mat", labelled)
    refuses("stancar", tmp_path, f"{labelled} has no class: it is not the list with labels")
    labelled.unlink()
    (root / "devkit" / labelled.name).write_bytes(kept)
    assert counts(index_dataset("stancar", tmp_path)) == (30, 12, 6)
    for file in (root / "devkit").iterdir():
        file.rename(root / file.name)
    assert counts(index_dataset("stancar", tmp_path)) == (30, 12, 6)


def test_fault_28_aircraft_has_100_variants(full):
    table = index_dataset("aircraft", full)
    assert table.class_name.nunique() == 100 and table[table.split == "test"].class_name.nunique() == 100
    assert all(name == name.strip() for name in table.class_name)
