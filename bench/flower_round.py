"""The work of the default round on Flower's simulation engine, for `bench.py --flower`.

Ten clients train one epoch with the plain PyTorch loop (`method="loop"`, one client each) and evaluate the new global
model on their own validation images. The server averages (FedAvg) and evaluates on the test set. There is no MAD.
"""

import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also in the processes of Ray

import data
from madsim import Config, gather
from model import Clients, evaluate, initial_weights, train_clients


@cache
def clients() -> Clients:
    """The clients with their data, made once per process that Flower starts."""
    return gather(Config(), data.load("phantom"))


def weights_of(arrays: ArrayRecord) -> torch.Tensor:
    return torch.from_numpy(arrays.to_numpy_ndarrays()[0])


def seconds_per_round(rounds: int) -> list[float]:
    """The seconds of each round. Flower starts its processes in the first."""
    client_app, server_app, marks = ClientApp(), ServerApp(), []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        here, client = clients(), int(context.node_config["partition-id"])
        own = here.shares[client].train
        W, loss = train_clients(
            weights_of(message.content["arrays"]), here.images, here.labels, [own], [np.random.default_rng(client)],
            method="loop",
        )  # fmt: skip
        metrics = MetricRecord({"loss": loss.item(), "num-examples": len(own)})
        content = RecordDict({"arrays": ArrayRecord([W[0].numpy()]), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @client_app.evaluate()
    def validate(message: Message, context: Context) -> Message:
        here = clients()
        own = here.shares[int(context.node_config["partition-id"])].validation
        result = evaluate(weights_of(message.content["arrays"]), here.images[own], here.labels[own])
        metrics = MetricRecord({name: result[name] for name in ("loss", "accuracy")} | {"num-examples": len(own)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        dataset = data.load("phantom")
        images, labels = clients().tensors(dataset.test_images, dataset.test_labels)

        def test(t: int, arrays: ArrayRecord) -> MetricRecord:  # after each round, and once before the first
            result = evaluate(weights_of(arrays), images, labels)
            marks.append(time.perf_counter())
            return MetricRecord(result)

        FedAvg().start(grid, ArrayRecord([initial_weights(0).numpy()]), num_rounds=rounds, evaluate_fn=test)

    run_simulation(server_app, client_app, num_supernodes=len(clients().shares))
    return np.diff(marks).tolist()
