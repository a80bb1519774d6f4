"""Tests of model.py: the fast code against the plain code, gradients, ties, unequal clients, devices, metrics."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import some
from torch.func import grad, vmap

import model
from model import METHODS, Network, convolve_pool, evaluate, fast_convolve_pool, initial_weights, predict

NO_DROPOUT = (0.0, 0.0)


@pytest.fixture(scope="module")
def images(phantom) -> torch.Tensor:
    return torch.tensor(phantom.train_images[:1000]).float().div(127.5).sub(1)[:, None]


@pytest.fixture(scope="module")
def labels(phantom) -> torch.Tensor:
    return torch.tensor(phantom.train_labels[:1000])


def members(*sizes: int) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, client]) for client in range(count)]


def train(images, labels, sizes, method="stacked", **options):
    w = initial_weights(0).to(images.dtype)
    return model.train_clients(w, images, labels, members(*sizes), rngs(len(sizes)), method=method, **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative difference between a client's weights in a [C, P] and in b [C, P]."""
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


# ---------------------------------------------------------------- the network


def test_the_network_is_the_testbeds():
    shapes = [tuple(p.shape) for p in Network().parameters()]
    assert shapes == [
        (6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (64, 256), (64,), (32, 64), (32,), (2, 32), (2,),
    ]  # fmt: skip
    assert len(initial_weights(0)) == 21_166


def test_initial_weights_come_from_the_seed_and_leave_torchs_own_generator_alone():
    state = torch.get_rng_state()
    assert (initial_weights(3) == initial_weights(3)).all()
    assert (initial_weights(3) != initial_weights(4)).any()
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("pytorch", [25**-0.5, 25**-0.5, 150**-0.5, 150**-0.5, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 32**-0.5, 32**-0.5]),
        ("kaiming", [(6 / 25) ** 0.5, 0, 0.2, 0, (6 / 320) ** 0.5, 0, 0.25, 0, (6 / 34) ** 0.5, 0]),
    ],
)
def test_initial_weights_lie_within_the_bounds_of_their_kind(kind, bounds):
    """The layers have 25, 150, 256, 64 and 32 inputs; the linear ones have 64, 32 and 2 outputs."""
    for bound, part in zip(bounds, model.parts_of(initial_weights(5, kind)).values(), strict=True):
        most = part.abs().max().item()
        assert most <= bound * (1 + 1e-6) and (part.numel() < 100 or most >= 0.95 * bound)
        assert abs(part.mean()) <= 5 * bound / (3 * part.numel()) ** 0.5  # five standard errors


def test_dropout_factors_are_zero_or_rescaled():
    _, keep = model.draw_batches(members(400), rngs(1), (1, 20), epochs=1, batch_size=20, dropout=(0.3, 0.2))
    first, second = keep[..., :64], keep[..., 64:]
    assert set(np.unique(first)) == {0, np.float32(1 / np.float32(0.7))}
    assert set(np.unique(second)) == {0, np.float32(1 / np.float32(0.8))}
    assert (first == 0).mean() == pytest.approx(0.3, abs=0.01)  # 0.003 is one standard deviation of 25,600 draws
    assert (second == 0).mean() == pytest.approx(0.2, abs=0.015)


def test_dropout_is_applied_where_the_testbed_has_it():
    network, x = Network(), torch.randn(3, 1, 28, 28)
    nothing_through = network(x, torch.zeros(3, 96))
    assert torch.allclose(nothing_through, network.output.bias.expand(3, 2))
    assert torch.allclose(network(x, torch.ones(3, 96)), network(x))


def test_both_hidden_layers_end_in_a_relu():
    """The first layer gives nothing, so the second gives its bias, where this is positive."""
    network = Network()
    torch.nn.init.constant_(network.hidden1.bias, -1e6)
    bias = network.hidden2.bias
    assert (bias < 0).any() and (bias > 0).any()
    expected = network.output.bias + network.output.weight[:, bias > 0] @ bias[bias > 0]
    assert torch.allclose(network(torch.randn(3, 1, 28, 28)), expected.expand(3, 2))


# ---------------------------------------------------------------- the fast kernel against the plain one


def kernel_inputs(dtype=torch.float64, channels=(6, 16), size=12):
    rng = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=rng, dtype=dtype)
    return draw(4, channels[0], size, size), draw(channels[1], channels[0], 5, 5), draw(channels[1])


