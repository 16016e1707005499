"""Torchreach beside Veritex and nnenum: the same boxes in turn (A B C, A B C, ...), one thread each.

The tools are taken from checkouts that the caller names; both are CPU tools. Each run is a process of its own,
so that a tool that ends it is recorded as having failed, and imports are not timed. The table gives medians of
CPU seconds and, for each tool, its median divided by that of torchreach in the same run. `--baseline` adds another
version of torchreach.

Where the data folder has the published lists of VeryDiff or NNEquiv (`peer_lists.py`), torchreach answers them too,
beside what is recorded of these tools; they are not run.

    Veritex: https://github.com/Shaddadi/veritex    nnenum: https://github.com/stanleybak/nnenum
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import nn

from benchmarks import common, peer_lists

RUNNER = Path(__file__).with_name("peer_runner.py")
CASES = [
    *("2_3 prop_3 full", "1_1 prop_4 full", "1_1 prop_3 full"),
    *("1_1 prop_3 centre 0.25 int8", "1_1 prop_3 centre 0.25 float16", "2_3 prop_4 full float16"),
    *("1_1 prop_3 centre 0.25 identical", "3_7 prop_4 full prune30"),
]
COLUMNS = ("case", "expected", "tool", "status", "regions", "CPU s", "wall s", "regions / CPU s", "ratio", "deviation")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def problem(case: common.Case) -> dict[str, np.ndarray]:
    """What `peer_runner` reads."""
    pairs = [affine(network) for network in case.networks()]
    arrays = {"box": case.box().numpy()}
    if len(pairs) == 1:
        return arrays | named(*pairs[0])
    for tail, (weights, biases) in zip(("_1", "_2"), pairs, strict=True):
        arrays |= named(weights, biases, tail)
    return arrays | named(*merged(*pairs))


def affine(network: nn.Module) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases of a fully connected ReLU network, float64."""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().double().numpy() for layer in linear]
    return weights, [layer.bias.detach().double().numpy() for layer in linear]


def named(weights: list[np.ndarray], biases: list[np.ndarray], tail: str = "") -> dict[str, np.ndarray]:
    return {f"{letter}{i}{tail}": a for letter, part in (("W", weights), ("b", biases)) for i, a in enumerate(part)}


