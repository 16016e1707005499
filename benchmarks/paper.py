"""The paper's experiment, on the networks as they are deployed: tables, figures, held-out pictures, other compressions.

Mo, Yang, Lu, Xiang: Compression Repair for Feedforward Neural Networks Based on Model Equivalence Evaluation (2024).
Writes results.json, fig2.png, fig3.png, fig4.png and the tables of README.md into `--output` (docs/paper). Jobs run in
`--processes` processes of one thread each; results do not depend on how many. `docs/paper/README.md` explains them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common, paper_report
from benchmarks import paper_networks as networks

ALPHAS = (2.0, 5.0, 10.0, 20.0)
COMPRESSIONS = ("int8", "pruned", "int4")
PRUNED_SHARE = 0.8
# Target set of the published network: |y1 - y2| of at most this, for every label and input. Scores span 49, so that
# an int8 output has steps of 0.19: half a step for its own rounding, one for all rounding before it.
LIMIT = 0.3
# Real numbers against float64: sums of 784 products.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Settings:
    """How much work to do."""

    folder: str = ""  # where jobs leave networks for each other
    seed: int = 0
    images: int = 10
    held_out: int = networks.HELD_OUT
    samples: int = 10_000  # per image, of the int8 kernels against the certificate
    iterations: int = 6  # of the published network; others get twice as many
    alphas: tuple[float, ...] = ALPHAS
    epochs: int = 10  # of one retraining; others get twice as many
    training_epochs: int = 6  # of the networks trained here
    data: int = 10_000  # training pictures mixed in

    @staticmethod
    def quick(folder: str, seed: int) -> Settings:
        """A smoke run."""
        return Settings(folder, seed, 2, 4, 500, 2, (2.0, 20.0), 2, 1, 2_000)


# -- one pair, one compression --------------------------------------------------------------------------


@functools.cache
def pictures() -> networks.Pictures:
    return networks.pictures()


@functools.cache
def pair(kind: str, settings: Settings) -> tuple[nn.Module, nn.Module]:
    """Original and compressed network: "published", or one of COMPRESSIONS of a network trained here."""
    if kind == "published":
        return networks.published_pair()
    original = networks.trained(pictures(), settings.seed, settings.training_epochs)
    calibration = pictures().train_x[:4096]
    if kind == "int4":
        return original, tr.quantize_weights(original, 4, per_channel=True)
    small = tr.prune_weights(original, PRUNED_SHARE) if kind == "pruned" else original
    return original, networks.deployed(small, calibration)  # type: ignore[arg-type]


def stars(settings: Settings) -> tr.StarBatch:
    """The paper's images, four centre pixels perturbed."""
    return networks.stars(networks.ten_images()[0][: settings.images])


def repair(kind: str, settings: Settings, **options: Any) -> tr.RepairResult:
    """Repair as every experiment here runs it: from the given network, training pictures with the original's scores."""
    original, compressed = pair(kind, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(pictures().train_x), generator=generator)[: settings.data]
    x = pictures().train_x[chosen]
    with torch.no_grad():
        data = (x, original(x))
    # The published weights are all but right, only their rounding is not; the others have to move.
    rate, weight, more = (3e-4, 0.3, 1) if kind == "published" else (3e-3, 1.0, 2)
    training = tr.RepairOptions(epochs=more * settings.epochs, learning_rate=rate, data_weight=weight)
    return tr.repair(
        original,
        compressed,
        stars(settings),
        data=data,
        evaluate=lambda network: networks.accuracy(network, pictures()),
        training=training,
        iterations=more * settings.iterations,
        seed=settings.seed,
        **options,
    )


def described(found: tr.Discrepancy) -> dict[str, Any]:
    """What the tables and figures need of a certificate, per image."""
    middle = (found.range_lower + found.range_upper) / 2
    return {
        "semantics": found.semantics,
        "status": [status.value for status in found.status],
        "maximum": found.max_upper.tolist(),
        "attained": found.max_lower.tolist(),
        # the paper's formula, Table II
        "mean of midranges": middle.abs().mean(1).tolist(),
        "range lower": found.range_lower.tolist(),
        "range upper": found.range_upper.tolist(),
    }


