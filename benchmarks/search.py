"""Branch and bound on the difference of two networks: how tight after how many seconds.

mnist: the MNIST pair, all 784 pixels within eps, clipped to [-1, 1]: certified bound over largest value attained.
acasxu: ACAS Xu networks and their float16 copies on the property boxes: seconds until max |y1 - y2| <= epsilon is
    certified.
int8: the same boxes with int8 weights: the interval when the seconds are over.
wide: the equivalence pairs on whole property boxes: certified bound over largest value attained when the seconds are
    over, and seconds until epsilon is certified where it holds.
trained: the same for copies that were trained further, and for students of another shape.
resnet8, ad01: MLPerf Tiny's ResNet8 and its autoencoder, against copies with 8-bit weights and with 30 %
    of them pruned: certified bound over largest value attained around three real inputs, when the seconds are over.
cases: the recorded pairs: seconds until the search closes to 1e-6, beside exact enumeration and the choice between
    them, against recorded ranges.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

import torchreach as tr
from benchmarks import common, exact_mnist

IMAGES, EPS = (0, 3, 7), (0.02, 0.05, 0.1)
TRAINED = ("1_1", "2_3", "3_7", "4_5", "5_9")
NETWORKS = tuple(f"1_{i}" for i in range(1, 10))
INT8_NETWORKS = ("1_1", "1_5")
PROPERTIES = (1, 2, 3, 4)
EPSILONS = (0.05, 0.01)
CLOSED = 1e-6
SOUND, TINY_RADII = "ad01_normal_id_01.bin", (255, 1024, 4096)
# Recorded ranges come from tools without error bounds.
TOLERANCE = 1e-7
WHOLE_BOXES = (
    "pair",
    "property",
    "attained",
    "upper",
    "upper / attained",
    "branches",
    "CPU s",
    "answer",
    "CPU s until",
)
TINY = ("copy", "input", "radius", "attained", "upper", "upper / attained", "CPU s", "peak MB")
COLUMNS = {
    "mnist": ("image", "eps", "one pass", "upper", "attained", "upper / attained", "branches", "CPU s"),
    "acasxu": ("network", "property", "epsilon", "answer", "upper", "attained", "branches", "CPU s"),
    "int8": ("network", "property", "lower", "upper", "method", "branches", "CPU s"),
    "wide": WHOLE_BOXES,
    "trained": WHOLE_BOXES,
    "resnet8": TINY,
    "ad01": TINY,
    "cases": (
        "case",
        "gap",
        "status",
        "branches",
        "CPU s",
        "enumeration CPU s",
        "auto CPU s",
        "auto / better",
        "deviation",
    ),
}


def timed(work):
    """Result of `work`, and the CPU seconds of this process."""
    began = time.process_time()
    return work(), time.process_time() - began


def mnist(args: argparse.Namespace) -> list[dict]:
    """One row per image and eps."""
    pair, images = exact_mnist.networks(), np.load(common.require_folder() / "fnn_repair" / "images.npy")
    rows = []
    for index in IMAGES[:1] if args.quick else IMAGES:
        image = torch.from_numpy(images)[index].double().flatten()[None]
        for eps in EPS:
            stars = tr.StarBatch.from_image(image, eps, clip=(-1, 1))
            first = tr.discrepancy(*pair, stars, "search", budget=tr.Budget(stars=1))
            found, seconds = timed(
                lambda s=stars: tr.discrepancy(*pair, s, budget=tr.Budget(seconds=args.seconds), gap=CLOSED)
            )
            row = {
                "image": index,
                "eps": eps,
                "one pass": float(first.max_upper),
                "upper": float(found.max_upper),
                "attained": float(found.max_lower),
                "upper / attained": float(found.max_upper / found.max_lower),
                "branches": found.stats.branches,
                "CPU s": seconds,
            }
            rows.append(row)
            common.say(f"image {index} eps {eps}: {row['upper / attained']:.3f}")
    return rows


def boxes(args: argparse.Namespace, networks: tuple[str, ...]):
    """(network name, property numbers, network, box), each box of a network once."""
    folder = common.require_folder() / "acasxu"
    for name in networks[:1] if args.quick else networks:
        network = tr.load(folder / f"ACASXU_run2a_{name}_batch_2000.onnx").double()
        seen: dict[tuple, list[int]] = {}
        for number in PROPERTIES:
            stars = tr.StarBatch.from_vnnlib(folder / f"prop_{number}.vnnlib")
            seen.setdefault(tuple(stars.lower.flatten().tolist() + stars.upper.flatten().tolist()), []).append(number)
        for numbers in seen.values():
            yield (
                name,
                "+".join(map(str, numbers)),
                network,
                tr.StarBatch.from_vnnlib(folder / f"prop_{numbers[0]}.vnnlib"),
            )


def acasxu(args: argparse.Namespace) -> list[dict]:
    """One row per network, box and epsilon."""
    rows = []
    for name, numbers, network, stars in boxes(args, NETWORKS):
        for epsilon in EPSILONS:
            half = copy.deepcopy(network).half().double()
            found, seconds = timed(
                lambda n=network, h=half, s=stars, e=epsilon: tr.equivalent(
                    n, h, s, e, budget=tr.Budget(seconds=args.seconds)
                )
            )
            rows.append(
                {
                    "network": name,
                    "property": numbers,
                    "epsilon": epsilon,
                    "answer": found.answer[0].value,
                    "upper": float(found.upper[0]),
                    "attained": float(found.lower[0]),
                    "branches": found.branches,
                    "CPU s": seconds,
                }
            )
            common.say(f"{name} property {numbers} {epsilon}: {found.answer[0].value}, {seconds:.1f} CPU s")
    return rows


def int8(args: argparse.Namespace) -> list[dict]:
    """One row per network and box."""
    rows = []
    for name, numbers, network, stars in boxes(args, INT8_NETWORKS):
        small: nn.Module = tr.quantize_weights(network, 8)
        found, seconds = timed(
            lambda n=network, c=small, s=stars: tr.discrepancy(
                n, c, s, budget=tr.Budget(seconds=args.seconds), gap=CLOSED
            )
        )
        rows.append(
            {
                "network": name,
                "property": numbers,
                "lower": float(found.max_lower),
                "upper": float(found.max_upper),
                "method": found.stats.method,
                "branches": found.stats.branches,
                "CPU s": seconds,
            }
        )
        common.say(f"{name} property {numbers}: [{rows[-1]['lower']:.4g}, {rows[-1]['upper']:.4g}]")
    return rows


def wide(args: argparse.Namespace) -> list[dict]:
    """One row per pair and whole box: after so many seconds, and for the first of `EPSILONS` on its own."""
    folder = common.require_folder()
    names = sorted(path.stem for path in (folder / "equivalence").glob("*.npz") if "identical" not in path.stem)
    pairs = ((name.removeprefix("acas_"), *common.acasxu_pair(f"{name}.npz")) for name in names)
    return on_whole_boxes(args, pairs)


def trained(args: argparse.Namespace) -> list[dict]:
    """The same for copies that were trained further, and for students of another shape."""
    return on_whole_boxes(args, trained_pairs(args.quick))


def trained_pairs(quick: bool):
    """(name, network, copy): disturbed by 2 % and retrained, or 2 x 100 neurons, on inputs of the boxes."""
    folder = common.require_folder() / "acasxu"
    for kind in ("retrained", "distilled"):
        for name in TRAINED[: 1 if quick else None]:
            network = tr.load(folder / f"ACASXU_run2a_{name}_batch_2000.onnx").double()
            torch.manual_seed(0)
            student: nn.Module = copy.deepcopy(network)
            if kind == "distilled":
                sizes = (nn.Linear(5, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
                student = nn.Sequential(nn.Flatten(), *sizes).double()
            else:
                with torch.no_grad():
                    for parameter in student.parameters():
                        parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
            boxes_ = [tr.StarBatch.from_vnnlib(folder / f"prop_{n}.vnnlib") for n in PROPERTIES if n != 2]
            x = torch.cat([box.sample(4000)[0] for box in boxes_]).double()
            with torch.no_grad():
                y = network(x)
            steps = 400 if kind == "retrained" else 4000
            optimizer = torch.optim.Adam(student.parameters(), 1e-4 if kind == "retrained" else 3e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                some = torch.randint(len(x), (512,))
                optimizer.zero_grad()
                (student(x[some]) - y[some]).pow(2).mean().backward()
                optimizer.step()
                schedule.step()
            yield f"{name} {kind}", network, student.requires_grad_(False)


def on_whole_boxes(args: argparse.Namespace, pairs: Iterable[tuple[str, nn.Module, nn.Module]]) -> list[dict]:
    rows = []
    for name, first, second in pairs:
        for number in PROPERTIES:
            if number == 2:  # the box of property 1
                continue
            stars = tr.StarBatch.from_vnnlib(common.require_folder() / "acasxu" / f"prop_{number}.vnnlib")
            budget = tr.Budget(seconds=args.seconds)
            found, seconds = timed(lambda a=first, b=second, s=stars, t=budget: tr.discrepancy(a, b, s, budget=t))
            said, until = timed(
                lambda a=first, b=second, s=stars, t=budget: tr.equivalent(a, b, s, EPSILONS[0], budget=t)
            )
            low, high = float(found.max_lower.max()), float(found.max_upper.max())
            rows.append(
                {
                    "pair": name,
                    "property": number,
                    "attained": low,
                    "upper": high,
                    "upper / attained": high / max(low, 1e-300),
                    "branches": found.stats.branches,
                    "CPU s": seconds,
                    "answer": said.answer[0].value,
                    "CPU s until": until,
                }
            )
            common.say(f"{name} property {number}: {high / max(low, 1e-300):.4g}, {seconds:.1f} CPU s")
        if args.quick:
            break
    return rows


def tiny_inputs() -> dict[str, tuple[float, list[torch.Tensor]]]:
    """Of each network: the width of its inputs' scale, and three inputs."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(p).permute(2, 0, 1)[None].float() for p in load_sample_images().images]
    pictures.append(pictures[1][:, :, 100:300, 200:400])  # the flower's middle
    small = [nn.functional.interpolate(picture, (32, 32), mode="area") for picture in pictures]
    sound = torch.from_numpy(np.fromfile(common.require_folder() / "mlperf_tiny" / SOUND, dtype=np.float32))
    frames = [sound[128 * start : 128 * start + 640][None] for start in (0, 60, 120)]
    return {"resnet8": (255.0, small), "ad01": (float(sound.max() - sound.min()), frames)}


