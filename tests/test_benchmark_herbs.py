"""What a HERBS step costs: the reference selector is the selector, the parts are the network, and the record holds what it says."""
import json

import numpy as np
import pytest
import torch

from ctrlscam.benchmark_herbs import (ALONE, CASES, GPU_CASES, LOOP, SMALL_CASE, WHOLE, between_parts, herbs_figure, herbs_row, herbs_table, kinds_of_work, part_of_step, part_works,
                                      places_in_common, read_votes, select_one_by_one, select_stages, time_herbs, whole_works, with_selector)
from ctrlscam.benchmark_methods import whole_step
from ctrlscam.benchmark_training import ResidentStream
from ctrlscam.config import Settings
from ctrlscam.herbs import select_tokens
from ctrlscam.processes import pick_device
from ctrlscam.step import build_student, start_run

CPU = torch.device("cpu")
TINY = Settings(dataset="synthbirds", smoke=True, device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run():
    config, batch = SMALL_CASE.settings(TINY), SMALL_CASE.batch(CPU)
    with pytest.warns(UserWarning, match="coarse"):
        state = start_run(config, None, None, CPU, build_student(config, SMALL_CASE.classes))
    state.student.train()
    return state, batch


@pytest.fixture(scope="module")
def record():
    return time_herbs(TINY, rounds=2)


@pytest.mark.parametrize("seed", range(20))
def test_both_selectors_agree_to_the_last_bit(seed):
    generator = torch.Generator().manual_seed(seed)
    B, S, K, D = (int(torch.randint(1, top, (), generator=generator)) for top in (7, 60, 30, 10))
    n = int(torch.randint(1, S + 1, (), generator=generator))
    tokens, votes = (torch.randn(B, S, size, dtype=torch.float64, generator=generator) for size in (D, K))
    results = []
    for selector in (select_tokens, select_one_by_one):
        leaves = [tokens.clone().requires_grad_(), votes.clone().requires_grad_()]
        kept, chosen, rest = selector(*leaves, n)
        assert (kept.shape, chosen.shape, rest.shape) == ((B, n, D), (B, n, K), (B, S - n, K))
        (kept.square().sum() + chosen.sin().sum() + rest.cos().sum()).backward()
        results.append([kept, chosen, rest, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_equal_votes_keep_the_order_of_places():
    tokens, votes = torch.arange(12.0).view(2, 6, 1), torch.zeros(2, 6, 4)
    for selector in (select_tokens, select_one_by_one):
        assert selector(tokens, votes, 3)[0][..., 0].tolist() == [[0, 1, 2], [6, 7, 8]]


def test_parts_together_are_the_network(run):
    state, batch = run
    network = state.student
    network.head.combiner.dropout.eval()
    outputs = network(batch.images)
    stages, tokens, fine, kept = between_parts(network, batch.images, state.config)
    again, votes, coarse = read_votes(network, stages)
    parts = select_stages(network, again, votes, select_one_by_one)
    network.head.combiner.dropout.train()
    for ours, theirs in ((outputs.fine, fine), (outputs.fine, votes), (outputs.coarse, coarse), (outputs.selected, parts[1]), (outputs.dropped, parts[2]), (kept, parts[0])):
        torch.testing.assert_close(list(ours), list(theirs), rtol=1e-4, atol=1e-5)
    assert places_in_common(network, tokens, fine) == 1.0


def test_a_part_leaves_no_gradient_behind(run):
    state, batch = run
    for name, work in part_works(state, batch).items():
        assert work() == SMALL_CASE.batch_size, name
    assert not [value for value in state.student.parameters() if value.grad is not None]


def test_a_part_goes_back_to_its_inputs():
    seen = []

    def double(one):
        one.register_hook(seen.append)
        return [2 * one]

    leaf = torch.ones(2, 3)
    assert part_of_step(double, [leaf], SMALL_CASE.settings(TINY))() == 2
    assert leaf.grad is None and torch.equal(seen[0], 2 * torch.ones(2, 3))


def test_steps_with_either_selector_end_in_the_same_weights():
    config, batch, ends = SMALL_CASE.settings(TINY).replace(learning_rate=1e-2), SMALL_CASE.batch(CPU), []
    for selector in (select_tokens, select_one_by_one):
        with pytest.warns(UserWarning, match="coarse"):
            state = start_run(config, None, None, CPU, build_student(config, SMALL_CASE.classes))
        state.student.train()
        start = state.student.head.combiner.classifier.weight.detach().clone()
        step = with_selector(whole_step(state, ResidentStream(config, batch, {}, None)), selector)
        assert [step(), step()] == [SMALL_CASE.batch_size] * 2
        assert not torch.equal(state.student.head.combiner.classifier.weight, start)
        ends.append([value.detach() for value in state.student.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_mixed_precision():
    case = SMALL_CASE._replace(precision="bf16")
    config, batch = case.settings(TINY), case.batch(CPU)
    with pytest.warns(UserWarning, match="coarse"):
        state = start_run(config, None, None, CPU, build_student(config, case.classes))
        wholes = whole_works(case, state, batch)
    assert {work() for work in (part_works(state, batch) | wholes).values()} == {case.batch_size}
    assert between_parts(state.student, batch.images, config)[1][0].dtype == torch.bfloat16


def test_record_survives_json_and_can_be_shown(record):
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again == record
    timed = {row["candidate"]: row for row in again["rows"] if "note" not in row}
    assert {WHOLE, WHOLE + LOOP, ALONE, "selector", "selector" + LOOP, "combiner", "losses", "backbone"} <= set(timed)
    assert timed[WHOLE]["share"] == dict(median=1.0, min=1.0, max=1.0) and timed[WHOLE]["peak bytes"] > 0
    assert timed["selector"]["operations"] < timed["selector" + LOOP]["operations"]
    assert sum(timed[WHOLE]["kinds"].values()) == pytest.approx(1)
    table = herbs_table(again)
    assert len(table) == len(again["rows"]) and table.loc[(str(SMALL_CASE), "selector"), "× faster than image by image"].count("–") == 1
    assert table.loc[(str(SMALL_CASE), "backbone"), "peak MB"] == "–"
    assert len(herbs_figure(again).axes) == 2


def test_without_a_gpu_the_gpu_cases_are_noted(record):
    noted = [row for row in record["rows"] if "note" in row]
    assert [row["case"] for row in noted] == [str(case) for case in GPU_CASES] and {row["note"] for row in noted} == {"not run: no GPU"}
    assert list(record["summary"]) == [str(SMALL_CASE)]


def test_ratios_are_taken_within_a_round():
    ms = {WHOLE: np.array([100.0, 1000.0, 50.0]), "selector": np.array([1.0, 10.0, 0.5]), "selector" + LOOP: np.array([8.0, 80.0, 4.0]), ALONE: np.array([50.0, 500.0, 25.0])}
    row = herbs_row("selector", ms, SMALL_CASE)
    assert row["share"] == dict(median=0.01, min=0.01, max=0.01) and row["times faster"] == dict(median=8.0, min=8.0, max=8.0)
    assert herbs_row(WHOLE, ms, SMALL_CASE)["over the backbone"]["median"] == 2 and herbs_row(ALONE, ms, SMALL_CASE)["times faster"] is None


def test_memory_that_runs_out_leaves_a_note(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("ctrlscam.benchmark_herbs._time_case", fails)
    found = time_herbs(TINY, rounds=1)
    assert found["rows"][0]["note"] == "not run: out of memory" and found["summary"] == {}
    with pytest.raises(ValueError, match="no timed case"):
        herbs_figure(found)


def test_sizes_are_those_of_recipe_and_paper():
    assert (CASES[0].network, CASES[0].image_size, CASES[0].batch_size, CASES[0].width, CASES[0].selects) == ("mobilenetv2_100", 128, 32, 128, (128, 64, 32, 8))
    assert {(case.image_size, case.batch_size, case.width, case.selects) for case in GPU_CASES} == {(384, 8, 1536, (256, 128, 64, 32))}
    assert GPU_CASES[1].settings(TINY).precision == "fp16"


def test_kinds_of_work_are_told_apart():
    one, query = torch.randn(64, 64), torch.randn(1, 2, 32, 8)
    assert kinds_of_work(lambda: (one @ one @ one) is None or 1, CPU)["matrix"] > 0.3
    shares = kinds_of_work(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query) is None or 1, CPU)
    assert shares["attention"] > 0.3 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.skipif(pick_device(Settings(dataset="synthbirds")).type != "cuda", reason="needs a GPU")
def test_on_a_gpu():
    found = time_herbs(TINY.replace(device="cuda"), rounds=2)
    assert not [row for row in found["rows"] if "note" in row]
    assert found["summary"][str(SMALL_CASE)]["places in common"] > 0.99