def outside(kind: str, settings: Settings, compressed: nn.Module, found: tr.Discrepancy) -> dict[str, Any]:
    """How many sampled outputs of the network as torch executes it leave the certified range, and how close they come.

    y1 in float64, y2 on the int8 kernels, at float32 inputs.
    """
    original = copy.deepcopy(pair(kind, settings)[0]).double()
    x = stars(settings).sample(settings.samples, settings.seed + 1).float()
    count, share = 0, 0.0
    with torch.no_grad():
        for image, points in enumerate(x):
            difference = original(points.double()) - compressed(points).double()
            low, high = found.range_lower[image], found.range_upper[image]
            count += int(((difference < low - ROUNDING) | (difference > high + ROUNDING)).sum())
            share = max(share, float((difference.abs().amax(0) / found.upper[image]).max()))
    return {"samples": x.shape[0] * x.shape[1], "outside": count, "largest share of the bound": share}


def network_row(name: str, network: nn.Module, folder: str) -> dict[str, Any]:
    """A row of Table I."""
    zero = sum(int((weight == 0).sum()) for weight in weights(network))
    return {
        "network": name,
        "parameters": networks.parameters(network),
        "zero weights": zero,
        "size KB": networks.saved(network, Path(folder) / f"{name}.pth".replace(" ", "_")),
        "accuracy": networks.accuracy(network, pictures()),
    }


def weights(network: nn.Module) -> Iterator[Tensor]:
    """Weights of the linear layers; codes of int8 ones."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            yield layer.weight.detach()
        elif isinstance(layer, torch.ao.nn.quantized.Linear):
            yield layer.weight().int_repr()


# -- jobs: each runs in a process of its own ------------------------------------------------------------


def repaired(kind: str, settings: Settings) -> dict[str, Any]:
    """Tables, figure 2 and checks of one compression; leaves the repaired network's state dict in the folder."""
    original, compressed = pair(kind, settings)
    goal = tr.Target.bounds(-LIMIT, LIMIT) if kind == "published" else tr.Target.factor(0.1)
    result = repair(kind, settings, target=goal, alpha=1.0)
    torch.save(result.network.state_dict(), Path(settings.folder) / f"repaired_{kind}.pth")
    images, labels = networks.ten_images()
    with torch.no_grad():
        scores = original(images[: settings.images].float())
    named = {"original": original, "compressed": compressed, "repaired": result.network}
    return {
        "table 1": [network_row(f"{kind} {name}", network, settings.folder) for name, network in named.items()],
        "labels": labels[: settings.images].tolist(),
        "scores": scores.tolist(),
        "before": described(result.before),
        "after": described(result.after),
        "satisfied": result.satisfied,
        "iteration": result.index,
        "history": history(result),
        "kernels before": outside(kind, settings, compressed, result.before),
        "kernels after": outside(kind, settings, result.network, result.after),
        "zeros kept": all(
            bool((new[old == 0] == 0).all())
            for old, new in zip(weights(compressed), weights(result.network), strict=True)
        ),
    }


def history(result: tr.RepairResult) -> list[dict[str, Any]]:
    """What each iteration of a repair led to, whether it was kept or undone."""
    return [
        {
            "iteration": step.iteration,
            "maximum": step.discrepancy.max_upper.max().item(),
            "mean": step.discrepancy.max_upper.mean().item(),
            "accuracy": step.accuracy,
            "loss": step.loss,
            "seconds": step.seconds,
        }
        for step in result.history
    ]


def curve(kind: str, alpha: float, step: str, settings: Settings) -> dict[str, Any]:
    """Discrepancy and accuracy over the iterations (figures 3 and 4)."""
    never = tr.Target.test(lambda _: False)
    result = repair(kind, settings, target=never, alpha=alpha, step=step)
    return {"kind": kind, "alpha": alpha, "step": step, "images": settings.images, "history": history(result)}


def restored(kind: str, settings: Settings) -> nn.Module:
    """The repaired network, from its file."""
    path = Path(settings.folder) / f"repaired_{kind}.pth"
    original, compressed = pair(kind, settings)
    if kind != "int4":
        return tr.load_int8(path, original)
    network = copy.deepcopy(compressed)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def reloaded(kind: str, settings: Settings) -> dict[str, Any]:
    """The certificate of the repaired network read from its file."""
    network = restored(kind, settings)
    found = tr.discrepancy(pair(kind, settings)[0], network, stars(settings))
    return {"after": described(found), "accuracy": networks.accuracy(network, pictures())}


