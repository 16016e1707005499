"""MLPerf Tiny's networks and TFLite Micro's hello_world, float against int8 as LiteRT executes it.

Its figures: docs/benchmarks/mlperf_tiny.md.

Points (every code that is possible is followed) with agreement of labels, boxes around real inputs where there are any,
and what each layer's weights and roundings make of the difference. Softmax is left out of both
networks, which keeps the order of the scores.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import torchreach as tr
from benchmarks import common
from benchmarks.search import SOUND, timed, tiny_inputs
from torchreach.graph.deployed import DeployedNetwork, Softmax

FILES = {
    "hello_world": ("hello_world_float", "hello_world_int8"),
    "ad01": ("ad01_fp32", "ad01_int8"),
    "kws": ("kws_ref_model_float32", "kws_ref_model"),
    "resnet8": ("pretrainedResnet", "pretrainedResnet_quant"),
}
STEPS = (0.01, 0.25, 1.0)  # radii of boxes, in steps between neighbouring input codes
SAMPLES = 1000
POINT_COLUMNS = ("network", "inputs", "certified", "attained", "same label", "differs", "open", "depends", "CPU s")
BOX_COLUMNS = (
    "network", "input", "radius (codes)", "certified", "attained", "sampled", "certified / attained", "bounds from",
    "CPU s", "MB",
)  # fmt: skip
BLAME_COLUMNS = (
    "network", "layer", "certified", "attained", "sampled", "SQNR dB", "up to here", "attained up to here",
)  # fmt: skip


def networks(name: str) -> tuple[nn.Module, DeployedNetwork]:
    """Both without softmax."""
    folder = common.require_folder() / "mlperf_tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kws has int8 weights in its float file, which it says
        original, deployed = (tr.load(folder / f"{file}.tflite") for file in FILES[name])
    assert isinstance(deployed, DeployedNetwork)
    if isinstance(deployed.operations[-1], Softmax):
        original, deployed = original[:-1], deployed.scores()  # type: ignore[index]
    return original, deployed


def inputs(name: str, deployed: DeployedNetwork) -> tuple[str, Tensor]:
    """What they are, and inputs [B, *shape] as numbers of codes."""
    if name == "hello_world":
        kind, x = "every code", deployed.entry.value(torch.arange(-128, 128))[:, None]
    elif name == "ad01":
        import numpy as np

        frames = np.fromfile(common.require_folder() / "mlperf_tiny" / SOUND, dtype=np.float32).reshape(-1, 128)
        kind, x = "real", torch.stack([torch.from_numpy(frames[i : i + 5].ravel()) for i in range(len(frames) - 4)])
    elif name == "resnet8":
        whole = tiny_inputs()["resnet8"][1]
        kind, x = "real", torch.cat([picture.movedim(1, -1) for picture in [*whole, *tiles()]])
    else:
        generator = torch.Generator().manual_seed(0)
        kind, x = "random", 10 * torch.randn(500, *deployed.shape, generator=generator)
    return kind, deployed.entry.value(deployed.quantise(x.float())).float()


def tiles() -> list[Tensor]:
    """Parts [1, 3, 32, 32] of the pictures."""
    from sklearn.datasets import load_sample_images

    result = []
    for picture in load_sample_images().images:
        small = torch.tensor(picture).permute(2, 0, 1)[None].float()
        small = nn.functional.interpolate(small, (128, 192), mode="area")
        result += [part for row in small.split(32, 2) for part in row.split(32, 3)]
    return result


def points(_: argparse.Namespace) -> list[dict]:
    rows = []
    for name in ("ad01", "kws", "resnet8"):
        original, deployed = networks(name)
        kind, x = inputs(name, deployed)
        found, seconds = timed(lambda o=original, d=deployed, x=x: tr.audit(o, d, x))
        row = {"network": name, "inputs": f"{len(x)} {kind}", "CPU s": seconds}
        row |= {"certified": float(found.upper.max()), "attained": float(found.lower.max())}
        if name in ("kws", "resnet8"):
            answers = (tr.Answer.EQUIVALENT, tr.Answer.NOT_EQUIVALENT, tr.Answer.UNKNOWN)
            row |= dict(zip(("same label", "differs", "open"), map(found.count, answers), strict=True))
            row["depends"] = int(found.depends.sum())
        rows.append(row)
        common.say(f"{name}: {rows[-1]}")
    return rows


def boxes(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in FILES:
        original, deployed = networks(name)
        kind, every = inputs(name, deployed)
        chosen = every[:: max(len(every) // args.inputs, 1)][: args.inputs]
        for i, x in enumerate(chosen):
            for radius in STEPS:
                reach = radius * float(deployed.entry.scale)
                stars = tr.StarBatch.from_box((x - reach)[None], (x + reach)[None])
                common.reset_peak_memory()
                found, seconds = timed(
                    lambda o=original, d=deployed, s=stars: tr.discrepancy(
                        o, d, s, budget=tr.Budget(seconds=args.seconds)
                    )
                )
                drawn = stars.sample(SAMPLES)[0]
                with torch.no_grad():
                    off = torch.cat([
                        (original(part) - deployed(part)).abs().amax(0, keepdim=True) for part in drawn.split(100)
                    ])  # fmt: skip
                high, low, sampled = float(found.upper.max()), float(found.lower.max()), float(off.max())
                rows.append({
                    "network": name, "input": f"{kind} {i}", "radius (codes)": radius, "certified": high,
                    "attained": low, "sampled": sampled, "certified / attained": high / max(low, 1e-300),
                    "bounds from": found.stats.method, "CPU s": seconds, "MB": common.peak_memory_mb(),
                    "holds": bool((off.amax(0).flatten() <= found.upper[0].flatten() * (1 + 1e-5) + 1e-5).all()),
                })  # fmt: skip
                common.say(f"{name} {radius}: {high:.5g} / {low:.5g}, {seconds:.1f} CPU s, {found.stats.method}")
    return rows


def blame(args: argparse.Namespace) -> list[dict]:
    """Each layer alone as it is deployed, its weights and its roundings, in the original; and all up to it."""
    rows = []
    for name in ("hello_world", "ad01"):
        original, deployed = networks(name)
        _, every = inputs(name, deployed)
        reach = STEPS[0] * float(deployed.entry.scale)
        stars = tr.StarBatch.from_box((every[:1] - reach), (every[:1] + reach))
        found, seconds = timed(
            lambda o=original, d=deployed, s=stars: tr.attribute(o, d, s, budget=tr.Budget(seconds=8 * args.seconds))
        )
        for k, layer in enumerate(found.layers):
            rows.append({
                "network": name, "layer": layer, "certified": float(found.alone[k].upper.max()),
                "attained": float(found.alone[k].lower.max()), "sampled": float(found.sampled_max[k]),
                "SQNR dB": float(found.sqnr[k]), "up to here": float(found.cumulative[k].upper.max()),
                "attained up to here": float(found.cumulative[k].lower.max()), "CPU s": seconds,
            })  # fmt: skip
        common.say(f"{name}: {len(found.layers)} layers, {seconds:.0f} CPU s")
    return rows


SECTIONS = {"points": (points, POINT_COLUMNS), "boxes": (boxes, BOX_COLUMNS), "blame": (blame, BLAME_COLUMNS)}


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of each comparison (default: 30)")
    parser.add_argument("--inputs", type=int, default=2, help="inputs of each network with boxes (default: 2)")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    args = parser.parse_args(argv)
    common.headline(args)
    warnings.simplefilter("ignore")
    found = {title: SECTIONS[title][0](args) for title in args.section}
    for title, rows in found.items():
        common.show(rows, SECTIONS[title][1], title)
    problems = [f"{row['network']}: a sample is outside" for row in found.get("boxes", ()) if not row["holds"]]
    return common.finish("mlperf_tiny", args, [row for rows in found.values() for row in rows], problems)


if __name__ == "__main__":
    sys.exit(main())