@pytest.mark.parametrize(("channels", "size"), [((6, 16), 12), ((1, 6), 28)])
def test_the_fast_kernel_equals_the_plain_one(channels, size):
    x, weight, bias = kernel_inputs(channels=channels, size=size)
    assert torch.allclose(fast_convolve_pool(x, weight, bias), convolve_pool(x, weight, bias))
    slope = torch.randn(4, channels[1], (size - 4) // 2, (size - 4) // 2, dtype=torch.float64)
    fast, plain = (
        grad(lambda *xwb, f=f: (f(*xwb) * slope).sum(), argnums=(0, 1, 2))(x, weight, bias)
        for f in (fast_convolve_pool, convolve_pool)
    )
    for a, b in zip(fast, plain):
        assert torch.allclose(a, b)


def test_a_tie_gives_the_gradient_to_the_windows_first_element():
    """Whole numbers make ties exact. There are flat areas, and windows in which two or three elements tie."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, (5, 2, 10, 10), generator=rng).double()
    x[:, :, :7] = 1.0
    weight = torch.randint(-1, 2, (3, 2, 5, 5), generator=rng).double()
    z = F.conv2d(x, weight).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    tied = (z == z.amax(-1, keepdim=True)).sum(-1)
    assert {1, 2, 4} <= set(tied.flatten().tolist())
    bias = torch.full((3,), 30.0, dtype=torch.float64)  # so that ReLU passes every value
    slope = torch.rand(5, 3, 3, 3, generator=rng, dtype=torch.float64)
    fast, plain = (
        grad(lambda x, f=f: (f(x, weight, bias) * slope).sum())(x) for f in (fast_convolve_pool, convolve_pool)
    )
    assert torch.allclose(fast, plain)


def test_relu_passes_no_gradient_at_or_below_zero():
    x, weight, _ = kernel_inputs()
    low = torch.full((16,), -1e6, dtype=torch.float64)
    gradient = grad(lambda x: fast_convolve_pool(x, weight, low).sum())(x)
    assert (gradient == 0).all()


def test_the_kernel_is_lifted_by_vmap():
    x, weight, bias = (torch.stack([a, 2 * a, -a]) for a in kernel_inputs())
    lifted = vmap(fast_convolve_pool)(x, weight, bias)
    for one, *args in zip(lifted, x, weight, bias):
        assert torch.allclose(one, convolve_pool(*args))


def test_the_pooling_of_evaluation_gives_the_values_of_the_plain_one():
    """In the last digit they can differ: some processors start the sum of a convolution with its bias."""
    x, weight, bias = kernel_inputs(torch.float32)
    expected = convolve_pool(x, weight, bias)
    assert torch.allclose(model.maxima_pooled(x, weight, bias), expected, rtol=1e-5, atol=1e-6 * expected.max())


# ---------------------------------------------------------------- local training


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_all_at_once_equals_one_by_one(images, labels, dtype, bound):
    """Three clients of unequal size train for one epoch. 61 images make 4 batches; the last has one."""
    sizes = (100, 61, 80)
    both = [train(images.to(dtype), labels, sizes, m, dropout=NO_DROPOUT) for m in METHODS]
    assert relative(both[0][0], both[1][0]) < bound
    assert both[0][1] == pytest.approx(both[1][1].numpy(), rel=bound)


def test_dropout_and_more_epochs_do_not_part_the_two_ways(images, labels):
    sizes = (45, 100, 20)
    both = [train(images.double(), labels, sizes, m, epochs=3, batch_size=20, lr=3e-3) for m in METHODS]
    assert relative(both[0][0], both[1][0]) < 1e-10


def test_training_equals_torchs_own_loop(images, labels):
    """One client trains on all its images in every step. A plain PyTorch loop without our batches does the same."""
    network = Network().double()
    torch.nn.utils.vector_to_parameters(initial_weights(0).double(), network.parameters())
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(3):
        loss = F.cross_entropy(network(images[:50].double()), labels[:50])
        adam.zero_grad()
        loss.backward()
        adam.step()
    expected = torch.nn.utils.parameters_to_vector(network.parameters()).detach()[None]
    trained, _ = train(images.double(), labels, (50,), epochs=3, batch_size=50, dropout=NO_DROPOUT)
    assert relative(trained, expected) < 1e-10


def test_training_learns_and_a_rate_of_zero_does_not(images, labels):
    w = initial_weights(0)
    trained, loss = train(images, labels, (500,), epochs=5)
    before, after = (F.cross_entropy(predict(v, images[:500]), labels[:500]) for v in (w, trained[0]))
    assert after < 0.8 * before
    assert loss[0] < before
    still, first_loss = train(images, labels, (500,), lr=0.0, dropout=NO_DROPOUT)
    assert (still[0] == w).all()
    assert first_loss[0] == pytest.approx(before.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_client_does_not_depend_on_who_else_trains(images, labels, method):
    w, own, others = initial_weights(0), members(60, 40, 80), [np.arange(300, 345), np.arange(500, 620)]
    alone, _ = model.train_clients(w, images, labels, own[1:2], rngs(3)[1:2], method=method)
    among, _ = model.train_clients(w, images, labels, [others[0], own[1], others[1]], rngs(3), method=method)
    assert relative(alone, among[1:2]) < 1e-5


@pytest.mark.slow
def test_blocks_of_clients_change_nothing(images, labels, monkeypatch):
    sizes = (30, 45, 20, 60, 25)
    whole, loss = train(images.double(), labels, sizes)
    monkeypatch.setattr(model, "BLOCK", 2 * 20)
    blocks, loss_of_blocks = train(images.double(), labels, sizes)
    assert relative(blocks, whole) < 1e-12
    assert loss_of_blocks == pytest.approx(loss.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", some([7, 13, 20], 7))
@pytest.mark.parametrize("seed", some(range(6), 0))
def test_threads_and_blocks_change_no_bit(images, labels, monkeypatch, batch_size, seed):
    """Ten steps and more of clients that differ in size. Another order of sums would change the last bits."""
    sizes = np.random.default_rng(seed).integers(1, 90, 11)
    sizes[seed] = 99
    options: dict = {"epochs": 1 + seed % 2, "batch_size": batch_size}
    W, loss = train(images, labels, sizes, **options)
    for block, threads in ((1, 1), (1, 2), (3, 1), (4, 3), (11, 1), (100, 2), (100, 64)):
        monkeypatch.setattr(model, "BLOCK", block * batch_size)
        found = train(images, labels, sizes, threads=threads, **options)
        assert torch.equal(found[0], W) and torch.equal(found[1], loss), (block, threads)
        model.recorded_gradients.cache_clear()


def test_threads_change_no_bit_of_evaluation(images):
    w = initial_weights(0)
    logits = predict(w, images)
    assert all(torch.equal(predict(w, images, threads), logits) for threads in (2, 3, 7))


def test_blocks_of_clients_by_hand():
    """100 images a block are 5 clients with batches of 20. 23 clients on 2 threads take 3 turns of 4 clients each."""
    cpu = torch.device("cpu")
    for clients, batch, threads, size in (
        (10, 20, 1, 5), (10, 20, 2, 5), (10, 20, 3, 4), (10, 20, 10, 1), (3, 20, 64, 1), (23, 20, 2, 4), (7, 500, 2, 1),
    ):  # fmt: skip
        assert model.block_size(clients, batch, threads, cpu) == size
    assert model.block_size(1000, 20, 2, torch.device("cuda")) == 1000


def test_widths_of_batches_by_hand():
    """A short batch is filled up where that is at most a tenth of the work. Otherwise its width is the next of four."""
    assert model.batch_widths([424], 1, 20) == [20] * 22  # the last batch has 4 images: 16 of 440 are filled up
    assert model.batch_widths([42, 30], 1, 20) == [20, 20, 4]  # 2 images, so 18 of 60 would be
    assert model.batch_widths([30, 42], 2, 20) == [20, 20, 20, 20, 20, 4]  # 3 and 2 batches an epoch
    assert model.batch_widths([5], 1, 20) == [5]


def test_an_error_in_a_thread_reaches_the_caller(images, labels, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(model, "train_stacked", lambda *arguments, **options: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(MemoryError, match="no"):
        train(images, labels, (20, 20, 20), threads=2)
    assert torch.get_num_threads() == threads


def test_every_image_is_used_once_an_epoch():
    own = members(61, 40)
    numbers, _ = model.draw_batches(own, rngs(2), (2, 20), epochs=2, batch_size=20, dropout=NO_DROPOUT)
    assert numbers.shape == (2, 8, 20)  # 4 batches per epoch for 61 images
    for client, images in enumerate(own):
        drawn = numbers[client][numbers[client] >= 0]
        assert sorted(drawn) == sorted([*images, *images])
    assert (numbers[0, 3] >= 0).sum() == 1  # the short last batch is kept
    assert (numbers[1, 4:] == -1).all()  # the smaller client has no more batches
    assert (numbers[0, :4] != numbers[0, 4:]).any()  # every epoch has its own order


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pytorch_without_torchscript_gives_the_same_bytes(images, labels, monkeypatch, threads):
    right = train(images, labels, (50, 31, 20), threads=threads)
    model.recorded_gradients.cache_clear()
    monkeypatch.delattr(torch._C, "_create_graph_by_tracing")
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    found = train(images, labels, (50, 31, 20), threads=threads)
    model.recorded_gradients.cache_clear()
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


def test_unknown_initial_weights_list_the_known():
    with pytest.raises(ValueError, match="'zeros' are unknown; known: pytorch, kaiming"):
        initial_weights(0, "zeros")


def test_an_unknown_method_lists_the_known(images, labels):
    with pytest.raises(ValueError, match="'fast' is unknown; known: stacked, loop"):
        train(images, labels, (20,), "fast")


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_strays_from_the_device(method, monkeypatch):
    """Training runs on the device `meta`. Its tensors have a shape but no memory.

    Code that mixes them with tensors of another device fails. Code that waits for a value in the middle of training
    fails too, because there is no value to fetch. A fake CUDA device does not work here: PyTorch's autograd asks for a
    real one in a build with CUDA. Adam is replaced, because it does not know the device.
    """

    def same_device(weights, gradients, means, squares, _, counts, **settings):
        assert {t.device.type for t in (*weights, *gradients, *means, *squares, *counts)} == {"meta"}

    plain_adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: plain_adam(parameters, lr=lr))
    monkeypatch.setattr(model, "adam", same_device)
    device = torch.device("meta")
    w, images = torch.zeros(21_166, device=device), torch.zeros(200, 1, 28, 28, device=device)
    labels = torch.zeros(200, dtype=torch.int64, device=device)
    W, loss = model.train_clients(w, images, labels, members(50, 70), rngs(2), method=method)
    logits = predict(W[0], images)
    assert {W.device, loss.device, logits.device} == {device}
    assert (W.shape, loss.shape, logits.shape) == ((2, 21_166), (2,), (200, 2))


def test_a_stray_tensor_would_be_caught():
    """The negative control of the test above: the weights, the images or the labels stay on the CPU."""
    w, images = torch.zeros(21_166, device="meta"), torch.zeros(50, 1, 28, 28, device="meta")
    labels = torch.zeros(50, dtype=torch.int64, device="meta")
    for stray in range(3):
        arguments = [torch.zeros_like(t, device="cpu") if i == stray else t for i, t in enumerate((w, images, labels))]
        with pytest.raises(RuntimeError):
            model.train_clients(*arguments, members(50), rngs(1), method="loop")


# ---------------------------------------------------------------- evaluation


def constant_network(bias: tuple[float, float]) -> torch.Tensor:
    """Weights that give the logits `bias` for every image."""
    w = torch.zeros(21_166)
    w[-2:] = torch.tensor(bias)
    return w


def test_metrics_by_hand(images):
    labels = torch.tensor([1, 1, 1, 0])
    metrics = evaluate(constant_network((0.0, math.log(3))), images[:4], labels)  # pneumonia has probability 3/4
    assert metrics == {
        "loss": pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4, rel=1e-6),
        "accuracy": 0.75, "sensitivity": 1.0, "specificity": 0.0, "auc": 0.5,
    }  # fmt: skip
    assert evaluate(constant_network((1.0, 0.0)), images[:4], labels)["accuracy"] == 0.25


def test_metrics_of_a_ranking(images, monkeypatch):
    margins = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0])
    monkeypatch.setattr(model, "predict", lambda w, images: torch.stack([-margins / 2, margins / 2], 1))
    metrics = evaluate(None, images[:5], torch.tensor([0, 1, 0, 1, 1]))
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["sensitivity"] == pytest.approx(2 / 3)
    assert metrics["specificity"] == pytest.approx(1 / 2)
    assert metrics["auc"] == pytest.approx(5 / 6)  # 1 of 6 pairs is wrong: pneumonia at -1, normal at 0.5


def test_metrics_that_can_not_be_had_are_nan(images):
    one_class = evaluate(constant_network((0.0, 1.0)), images[:3], torch.ones(3, dtype=torch.int64))
    assert math.isnan(one_class["specificity"]) and math.isnan(one_class["auc"])
    broken = evaluate(torch.full((21_166,), math.nan), images[:4], torch.tensor([0, 1, 0, 1]))
    assert math.isnan(broken["loss"]) and math.isnan(broken["auc"])


def test_each_client_is_evaluated_on_its_own_images(images, labels):
    w, shares = initial_weights(1), [np.array([5, 900, 17]), np.array([3, 4]), np.arange(100, 160)]
    own = np.concatenate(shares)
    loss, accuracy = model.metrics_by_client(predict(w, images[own]), labels[own], np.repeat([0, 1, 2], [3, 2, 60]))
    for client, share in enumerate(shares):
        expected = evaluate(w, images[share], labels[share])
        assert loss[client] == pytest.approx(expected["loss"], rel=1e-5)
        assert accuracy[client] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("count", [1, 139, 140, 141])
def test_predictions_are_the_plain_networks_however_many_are_asked_for(images, count):
    w = initial_weights(2)
    plain = Network()
    torch.nn.utils.vector_to_parameters(w, plain.parameters())
    assert torch.allclose(predict(w, images[:count]), plain(images[:count]).detach(), atol=1e-5)