def held_out(kind: str, settings: Settings, first: int, last: int) -> dict[str, Any]:
    """Largest certified discrepancy of other test pictures, before and after."""
    original, compressed = pair(kind, settings)
    sets = networks.stars(networks.held_out(pictures(), settings.held_out)[first:last])
    found = [tr.discrepancy(original, network, sets) for network in (compressed, restored(kind, settings))]
    return {"before": found[0].max_upper.tolist(), "after": found[1].max_upper.tolist()}


def triangle(settings: Settings) -> list[dict[str, Any]]:
    """Original, weight-only twin and deployed network, as shipped and as repaired: largest over the images."""
    original, shipped = pair("published", settings)
    original = copy.deepcopy(original).double()  # as the weight-only twin is
    rows = []
    for name, deployed in (("shipped", shipped), ("repaired", restored("published", settings))):
        twin = tr.weight_only(deployed)
        sides = {
            "itself": (original, original),
            "weights": (original, twin),
            "rounding": (twin, deployed),
            "both": (original, deployed),
        }
        found = {side: tr.discrepancy(*networks_, stars(settings)) for side, networks_ in sides.items()}
        upper = {side: value.max_upper.tolist() for side, value in found.items()}
        holds = found["both"].lower <= found["weights"].upper + found["rounding"].upper + ROUNDING
        rows.append({"network": name, **upper, "holds": bool(holds.all())})
    return rows


# -- all of it ------------------------------------------------------------------------------------------


def timed(job: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a job returns, and its CPU seconds."""
    torch.set_num_threads(1)
    networks.quiet()
    began = time.process_time()
    return job(*arguments), time.process_time() - began


def run(settings: Settings, processes: int) -> dict[str, Any]:
    """All results."""
    seconds: dict[str, float] = {}

    def result(name: str, future: Future) -> Any:
        value, seconds[name] = future.result()
        common.say(f"{name}: {seconds[name]:.1f} CPU s")
        return value

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        kinds = ("published", *COMPRESSIONS)
        repairs = {kind: pool.submit(timed, repaired, kind, settings) for kind in kinds}
        plans = [(kind, alpha, "pointwise") for kind in ("published", "pruned") for alpha in settings.alphas]
        plans += [("pruned", settings.alphas[0], step) for step in ("extremum", "midpoint", "magnitude")]
        curves = [pool.submit(timed, curve, *plan, settings) for plan in plans]
        found = {kind: result(f"repair {kind}", future) for kind, future in repairs.items()}
        again = {kind: pool.submit(timed, reloaded, kind, settings) for kind in kinds}
        sides = pool.submit(timed, triangle, settings)
        step = -(-settings.held_out // 4)
        held = {
            (kind, first): pool.submit(timed, held_out, kind, settings, first, first + step)
            for kind in kinds
            for first in range(0, settings.held_out, step)
        }
        for (kind, first), future in held.items():
            part = result(f"held out {kind} {first}", future)
            whole = found[kind].setdefault("held out", {"before": [], "after": []})
            for when in whole:
                whole[when] += part[when]
        for kind, future in again.items():
            found[kind]["reloaded"] = result(f"reloaded {kind}", future)
        return {
            "pairs": found,
            "triangle": result("triangle", sides),
            "curves": [result("curve " + " ".join(map(str, plan)), f) for plan, f in zip(plans, curves, strict=True)],
            "CPU seconds": seconds,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run on two images")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "paper")
    args = parser.parse_args(argv)
    networks.quiet()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.quick(folder, args.seed) if args.quick else Settings(folder, args.seed)
        results = run(settings, args.processes)
    recorded = json.loads((common.require_folder() / "fnn_repair" / "ten_images.json").read_text())["images"]
    results["table 2"] = paper_report.table_2(results["pairs"]["published"], recorded)
    problems = paper_report.problems(results, quick=args.quick)
    report = {
        "settings": {key: value for key, value in asdict(settings).items() if key != "folder"},
        "machine": common.machine(1),
        "seconds": time.monotonic() - began,
        "problems": problems,
        **results,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(paper_report.rounded(report), indent=1) + "\n")
    paper_report.draw(results, args.output)
    paper_report.fill(args.output / "README.md", paper_report.tables(report))
    print(paper_report.tables(report))
    for problem in problems:
        print("PROBLEM:", problem)
    print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
