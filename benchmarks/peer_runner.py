"""One timed run of one tool on one problem, in a process of its own; started by `peers.py`.

    python peer_runner.py TOOL PROBLEM.npz [CHECKOUT]

The problem holds dense weights W0, b0, W1, ... and a box [N_in, 2]; a merged network is block-diagonal, its
last weights [W1, -W2]. Torchreach gets the two networks instead (keys with _1 and _2). Every tool
warms up on a box of a hundredth of the width, then is timed once. The last line printed is one JSON object.

Nothing but numpy and the tool is imported, since the tool may live in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Outcome = tuple[int, np.ndarray | None, np.ndarray | None]  # regions, output lower and upper where known
Run = Callable[[np.ndarray], Outcome]


def layers(problem, tail: str = "") -> tuple[list[np.ndarray], list[np.ndarray]]:
    number = next(i for i in range(len(problem)) if f"W{i}{tail}" not in problem)
    return [problem[f"W{i}{tail}"] for i in range(number)], [problem[f"b{i}{tail}"] for i in range(number)]


def torchreach(problem, checkout: str | None) -> Run:
    sys.path.insert(0, checkout or str(Path(__file__).resolve().parents[1]))
    import torch

    import torchreach as tr
    from tests.networks import from_arrays

    torch.set_num_threads(1)
    if "W0_1" in problem:
        module = tr.merge(from_arrays(*layers(problem, "_1")), from_arrays(*layers(problem, "_2")))
    else:
        module = from_arrays(*layers(problem))

    def run(box: np.ndarray) -> Outcome:
        bounds = torch.from_numpy(box)
        reached = tr.reach(module, tr.StarBatch.from_box(bounds[:, 0], bounds[:, 1]), keep_stars=False)
        if reached.status[0] is not tr.Status.EXACT:
            raise RuntimeError(f"status {reached.status[0]}")
        return len(reached), reached.lower[0].numpy(), reached.upper[0].numpy()

    return run


def veritex(problem, checkout: str | None) -> Run:
    """Its facet-vertex sets, depth first in one process: without its queues between processes."""
    sys.path[:0] = [f"{checkout}/src", str(checkout)]
    from veritex.networks.ffnn import FFNN
    from veritex.sets.cubedomain import CubeDomain

    weights, biases = layers(problem)
    network = FFNN((weights, [b[:, None] for b in biases], ["ReLU"] * (len(weights) - 1)), exact_outputd=True)
    last = len(weights) - 1

    def run(box: np.ndarray) -> Outcome:
        work = [(CubeDomain(box[:, 0], box[:, 1]).to_FVIM(), -1, np.array([]))]
        low = np.full(len(biases[-1]), np.inf)
        high = -low
        regions = 0
        while work:
            for state in network.compute_state(work.pop()):
                if state[1] < last:
                    work.append(state)
                    continue
                regions += 1
                output = state[0].vertices @ state[0].M.T + state[0].b.T
                low, high = np.minimum(low, output.min(0)), np.maximum(high, output.max(0))
        return regions, low, high

    return run


def nnenum(problem, checkout: str | None) -> Run:
    """Its exact mode in one process. It counts stars; output ranges would cost it further linear programs."""
    sys.path[:0] = [f"{checkout}/src", str(checkout)]
    from nnenum.enumerate import enumerate_network
    from nnenum.network import FullyConnectedLayer, NeuralNetwork, ReluLayer
    from nnenum.settings import Settings

    Settings.NUM_PROCESSES = 1
    Settings.PARALLEL_ROOT_LP = False
    Settings.TRY_QUICK_OVERAPPROX = False
    Settings.BRANCH_MODE = Settings.BRANCH_EXACT
    Settings.PRINT_PROGRESS = False
    chain = []
    weights, biases = layers(problem)
    for weight, bias in zip(weights, biases, strict=True):
        if chain:
            chain.append(ReluLayer(len(chain), chain[-1].get_output_shape()))
        chain.append(FullyConnectedLayer(len(chain), weight, bias, (weight.shape[1],)))
    network = NeuralNetwork(chain)

    def run(box: np.ndarray) -> Outcome:
        result = enumerate_network(box, network)
        if result.result_str != "none":
            raise RuntimeError(f"nnenum ended with result {result.result_str!r} after {result.total_stars} stars")
        return result.total_stars, None, None

    return run


TOOLS = {"torchreach": torchreach, "baseline": torchreach, "veritex": veritex, "nnenum": nnenum}


def main(tool: str, path: str, checkout: str | None = None) -> None:
    with np.load(path) as data:
        problem = {key: value.astype(np.float64) for key, value in data.items()}
    run = TOOLS[tool](problem, checkout)
    box = problem["box"]
    # A little off the centre: symmetric boxes have hyperplanes through their vertices more often.
    centre = box @ [0.49, 0.51]
    half = (box[:, 1] - box[:, 0]) / 200
    try:
        run(np.stack((centre - half, centre + half), 1))
    except (Exception, SystemExit) as error:  # the timed run is the one that counts
        print("warm-up failed:", error)
    began, began_cpu = time.perf_counter(), time.process_time()
    regions, low, high = run(box)
    outcome = {
        "regions": regions,
        "cpu_seconds": time.process_time() - began_cpu,
        "seconds": time.perf_counter() - began,
        "lower": None if low is None else low.tolist(),
        "upper": None if high is None else high.tolist(),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
