"""Every loss against a second formulation: plain Python numbers, loops over images, classes and cells, gradients by central differences."""
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from ctrlscam.baselines import fitnet_loss, local_logits, sdd_loss, standardized_kd_loss
from ctrlscam.losses import (attention_map, attention_map_loss, attention_transfer_loss, background_suppression_loss, cam_loss, cat_loss,
                             deit_distillation_loss, dist_loss, dkd_loss, hint_loss, kd_loss, refinement_loss, standardize_logits)
from ctrlscam.maps import binarize_maps, class_activation_map, class_activation_maps, full_precision, hint_map, select_class_maps

TOLERANCE = 1e-6
SEEDS = (0, 1, 2)


# ---- the second formulation: nested lists of Python floats ----

def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def flat(nested):
    return [number for part in nested for number in flat(part)] if isinstance(nested, list) else [nested]


def log_probabilities(logits, temperature=1.0):
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - log_sum for z in scaled]


def divergence(student, teacher, temperature):
    """KL(teacher ‖ student) of one pair of logit vectors."""
    log_s, log_t = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    return math.fsum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t))


def rows(logits):
    """All logit vectors of B×…×K."""
    return [row for part in logits for row in rows(part)] if isinstance(logits[0], list) else [logits]


def plain_kd(student, teacher, temperature):
    return temperature**2 * mean([divergence(s, t, temperature) for s, t in zip(rows(student), rows(teacher))])


def z_scores(logits):
    centre = mean(logits)
    spread = math.sqrt(mean([(z - centre) ** 2 for z in logits]))
    return [(z - centre) / spread if spread > 1e-9 else 0.0 for z in logits]


def plain_standardized_kd(student, teacher, temperature):
    return plain_kd([z_scores(z) for z in student], [z_scores(z) for z in teacher], temperature)


def plain_dkd(student, teacher, labels, alpha, beta, temperature):
    total = []
    for s, t, y in zip(student, teacher, labels):
        log_s, log_t = log_probabilities(s, temperature), log_probabilities(t, temperature)
        others = [k for k in range(len(s)) if k != y]
        rest_s, rest_t = (math.fsum(math.exp(log_p[k]) for k in others) for log_p in (log_s, log_t))
        target = math.exp(log_t[y]) * (log_t[y] - log_s[y]) + rest_t * math.log(rest_t / rest_s)
        among = math.fsum(math.exp(log_t[k]) / rest_t * ((log_t[k] - math.log(rest_t)) - (log_s[k] - math.log(rest_s))) for k in others)
        total.append(alpha * target + beta * among)
    return temperature**2 * mean(total)


def correlation(a, b):
    """Pearson's; 0 where one side is constant."""
    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b = (math.sqrt(math.fsum((x - m) ** 2 for x in v)) for v, m in ((a, mean_a), (b, mean_b)))
    if min(spread_a, spread_b) < 1e-12:
        return 0.0
    return math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / (spread_a * spread_b)


def plain_dist(student, teacher, beta, gamma, temperature):
    p_s, p_t = ([[math.exp(x) for x in log_probabilities(z, temperature)] for z in logits] for logits in (student, teacher))
    classes = range(len(p_s[0]))
    inter = mean([1 - correlation(s, t) for s, t in zip(p_s, p_t)])
    intra = mean([1 - correlation([row[k] for row in p_s], [row[k] for row in p_t]) for k in classes])
    return temperature**2 * (beta * inter + gamma * intra)


def shares(source, target):
    """For each of the target cells: which source cells it covers, and by what share of its width."""
    width = source / target
    return [[(u, (min((i + 1) * width, u + 1) - max(i * width, u)) / width) for u in range(source) if min((i + 1) * width, u + 1) > max(i * width, u)] for i in range(target)]


def coarser(one_map, height, width):
    """Area average of one H×W map: every source cell counts by the share of it that lies in the target cell."""
    if (len(one_map), len(one_map[0])) == (height, width):
        return one_map
    return [[sum(a * b * one_map[u][v] for u, a in high for v, b in wide) for wide in shares(len(one_map[0]), width)] for high in shares(len(one_map), height)]


def same_grid(map_s, map_t):
    height, width = min(len(map_s), len(map_t)), min(len(map_s[0]), len(map_t[0]))
    return coarser(map_s, height, width), coarser(map_t, height, width)


def mean_square(map_s, map_t):
    return mean([(a - b) ** 2 for a, b in zip(flat(map_s), flat(map_t))])


def unit_length(one_map):
    length = math.sqrt(math.fsum(x**2 for x in flat(one_map)))
    return [[x / length if length > 1e-12 else 0.0 for x in row] for row in one_map]


def unit_range(one_map):
    low, high = min(flat(one_map)), max(flat(one_map))
    return [[(x - low) / (high - low) if high - low > 1e-9 else 0.0 for x in row] for row in one_map]


