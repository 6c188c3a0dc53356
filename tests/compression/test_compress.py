"""compress: the best factors by data, ranks where they pay, nothing slower, and the model that was given untouched."""

import copy
import json
import math

import pytest
import torch
from contract import FLOOR, relative_error
from torch import nn

import byol_fast as bf
import byol_fast.compression.analysis
from byol_fast.compression import Analysis

OPEN = {"gate": "none", "progress": False}


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def error(model, compressed, rows):
    with torch.no_grad():
        return float((compressed(rows) - model(rows)).norm() / model(rows).norm())


def test_the_model_given_is_not_modified(low_rank_rows):
    model = perceptron().train()
    model[2].weight.requires_grad_(False)
    modules, bits = list(model.modules()), copy.deepcopy(model.state_dict())
    compressed, _ = bf.compress(model, low_rank_rows, exclude="4", **OPEN)
    assert list(model.modules()) == modules
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert all(module.training for module in compressed.modules())
    assert [type(layer) for layer in compressed[::2]] == [bf.Bottleneck, bf.Bottleneck, nn.Linear]
    assert not compressed[2].encoder.weight.requires_grad
    assert compressed[0].encoder.weight.requires_grad


def test_data_of_low_rank_need_only_that_rank(low_rank_rows):
    model = nn.Sequential(nn.Linear(24, 20))
    by_data, _ = bf.compress(model, low_rank_rows, keep=0.56, **OPEN)
    by_weight, _ = bf.compress(model, low_rank_rows, keep=0.56, method="svd", **OPEN)
    assert by_data[0].rank == by_weight[0].rank == 6
    assert error(model, by_data, low_rank_rows) < 0.01
    assert error(model, by_weight, low_rank_rows) > 0.1


def test_the_factors_of_one_layer_are_the_best_there_are(low_rank_rows):
    model = nn.Sequential(nn.Linear(24, 20)).double()
    rows = low_rank_rows.double()
    compressed, report = bf.compress(model, rows, keep=0.28, **OPEN)
    rank = compressed[0].rank
    output = model(rows).detach()
    best = torch.linalg.svdvals(output - output.mean(0))[rank:].norm() / output.norm()
    # What the output matters is estimated from 200 random directions, which the damping does not even out.
    assert best <= error(model, compressed, rows) < 1.1 * best
    assert report.error == pytest.approx(error(model, compressed, rows))


def test_ranks_by_the_output_of_the_model_beat_equal_shares(low_rank_rows):
    model = perceptron()
    with torch.no_grad():
        # A third of the hidden units does nothing for the output.
        model[4].weight[:, :24] = 0
    results = {}
    for allocation in ("output", "uniform"):
        compressed, report = bf.compress(model, low_rank_rows, keep=0.4, allocation=allocation, **OPEN)
        assert report.kept <= 0.4
        results[allocation] = error(model, compressed, low_rank_rows)
    assert results["output"] < 0.8 * results["uniform"]


