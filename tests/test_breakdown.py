"""Accuracy by head, family and part, against plain loops; the nine families of CUB against the published ranges and figures."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import confusion_matrix

from ctrlscam.breakdown import CUB_FAMILIES, OUTSIDE, PUBLISHED_FAMILIES, confusion, head_ranks, head_table, label_ranks, part_report
from ctrlscam.data import HIERARCHIES, index_cub200, index_nabird
from ctrlscam.evaluate import family_report, predictions_from_logits, predictions_table, topk_accuracy

METADATA = ROOT / "data" / "metadata"
RANGES = {"Flycatcher": (36, 42), "Gull": (58, 65), "Kingfisher": (78, 82), "Sparrow": (112, 132), "Tern": (140, 146), "Vireo": (150, 156),
          "Warbler": (157, 181), "Woodpecker": (186, 191), "Wren": (192, 198)}  # as published, numbers from 0


def classes_of(table):
    return table[["label", "class_name"]].drop_duplicates().sort_values("label", ignore_index=True)


def cub():
    """Classes of CUB and, where its lists are at hand, its table; else names made up to follow the ranges."""
    root = METADATA / "cub_200_2011"
    if (root / "classes.txt").is_file():
        table = index_cub200(root)
        return HIERARCHIES["cub200"](root, classes_of(table)), table
    word = {label: family for family, (first, last) in RANGES.items() for label in range(first, last + 1)}
    names = pd.DataFrame({"label": range(200), "class_name": [f"{k + 1:03}.Made_up_{word.get(k, f'Bird{k}')}" for k in range(200)]})
    return HIERARCHIES["cub200"](root, names), None


def test_families_by_name_are_the_published_ranges():
    families = cub()[0].family
    for family, (first, last) in RANGES.items():
        assert families.index[families == family].tolist() == list(range(first, last + 1))
    sizes = families.value_counts()
    assert set(sizes.index[sizes >= 5]) == set(CUB_FAMILIES) == set(RANGES)


def test_published_accuracies_are_whole_numbers_of_images():
    classes, table = cub()
    if table is None:
        pytest.skip("the lists of CUB are not at hand")
    family = classes.set_index("label").family
    images = family[table.label[table.split == "test"]].value_counts()
    right = PUBLISHED_FAMILIES.accuracy.to_numpy() * images[PUBLISHED_FAMILIES.family].to_numpy()
    assert np.abs(right - right.round()).max() < 0.01
    assert (images[PUBLISHED_FAMILIES.family].to_numpy() - right.round() >= PUBLISHED_FAMILIES.outer_errors).all()


def as_published(answers, labels, first, classes, columns):
    """Right answers and outer errors of a matrix with so many columns, the last of which takes what lies beyond the others."""
    right = outer = 0
    for answer, label in zip(answers, labels):
        if first <= label < first + classes:
            right += answer == label
            outer += not 0 <= answer - first < columns - 1
    return right, outer


@pytest.mark.parametrize("seed", range(5))
def test_a_matrix_as_wide_as_published_misses_the_last_class_and_nothing_else(seed):
    families, rng = cub()[0].family.tolist(), np.random.default_rng(seed)
    labels = rng.integers(100, 200, 4000)
    answers = np.where(rng.random(4000) < 0.6, labels, rng.integers(100, 200, 4000))
    for family, (first, last) in RANGES.items():
        matrix, classes = confusion(answers, labels, families, family), last - first + 1
        ours = np.trace(matrix), matrix[OUTSIDE].sum()
        assert as_published(answers, labels, first, classes, classes + 1) == ours
    answers[np.flatnonzero(labels == 195)[:3]] = 199
    ours = np.trace(confusion(answers, labels, families, "Wren")), confusion(answers, labels, families, "Wren")[OUTSIDE].sum()
    missed = int(((labels >= 192) & (labels <= 198) & (answers == 199)).sum())
    assert missed >= 3
    assert as_published(answers, labels, 192, 7, 26) == (ours[0], ours[1] - missed)


def test_nabirds_through_its_tree():
    root = METADATA / "nabirds"
    if not (root / "hierarchy.txt").is_file():
        pytest.skip("the lists of NABirds are not at hand")
    classes, rng = HIERARCHIES["nabird"](root, classes_of(index_nabird(root))), np.random.default_rng(0)
    labels, answers = rng.integers(0, 555, 5000), rng.integers(0, 555, 5000)
    for level in ("species", "family", "order"):
        families = classes[level].tolist()
        report = family_report(answers, labels, families)
        assert report.n.sum() == 5000 and report.family.nunique() == classes[level].nunique()
        for row in report.head(6).to_dict("records"):
            matrix = confusion(answers, labels, families, row["family"], class_names=classes.class_name)
            assert (np.trace(matrix), matrix[OUTSIDE].sum()) == (round(row["accuracy"] * row["n"]), row["outer_errors"])


@pytest.mark.parametrize("seed", range(20))
def test_confusion_is_a_part_of_the_whole_matrix(seed):
    rng = np.random.default_rng(seed)
    families = rng.choice(["a", "b", "c", ""], 15)
    families[:3] = ["a", "b", "c"]
    labels, answers = rng.integers(0, 15, 400), rng.integers(0, 15, 400)
    whole = confusion_matrix(labels, answers, labels=range(15))
    for family in "abc":
        own = families == family
        matrix = confusion(answers, labels, families, family)
        assert np.array_equal(matrix.to_numpy()[:, :-1], whole[own][:, own])
        assert np.array_equal(matrix[OUTSIDE], whole[own][:, ~own].sum(1))


def looped(probabilities, label):
    """Places of the label for one image, by sorting and adding in plain Python."""
    heads = range(len(probabilities))
    orders = [sorted(heads, key=lambda head: sign * probabilities[head].max()) for sign in (-1, 1)]
    sums = [[sum(probabilities[head] for head in order[:k + 1]) for k in heads] for order in orders]
    sums[0][-1] = sums[1][-1] = sum(probabilities[head] for head in heads)
    place = lambda p: sorted(range(len(p)), key=lambda c: (-p[c], c)).index(label)
    return [[place(p) for p in answers] for answers in (probabilities, *sums)]


@pytest.mark.parametrize("seed", range(10))
def test_head_ranks_against_loops_with_ties(seed):
    """Eighths are exact in any order of summation, so ties are real ties; many heads are equally sure."""
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.multinomial(8, np.full(6, 1 / 6), (60, 9)) / 8, rng.integers(0, 6, 60)
    assert head_ranks(probabilities, labels).tolist() == [looped(p, y) for p, y in zip(probabilities, labels.tolist())]
    assert torch.equal(head_ranks(torch.from_numpy(probabilities).bfloat16(), torch.from_numpy(labels)), head_ranks(probabilities, labels))


def test_heads_batch_by_batch():
    """What is kept for an image does not depend on its batch, and 27 small numbers are all that is kept."""
    rng = np.random.default_rng(0)
    probabilities, labels = torch.softmax(torch.from_numpy(rng.normal(size=(300, 9, 200)).astype(np.float32)), -1), rng.integers(0, 200, 300)
    whole = head_ranks(probabilities, labels)
    parts = [head_ranks(probabilities[k:k + 32], labels[k:k + 32]) for k in range(0, 300, 32)]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (300, 3, 9)
    table = head_table([f"h{k}" for k in range(9)], whole)
    for k, top in ((1, "top1"), (3, "top3"), (5, "top5")):
        assert table[top][:9].tolist() == pytest.approx([topk_accuracy(probabilities[:, head], labels, k) for head in range(9)])
        assert table[top][[17, 26]].tolist() == pytest.approx([topk_accuracy(probabilities.double().sum(1), labels, k)] * 2)


def test_label_ranks_of_any_depth():
    scores, labels = torch.randn(5, 2, 3, 7), torch.tensor([0, 6, 3, 3, 1])
    ranks = label_ranks(scores, labels)
    for place in np.ndindex(5, 2, 3):
        assert ranks[place] == (scores[place].argsort(descending=True) == labels[place[0]]).nonzero().item()


def test_parts_of_unequal_size():
    """Top-1, top-5 and loss of the whole are the means of the parts, weighted by images."""
    rng, parts = np.random.default_rng(0), ["birds"] * 20 + ["dogs"] * 7
    labels = np.concatenate([rng.integers(0, 20, 500), rng.integers(20, 27, 90)])
    logits = rng.normal(size=(590, 27)) + 1.5 * np.eye(27)[labels]
    rows = predictions_table(predictions_from_logits(np.arange(590), labels, logits))
    report = part_report(rows.sample(frac=1, random_state=0), parts).set_index("part")
    assert report.index.tolist() == ["birds", "dogs", "all"] or report.index.tolist() == ["dogs", "birds", "all"]
    for name in ("top1", "top5", "loss"):
        assert (report[name][:2] * report.n[:2]).sum() / 590 == pytest.approx(report[name]["all"], rel=1e-6)
    answers = logits.argmax(1)
    assert report.elsewhere["birds"] == (answers[:500] >= 20).sum() and report.elsewhere["dogs"] == (answers[500:] < 20).sum()
    assert report.top5["dogs"] == pytest.approx(topk_accuracy(logits[500:], labels[500:], 5))
