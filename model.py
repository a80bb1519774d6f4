"""The clients: the network, the local training of all clients at once and its plain twin, evaluation.

The network and its training are written for one client. `train_clients` with `method="stacked"` lifts them to all
clients with `torch.func.vmap`. With `method="loop"` it trains one client after another with `torch.optim.Adam`. This
plain twin gives the same results up to rounding. `Clients` are the clients of a run with their data.

Shapes: C clients, S steps, B batch, P parameters, n images; ci and co channels in and out, k kernel size.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import Lock, local
from typing import Any

import numpy as np
import torch

if torch.__version__ < "2.7":  # it fails in round 1, because it can't record vmap
    way = "pip install -r requirements.txt updates it"
    raise ImportError(f"torch 2.7 or newer is needed; this is torch {torch.__version__}; {way}")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.adam import adam

HIDDEN = (64, 32)  # testbed: units of the two hidden linear layers
DROPOUT = (0.3, 0.2)  # testbed: after each of them
# PyTorch's own defaults
ADAM: dict[str, Any] = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)
METHODS = ("stacked", "loop")
INITIAL_WEIGHTS = ("pytorch", "kaiming")
BLOCK = 100  # ours, measured: images of all clients that a thread trains at once, at most; more leave its core's cache
EVALUATED = 140  # ours, measured: images that a thread evaluates at once
FILLED = 0.1  # ours: the share of the work that may go into filling up short batches
ALIGNED = 16  # floats: a client's row in training is filled up to a multiple of this, the longest vector of a processor
RECORDINGS = 8  # ours: recordings that are kept, about 20 MB each; a run mostly needs one or two at a time
RECORDER = Lock()  # PyTorch can record in one thread at a time
opened: list[int] = []  # the callers' numbers of threads, one for each open block of `own_modes`
entered = local()  # per thread of Python: whether it is inside `own_modes`


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside the block PyTorch has its usual modes, whatever the caller has set, and one thread; see `in_threads`.

    The caller's modes and number of threads return afterwards. Raises RuntimeError if PyTorch refuses to compute
    because this process is a fork of one in which it has computed before.
    """
    if getattr(entered, "own_modes", False):
        yield
        return
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        before = callers_threads()
        opened.append(before)
        entered.own_modes = True
        try:
            torch.set_num_threads(1)
            yield
        except RuntimeError as error:
            if "fork" not in str(error):
                raise
            way = "start the processes with spawn, forkserver or joblib"
            raise RuntimeError(f"this process is a fork of one in which PyTorch has computed before; {way}") from None
        finally:
            torch.set_num_threads(before)
            entered.own_modes = False
            opened.pop()


def callers_threads() -> int:
    """PyTorch's number of threads outside all blocks of `own_modes`.

    A new thread of Python starts with the number that was set last, which may be that of another thread's block.
    """
    return opened[0] if opened else torch.get_num_threads()


def in_threads(function: Callable, parts: Sequence, threads: int) -> list:
    """The function's results for all parts. `threads` threads share the parts, each with one thread of PyTorch.

    The threads meet once, at the end. With PyTorch's own threads they would meet at the end of each small operation,
    so that one late thread delays all, some 300 times in a step of training.
    """
    if min(threads, len(parts)) == 1:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, parts))


# ---------------------------------------------------------------- the network of one client


