"""pretrain on scikit-learn's digits: every method against the optimum, which linear algebra knows."""

import copy
import functools
import io

import numpy as np
import pytest
import scipy.sparse
import torch
from contract import assert_contract
from torch.utils.data import DataLoader, TensorDataset

import byol_fast as bf

adam = functools.partial(torch.optim.Adam, lr=3e-3)


def eckart_young(rows, rank, centered=True):
    """The smallest possible mean squared error per element, from a float64 SVD."""
    rows = rows.double()
    values = torch.linalg.svdvals(rows - rows.mean(0) if centered else rows)
    return float(values[rank:].square().sum() / rows.numel())


def loss_of(layer, rows):
    """What the layer's reconstruction loses, in float64, without the fused operation."""
    layer, rows = layer.double(), rows.double()
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(layer.decode(layer.encode(rows)), rows))


# ------------------------------------------------------------------------------------------------ the optimum


@pytest.mark.parametrize("method", ["auto", "exact", "alternate", "joint"])
@pytest.mark.parametrize("bias", [True, False])
def test_all_methods_agree_on_the_optimum_of_a_linear_bottleneck(digits, method, bias):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, bias=bias)
    result = bf.pretrain(
        layer,
        rows,
        method=method,
        epochs=400,
        batch_size=None,
        optimizer=functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"),
        stop_at=1.0005,
    )
    assert result.module is layer
    assert result.method == ("exact" if method == "auto" else method)
    assert loss_of(layer, rows) <= 1.001 * eckart_young(rows, 6, bias)
    assert result.certificate <= 1.001


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": True, "bias": False}, {"dtype": torch.float64}])
def test_exact_solves_every_linear_layer(digits, options):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, **options)
    bf.pretrain(layer, rows)
    assert loss_of(layer, rows) <= 1.00001 * eckart_young(rows, 6, options.get("bias", True))


def test_a_rank_beyond_the_features_reconstructs_exactly(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 80)
    result = bf.pretrain(layer, rows)
    assert loss_of(layer, rows) < 1e-12
    assert result.certificate == 1


def test_the_certificate_is_the_quotient_of_the_losses(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    result = bf.pretrain(layer, rows, method="joint", epochs=3, optimizer=adam)
    certificates = [row["certificate"] for row in result.history]
    assert certificates == sorted(certificates, reverse=True)
    assert result.certificate == pytest.approx(loss_of(layer, rows) / eckart_young(rows, 6), rel=1e-6)


def test_stop_at_ends_training_at_the_first_certificate_that_is_good_enough(digits):
    rows, _ = digits
    result = bf.pretrain(
        bf.Bottleneck(64, 6), rows, method="joint", epochs=1000, batch_size=256, optimizer=adam, stop_at=1.2
    )
    certificates = [row["certificate"] for row in result.history]
    assert certificates[-1] <= 1.2 < min(certificates[:-1])


def test_too_many_features_for_a_certificate_are_trained_without(monkeypatch):
    monkeypatch.setattr("byol_fast.pca._COVARIANCE_FEATURES", 32)
    rows = torch.randn(300, 512, generator=torch.Generator().manual_seed(0)).mul_(torch.linspace(0, 1, 512) ** 4)
    layer = bf.Bottleneck(512, 2, bias=False)
    before = loss_of(layer, rows)
    result = bf.pretrain(layer.float(), rows, method="joint", epochs=3, optimizer=adam)
    assert result.pca is None
    assert "certificate" not in result.history[-1]
    assert loss_of(layer, rows) < before
    with pytest.raises(ValueError, match="stop_at: expected few enough features for their covariance, got 512"):
        bf.pretrain(layer.float(), rows, stop_at=1.1)


@pytest.mark.parametrize("method", ["exact", "alternate", "joint"])
def test_the_progress_bar_shows_the_loss_and_the_certificate(digits, monkeypatch, method):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    rows, _ = digits
    result = bf.pretrain(bf.Bottleneck(64, 6), rows, method=method, epochs=2, optimizer=adam)
    last_shown = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert f"loss={result.history[-1]['loss']:.4g}" in last_shown
    assert f"certificate={result.certificate:.4f}" in last_shown


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh"])
def test_a_nonlinear_bottleneck_starts_from_the_linear_optimum(digits, activation):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, activation=activation)
    bf.pretrain(layer, rows, epochs=0)
    assert loss_of(layer, rows) <= 1.02 * eckart_young(rows, 6)