def rectified(one_map):
    return [[max(x, 0.0) for x in row] for row in one_map]


def plain_hint(student, teacher):
    return mean([mean_square(*same_grid(s, t)) for s, t in zip(student, teacher)])


def plain_cam(student, teacher, normalize):
    scaled = {"minmax": unit_range, "l2": unit_length}[normalize]
    return mean([mean_square(*(scaled(m) for m in same_grid(rectified(s), rectified(t)))) for s, t in zip(student, teacher)])


def plain_attention_map(features, p):
    return [[mean([abs(channel[u][v]) ** p for channel in features]) for v in range(len(features[0][0]))] for u in range(len(features[0]))]


def plain_attention_maps_loss(student, teacher):
    return mean([mean_square(*(unit_length(m) for m in same_grid(s, t))) for s, t in zip(student, teacher)])


def plain_attention(student, teacher, p):
    return plain_attention_maps_loss([plain_attention_map(f, p) for f in student], [plain_attention_map(f, p) for f in teacher])


def plain_fitnet(student, teacher):
    return mean([mean_square(*same_grid(s, t)) for f_s, f_t in zip(student, teacher) for s, t in zip(f_s, f_t)])


def block_means(one_map, across):
    """Adaptive average pooling: cell i takes the rows from ⌊i·H/r⌋ up to, not including, ⌈(i+1)·H/r⌉; columns likewise."""
    height, width = len(one_map), len(one_map[0])
    return [[mean([one_map[u][v] for u in range(i * height // across, -(-(i + 1) * height // across)) for v in range(j * width // across, -(-(j + 1) * width // across))])
             for j in range(across)] for i in range(across)]


def plain_binarized(one_map):
    threshold = mean([abs(x) for x in flat(one_map)])
    return [[1.0 if x > threshold else 0.0 for x in row] for row in one_map]


def paper_cat(student, teacher, resolution, normalize, binarize):
    """The paper's form: per image the mean over the classes of the *summed* squared difference over the cells."""
    images = []
    for maps_s, maps_t in zip(student, teacher):
        classes = []
        for map_s, map_t in zip(maps_s, maps_t):
            map_s, map_t = (block_means(m, resolution) for m in (map_s, plain_binarized(map_t) if binarize else map_t))
            if normalize:
                map_s, map_t = unit_length(map_s), unit_length(map_t)
            classes.append(math.fsum((a - b) ** 2 for a, b in zip(flat(map_s), flat(map_t))))
        images.append(mean(classes))
    return mean(images)


def plain_selected(maps, logits, n, largest):
    """The maps of the n classes with the highest or the lowest logits, image by image."""
    return [[image[k] for k in sorted(range(len(z)), key=lambda k: z[k], reverse=largest)[:n]] for image, z in zip(maps, logits)]


def plain_local(features, weight, bias, grids):
    """Class maps plus bias, pooled to m×m cells for every m: N logit vectors per image."""
    images = []
    for image in features:
        maps = [[[math.fsum(w * channel[u][v] for w, channel in zip(row, image)) + b for v in range(len(image[0][0]))] for u in range(len(image[0]))]
                for row, b in zip(weight, bias)]
        pooled = [[flat(block_means(one_map, m)) for one_map in maps] for m in grids]
        images.append([[one_class[cell] for one_class in grid] for grid, m in zip(pooled, grids) for cell in range(m * m)])
    return images


def plain_sdd(student, teacher, temperature, beta):
    values = []
    for cells_s, cells_t in zip(student, teacher):
        top = [row.index(max(row)) for row in cells_t]
        values += [(1 if here == top[0] else beta) * divergence(s, t, temperature) for s, t, here in zip(cells_s, cells_t, top)]
    return temperature**2 * mean(values)


def plain_deit(tokens, teacher, labels, kind, alpha, tau, smoothing):
    classes, total = range(len(teacher[0])), []
    for (cls, dist), t, y in zip(tokens, teacher, labels):
        target = y if isinstance(y, list) else [(1 - smoothing) * (k == y) + smoothing / len(classes) for k in classes]
        base = -math.fsum(target[k] * log_probabilities(cls)[k] for k in classes)
        part = {"none": lambda: None, "hard": lambda: -log_probabilities(dist)[t.index(max(t))], "soft": lambda: tau**2 * divergence(dist, t, tau) / len(classes)}[kind]()
        total.append(base if kind == "none" else (1 - alpha) * base + alpha * part)
    return mean(total)


def plain_refinement(coarse, fine, temperature):
    return mean([divergence(c, f, temperature) / len(c) for c, f in zip(rows(coarse), rows(fine))])


def plain_suppression(dropped):
    return mean([(math.tanh(z) + 1) ** 2 for z in flat(dropped)])


# ---- the comparison ----

def central_differences(function, nested, step=1e-5):
    """The gradient of function(nested), one number after the other."""
    nested, gradient = deepcopy(nested), []

    def visit(part):
        for i, value in enumerate(part):
            if isinstance(value, list):
                visit(value)
            else:
                part[i] = value + step
                above = function(nested)
                part[i] = value - step
                gradient.append((above - function(nested)) / (2 * step))
                part[i] = value

    visit(nested)
    return gradient


def compare(loss_function, plain_function, student, *teacher):
    """Value and gradient of both formulations agree; nothing flows to the teacher. Returns both differences, the second relative to the largest component."""
    student = student.double().clone().requires_grad_()
    teacher = [t.double().clone().requires_grad_() for t in teacher]
    loss = loss_function(student, *teacher)
    assert loss.shape == () and loss.dtype == torch.float64
    gradient, *flown = torch.autograd.grad(loss, (student, *teacher), allow_unused=True)
    assert all(g is None for g in flown), "a gradient reached the teacher"
    others = [t.tolist() for t in teacher]
    plain = plain_function(student.tolist(), *others)
    expected = torch.tensor(central_differences(lambda s: plain_function(s, *others), student.tolist()), dtype=torch.float64)
    value_difference = abs(loss.item() - plain) / max(1, abs(plain))
    gradient_difference = (gradient.flatten() - expected).abs().max().item() / max(1e-3, expected.abs().max().item())
    assert value_difference <= TOLERANCE and gradient_difference <= TOLERANCE, (value_difference, gradient_difference)
    return value_difference, gradient_difference


def random(seed, *shapes, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors[0] if len(shapes) == 1 else tensors


def labels_of(seed, images, classes):
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(100 + seed))


LOGITS = [(1, 2), (4, 5), (6, 3), (2, 9)]
TOKENS = [(2, 3, 4), (1, 5, 2), (3, 1, 6)]
GRIDS = [((2, 4, 4), (4, 4)), ((2, 3, 5), (6, 10)), ((1, 7, 7), (3, 4)), ((2, 4, 6), (6, 4)), ((2, 2, 3), (2, 3))]      # (images, H, W), (H', W')


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", (0.5, 1, 4))
@pytest.mark.parametrize("shape", LOGITS + TOKENS)
def test_kd(shape, temperature, seed):
    compare(lambda s, t: kd_loss(s, t, temperature), lambda s, t: plain_kd(s, t, temperature), *random(seed, shape, shape, scale=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", (1, 2))
@pytest.mark.parametrize("shape", [(4, 5), (6, 3), (2, 9)])
def test_standardized_kd(shape, temperature, seed):
    compare(lambda s, t: standardized_kd_loss(s, t, temperature), lambda s, t: plain_standardized_kd(s, t, temperature), *random(seed, shape, shape, scale=3))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha,beta,temperature", [(1, 8, 4), (1, 1, 1), (0, 2, 3), (2, 0, 0.5)])
@pytest.mark.parametrize("shape", LOGITS)
def test_dkd(shape, alpha, beta, temperature, seed):
    labels = labels_of(seed, *shape)
    compare(lambda s, t: dkd_loss(s, t, labels, alpha, beta, temperature), lambda s, t: plain_dkd(s, t, labels.tolist(), alpha, beta, temperature),
            *random(seed, shape, shape, scale=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"beta": 1, "gamma": 1, "temperature": 1}, {"beta": 0, "gamma": 3, "temperature": 2}])
@pytest.mark.parametrize("shape", [(4, 5), (6, 3), (3, 9)])
def test_dist(shape, options, seed):
    compare(lambda s, t: dist_loss(s, t, **options), lambda s, t: plain_dist(s, t, **{"beta": 2, "gamma": 2, "temperature": 4, **options}),
            *random(seed, shape, shape, scale=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape,other", GRIDS)
def test_hint(shape, other, seed):
    student, teacher = random(seed, shape, (shape[0], *other))
    compare(hint_loss, plain_hint, student.tanh(), teacher.tanh())
    compare(hint_loss, plain_hint, teacher.tanh(), student.tanh())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalize", ("minmax", "l2"))
@pytest.mark.parametrize("shape,other", GRIDS)
def test_cam(shape, other, normalize, seed):
    student, teacher = random(seed, shape, (shape[0], *other))
    compare(lambda s, t: cam_loss(s, t, normalize=normalize), lambda s, t: plain_cam(s, t, normalize), student, teacher)
    compare(lambda s, t: cam_loss(s, t, normalize=normalize), lambda s, t: plain_cam(s, t, normalize), teacher, student)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", (1, 2, 3))
@pytest.mark.parametrize("shape,other", GRIDS)
def test_attention_transfer(shape, other, p, seed):
    images, height, width = shape
    student, teacher = random(seed, (images, 2, height, width), (images, 3, *other))
    compare(lambda s, t: attention_transfer_loss(s, t, p), lambda s, t: plain_attention(s, t, p), student, teacher)
    expected = torch.tensor([plain_attention_map(f, p) for f in teacher.tolist()], dtype=torch.float64)
    torch.testing.assert_close(attention_map(teacher, p), expected, atol=1e-12, rtol=1e-12)
    compare(attention_map_loss, plain_attention_maps_loss, attention_map(student, p), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape,other", GRIDS)
def test_fitnet(shape, other, seed):
    images, height, width = shape
    compare(fitnet_loss, plain_fitnet, *random(seed, (images, 3, height, width), (images, 3, *other)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature,beta", [(4, 2), (1, 0.5), (2, 1)])
@pytest.mark.parametrize("shape", TOKENS)
def test_sdd(shape, temperature, beta, seed):
    compare(lambda s, t: sdd_loss(s, t, temperature, beta), lambda s, t: plain_sdd(s, t, temperature, beta), *random(seed, shape, shape, scale=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid,other,grids", [((4, 4), (4, 4), (1, 2, 4)), ((3, 5), (6, 5), (1, 2)), ((2, 2), (4, 4), (1, 4)), ((5, 4), (2, 3), (1, 3))])
def test_local_logits_and_sdd(grid, other, grids, seed):
    """From the features to the loss, with the gradient in features, weight and bias of the student."""
    features, weight, bias, teacher_features, teacher_weight, teacher_bias = random(seed, (2, 3, *grid), (4, 3), (4,), (2, 5, *other), (4, 5), (4,))

    def local(features, weight, bias):
        return local_logits(features.mean((2, 3)) @ weight.T + bias, features, weight, grids)

    teacher = local(teacher_features, teacher_weight, teacher_bias)
    expected = torch.tensor(plain_local(teacher_features.tolist(), teacher_weight.tolist(), teacher_bias.tolist(), grids), dtype=torch.float64)
    assert teacher.shape == (2, sum(m * m for m in grids), 4)
    torch.testing.assert_close(teacher, expected, atol=1e-12, rtol=1e-12)
    f, w, b = features.tolist(), weight.tolist(), bias.tolist()
    compare(lambda x, t: sdd_loss(local(x, weight, bias), t, 4), lambda x, t: plain_sdd(plain_local(x, w, b, grids), t, 4, 2), features, teacher)
    compare(lambda x, t: sdd_loss(local(features, x, bias), t, 4), lambda x, t: plain_sdd(plain_local(f, x, b, grids), t, 4, 2), weight, teacher)
    compare(lambda x, t: sdd_loss(local(features, weight, x), t, 4), lambda x, t: plain_sdd(plain_local(f, w, x, grids), t, 4, 2), bias, teacher)


CAT_FORMS = [(resolution, normalize, binarize) for resolution in (1, 2, 3, 4) for normalize in (True, False) for binarize in (True, False)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("resolution,normalize,binarize", CAT_FORMS)
def test_cat(resolution, normalize, binarize, seed):
    """The value here is the paper's, divided by r². Grids that r divides, grids that it does not, grids that differ."""
    for grid, other in (((4, 4), (4, 4)), ((5, 4), (4, 7))):
        student, teacher = random(seed, (2, 3, *grid), (2, 3, *other))
        compare(lambda s, t: cat_loss(s, t, resolution, normalize=normalize, binarize=binarize),
                lambda s, t: paper_cat(s, t, resolution, normalize, binarize) / resolution**2, student, teacher)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", (1, 2, 5))
@pytest.mark.parametrize("largest", (True, False))
@pytest.mark.parametrize("binarize", (True, False))
def test_cat_of_some_classes(binarize, largest, n, seed):
    """Only the n chosen classes count, and only their maps get a gradient."""
    student, teacher, logits = random(seed, (2, 5, 4, 4), (2, 5, 4, 4), (2, 5))

    def chosen(student, teacher):
        student, teacher = (plain_selected(maps, logits.tolist(), n, largest) for maps in (student, teacher))
        assert all(len(image) == n for image in student)
        return paper_cat(student, teacher, 2, True, binarize) / 4

    compare(lambda s, t: cat_loss(*select_class_maps(s, t, logits, n, largest), 2, binarize=binarize), chosen, student, teacher)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ("none", "soft", "hard"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_deit(smoothing, kind, seed):
    tokens, teacher, labels = *random(seed, (4, 2, 5), (4, 5), scale=2), labels_of(seed, 4, 5)
    mixed = torch.softmax(random(seed + 7, (4, 5)), dim=1)
    for target in (labels, mixed):
        compare(lambda s, t: deit_distillation_loss(s[:, 0], s[:, 1], t, target, kind=kind, alpha=0.3, tau=3.0, label_smoothing=smoothing),
                lambda s, t: plain_deit(s, t, target.tolist(), kind, 0.3, 3.0, smoothing), tokens, teacher)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", (0.5, 4, 64))
@pytest.mark.parametrize("shape", TOKENS)
def test_refinement(shape, temperature, seed):
    compare(lambda c, f: refinement_loss(c, f, temperature), lambda c, f: plain_refinement(c, f, temperature), *random(seed, shape, shape, scale=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", TOKENS)
def test_background_suppression(shape, seed):
    compare(background_suppression_loss, plain_suppression, random(seed, shape))


# ---- unusual inputs ----

LOGIT_LOSSES = {
    "kd": lambda s, t: kd_loss(s, t, 3), "kd of cells": lambda s, t: kd_loss(s[:, None], t[:, None], 3), "standardized_kd": lambda s, t: standardized_kd_loss(s, t, 2),
    "dkd": lambda s, t: dkd_loss(s, t, torch.arange(len(s)) % s.shape[1], 1, 8, 4), "dist": dist_loss, "dist at T = 1": lambda s, t: dist_loss(s, t, temperature=1),
    "sdd": lambda s, t: sdd_loss(s[:, None].expand(-1, 3, -1), t[:, None].expand(-1, 3, -1), 4),
    "deit soft": lambda s, t: deit_distillation_loss(s, s, t, torch.zeros(len(s), dtype=torch.long), kind="soft", alpha=0.5, tau=3.0),
    "deit hard": lambda s, t: deit_distillation_loss(s, s, t, torch.zeros(len(s), dtype=torch.long), kind="hard", alpha=0.5, tau=1.0),
    "refinement": lambda s, t: refinement_loss(s[:, None], t[:, None], 4), "background suppression": lambda s, t: background_suppression_loss(s)}
MAP_LOSSES = {
    "hint": lambda s, t: hint_loss(s[:, 0], t[:, 0]), "cam minmax": lambda s, t: cam_loss(s[:, 0], t[:, 0]), "cam l2": lambda s, t: cam_loss(s[:, 0], t[:, 0], normalize="l2"),
    "cat": lambda s, t: cat_loss(s, t, 2), "cat binarised": lambda s, t: cat_loss(s, t, 2, binarize=True), "cat plain": lambda s, t: cat_loss(s, t, 2, normalize=False),
    "attention transfer": attention_transfer_loss, "fitnet": fitnet_loss,
    "local logits": lambda s, t: sdd_loss(*(local_logits(full_precision(f).mean((2, 3)), f, torch.eye(3).to(f), (1, 2)) for f in (s, t)), 4)}


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("sign", (1, -1))
def test_large_logits_are_finite(name, dtype, sign):
    """Logits of ±1000, of one mind and opposed: value and gradient stay finite."""
    student = torch.tensor([[1000.0, -1000.0, 0.0], [-1000.0, -1000.0, 1000.0], [1000.0, 1000.0, 1000.0]], dtype=dtype).requires_grad_()
    loss = LOGIT_LOSSES[name](student, sign * student.detach().roll(1, 0))
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_large_logits_in_single_precision(name):
    """The value in float32 is that of float64, also where the exponentials alone would overflow."""
    student, teacher = random(3, (4, 6), (4, 6), scale=10 if name == "dist at T = 1" else 300)      # it correlates probabilities, and float32 ends at 1e-45
    expected = LOGIT_LOSSES[name](student, teacher).item()
    assert LOGIT_LOSSES[name](student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_large_logits_have_the_right_value():
    student, teacher = random(4, (3, 5), (3, 5), scale=1000)
    labels = labels_of(4, 3, 5)
    compare(lambda s, t: kd_loss(s, t, 4), lambda s, t: plain_kd(s, t, 4), student, teacher)
    compare(lambda s, t: standardized_kd_loss(s, t, 2), lambda s, t: plain_standardized_kd(s, t, 2), student, teacher)
    assert dkd_loss(student / 10, teacher / 10, labels, 1, 8, 4).item() == pytest.approx(plain_dkd((student / 10).tolist(), (teacher / 10).tolist(), labels.tolist(), 1, 8, 4), rel=1e-6)


@pytest.mark.parametrize("tied", [[[1.0, 1.0, 0.0, -1.0], [2.0, 0.5, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]], [[0.3, 0.3, 0.3, 0.3], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 0.0, 0.0]]])
def test_tied_logits(tied):
    """A teacher with equal logits in some places, or in all."""
    student, teacher, labels = random(5, (3, 4)), torch.tensor(tied, dtype=torch.float64), torch.tensor([0, 2, 3])
    compare(lambda s, t: kd_loss(s, t, 4), lambda s, t: plain_kd(s, t, 4), student, teacher)
    compare(lambda s, t: standardized_kd_loss(s, t, 2), lambda s, t: plain_standardized_kd(s, t, 2), student, teacher)
    compare(lambda s, t: dkd_loss(s, t, labels, 1, 8, 4), lambda s, t: plain_dkd(s, t, labels.tolist(), 1, 8, 4), student, teacher)
    compare(lambda s, t: dist_loss(s, t), lambda s, t: plain_dist(s, t, 2, 2, 4), student, teacher)
    compare(lambda s, t: sdd_loss(s, t, 4), lambda s, t: plain_sdd(s, t, 4, 2), student[None], teacher[None])
    compare(lambda s, t: deit_distillation_loss(s[:, 0], s[:, 1], t, labels, kind="hard", alpha=0.5, tau=1.0),
            lambda s, t: plain_deit(s, t, labels.tolist(), "hard", 0.5, 1.0, 0.1), random(6, (3, 2, 4)), teacher)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_student_without_preference(name):
    """A student whose logits are all equal but for the last bit: finite, and no exploding gradient."""
    rounding = torch.arange(100).remainder(2)
    for level in (0.0, 0.1, 100.1):
        student = torch.full((3, 100), level)
        student = torch.where(rounding == 1, student.nextafter(torch.tensor(2e3)), student).requires_grad_()
        loss = LOGIT_LOSSES[name](student, torch.randn(3, 100, generator=torch.Generator().manual_seed(0)))
        gradient = torch.autograd.grad(loss, student)[0]
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 10


def test_constant_maps():
    """One map that is constant or zero, among others that are not: the formulations agree, and nothing is NaN."""
    student, teacher = random(7, (3, 4, 4), (3, 4, 4))
    student[1], teacher[0], teacher[2] = -1.0, 0.5, 0.0                            # rectified, the student's map is zero
    for normalize in ("minmax", "l2"):
        compare(lambda s, t: cam_loss(s, t, normalize=normalize), lambda s, t: plain_cam(s, t, normalize), student, teacher)
    compare(hint_loss, plain_hint, student, teacher)
    student, teacher = random(8, (2, 3, 4, 4), (2, 3, 4, 4))
    student[0, 1], teacher[1, 2], teacher[0, 0] = 0.25, 0.5, 0.0
    for resolution, normalize, binarize in CAT_FORMS:
        compare(lambda s, t: cat_loss(s, t, resolution, normalize=normalize, binarize=binarize),
                lambda s, t: paper_cat(s, t, resolution, normalize, binarize) / resolution**2, student, teacher)
    teacher[1] = 0.0                                                               # a teacher without any activity in one image
    compare(attention_transfer_loss, lambda s, t: plain_attention(s, t, 2), student, teacher)


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize("level", (0.0, 0.1, 3.7, -2.0))
def test_a_student_with_constant_maps(name, level):
    student = torch.full((2, 3, 7, 7), level, requires_grad=True)
    loss = MAP_LOSSES[name](student, torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)))
    gradient = torch.autograd.grad(loss, student)[0]
    assert loss.isfinite() and gradient.isfinite().all()
    if name == "cam minmax":
        assert gradient.abs().max() == 0


def test_rounding_is_no_shape():
    """Brought to another grid, a constant map is constant only up to rounding; 0…1 must not magnify that."""
    teacher = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for level in (0.1, 0.3, 3.7, 1000.1):
        student = torch.full((2, 7, 11), level, requires_grad=True)
        loss = cam_loss(student, teacher)
        torch.testing.assert_close(loss, cam_loss(torch.zeros(2, 7, 11), teacher))
        assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *MAP_LOSSES])
def test_half_precision_inputs(name, dtype):
    """Half-precision inputs give the float32 value of the same numbers, with and without autocast, and a gradient in their own precision."""
    loss_function = {**LOGIT_LOSSES, **MAP_LOSSES}[name]
    shape = (4, 3) if name in LOGIT_LOSSES else (4, 3, 6, 6)
    student, teacher = (tensor.to(dtype) for tensor in random(9, shape, shape, scale=2))
    student.requires_grad_()
    wide_student = student.detach().float().requires_grad_()
    wide = loss_function(wide_student, teacher.float())
    wide_gradient = torch.autograd.grad(wide, wide_student)[0]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_function(student, teacher)
        gradient = torch.autograd.grad(loss, student)[0]
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(loss, wide, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient.float(), wide_gradient, atol=0.02 * wide_gradient.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("call,message", [
    (lambda: kd_loss(torch.zeros(4, 5), torch.zeros(4, 6), 4), "(4, 5) and (4, 6)"),
    (lambda: kd_loss(torch.zeros(5), torch.zeros(5), 4), "one shape, B×K"),
    (lambda: kd_loss(torch.zeros(2, 3, 5), torch.zeros(2, 5), 4), "(2, 3, 5) and (2, 5)"),
    (lambda: kd_loss(torch.zeros(4, 5), torch.zeros(4, 5), -1), "temperature must be positive"),
    (lambda: standardized_kd_loss(torch.zeros(4, 5), torch.zeros(3, 5), 2), "(4, 5) and (3, 5)"),
    (lambda: dkd_loss(torch.zeros(4, 5), torch.zeros(4, 4), torch.zeros(4, dtype=torch.long), 1, 8, 4), "(4, 5) and (4, 4)"),
    (lambda: dkd_loss(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(1, dtype=torch.long), 1, 8, 4), "one class index per image"),
    (lambda: dist_loss(torch.zeros(4, 5), torch.zeros(5, 4)), "(4, 5) and (5, 4)"),
    (lambda: dist_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)), "must be B×K"),
    (lambda: hint_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4)), "(2, 1, 4, 4) and (2, 4, 4)"),
    (lambda: cat_loss(torch.zeros(2, 5, 4, 4), torch.zeros(2, 6, 4, 4), 2), "(2, 5, 2, 2) and (2, 6, 2, 2)"),
    (lambda: cat_loss(torch.zeros(2, 5, 4, 4), torch.zeros(2, 5, 4, 4), 0), "at least 1 cell per side"),
    (lambda: attention_map(torch.zeros(2, 4, 4)), "B×C×H×W, got (2, 4, 4)"),
    (lambda: attention_map_loss(torch.ones(2, 4, 4), torch.ones(3, 4, 4)), "(2, 4, 4) and (3, 4, 4)"),
    (lambda: attention_transfer_loss(torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 4)), "(2, 4, 4) and (1, 4, 4)"),
    (lambda: fitnet_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)), "1×1 convolution first"),
    (lambda: fitnet_loss(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)), "must be B×C×H×W"),
    (lambda: cam_loss(torch.zeros(2, 4, 4), torch.zeros(1, 4, 4)), "(2, 4, 4) and (1, 4, 4)"),
    (lambda: cam_loss(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), normalize="max"), "choose one of minmax, l2"),
    (lambda: local_logits(torch.zeros(2, 5), torch.zeros(2, 3, 4, 4), torch.zeros(6, 3), (1, 2)), "(6, 3) and (2, 5)"),
    (lambda: local_logits(torch.zeros(2, 5), torch.zeros(2, 3, 16), torch.zeros(5, 3), (1, 2)), "(2, 3, 16)"),
    (lambda: local_logits(torch.zeros(2, 5), torch.zeros(2, 4, 4, 4), torch.zeros(5, 3), (1, 2)), "with the same C"),
    (lambda: sdd_loss(torch.zeros(2, 5, 4), torch.zeros(2, 21, 4), 4), "make both with the same grids"),
    (lambda: sdd_loss(torch.zeros(2, 4), torch.zeros(2, 4), 4), "must both be B×N×K"),
    (lambda: sdd_loss(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4), 0), "temperature must be positive"),
    (lambda: deit_distillation_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), kind="hard", alpha=0.5, tau=1.0), "(2, 4) and (2, 5)"),
    (lambda: deit_distillation_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), kind="firm", alpha=0.5, tau=1.0), "none, soft, hard"),
    (lambda: refinement_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), 4), "(2, 3, 4) and (2, 4, 4)"),
])
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