def convolve_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution, ReLU, 2x2 max-pool of images x [B, ci, H, W]: the plain twin of `ConvolvePool`."""
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2)


class Network(nn.Module):
    """The testbed's LeNet-like network of 21,166 parameters: images [B, 1, 28, 28] in [-1, 1] to logits [B, 2].

    `keep` [B, 96] are the dropout factors of the two hidden layers, 0 or 1 / (1 - p). None means no dropout. The caller
    draws them, so that a client's randomness depends on the seed, the round and the client alone.
    """

    def __init__(self, block: Callable[..., Tensor] = convolve_pool):
        super().__init__()
        self.block = block
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.hidden1, self.hidden2 = nn.Linear(256, HIDDEN[0]), nn.Linear(*HIDDEN)
        self.output = nn.Linear(HIDDEN[1], 2)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        keep1, keep2 = (1.0, 1.0) if keep is None else keep.split(HIDDEN, 1)
        x = self.block(images, self.conv1.weight, self.conv1.bias)  # [B, 6, 12, 12]
        x = self.block(x, self.conv2.weight, self.conv2.bias)  # [B, 16, 4, 4]
        x = F.relu(self.hidden1(x.flatten(1))) * keep1  # [B, 64]
        x = F.relu(self.hidden2(x)) * keep2  # [B, 32]
        return self.output(x)  # [B, 2]


def initial_weights(seed: int, kind: str = "pytorch") -> Tensor:
    """The first weights of the network as one row w [P], drawn uniformly and determined by the seed.

    `kind` "pytorch" is PyTorch's own initialisation: weights and biases lie within 1 / sqrt(inputs). "kaiming" is that
    of a later copy of the testbed: sqrt(6 / inputs) for convolutions (He et al. 2015), sqrt(6 / (inputs + outputs)) for
    linear layers (Glorot and Bengio 2010), and no biases. The random numbers come from a generator of their own, so
    other threads and the caller's generator do not matter. Raises ValueError for another kind.
    """
    if kind not in INITIAL_WEIGHTS:
        raise ValueError(f"initial weights {kind!r} are unknown; known: {', '.join(INITIAL_WEIGHTS)}")
    generator = torch.Generator().manual_seed(seed)
    w = torch.empty(PARAMETERS, dtype=torch.float32, device="cpu")
    bound = 0.0
    for name, part in parts_of(w).items():
        is_weight, inputs = name.endswith("weight"), part[0].numel()
        if kind == "kaiming":
            bound = is_weight * (6 / (inputs if name.startswith("conv") else inputs + len(part))) ** 0.5
        elif is_weight:
            bound = inputs**-0.5  # of the biases of the layer too
        part.uniform_(-bound, bound, generator=generator)
    return w


# ---------------------------------------------------------------- the fast kernel


class ConvolvePool(torch.autograd.Function):
    """`convolve_pool` made for vmap: one matrix product per layer and direction for any number of clients.

    The pooled output at (y, x) depends on the (k+1) x (k+1) patch of the input at (2y, 2x). It is the maximum of four
    convolutions, which are four shifted kernels on that same patch. The batch is innermost in memory, so patches are
    copied in long runs. If elements of a pooling window tie, the first one in reading order gets the whole gradient, as
    in `F.max_pool2d`. Ties do occur: X-rays have flat black areas.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor):
        co, ci, k, _ = weight.shape
        x = x.permute(1, 2, 3, 0)  # [ci, H, W, B]
        patches = x.unfold(1, k + 1, 2).unfold(2, k + 1, 2).permute(0, 4, 5, 1, 2, 3)  # [ci, k+1, k+1, h, w, B]
        h, w, B = patches.shape[3:]
        patches = patches.reshape(ci * (k + 1) ** 2, h * w * B)
        shifts = F.pad(weight, (1, 1, 1, 1)).unfold(2, k + 1, 1).unfold(3, k + 1, 1)  # [co, ci, 2, 2, k+1, k+1]
        kernels = shifts.permute(2, 3, 0, 1, 4, 5).reshape(4 * co, ci * (k + 1) ** 2)
        z = torch.mm(kernels, patches).view(4, co, h, w, B)  # the window's elements, last to first in reading order
        peak = torch.maximum(torch.maximum(z[0], z[1]), torch.maximum(z[2], z[3]))  # [co, h, w, B]
        pooled = torch.relu(peak + bias[:, None, None, None])  # max(z) + b = max(z + b)
        return pooled.permute(3, 0, 1, 2), patches, kernels, z, peak

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    @torch.no_grad()
    def backward(ctx, grad: Tensor, *_):
        weight, pooled, patches, kernels, z, peak = ctx.saved_tensors
        co, ci, k, _ = weight.shape
        h, w, B = z.shape[2:]
        left = torch.ops.aten.threshold_backward(grad, pooled, 0).permute(1, 2, 3, 0)  # ReLU's gradient [co, h, w, B]
        grad_bias = left.sum((1, 2, 3))
        parts = []
        for element in (z[3], z[2], z[1]):  # reading order: the first element that is the maximum gets the gradient
            parts.append(torch.ops.aten.threshold_backward(left, element - peak, -torch.finfo(z.dtype).tiny))
            left = left - parts[-1]
        grad_z = torch.cat([left, *parts[::-1]]).view(4 * co, h * w * B)
        shifts = torch.mm(grad_z, patches.T).view(2, 2, co, ci, k + 1, k + 1)
        windows = [shifts[i, j, :, :, 1 - i : 1 - i + k, 1 - j : 1 - j + k] for i in (0, 1) for j in (0, 1)]
        grad_weight = windows[0] + windows[1] + windows[2] + windows[3]
        if not ctx.needs_input_grad[0]:  # the input of the first layer is data
            return None, grad_weight, grad_bias
        half = (k + 1) // 2  # each patch is half x half windows of 2 x 2 pixels; overlapping windows add up
        grad_patches = torch.mm(kernels.T, grad_z).view(ci, half, 2, half, 2, h, w, B)
        grad_x = grad_patches.new_zeros(ci, 2, 2, h + half - 1, w + half - 1, B)
        for i in range(half):
            for j in range(half):
                grad_x[:, :, :, i : i + h, j : j + w].add_(grad_patches[:, i, :, j])
        grad_x = grad_x.permute(0, 3, 1, 4, 2, 5).reshape(ci, 2 * (h + half - 1), 2 * (w + half - 1), B)
        return grad_x.permute(3, 0, 1, 2), grad_weight, grad_bias