def test_without_warm_start_a_nonlinear_bottleneck_starts_where_it_is(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, activation="relu")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bf.pretrain(layer, rows, epochs=0, warm_start=False)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("method", ["joint", "alternate"])
def test_gradient_steps_improve_a_nonlinear_bottleneck(digits, method):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, activation="gelu")
    result = bf.pretrain(layer, rows, method=method, epochs=30, batch_size=256, warm_start=False, optimizer=adam)
    assert result.method == method
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_alternate_updates_one_half_at_a_time(digits):
    """Each call of the optimiser sees gradients of one half only."""
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, activation="gelu")
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure):
            loss = super().step(closure)
            seen.append(tuple(name for name, p in layer.named_parameters() if p.grad is not None))
            return loss

    bf.pretrain(layer, rows, method="alternate", epochs=2, batch_size=None, optimizer=functools.partial(Spy, lr=1e-3))
    encoder, decoder = ("encoder.weight", "encoder.bias"), ("decoder.weight", "decoder.bias")
    assert seen == [encoder, decoder, encoder, decoder]
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_a_target_of_its_own_is_reconstructed(digits):
    rows, _ = digits
    target = rows.flip(1)
    layer = bf.Bottleneck(64, 64)
    result = bf.pretrain(layer, (rows, target), epochs=60, batch_size=256, optimizer=adam)
    assert result.method == "joint"
    assert result.loss < 0.3 * float(torch.nn.functional.mse_loss(rows, target))
    assert np.isnan(result.certificate)


def test_any_module_with_a_reconstruction_loss_is_trained(digits):
    rows, _ = digits

    class Deep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bf.Bottleneck(64, 6)

        def reconstruction_loss(self, input):
            return self.inner.reconstruction_loss(input)

    result = bf.pretrain(Deep(), rows, epochs=5, batch_size=256, optimizer=adam)
    assert result.method == "joint"
    assert result.history[-1]["loss"] < result.history[0]["loss"]


# -------------------------------------------------------------------------------------------------------- data


def as_tensor(rows, folder):
    return rows


def as_array(rows, folder):
    return rows.numpy().astype(np.float64)


def as_read_only_file(rows, folder):
    np.save(folder / "rows.npy", rows.numpy())
    return np.load(folder / "rows.npy", mmap_mode="r")


def as_integers(rows, folder):
    return (rows * 16).to(torch.uint8)


def as_dataset(rows, folder):
    return TensorDataset(rows)


def as_loader(rows, folder):
    return DataLoader(TensorDataset(rows), batch_size=100)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("form", [as_tensor, as_array, as_read_only_file, as_integers, as_dataset, as_loader])
def test_data_of_every_kind_gives_the_optimum(digits, tmp_path, form):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    bf.pretrain(layer, form(rows, tmp_path))
    scaled = rows * 16 if form is as_integers else rows
    assert loss_of(layer, scaled) <= 1.00001 * eckart_young(scaled, 6)


@pytest.mark.parametrize("form", [as_tensor, as_array, as_read_only_file, as_dataset])
def test_the_order_of_the_rows_does_not_depend_on_the_kind_of_data(digits, tmp_path, form):
    rows, _ = digits
    results = []
    for data in (rows, form(rows, tmp_path)):
        torch.manual_seed(0)
        layer = bf.Bottleneck(64, 6)
        bf.pretrain(layer, data, method="joint", epochs=2, batch_size=100)
        results.append(layer.encoder.weight)
    assert torch.equal(*results)