def merged(first: tuple[list, list], second: tuple[list, list]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both networks side by side, dense: first weights stacked, then block-diagonal, last [W1, -W2]."""
    weights, biases = [], []
    for index, (w1, w2, b1, b2) in enumerate(zip(first[0], second[0], first[1], second[1], strict=True)):
        if index == 0:
            weights.append(np.vstack((w1, w2)))
        elif index < len(first[0]) - 1:
            zeros = np.zeros((len(w1), w2.shape[1])), np.zeros((len(w2), w1.shape[1]))
            weights.append(np.block([[w1, zeros[0]], [zeros[1], w2]]))
        else:
            weights.append(np.hstack((w1, -w2)))
        biases.append(b1 - b2 if index == len(first[0]) - 1 else np.concatenate((b1, b2)))
    return weights, biases


def run_once(command: list[str], seconds: float, core: int | None) -> dict[str, Any]:
    """Outcome of one run: status "done", or how the process ended and the last it said."""

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    # Files, not pipes, and a session of its own: a tool's helper processes may outlive it and hold a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=os.environ | ONE_THREAD, preexec_fn=pin, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": f"not finished in {seconds:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read().strip(), err.read().strip()
    if code == 0 and printed:
        return {"status": "done", **json.loads(printed.splitlines()[-1])}
    said = (complaint or printed or "nothing said").splitlines()[-1]
    how = f"signal {-code}" if code < 0 else f"exit {code}"
    return {"status": f"{how}: {said[:120]}", "output": f"{printed}\n{complaint}"[-4000:]}


def summary(case: common.Case, tool: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over the runs that finished."""
    done = [run for run in runs if run["status"] == "done"]
    row: dict[str, Any] = {
        "case": case.name,
        "expected": case.expected,
        "tool": tool,
        "status": next((run["status"] for run in runs if run["status"] != "done"), "done"),
        "runs": runs,
    }
    if not done:
        return row
    cpu = statistics.median(run["cpu_seconds"] for run in done)
    row |= {
        "regions": done[-1]["regions"],
        "CPU s": cpu,
        "wall s": statistics.median(run["seconds"] for run in done),
        "regions / CPU s": done[-1]["regions"] / cpu,
    }
    if done[-1]["lower"] is not None:
        low, high = (bound.numpy() for bound in case.recorded_range())
        off = (np.abs(done[-1]["lower"] - low).max(), np.abs(done[-1]["upper"] - high).max())
        row["deviation"] = float(max(off))
    return row


def compare(case: common.Case, tools: dict[str, list[str]], args) -> list[dict[str, Any]]:
    """All tools on one case, in turn, `args.repeats` times; a tool that failed is not run again."""
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "problem.npz")
        np.savez(path, **problem(case))  # type: ignore[arg-type]
        for _ in range(args.repeats):
            for tool, (python, *checkout) in tools.items():
                if runs[tool] and runs[tool][-1]["status"] != "done":
                    continue
                command = [python, str(RUNNER), tool, str(path), *checkout]
                runs[tool].append(run_once(command, args.seconds, args.core))
                common.say(f"{case.name}, {tool}: {runs[tool][-1].get('cpu_seconds', runs[tool][-1]['status'])}")
    rows = [summary(case, tool, runs[tool]) for tool in tools]
    ours = next(row for row in rows if row["tool"] == "torchreach")
    for row in rows:
        if "CPU s" in row and "CPU s" in ours:
            row["ratio"] = row["CPU s"] / ours["CPU s"]
    return rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Whatever is wrong with our own runs; how a peer fails is a result."""
    found = []
    for row in rows:
        if row["tool"] != "torchreach":
            continue
        if row["status"] != "done":
            found.append(f"{row['case']}: torchreach: {row['status']}")
        elif row["expected"] is not None and row["regions"] != row["expected"]:
            found.append(f"{row['case']}: torchreach counts {row['regions']} regions, expected {row['expected']}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.options(__doc__)
    for tool in ("veritex", "nnenum"):
        parser.add_argument(f"--{tool}", type=Path, metavar="PATH", help=f"checkout of {tool}; left out if not given")
        parser.add_argument(f"--{tool}-python", default=sys.executable, help="interpreter with what it needs")
    parser.add_argument("--baseline", type=Path, metavar="PATH", help="another checkout of torchreach, run in turn too")
    parser.add_argument("--case", action="append", help="case, may be repeated (default: eight of them)")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of one run (default: 600)")
    parser.add_argument("--core", type=int, help="pin every run to this core")
    parser.add_argument("--section", action="append", choices=("regions", *peer_lists.READERS),
                        help="only this one; may be repeated (default: those with data)")  # fmt: skip
    parser.add_argument("--list", help="only this published list, such as acas-prune-0.05")
    parser.add_argument("--total", type=float, default=600.0, help="seconds for each peer's lists (default: 600)")
    parser.add_argument("--samples", type=int, default=10_000, help="of each answer of a list (default: 10000)")
    args = parser.parse_args(argv)
    if args.threads != 1:
        parser.error("peers are compared on one thread; --threads must be 1")
    tools = {"torchreach": [sys.executable]}
    for tool in ("baseline", "veritex", "nnenum"):
        path = getattr(args, tool)
        if path is not None:
            if not path.is_dir():
                parser.error(f"--{tool}: no folder {path}")
            tools[tool] = [getattr(args, f"{tool}_python", sys.executable), str(path.resolve())]
    common.headline(args)
    folder = common.require_folder()
    sections = args.section or ["regions", *(peer for peer in peer_lists.READERS if (folder / peer).is_dir())]
    rows, wrong = [], []
    if "regions" in sections:
        for case in common.choose(common.acasxu_cases(10**9), args.case or CASES):
            rows += compare(case, tools, args)
        common.show(rows, COLUMNS, "CPU seconds, one thread", "ratio: median CPU seconds, divided by torchreach's")
        wrong += problems(rows)
    for peer in (peer for peer in peer_lists.READERS if peer in sections):
        found, lines = peer_lists.run(peer, args)
        common.show(found, peer_lists.COLUMNS, f"Published lists of {peer}", peer_lists.NOTE)
        common.show(lines, peer_lists.SUMMARY, f"Lists of {peer}")
        wrong += [f"{row['instance']}, {row['asked']}: {problem}" for row in found for problem in row["problems"]]
        rows += [*found, *({"summary": True, **line} for line in lines)]
    return common.finish("peers", args, rows, wrong)


if __name__ == "__main__":
    sys.exit(main())