def fast_convolve_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`convolve_pool` by the fast kernel, for odd k and even H - k + 1 and W - k + 1, as in `Network`."""
    return ConvolvePool.apply(x, weight, bias)[0]


def batch_innermost(images: Tensor) -> Tensor:
    """The same images [..., B, 1, 28, 28] in the memory layout that the fast kernel reads."""
    return images.movedim(-4, -1).contiguous().movedim(-1, -4)


with torch.device("meta"):  # only shapes are needed; the weights come with each call
    FAST_NETWORK = Network(fast_convolve_pool)
SHAPES = {name: parameter.shape for name, parameter in FAST_NETWORK.named_parameters()}
PARAMETERS = sum(shape.numel() for shape in SHAPES.values())


def maxima_pooled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The values of `convolve_pool`, up to rounding, in half of the time. Where elements tie, its gradients differ."""
    z = F.conv2d(x, weight)
    z = torch.maximum(z[..., ::2, :], z[..., 1::2, :])
    return torch.relu(torch.maximum(z[..., ::2], z[..., 1::2]) + bias[:, None, None])  # max(z) + b = max(z + b)


def parts_of(w: Tensor) -> dict[str, Tensor]:
    """The network's parameters by their names, as views of the weights w [P], which may be filled up at the end."""
    parts = w.split([*(shape.numel() for shape in SHAPES.values()), len(w) - PARAMETERS])
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts)}


def row_of(w: Tensor) -> Tensor:
    """The weights w [P], filled up to a multiple of `ALIGNED`.

    Adam works through the rows of all clients of a block as one row. So the weights of a client have the same place in
    the vectors of the processor, whatever the block.
    """
    return F.pad(w, (0, -PARAMETERS % ALIGNED))


def network_of(w: Tensor, block: Callable[..., Tensor]) -> Network:
    """The network whose parameters are views of the weights w [P]."""
    with torch.device("meta"):
        network = Network(block)
    network.load_state_dict(parts_of(w), assign=True)
    return network