# ---- what the methods promise ----

@pytest.mark.parametrize("resolution", (1, 2, 4))
def test_cat_is_the_papers_value_over_the_cells(resolution):
    student, teacher = random(10, (3, 4, 4, 4), (3, 4, 8, 8))
    here = cat_loss(student, teacher, resolution).item()
    assert here * resolution**2 == pytest.approx(paper_cat(student.tolist(), teacher.tolist(), resolution, True, False), rel=1e-12)


@pytest.mark.parametrize("n", (1, 3, 6))
def test_the_number_of_chosen_classes_is_exact(n):
    """The original compares strictly with one sorted logit, and so keeps one class too few at the top and one too many at the bottom."""
    logits = random(11, (4, 8))
    maps = random(12, (4, 8, 3, 3))
    for z in logits.tolist():
        falling = sorted(z, reverse=True)
        assert len([k for k in range(8) if z[k] > falling[n - 1]]) == n - 1         # the original's highest
        assert len([k for k in range(8) if not z[k] > falling[8 - 1 - n]]) == n + 1  # the original's lowest
    for largest in (True, False):
        student, teacher = select_class_maps(maps, 2 * maps, logits, n, largest)
        assert student.shape == teacher.shape == (4, n, 3, 3)
        assert student.tolist() == plain_selected(maps.tolist(), logits.tolist(), n, largest)
        assert torch.equal(teacher, 2 * student)


