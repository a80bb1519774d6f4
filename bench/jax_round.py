"""The work of the default round in JAX, written by hand for `bench.py --jax`: what a compiler makes of it.

All clients train one epoch in one compiled program, with the arithmetic of `model.ConvolvePool`. The server averages
(FedAvg). The new global model is evaluated on the clients' validation images and on the test set. There is no MAD.

Shapes: C clients, S steps, B batch, n images; ci and co channels in and out, k kernel size.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from madsim import Config, gather
from model import ADAM, DROPOUT, HIDDEN, draw_batches, initial_weights, parts_of

PART = 100  # images that are evaluated at once


def convolve_pool(x, weight, bias):
    """Convolution, ReLU, 2x2 max-pool of x [ci, H, W, B]: four shifted kernels on patches of (k+1) x (k+1) pixels.

    The first element of a window in reading order gets the gradient where elements tie.
    """
    co, ci, k, _ = weight.shape
    _, H, W, B = x.shape
    h, w, half = (H - k + 1) // 2, (W - k + 1) // 2, (k + 1) // 2
    windows = x.reshape(ci, H // 2, 2, W // 2, 2, B).transpose(0, 2, 4, 1, 3, 5)  # [ci, 2, 2, H/2, W/2, B]
    patches = jnp.stack([windows[:, :, :, i : i + h, j : j + w] for i in range(half) for j in range(half)], 1)
    shifts = [jnp.pad(weight, ((0, 0), (0, 0), (i, 1 - i), (j, 1 - j))) for i in (0, 1) for j in (0, 1)]
    kernels = jnp.stack(shifts).reshape(4 * co, ci, half, 2, half, 2).transpose(0, 1, 2, 4, 3, 5)
    z = kernels.reshape(4 * co, -1) @ patches.reshape(-1, h * w * B)
    peak, *others = z.reshape(4, co, h, w, B)
    for other in others:
        peak = jnp.where(peak >= other, peak, other)
    return jax.nn.relu(peak + bias[:, None, None, None])


def logits_of(w, images, keep):
    """Logits [B, 2] of images [B, 28, 28]; see `model.Network`. `w` are its parameters by their names."""
    keep1, keep2 = keep[:, : HIDDEN[0]], keep[:, HIDDEN[0] :]
    x = images.transpose(1, 2, 0)[None]  # the batch is innermost
    x = convolve_pool(x, w["conv1.weight"], w["conv1.bias"])
    x = convolve_pool(x, w["conv2.weight"], w["conv2.bias"])
    x = jax.nn.relu(x.reshape(-1, x.shape[-1]).T @ w["hidden1.weight"].T + w["hidden1.bias"]) * keep1
    x = jax.nn.relu(x @ w["hidden2.weight"].T + w["hidden2.bias"]) * keep2
    return x @ w["output.weight"].T + w["output.bias"]


def losses(logits, labels):
    """Cross-entropy [n] in nats of logits [n, 2]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def batch_loss(w, images, labels, keep, share):
    """The mean cross-entropy of a batch; `share` [B] is 0 where a short one is filled up."""
    return (losses(logits_of(w, images, keep), labels) * share).sum()


@jax.jit
def train(w, images, labels, numbers, keep, lr):
    """The parameters of all clients after an epoch of Adam, from the global parameters w; see `model.draw_batches`.

    All clients must have the same number of batches, as in the default round.
    """
    C = len(numbers)
    W = jax.tree.map(lambda part: jnp.broadcast_to(part, (C, *part.shape)), w)
    zeros = jax.tree.map(jnp.zeros_like, W)
    gradients = jax.vmap(jax.grad(batch_loss))

    def step(carry, batch):
        W, mean, square, t = carry
        numbers, keep = batch
        share = (numbers >= 0) / jnp.maximum((numbers >= 0).sum(1, keepdims=True), 1)
        pick, t = jnp.maximum(numbers, 0), t + 1
        gradient = gradients(W, images[pick], labels[pick], keep, share)
        b1, b2 = ADAM["beta1"], ADAM["beta2"]
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, gradient)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, square, gradient)
        rate, scale = lr / (1 - b1**t), 1 / jnp.sqrt(1 - b2**t)
        W = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) * scale + ADAM["eps"]), W, mean, square)
        return (W, mean, square, t), None

    carry, _ = jax.lax.scan(step, (W, zeros, zeros, 0.0), (numbers.swapaxes(0, 1), keep.swapaxes(0, 1)))
    return carry[0]


@jax.jit
def average(W, weights):
    """FedAvg: the mean of the clients' parameters, weighted [C]."""
    return jax.tree.map(lambda part: jnp.tensordot(weights / weights.sum(), part, 1), W)


@jax.jit
def evaluate(w, images, labels):
    """Losses [n] and hits [n] on images [K, PART, 28, 28], of which the last may be filled up with blank ones."""
    logits = jax.lax.map(lambda part: logits_of(w, part, jnp.ones((PART, sum(HIDDEN)))), images)
    logits = logits.reshape(-1, 2)[: len(labels)]
    return losses(logits, labels), (logits[:, 1] > logits[:, 0]) == labels


def seconds_per_round(rounds: int) -> list[float]:
    """The seconds of each round. XLA compiles in the first."""
    c = gather(Config(), data.load("phantom"))
    images, labels = c.images[:, 0].numpy(), c.labels.numpy()
    own = np.concatenate([c.evaluated[:, 0].numpy(), np.zeros((-len(c.evaluated) % PART, 28, 28), np.float32)])
    parts, truth = own.reshape(-1, PART, 28, 28), np.concatenate([c.test_labels.numpy(), labels[c.own]])
    w = {name: part.numpy() for name, part in parts_of(initial_weights(0)).items()}
    on_device = [jnp.asarray(array) for array in (images, labels, parts, truth)]
    members = [share.train for share in c.shares]
    shape, seconds = (len(members), Config.batch_size), []
    for t in range(1, rounds + 1):
        start = time.perf_counter()
        rngs = [np.random.default_rng([0, t, client, 1]) for client in range(len(members))]
        numbers, keep = draw_batches(members, rngs, shape, 1, Config.batch_size, DROPOUT)
        w = average(train(w, *on_device[:2], numbers, keep, Config.lr), c.sizes)
        loss, right = map(np.asarray, evaluate(w, *on_device[2:]))
        tests = len(c.test_labels)
        for values in (loss, right):
            values[:tests].mean(), np.bincount(c.owner, values[tests:])
        seconds.append(time.perf_counter() - start)
    return seconds