def test_validation_is_held_out_and_measured(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    shared = bf.pretrain(layer, rows, validation=0.25)
    separate = bf.pretrain(bf.Bottleneck(64, 6), rows[:1000], validation=rows[1000:])
    held_out = shared.history[-1]["validation_loss"]
    everywhere = ((1797 - 449) * shared.loss + 449 * held_out) / 1797
    assert everywhere == pytest.approx(loss_of(layer, rows), rel=1e-5)
    assert everywhere > eckart_young(rows, 6)
    expected = torch.nn.functional.mse_loss(separate.module(rows[1000:]), rows[1000:])
    assert separate.history[-1]["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_patience_stops_and_goes_back_to_the_best(digits):
    rows, _ = digits
    few, others = rows[:40], rows[40:]
    layer = bf.Bottleneck(64, 20, activation="relu")
    result = bf.pretrain(layer, few, validation=others, patience=3, epochs=500, batch_size=None, optimizer=adam)
    losses = [row["validation_loss"] for row in result.history]
    assert len(losses) < 500
    assert losses.index(min(losses)) == len(losses) - 4
    assert layer.reconstruction_loss(others).item() == pytest.approx(min(losses), rel=1e-5)


def test_clip_norm_bounds_the_step(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    before = torch.nn.utils.parameters_to_vector(layer.parameters()).detach().clone()
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    bf.pretrain(layer, rows, method="joint", epochs=1, batch_size=None, optimizer=sgd, clip_norm=1e-3)
    after = torch.nn.utils.parameters_to_vector(layer.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_weights(digits, dtype):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6)
    result = bf.pretrain(layer, rows, method="joint", epochs=60, batch_size=256, optimizer=adam, autocast=dtype)
    assert layer.encoder.weight.dtype == torch.float32
    assert result.certificate < 1.2


def test_a_scheduler_takes_a_step_an_epoch(digits):
    rows, _ = digits
    result = bf.pretrain(
        bf.Bottleneck(64, 6),
        rows,
        method="joint",
        epochs=3,
        optimizer=functools.partial(torch.optim.SGD, lr=1.0e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    assert [row["lr"] for row in result.history] == [1e-3, 5e-4, 2.5e-4]


def test_the_callers_generator_mode_and_data_stay_as_they_are(digits):
    rows, _ = digits
    layer = bf.Bottleneck(64, 6, activation="relu").eval()
    copy, state = rows.clone(), torch.get_rng_state()
    bf.pretrain(layer, rows, epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rows, copy)
    assert not layer.training


def test_same_seed_same_weights_and_another_seed_others(digits):
    rows, _ = digits

    def weight(seed):
        torch.manual_seed(0)
        layer = bf.Bottleneck(64, 6)
        bf.pretrain(layer, rows, method="joint", epochs=2, batch_size=100, seed=seed)
        return layer.encoder.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


# ------------------------------------------------------------------------------------------------------ errors

LAYER = functools.partial(bf.Bottleneck, 4, 2)
ROWS = torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("make", "data", "options", "error", "message"),
    [
        (lambda: torch.nn.Linear(4, 2), ROWS, {}, TypeError, "module: expected a module with a reconstruction_loss"),
        (
            LAYER,
            ROWS,
            {"method": "pca"},
            ValueError,
            "method: expected one of auto, exact, alternate, joint, got 'pca'",
        ),
        (LAYER, "rows.npy", {}, TypeError, "data: expected a tensor, an array"),
        (LAYER, iter([ROWS]), {}, TypeError, "data: expected batches that can be gone through again"),
        (LAYER, ROWS[:0], {}, ValueError, "data: expected at least one row"),
        (LAYER, (ROWS, ROWS[:3]), {}, ValueError, "same number of rows"),
        (LAYER, ROWS.to(torch.complex64), {}, TypeError, "data: expected real numbers, got dtype torch.complex64"),
        (LAYER, torch.zeros(8, 5), {}, ValueError, "[any, 4], got [8, 5]"),
        (LAYER, torch.full((8, 4), torch.nan), {}, ValueError, "NaN or Inf in row 0"),
        (LAYER, ROWS, {"epochs": -1}, ValueError, "epochs: expected an integer ≥ 0, got -1"),
        (LAYER, ROWS, {"batch_size": 0}, ValueError, "batch_size: expected an integer ≥ 1"),
        (LAYER, ROWS, {"patience": 0}, ValueError, "patience: expected an integer ≥ 1"),
        (LAYER, ROWS, {"clip_norm": 0}, ValueError, "clip_norm: expected a number > 0"),
        (LAYER, ROWS, {"autocast": torch.float32}, ValueError, "autocast: expected torch.bfloat16"),
        (LAYER, ROWS, {"resume": True}, ValueError, "resume: expected checkpoint=path"),
        (LAYER, ROWS, {"validation": 1.5}, ValueError, "validation: expected a share"),
        (LAYER, DataLoader(TensorDataset(ROWS)), {"validation": 0.5}, TypeError, "validation: expected data"),
        (LAYER, ROWS, {"method": "joint", "optimizer": "adam"}, TypeError, "optimizer: expected"),
        (LAYER, ROWS, {"method": "joint", "scheduler": "cosine"}, TypeError, "scheduler: expected"),
        (LAYER, (ROWS, ROWS), {"method": "exact"}, ValueError, "method: expected"),
        (lambda: LAYER(tied=True), ROWS, {"method": "alternate"}, ValueError, "method: expected"),
        (lambda: LAYER(activation="relu"), ROWS, {"stop_at": 1.1}, ValueError, "stop_at: expected None"),
    ],
)
def test_errors_are_one_line_and_name_the_argument(make, data, options, error, message):
    with pytest.raises(error) as caught:
        bf.pretrain(make(), data, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_that_explodes_is_an_error_that_says_when(digits):
    rows, _ = digits
    sgd = functools.partial(torch.optim.SGD, lr=1e6)
    with pytest.raises(FloatingPointError, match=r"loss: expected a finite number, got .* in epoch \d+, step 1"):
        bf.pretrain(bf.Bottleneck(64, 6), rows, method="joint", batch_size=None, optimizer=sgd)


@pytest.mark.parametrize("layout", ["csr", "coo", "scipy"])
@pytest.mark.parametrize(
    ("method", "activation"),
    [("exact", "identity"), ("alternate", "identity"), ("joint", "identity"), ("joint", "relu")],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_matrix_trains_as_its_dense_rows_do(method, activation, layout):
    rows = torch.randn(300, 6) @ torch.randn(6, 80) * (torch.rand(300, 80) < 0.04)
    sparse = rows.to_sparse_csr() if layout == "csr" else rows.to_sparse()
    if layout == "scipy":
        sparse = scipy.sparse.coo_array(rows.numpy())
    options = {"method": method, "epochs": 3, "batch_size": 64, "validation": 0.2}
    layer = bf.Bottleneck(80, 8, bias=False, activation=activation)
    losses = []
    for data, dtype in ((sparse, torch.float32), (rows, torch.float32), (rows.double(), torch.float64)):
        history = bf.pretrain(copy.deepcopy(layer).to(dtype), data, **options).history
        losses.append(torch.tensor([[row["loss"], row["validation_loss"]] for row in history], dtype=torch.float64))
    # History is in float64 throughout, its values are not.
    assert_contract(losses[0].float(), losses[1].float(), losses[2], "losses")