def test_tied_logits_still_give_n_classes():
    student, teacher = select_class_maps(torch.ones(2, 6, 3, 3), torch.ones(2, 6, 3, 3), torch.zeros(2, 6), 4)
    assert student.shape == teacher.shape == (2, 4, 3, 3)


def test_binarised_maps_are_one_above_the_mean_absolute_value():
    maps = random(13, (2, 3, 5, 4))
    binary = binarize_maps(maps)
    assert set(binary.flatten().tolist()) == {0.0, 1.0}
    assert binary.tolist() == [[plain_binarized(one_map) for one_map in image] for image in maps.tolist()]
    assert binarize_maps(-maps.abs()).sum() == 0                                   # nothing negative exceeds the threshold


def test_a_bias_of_the_head_is_dropped():
    """Class maps are weight times features: a bias changes the logits, not the loss, and gets no gradient."""
    features, teacher = random(14, (3, 6, 4, 4), (3, 5, 4, 4))
    head = nn.Linear(6, 5).double()
    values, logits = [], []
    for level in (0.0, 7.0):
        nn.init.constant_(head.bias, level)
        loss = cat_loss(class_activation_maps(features, head.weight), teacher, 2)
        assert torch.autograd.grad(loss, head.bias, allow_unused=True)[0] is None
        values.append(loss.item())
        logits.append(head(features.mean((2, 3))))
    assert values[0] == values[1] and not torch.equal(*logits)