def logits_of(w: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """Logits [B, 2] of the fast network with weights w [P]; see `Network`."""
    return functional_call(FAST_NETWORK, parts_of(w), (images, keep))


# ---------------------------------------------------------------- local training


@own_modes()
def train_clients(
    w: Tensor,
    images: Tensor,
    labels: Tensor,
    members: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    *,
    epochs: int = 1,
    batch_size: int = 20,
    lr: float = 1e-3,
    dropout: tuple[float, float] = DROPOUT,
    method: str = "stacked",
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Local training of all clients from the global weights w [P]: (W [C, P], mean training loss [C] in nats).

    `images` float32 [n, 1, 28, 28] in [-1, 1] and `labels` int64 [n] belong to all clients together and lie on w's
    device. `members[c]` are the numbers of the training images of client c. `rngs[c]` draws their order and the
    dropout. Clients may differ in size: each makes epochs * ceil(size / batch_size) steps with a new Adam, and the last
    short batch of an epoch is kept. `method` is "stacked" (blocks of clients at once) or "loop" (one by one). `threads`
    threads share the clients; their number changes no result. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    stacked = method == "stacked"
    widths = batch_widths([len(own) for own in members], epochs, batch_size)
    size = block_size(len(members), max(widths), threads, w.device) if stacked else 1
    train = partial(train_stacked, widths=widths) if stacked else train_loop
    W, loss = w.new_empty(len(members), PARAMETERS), w.new_empty(len(members))

    def train_block(first: int) -> None:
        block = slice(first, first + size)
        own = members[block]
        batches = draw_batches(own, rngs[block], (size, max(widths)), epochs, batch_size, dropout)
        trained, losses = train(w, images, labels, lr, *batches)
        W[block], loss[block] = trained[: len(own)], losses[: len(own)]

    for width in set(widths) if stacked else ():
        recorded_gradients(size, width, w.device, w.dtype)  # before the threads start
    in_threads(train_block, range(0, len(members), size), threads)
    return W, loss


def block_size(clients: int, batch: int, threads: int, device: torch.device) -> int:
    """How many clients a thread trains at once: equal blocks, at most `BLOCK` images. A GPU trains all at once."""
    turns = -(-clients // (threads * max(1, BLOCK // batch)))  # blocks that a thread trains one after another
    return -(-clients // (threads * turns)) if device.type == "cpu" else clients


def batch_widths(sizes: Sequence[int], epochs: int, batch_size: int) -> list[int]:
    """The room for images in each step, from the clients' numbers of images: enough for the batch of every client.

    It does not depend on the blocks, so the results of a client do not either. Each new width has to be recorded. So
    all steps have the same width, unless filling up short batches would be more than `FILLED` of the work.
    """
    n = np.array(sizes)[:, None]  # [C, 1]
    full = min(batch_size, n.max())
    steps = -(-n // full)  # per epoch
    s = np.arange(epochs * steps.max())
    batches = np.where(s < epochs * steps, np.minimum(full, n - s % steps * full), 0)  # [C, S]
    widths = np.minimum(full, -(-batches.max(0) // 4) * 4)  # [S]
    return [int(full)] * len(s) if widths.sum() > (1 - FILLED) * full * len(s) else widths.tolist()


def draw_batches(
    members: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    shape: tuple[int, int],
    epochs: int,
    batch_size: int,
    dropout: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """The clients' batches of image numbers, int64 [C, S, B], and their dropout factors, float32 [C, S, B, 96].

    `shape` is C and B, which have room for the clients and for their largest batch. -1 fills up what is left: short
    batches, the missing batches of clients with fewer images, and missing clients. So all batches have one shape.
    """
    widths = [min(batch_size, len(own)) for own in members]  # a client's draws do not depend on other clients
    steps = [epochs * -(-len(own) // width) for own, width in zip(members, widths)]
    numbers = np.full((shape[0], max(steps), shape[1]), -1)
    keep = np.ones((*numbers.shape, sum(HIDDEN)), np.float32)
    p = np.repeat(np.array(dropout, np.float32), HIDDEN)  # [96]
    for c, (own, rng) in enumerate(zip(members, rngs)):
        epoch_of = numbers[c, : steps[c]].reshape(epochs, -1)  # [epochs, steps per epoch * B]
        for epoch in range(epochs):
            epoch_of[epoch, : len(own)] = rng.permutation(own)
        if p.any():
            drawn = keep[c, : steps[c], : widths[c]]
            drawn[:] = (rng.random(drawn.shape, np.float32) >= p) / (1 - p)
    return numbers, keep


def batch_losses(
    W: Tensor, images: Tensor, labels: Tensor, pick: Tensor, share: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of each client on its batch `pick` [C, B] of the images: the sum, and the losses [C].

    A client's loss depends on its own row of W [C, P] alone. So the gradient of the sum [C, P] holds the gradient of
    every client. `share` [C, B] is 1 / (size of the batch), and 0 where a short batch is filled up.
    """
    logits = vmap(logits_of)(W, batch_innermost(images[pick]), keep)  # [C, B, 2]
    losses = F.cross_entropy(logits.flatten(0, 1), labels[pick].flatten(), reduction="none").view_as(share) * share
    return losses.sum(), losses.sum(1)


def record(function: Callable, *arguments: Tensor) -> Callable:
    """Record the operations that the function runs for arguments of these shapes; every step replays them.

    vmap and autograd walk through the network in Python, which takes longer than the arithmetic. TorchScript replays
    the recording without Python. A PyTorch that no longer has it replays the same operations, more slowly. The two
    calls of torch._C are what torch.jit.trace does, but that would keep its result for ever: 10 to 20 MB for each size.

    A new thread does the work: Ctrl-C does not reach it, and the caller's modes of PyTorch, such as autocast, do not
    apply in it. An interrupted recording would leave PyTorch's own state behind half changed.
    """

    def trace() -> Callable:
        with RECORDER, torch.no_grad(), torch.autograd.set_detect_anomaly(False):
            operations = make_fx(function)(*arguments)
            if not hasattr(torch._C, "_create_graph_by_tracing"):
                return operations
            graph, _ = torch._C._create_graph_by_tracing(operations, arguments, lambda value: "", True, False, None, [])
            return torch._C._create_function_from_graph("recorded", graph)

    with ThreadPoolExecutor(1) as thread:  # leaving the block waits for the thread, also after Ctrl-C
        return thread.submit(trace).result()


@lru_cache(RECORDINGS)
def recorded_gradients(clients: int, batch: int, device: torch.device, dtype: torch.dtype) -> Callable:
    """The recorded function from the arguments of `batch_losses` to gradients [C, P] and losses [C], for one size."""
    new = partial(torch.zeros, device=device, dtype=dtype)
    W, images, labels = row_of(new(PARAMETERS)).repeat(clients, 1), new(1, 1, 28, 28), new(1).long()
    pick, share, keep = new(clients, batch).long(), new(clients, batch), new(clients, batch, sum(HIDDEN))
    return record(grad(batch_losses, has_aux=True), W, images, labels, pick, share, keep)


@torch.no_grad()
def train_stacked(
    w: Tensor, images: Tensor, labels: Tensor, lr: float, numbers: np.ndarray, keep: np.ndarray, widths: list[int]
) -> tuple[Tensor, Tensor]:
    """Train a block of clients at once; see `train_clients`, `draw_batches` for `numbers` and `keep`, `batch_widths`.

    The loop over steps never waits for the device: the data that it needs are sent there before.
    """
    w.new_empty(8_000_000)  # freeing 32 MB once makes glibc keep freed memory
    sizes = (numbers >= 0).sum(2)  # [C, S]
    last = (sizes > 0).sum(1) - 1  # [C]
    picks = torch.from_numpy(numbers.clip(0)).to(w.device)  # [C, S, B]
    shares = torch.from_numpy((numbers >= 0) / sizes.clip(1)[..., None]).to(w)  # [C, S, B]
    portions = torch.from_numpy(sizes / sizes.sum(1, keepdims=True).clip(1)).to(w)  # [C, S]
    keeps = torch.from_numpy(keep).to(w)  # [C, S, B, 96]

    W = row_of(w).expand(len(numbers), -1).clone()  # [C, P], filled up
    # The moments and the step count of Adam
    mean, square = torch.zeros_like(W), torch.zeros_like(W)
    count = torch.zeros((), dtype=torch.float32, device=w.device)
    trained, total = w.new_empty(len(W), PARAMETERS), w.new_zeros(len(W))
    for s, B in enumerate(widths[: sizes.shape[1]]):
        gradients = recorded_gradients(len(W), B, W.device, W.dtype)
        gradient, loss = gradients(W, images, labels, picks[:, s, :B], shares[:, s, :B], keeps[:, s, :B])
        adam([W], [gradient], [mean], [square], [], [count], lr=lr, fused=True, **ADAM)
        total = total + loss * portions[:, s]  # one by one: the block's number of steps must not change the rounding
        done = np.flatnonzero(last == s)  # these clients have no more batches; later steps do not matter
        trained[done] = W[done, :PARAMETERS]
    return trained, total


def train_loop(
    w: Tensor, images: Tensor, labels: Tensor, lr: float, numbers: np.ndarray, keep: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Train one client in plain PyTorch, numbers [1, S, B]: the twin of `train_stacked`."""
    w = w.detach().clone()
    network = network_of(w, convolve_pool)
    adam = torch.optim.Adam(network.parameters(), lr=lr)
    loss, total = w.new_zeros(1), (numbers >= 0).sum()
    for batch, factors in zip(numbers[0], keep[0]):
        size = (batch >= 0).sum()
        pick = torch.from_numpy(batch[:size]).to(w.device)
        logits = network(images[pick], torch.from_numpy(factors[:size]).to(w))
        batch_loss = F.cross_entropy(logits, labels[pick])
        adam.zero_grad()
        batch_loss.backward()
        adam.step()
        loss += batch_loss.detach() * (size / total)
    return w[None], loss


# ---------------------------------------------------------------- evaluation


@own_modes()
def predict(w: Tensor, images: Tensor, threads: int = 1) -> Tensor:
    """Logits [n, 2] of weights w [P] on images float32 [n, 1, 28, 28], without dropout."""
    network = network_of(w.clone(), maxima_pooled)  # the caller may have made w in inference mode
    logits = torch.no_grad()(network.forward)
    return torch.cat(in_threads(logits, images.split(EVALUATED), threads))


def evaluate(w: Tensor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The `metrics` of weights w [P] on images float32 [n, 1, 28, 28] with labels int64 [n]."""
    return metrics(predict(w, images), labels)


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss (cross-entropy, nats), accuracy, sensitivity, specificity and auc of logits [n, 2].

    Sensitivity is the share of pneumonia found, specificity the share of normal found, auc the area under the ROC
    curve. A value is NaN if its class is absent or the logits are not finite.
    """
    from scipy.stats import mannwhitneyu

    margin, truth = (logits[:, 1] - logits[:, 0]).double().cpu().numpy(), labels.cpu().numpy() == 1
    right = (margin > 0) == truth
    if both := truth.any() and not truth.all() and np.isfinite(margin).all():
        # Of all pairs of a pneumonia and a normal image, those in the right order
        right_pairs = mannwhitneyu(margin[truth], margin[~truth], method="asymptotic").statistic
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": float(right.mean()),
        "sensitivity": float(right[truth].mean()) if truth.any() else float("nan"),
        "specificity": float(right[~truth].mean()) if not truth.all() else float("nan"),
        "auc": float(right_pairs / truth.sum() / (~truth).sum()) if both else float("nan"),
    }


def metrics_by_client(logits: Tensor, labels: Tensor, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss (nats) [C] and accuracy [C] per client, from logits [n, 2]; `owner` [n] is the client of each image."""
    losses = F.cross_entropy(logits, labels, reduction="none").cpu().numpy()
    right = ((logits[:, 1] > logits[:, 0]).long() == labels).cpu().numpy()
    sizes = np.bincount(owner)
    return np.bincount(owner, losses) / sizes, np.bincount(owner, right) / sizes


# ---------------------------------------------------------------- the clients of a run


class Clients:
    """The clients of a run and their data on the device. Each method is one part of a round.

    `train` is the images uint8 [n, 28, 28], their labels int64 [n], and the labels under attack. `test` is the test
    images and labels. `shares` has one data.Share per client. `attacking(t)` says whether the malicious clients attack
    in round t, and `submit(W [m, P], w [P], honest [h, P], rng, t)` is what they then submit. `threads` is the number
    of threads (None: the smallest of the numbers of `cores` and of PyTorch's own number). `training` are the options of
    `train_clients`. Raises ValueError for the device cuda on a machine without one.
    """

    @own_modes()
    def __init__(
        self,
        train: tuple[np.ndarray, np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        shares: Sequence,
        *,
        seed: int,
        attacking: Callable[[int], bool],
        submit: Callable[..., Tensor],
        device: str,
        threads: int | None,
        cores: dict[str, int],
        **training: Any,
    ):
        self.shares, self.seed, self.training = shares, seed, training
        self.attacking, self.submit = attacking, submit
        self.device = pick_device(device)
        self.cores = cores | {"pytorch": callers_threads()}  # OMP_NUM_THREADS or the caller may have set it
        self.threads = threads or min(self.cores.values())
        self.malicious = np.array([share.malicious for share in shares])  # [C]
        self.sizes = np.array([len(share.train) for share in shares])  # [C]
        images, true, attacked = train
        self.images, self.labels = self.tensors(images, true)
        self.attacked_labels = self.tensors(images[:0], attacked)[1]
        # Each round evaluates in one pass: the test images, then the clients' own validation images.
        test_images, self.test_labels = self.tensors(*test)
        self.own = np.concatenate([share.validation for share in shares])
        self.owner = np.repeat(np.arange(len(shares)), [len(share.validation) for share in shares])
        self.validation_sizes = np.bincount(self.owner)  # [C]
        self.evaluated = torch.cat([test_images, self.images[self.own]])

    def tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images [n, 1, 28, 28], scaled to [-1, 1] as in the testbed, and the labels [n], on the device."""
        scaled = torch.tensor(images, device=self.device).float().div(127.5).sub(1)[:, None]
        return scaled, torch.tensor(labels, device=self.device)

    def train(self, w: np.ndarray, asked: np.ndarray, t: int) -> tuple[Tensor, np.ndarray]:
        """Local training of the clients `asked` [C] in round t from the global weights w [P].

        Returns the models [n, P] of these n clients, and the mean training loss [C], which is NaN for the others.
        """
        who = np.flatnonzero(asked).tolist()
        rngs = [np.random.default_rng([self.seed, t, client, 1]) for client in who]
        members = [self.shares[client].train for client in who]
        data = self.images, self.labels_in(t)
        W, loss = train_clients(self.send(w), *data, members, rngs, threads=self.threads, **self.training)
        losses = np.full(len(asked), np.nan)
        losses[who] = loss.cpu().numpy()
        return W, losses

    def attack(self, W: Tensor, w: np.ndarray, asked: np.ndarray, t: int) -> np.ndarray:
        """The submissions [C, P] that the server gets in round t. Rows of clients that were not asked are NaN."""
        bad = self.malicious[asked]
        if bad.any() and self.attacking(t):
            rng = np.random.default_rng([self.seed, t, 2])
            with own_modes():
                W[bad] = self.submit(W[bad], self.send(w), W[~bad], rng, t)
        if asked.all():
            return W.cpu().numpy()
        submitted = np.full((len(asked), W.shape[1]), np.nan, np.float32)
        submitted[asked] = W.cpu().numpy()
        return submitted

    def evaluate(self, w: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Loss [C] and accuracy [C] on the clients' own validation data in round t, and the metrics on the test set."""
        with own_modes():
            logits, n = predict(self.send(w), self.evaluated, self.threads), len(self.test_labels)
            test, own = logits[:n], logits[n:]
            return *metrics_by_client(own, self.labels_in(t)[self.own], self.owner), metrics(test, self.test_labels)

    def labels_in(self, t: int) -> Tensor:
        """The labels [n] that the clients see in round t."""
        return self.attacked_labels if self.attacking(t) else self.labels

    def send(self, w: np.ndarray) -> Tensor:
        """The server's weights w [P] on the clients' device."""
        return torch.from_numpy(w).to(self.device)


def pick_device(name: str) -> torch.device:
    """The torch device named by `--device`. Raises ValueError for cuda on a machine without a CUDA device.

    Raises it too if the caller has lowered the precision of matrix products, which holds for the whole process.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for some devices alone
        precision = "mixed"
    if precision != "highest":
        raise ValueError(
            f"PyTorch's float32 matmul precision is {precision!r}, which changes the results; "
            f"first call torch.set_float32_matmul_precision('highest')"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine has 0 usable CUDA devices; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