def tiny(name: str, args: argparse.Namespace) -> list[dict]:
    """One row per copy, input and radius."""
    rows = []
    network = tr.load(common.require_folder() / "mlperf_tiny" / f"{name}_float.onnx")
    copies = {"8 bits": tr.quantize_weights(network, 8), "30 % pruned": tr.prune_weights(network, 0.3)}
    scale, inputs = tiny_inputs()[name]
    for kind, index, parts in itertools.product(copies, range(len(inputs)), TINY_RADII):
        if args.quick and (rows or parts != TINY_RADII[-1]):
            continue
        stars = tr.StarBatch.from_image(inputs[index], scale / parts)
        common.reset_peak_memory()
        found, seconds = timed(
            lambda c=copies[kind], s=stars: tr.discrepancy(network, c, s, budget=tr.Budget(seconds=args.seconds))
        )
        low, high = float(found.max_lower), float(found.max_upper)
        rows.append(
            {
                "copy": kind,
                "input": index,
                "radius": f"1/{parts}",
                "attained": low,
                "upper": high,
                "upper / attained": high / max(low, 1e-300),
                "CPU s": seconds,
                "peak MB": common.peak_memory_mb(),
            }
        )
        common.say(f"{name} {kind} {index} 1/{parts}: {high / max(low, 1e-300):.4g}, {seconds:.0f} CPU s")
    return rows