def correlation_of_maps(features_s, weight_s, features_t, weight_t, label):
    """Pearson's, of the two class activation maps of one image, written out."""
    maps = [[math.fsum(w * channel[u][v] for w, channel in zip(weight[label], image)) for u in range(len(image[0])) for v in range(len(image[0][0]))]
            for image, weight in ((features_s, weight_s), (features_t, weight_t))]
    return correlation(*maps), len(maps[0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale,accuracy", [(0.05, 1e-2), (0.005, 1e-4), (0.0005, 1e-6)])
def test_a_hint_at_small_scale_counts_the_correlation(scale, accuracy, seed):
    """L ≈ 2 s² (1 − ρ), times (N − 1)/N as the maps have unbiased standard deviation 1; the error falls with s²."""
    features_s, features_t, weight_s, weight_t = random(seed, (1, 4, 6, 5), (1, 7, 6, 5), (3, 4), (3, 7))
    label = torch.tensor([seed])
    hints = [hint_map(f, w, label, scale=scale) for f, w in ((features_s, weight_s), (features_t, weight_t))]
    rho, cells = correlation_of_maps(features_s[0].tolist(), weight_s.tolist(), features_t[0].tolist(), weight_t.tolist(), seed)
    assert hint_loss(*hints).item() == pytest.approx(2 * scale**2 * (1 - rho) * (cells - 1) / cells, rel=accuracy)


@pytest.mark.parametrize("seed", SEEDS)
def test_cat_of_one_centred_class_is_a_hint_at_small_scale(seed):
    """K' = 1, r = H, maps centred to mean 0: CAT's normalised loss is 2 (1 − ρ)/N, the hint's s² (N − 1) times that."""
    scale = 1e-4
    features_s, features_t, weight_s, weight_t = random(20 + seed, (1, 4, 5, 5), (1, 6, 5, 5), (3, 4), (3, 6))
    label = torch.tensor([seed])
    maps = [class_activation_map(f, w, label) for f, w in ((features_s, weight_s), (features_t, weight_t))]
    centred = [m - m.mean() for m in maps]
    cat = cat_loss(centred[0][:, None], centred[1][:, None], 5).item()
    rho, cells = correlation_of_maps(features_s[0].tolist(), weight_s.tolist(), features_t[0].tolist(), weight_t.tolist(), seed)
    assert cat == pytest.approx(2 * (1 - rho) / cells, rel=1e-9)
    hint = hint_loss(*(hint_map(f, w, label, scale=scale) for f, w in ((features_s, weight_s), (features_t, weight_t)))).item()
    assert hint == pytest.approx(scale**2 * (cells - 1) * cat, rel=1e-6)


def test_z_scores_are_those_of_the_definition():
    logits = random(15, (5, 7), scale=4)
    expected = torch.tensor([z_scores(z) for z in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(standardize_logits(logits), expected, atol=1e-12, rtol=1e-12)


def test_local_logits_of_the_whole_image_are_the_logits():
    features, weight, bias = random(16, (2, 3, 5, 7), (4, 3), (4,))
    logits = features.mean((2, 3)) @ weight.T + bias
    assert torch.equal(local_logits(logits, features, weight, (1, 2, 4))[:, 0], logits)