def test_ranks_by_measurement_see_errors_that_add_up():
    """The tokens of a sample are alike, and one branch sums them: to first order, both branches matter alike."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.summed, self.kept = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, tokens):
            return torch.cat((self.summed(tokens).sum(1), self.kept(tokens).flatten(1)), dim=1)

    torch.manual_seed(0)
    model = Branches()
    samples = torch.randn(64, 1, 24) + 0.05 * torch.randn(64, 16, 24)
    errors = {}
    for allocation in ("measured", "output"):
        compressed, report = bf.compress(model, samples, keep=0.6, allocation=allocation, **OPEN)
        assert report.kept <= 0.6
        errors[allocation] = error(model, compressed, samples)
    assert errors["measured"] < 0.8 * errors["output"]


def test_one_analysis_serves_many_budgets(low_rank_rows):
    model = perceptron()
    analysis = Analysis(model, low_rank_rows, gate="none")
    for options in ({"keep": 0.3}, {"keep": 0.6, "allocation": "uniform"}, {"error": 0.1}):
        found, report = analysis.compress(**options, progress=False)
        expected, alone = bf.compress(model, low_rank_rows, **options, **OPEN)
        assert report.to_json() == alone.to_json()
        assert torch.equal(found(low_rank_rows), expected(low_rank_rows))


def test_an_analysis_does_not_remember_what_one_budget_refused(low_rank_rows, clock, monkeypatch):
    analysis = Analysis(perceptron(), low_rank_rows)
    with monkeypatch.context() as slow:
        slow.setattr(byol_fast.compression.analysis, "milliseconds", lambda data, *models: [1.0, 1.1])
        assert not analysis.compress(progress=False)[1].replaced
    assert analysis.compress(progress=False)[1].replaced


def test_plain_factors_need_no_data():
    model = perceptron()
    compressed, report = bf.compress(model, None, keep=0.5, method="svd", **OPEN)
    # Of each layer, the largest rank with half its weights.
    assert [layer.rank for layer in report.layers] == [6, 8, 2]
    assert math.isnan(report.error)
    for dense, layer in zip(model[::2], compressed[::2], strict=True):
        weight = dense.weight.double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = left[:, : layer.rank] * values[: layer.rank] @ right[: layer.rank]
        assert relative_error(layer.to_linear().weight, best) < FLOOR[torch.float32]
        assert torch.equal(layer.decoder.bias, dense.bias)


def test_sequential_fitting_makes_up_for_the_layers_before(low_rank_rows):
    model = perceptron()
    one_shot, first = bf.compress(model, low_rank_rows, keep=0.3, **OPEN)
    sequential, second = bf.compress(model, low_rank_rows, keep=0.3, sequential=True, **OPEN)
    assert [layer.rank for layer in first.layers] == [layer.rank for layer in second.layers]
    assert error(model, sequential, low_rank_rows) < error(model, one_shot, low_rank_rows)


def test_an_error_is_kept_by_the_smallest_model_found(low_rank_rows):
    model = perceptron()
    compressed, report = bf.compress(model, low_rank_rows, error=0.1, **OPEN)
    assert error(model, compressed, low_rank_rows) <= 0.1
    _, smaller = bf.compress(model, low_rank_rows, keep=report.kept - 0.03, **OPEN)
    assert smaller.error > 0.1


def test_recovery_learns_from_the_dense_model_and_stops(low_rank_rows):
    model = perceptron()
    recovery = bf.Recovery(layer_epochs=3, epochs=20, lr=3e-3, patience=2)
    compressed, report = bf.compress(model, low_rank_rows, keep=0.3, recovery=recovery, batch_size=16, **OPEN)
    assert report.error < 0.9 * report.error_before_recovery
    assert report.error == pytest.approx(error(model, compressed, low_rank_rows), rel=1e-4)
    assert [row["epoch"] for row in report.history[:3]] == [1, 2, 3]
    assert {"layers_loss", "layers_held_out_error"} <= report.history[0].keys()
    assert "model_held_out_error" in report.history[-1]
    assert all(parameter.grad is None for parameter in compressed.parameters())


def test_hints_make_layers_alike_that_the_output_alone_does_not(low_rank_rows):
    model = perceptron()

    def layer_error(hints):
        options = {"keep": 0.5, "batch_size": 16, **OPEN}
        found, _ = bf.compress(model, low_rank_rows, recovery=bf.Recovery(epochs=20, hints=hints, lr=3e-3), **options)
        return error(model[:3], found[:3], low_rank_rows)

    assert layer_error(hints=1.0) < 0.8 * layer_error(hints=0.0)


def test_recovery_never_leaves_the_model_worse_on_what_was_held_out(low_rank_rows):
    options = {"keep": 0.3, "batch_size": 16, **OPEN}
    expected, _ = bf.compress(perceptron(), low_rank_rows, **options)
    # Each step destroys more than it learns.
    recovery = bf.Recovery(epochs=3, lr=10.0, patience=1)
    found, report = bf.compress(perceptron(), low_rank_rows, recovery=recovery, **options)
    assert len(report.history) == 1
    assert torch.equal(found(low_rank_rows), expected(low_rank_rows))
    assert report.error == report.error_before_recovery


# ---------------------------------------------------------------------------------------------------------- the gate


def test_no_layer_that_measures_slower_is_replaced(low_rank_rows, clock):
    # 24·32 + .4 against 56·k + .8: rank 6; 32·32: rank 9; 32·5: rank 0
    clock.call = 0.4
    _, report = bf.compress(perceptron(), low_rank_rows, keep=0.3, progress=False)
    for layer in report.layers:
        assert layer.ms < 0.95 * layer.dense_ms if layer.rank else layer.reason
    assert "break-even rank 0: rank 1 takes 0.837 ms, the dense layer 0.560 ms" in report.layers[2].reason
    assert report.ms < report.dense_ms


def test_a_loss_that_is_not_confirmed_is_none(low_rank_rows, clock, monkeypatch):
    """Every bottleneck measures slower the first time, because of what else the machine does."""
    seen = set()

    def times(site, call, rank):
        disturbed = (site, rank) not in seen
        seen.add((site, rank))
        dense, bottleneck = clock.times(site, call, rank)
        return dense, bottleneck + 100 * disturbed

    expected = bf.compress(perceptron(), low_rank_rows, keep=0.5, progress=False)[1]
    monkeypatch.setattr(byol_fast.compression.gate, "_times", times)
    found = bf.compress(perceptron(), low_rank_rows, keep=0.5, progress=False)[1]
    assert found.replaced
    assert found.to_json() == expected.to_json()


def test_a_refusal_names_the_break_even_rank_and_what_was_asked(low_rank_rows, clock):
    clock.call = 0.5
    _, report = bf.compress(perceptron(), low_rank_rows, keep=0.9, progress=False)
    assert any(layer.reason.startswith("break-even rank ") and ", asked " in layer.reason for layer in report.layers)


def test_a_model_whose_layers_are_all_too_small_comes_back_unchanged_with_the_reasons(low_rank_rows, clock):
    clock.call = 5.0
    model = perceptron()
    compressed, report = bf.compress(model, low_rank_rows, progress=False)
    assert compressed is not model
    assert repr(compressed) == repr(model)
    assert torch.equal(compressed(low_rank_rows), model(low_rank_rows))
    assert (report.error, report.kept, report.parameters) == (0.0, 1.0, report.parameters_before)
    assert all("break-even rank 0" in layer.reason for layer in report.layers)


def test_a_model_that_is_slower_as_a_whole_comes_back_unchanged(low_rank_rows, clock, monkeypatch):
    monkeypatch.setattr(byol_fast.compression.analysis, "milliseconds", lambda data, *models: [1.0, 1.1])
    compressed, report = bf.compress(perceptron(), low_rank_rows, progress=False)
    assert repr(compressed) == repr(perceptron())
    assert "the whole model would take 1.10 ms a batch" in report.layers[0].reason
    assert report.ms == report.dense_ms == 1.0


def test_a_latency_is_met_by_ranks_per_millisecond(low_rank_rows, clock):
    model = perceptron()
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e3
    _, report = bf.compress(model, low_rank_rows, latency=0.6 * total, progress=False)
    saved = sum(layer.dense_ms - layer.ms for layer in report.layers if layer.rank)
    assert total - saved <= 0.6 * total
    assert report.replaced


def test_the_gate_measures_real_layers(low_rank_rows):
    wide = nn.Sequential(nn.Linear(24, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    _, report = bf.compress(wide, low_rank_rows, keep=0.05, progress=False)
    assert all(layer.dense_ms > 0 for layer in report.replaced)
    assert all(layer.reason for layer in report.layers if layer.rank is None)


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_tells_itself(low_rank_rows, tmp_path, clock):
    _, report = bf.compress(perceptron(), low_rank_rows, keep=0.4, exclude="4", progress=False)
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "kind", "weights", "rank", "kept", "error", "ms", "before", "ms"]
    assert text.splitlines()[1].split()[:3] == ["0", "Linear", "768"]
    assert len(report.layers) == 2
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert content["kept"] == report.kept <= 0.4
    assert content["layers"][0]["rank"] == report.layers[0].rank
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0.5, "error": 0.1}, TypeError, "expected at most one of keep, error, latency, got keep, error"),
        ({"keep": 1.5}, ValueError, r"keep: expected a number in \(0, 1\], got 1.5"),
        ({"error": 0.0}, ValueError, "error: expected a number > 0, got 0.0"),
        ({"method": "magic"}, ValueError, "method: expected one of data_aware, svd, got 'magic'"),
        ({"allocation": "none"}, ValueError, "allocation: expected one of measured, output, uniform"),
        ({"gate": "open"}, ValueError, "gate: expected one of latency, none, got 'open'"),
        ({"latency": 1.0, "gate": "none"}, ValueError, 'gate: expected "latency" with latency=…'),
        ({"margin": 1.0}, ValueError, r"margin: expected a number in \[0, 1\)"),
        ({"calibration": None}, ValueError, "calibration: expected data, or"),
        ({"calibration": []}, ValueError, "calibration: expected at least one batch, got none"),
        ({"calibration": "text"}, TypeError, "calibration: expected a tensor, an array or an iterable .*, got str"),
        ({"calibration": torch.full((4, 24), torch.nan)}, ValueError, "calibration: .* got NaN or Inf at 0"),
        ({"forward": lambda model, batch: 3}, TypeError, "model: expected an output with floating-point tensors"),
        ({"model": "model"}, TypeError, "model: expected a torch.nn.Module, got str"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, error, message):
    options = {"model": perceptron(), "calibration": torch.randn(8, 24), "gate": "none", **options}
    with pytest.raises(error, match=message) as caught:
        bf.compress(options.pop("model"), options.pop("calibration"), **options)
    assert "\n" not in str(caught.value)


def test_recovery_checks_its_arguments():
    with pytest.raises(ValueError, match="epochs: expected an integer ≥ 0, got -1"):
        bf.Recovery(epochs=-1)
    with pytest.raises(ValueError, match="hints: expected a number ≥ 0, got -1"):
        bf.Recovery(hints=-1)
    with pytest.raises(ValueError, match="train: expected one of bottlenecks, all, got 'some'"):
        bf.Recovery(train="some")