def cases(args: argparse.Namespace) -> list[dict]:
    """One row per recorded pair."""
    rows = []
    for case in common.acasxu_cases(1000 if args.quick else 100_000):
        if not case.is_pair:
            continue
        box = case.box()
        original, compressed = case.networks()
        stars = tr.StarBatch.from_box(box[:, 0], box[:, 1])
        found, seconds = timed(
            lambda o=original, c=compressed, s=stars: tr.discrepancy(
                o, c, s, "search", budget=tr.Budget(seconds=args.seconds)
            )
        )
        _, enumeration = timed(lambda o=original, c=compressed, s=stars: tr.discrepancy(o, c, s, "exact"))
        _, auto = timed(
            lambda o=original, c=compressed, s=stars: tr.discrepancy(
                o, c, s, gap=CLOSED, budget=tr.Budget(seconds=args.seconds)
            )
        )
        low, high = case.recorded_range()
        off = torch.maximum((found.range_lower[0] - low).abs(), (found.range_upper[0] - high).abs())
        rows.append(
            {
                "case": case.name,
                "gap": float((found.upper - found.lower).max()),
                "status": found.status[0].value,
                "branches": found.stats.branches,
                "CPU s": seconds,
                "enumeration CPU s": enumeration,
                "auto CPU s": auto,
                "auto / better": auto / min(seconds, enumeration),
                "deviation": float(off.max()),
                "holds": bool((found.range_lower[0] <= low + TOLERANCE).all())
                and bool((found.range_upper[0] >= high - TOLERANCE).all()),
            }
        )
        common.say(f"{case.name}: gap {rows[-1]['gap']:.2g}, {seconds:.2g} CPU s")
    return rows


SECTIONS = {
    "mnist": mnist,
    "acasxu": acasxu,
    "int8": int8,
    "wide": wide,
    "trained": trained,
    "resnet8": partial(tiny, "resnet8"),
    "ad01": partial(tiny, "ad01"),
    "cases": cases,
}


def problems(section: str, row: dict) -> list[str]:
    """What is wrong with a row, as opposed to slow or wide."""
    low, high = ("lower", "upper") if section == "int8" else ("attained", "upper")
    if section != "cases":
        return [] if row[low] <= row[high] else [f"{section}: attained {row[low]:.6g} above certified {row[high]:.6g}"]
    found = [] if row["holds"] else [f"{row['case']}: the interval does not contain the recorded range"]
    if row["gap"] > CLOSED:
        found.append(f"{row['case']}: not closed to {CLOSED:g}, gap {row['gap']:.2g}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each search (default: 60)")
    parser.add_argument("--quick", action="store_true", help="one image, one network, small cases")
    args = parser.parse_args(argv)
    common.headline(args)
    rows, wrong = [], []
    for section in args.section or SECTIONS:
        found = SECTIONS[section](args)
        common.show(found, COLUMNS[section], section)
        wrong += [problem for row in found for problem in problems(section, row)]
        rows += [{"section": section, **row} for row in found]
    return common.finish("search", args, rows, wrong)


if __name__ == "__main__":
    sys.exit(main())
