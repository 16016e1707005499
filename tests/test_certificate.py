"""Certificates and their checker: every method, what the checker shares with the engine, mutations, damaged files."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import save_file
from scipy.optimize import linprog
from torch import nn

import torchreach as tr
from tests.data import require_data
from tests.networks import acasxu_pair
from torchreach.check.check import check, main
from torchreach.check.forms import Form, Networks, Refused
from torchreach.check.polytopes import Polytopes
from torchreach.check.proof import Bounded, Parts, Set
from torchreach.check.weights import digest, network
from torchreach.core.errors import OptionError, UnsupportedLayerError
from torchreach.read.save import save as save_network
from torchreach.verbs.certificate import layers_of

CHECKER = Path(tr.__file__).parent / "check"
SIZE = 600  # lines of code of the checker


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(n_in, n_out, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) / n_in**0.5)
            layer.bias.copy_(0.3 * torch.randn(n_out, generator=generator, dtype=torch.float64))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def kept(module: nn.Module, path: Path) -> Path:
    state = {k: v.contiguous() for k, v in module.state_dict().items() if k.endswith(("weight", "bias"))}
    save_file(state, path)
    return path


def boxes(count: int, inputs: int, half: float, seed: int = 3) -> tr.StarBatch:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, inputs, generator=generator, dtype=torch.float64) - 0.5
    return tr.StarBatch.from_box(centre - half, centre + half)


def cut_stars() -> tr.StarBatch:
    """Two triangles, as stars with a half-space."""
    basis = torch.tensor([[0.1, -0.2], [0.5, 0.1], [-0.2, 0.4]], dtype=torch.float64).expand(2, 3, 2)
    A, b = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]).double(), torch.tensor([[0.3], [0.1]]).double()
    one = torch.ones(2, 2, dtype=torch.float64)
    return tr.StarBatch(basis, A, b, -one, one, torch.arange(2))


def said(certificate: Path, *files: Path) -> list[str]:
    lines: list[str] = []
    check(certificate, list(files), lines.append)
    return lines


SMALL, WIDE = mlp(3, 8, 6, 2), mlp(12, 12, 10, 3, seed=1)
CASES = {
    "vertices": (SMALL, tr.quantize_weights(SMALL, bits=4), boxes(2, 3, 0.15), {"method": "exact"}, 1e-8),
    "half-spaces": (mlp(2, 6, 2), tr.prune_weights(mlp(2, 6, 2), 0.4), cut_stars(), {"method": "exact"}, 1e-8),
    "programs": (WIDE, tr.quantize_weights(WIDE, bits=4), boxes(1, 12, 0.03), {"method": "exact"}, 1e-6),
    "inputs": (SMALL, mlp(3, 7, 2, seed=5), boxes(1, 3, 0.2), {"method": "search", "gap": 0.02}, 1e-8),
    "signs": (WIDE, tr.quantize_weights(WIDE, bits=8), boxes(1, 12, 0.05), {"method": "search"}, 1e-5),
    "within": (SMALL, tr.quantize_weights(SMALL, bits=8), boxes(2, 3, 0.3), {"tolerance": 0.5}, 1e-8),
    "point": (SMALL, tr.quantize_weights(SMALL, bits=4), boxes(1, 3, 0.0), {}, 1e-8),
    "identical": (SMALL, SMALL, boxes(1, 3, 0.4), {}, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_certificates_of_every_method_are_verified(name, tmp_path):
    original, compressed, stars, options, off = CASES[name]
    found = tr.discrepancy(original, compressed, stars, **options)
    made = found.save_certificate(tmp_path / "c")
    lines = said(made.path, kept(original, tmp_path / "a.safetensors"), kept(compressed, tmp_path / "b.safetensors"))
    assert [line for line in lines if line.startswith("verified: |y1 - y2| <= ")]
    assert (made.upper >= found.upper.double()).all()
    assert (made.upper <= found.upper.double() * (1 + off)).all()  # what was proven is what was certified
    if name == "vertices":
        assert made.leaves == tuple(found.regions.tolist())
    content = tensors(made.path)
    for s in range(len(stars)):
        assert (content[f"claim.{s}.attained"] >= found.lower[s].numpy() * (1 - 1e-6) - 1e-9).all()


def test_reach_repair_and_equivalence_have_certificates(tmp_path):
    pruned, stars = tr.prune_weights(SMALL, 0.3), boxes(2, 3, 0.3)
    a, b = kept(SMALL, tmp_path / "a.safetensors"), kept(pruned, tmp_path / "b.safetensors")
    reached = tr.reach(SMALL, stars)
    assert "|y| <=" in said(reached.save_certificate(tmp_path / "c").path, a)[-2]
    merged = tr.reach(tr.merge(SMALL, pruned), stars)
    assert "|y1 - y2| <=" in said(merged.save_certificate(tmp_path / "c").path, a, b)[-2]
    same = tr.equivalent(SMALL, pruned, stars, epsilon=2.0)
    assert float(same.save_certificate(tmp_path / "c").upper.max()) <= 2
    said(tmp_path / "c", a, b)
    repaired = tr.repair(SMALL, pruned, stars, target=0.5, method="solve", iterations=1)
    made = repaired.save_certificate(tmp_path / "c")
    said(made.path, a, kept(repaired.network, tmp_path / "r.safetensors"))
    assert (made.upper <= repaired.after.upper.double() * (1 + 1e-8)).all()


def test_what_has_no_certificate_is_refused_by_name(tmp_path):
    stars = boxes(1, 3, 0.1)
    with pytest.raises(OptionError, match="no certificate for others to check"):
        tr.equivalent(SMALL, SMALL, stars, top1=True).save_certificate(tmp_path / "c")
    found = tr.discrepancy(SMALL, SMALL, stars)
    tr.save_result(found, tmp_path / "r.pt")
    with pytest.raises(OptionError, match="no certificate for others to check"):
        tr.load_result(tmp_path / "r.pt").save_certificate(tmp_path / "c")
    smooth = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(UnsupportedLayerError, match="Linear layers and ReLUs, got .* at 1"):
        tr.discrepancy(smooth, smooth, stars).save_certificate(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_proof_keeps_to_its_budget_and_what_it_writes_is_true(tmp_path):
    small = tr.quantize_weights(WIDE, bits=4)
    found = tr.discrepancy(WIDE, small, boxes(1, 12, 0.3), budget=tr.Budget(seconds=1))
    made = found.save_certificate(tmp_path / "c", tr.Budget(seconds=0.01))
    assert (made.upper >= found.lower).all()
    said(made.path, kept(WIDE, tmp_path / "a.safetensors"), kept(small, tmp_path / "b.safetensors"))


# -- independence ---------------------------------------------------------------------------------------


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, comments, docstrings or imports."""
    lines: set[int] = set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        with_text = (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        )
        bare = node.body[0] if with_text else node if isinstance(node, ast.Import | ast.ImportFrom) else None
        if bare is not None:
            lines -= set(range(bare.lineno, bare.end_lineno + 1))
    return len(lines)


def test_the_checker_is_small_and_imports_numpy_alone():
    files = sorted(CHECKER.glob("*.py"))
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in files) <= SIZE
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names | {"numpy"}}
    assert all(name.startswith("torchreach.check") for name in others)


def test_the_checker_runs_where_nothing_but_numpy_can_be_imported(tmp_path):
    made = tr.discrepancy(SMALL, SMALL, boxes(1, 3, 0.2)).save_certificate(tmp_path / "c")
    a = kept(SMALL, tmp_path / "a.safetensors")
    code = """if True:
        import sys
        class Only:
            def find_spec(self, name, path=None, target=None):
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names | {"numpy", "torchreach"} or (
                    top == "torchreach" and name != top and not name.startswith("torchreach.check")):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Only())
        from torchreach.check.check import main
        sys.exit(main(sys.argv[1:]))
    """
    run = subprocess.run([sys.executable, "-c", code, made.path, a, a], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "verified: |y1 - y2| <= 0 " in run.stdout


# -- what is not true is refused ------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        return load(archive.read("evidence.safetensors"))


def rewritten(path: Path, content: dict[str, np.ndarray], target: Path, about: dict | None = None) -> Path:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("certificate.json") if about is None else json.dumps(about).encode()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("certificate.json", text)
        archive.writestr("evidence.safetensors", save(content))
    return target


@cache
def example(name: str) -> tuple[nn.Module, nn.Module, tr.StarBatch, tr.Discrepancy]:
    """A case of one star, and its exact discrepancy."""
    original, compressed, stars, _, _ = CASES[name]
    return original, compressed, stars, tr.discrepancy(original, compressed, stars, method="exact")


def mutated(content: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """One to three changes of anything that is not the input set."""
    content = {name: value.copy() for name, value in content.items()}
    names = [name for name, value in content.items() if not name.startswith("set.") and value.size]
    for name in generator.choice(names, generator.integers(1, 4)):
        value = content[name].reshape(-1)
        if not value.size:
            continue
        at = int(generator.integers(value.size))
        if value.dtype.kind == "f":
            kinds = value[at] * generator.normal(1, 0.3), value[at] - abs(generator.normal(0, 0.1)), 0.0, -value[at]
            value[at] = kinds[generator.integers(len(kinds))]
        else:
            kinds = (
                value[at] + generator.integers(-3, 4),
                generator.integers(-1, 40),
                -1,
                value[generator.integers(value.size)],
            )
            value[at] = kinds[generator.integers(len(kinds))]
        if generator.random() < 0.1:  # coverage: parts that are missing
            content[name] = value[: int(generator.integers(value.size + 1))]
        else:
            content[name] = value.reshape(content[name].shape)
    return content


@pytest.mark.parametrize("name", ["vertices", "inputs", "programs", "half-spaces"])
def test_mutated_certificates_are_refused_or_still_true(name, tmp_path):
    """250 each: of what is accepted, the claims hold for the exact discrepancy."""
    original, compressed, stars, truth = example(name)
    options = CASES[name][3]
    made = tr.discrepancy(original, compressed, stars, **options).save_certificate(tmp_path / "c")
    files = kept(original, tmp_path / "a.safetensors"), kept(compressed, tmp_path / "b.safetensors")
    content, generator = tensors(made.path), np.random.default_rng(7)
    refused = 0
    for _ in range(250):
        changed = mutated(content, generator)
        try:
            said(rewritten(made.path, changed, tmp_path / "m"), *files)
        except Refused:
            refused += 1
            continue
        for s in range(len(stars)):
            assert (changed[f"claim.{s}.high"] >= truth.range_upper[s].numpy() - 1e-8).all()
            assert (changed[f"claim.{s}.low"] <= truth.range_lower[s].numpy() + 1e-8).all()
            assert (changed[f"claim.{s}.attained"] <= truth.upper[s].numpy() + 1e-8).all()
    assert refused > 100


def test_the_first_thing_that_cannot_be_verified_is_named(tmp_path):
    original, compressed, stars, _ = example("vertices")
    made = tr.discrepancy(original, compressed, stars).save_certificate(tmp_path / "c")
    a, b = kept(original, tmp_path / "a.safetensors"), kept(compressed, tmp_path / "b.safetensors")
    content = tensors(made.path)

    def refused(match: str, *files: Path, **changed: np.ndarray) -> None:
        new = content | {name.replace("_", "."): value for name, value in changed.items()}
        with pytest.raises(Refused, match=match):
            said(rewritten(made.path, new, tmp_path / "m"), *(files or (a, b)))

    refused(r"set 1, part \d+ of the tree, output \d: the upper end is", claim_1_high=content["claim.1.high"] - 1e-6)
    refused(r"set 0, output 0: the witness attains", claim_0_attained=content["claim.0.attained"] + 1e-6)
    refused("a witness that lies outside", claim_0_at=content["claim.0.at"] + 1)
    refused("a tree that is not complete", tree_0=content["tree.0"][:-1])
    refused("a split of what does not exist", tree_0=np.where(content["tree.0"] >= 0, 99, -1).astype(np.int32))
    refused("are not the networks of the certificate", b, a)
    refused("are not the networks of the certificate", a)
    refused("claim.0.high is missing", claim_0_high=np.full(2, np.inf))
    refused("claim.0.high is missing", claim_0_high=np.zeros(3))
    reversed_order = content["tree.0"].copy()
    reversed_order[0] = 3 + 2 * 8  # a neuron of the second layer first
    refused("order of the layers|depends on relaxed ones", tree_0=reversed_order)


@pytest.mark.parametrize("cut", [0, 10, 200, -30])
def test_damaged_files_are_refused(cut, tmp_path, capsys):
    made = tr.discrepancy(SMALL, SMALL, boxes(1, 3, 0.2)).save_certificate(tmp_path / "c")
    a = kept(SMALL, tmp_path / "a.safetensors")
    (tmp_path / "d").write_bytes(made.path.read_bytes()[:cut])
    assert main([str(tmp_path / "d"), str(a), str(a)]) == 1
    assert "is no certificate, or damaged" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), str(a), str(a)]) == 2
    assert main([]) == 2
    weights = bytearray(a.read_bytes())
    weights[-9] ^= 64  # one weight is another
    (tmp_path / "b.safetensors").write_bytes(weights)
    assert main([str(made.path), str(a), str(tmp_path / "b.safetensors")]) == 1
    assert "not the networks of the certificate" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["certificate", "network"])
def test_changed_bytes_are_refused_or_change_nothing_that_is_claimed(which, tmp_path, capsys):
    """150 files each with one to three bytes changed: the checker answers, and what it accepts is true."""
    original, compressed, stars, truth = example("vertices")
    made = tr.discrepancy(original, compressed, stars).save_certificate(tmp_path / "c")
    a, b = kept(original, tmp_path / "a.safetensors"), kept(compressed, tmp_path / "b.safetensors")
    save_network(original, tmp_path / "a.onnx", (3,))
    source = {"certificate": made.path, "network": tmp_path / "a.onnx"}[which]
    generator, answers = np.random.default_rng(11), []
    for _ in range(150):
        raw = bytearray(source.read_bytes())
        for _ in range(generator.integers(1, 4)):
            raw[generator.integers(len(raw))] = generator.integers(256)
        changed = tmp_path / ("m" + source.suffix)
        changed.write_bytes(raw)
        files = (changed, a, b) if which == "certificate" else (made.path, changed, b)
        answers.append(main([str(path) for path in files]))
        if answers[-1] == 0:
            claims = tensors(files[0])
            assert (claims["claim.0.high"] >= truth.range_upper[0].numpy() - 1e-8).all()
    capsys.readouterr()
    assert set(answers) <= {0, 1}
    assert answers.count(1) > 100


# -- the checker's parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [1, 2, 3, 5])
def test_cut_polytopes_have_the_vertices_that_enumeration_finds(variables):
    """Random cuts of the cube: every vertex lies in all half-spaces, and support values are those of programs."""
    generator = np.random.default_rng(variables)
    polytope, planes = Polytopes.boxes(1, variables), []
    for _ in range(6):
        c, g = generator.normal(0, 0.3), generator.normal(0, 1, variables)
        rows = np.concatenate(([c], g))[None, :, None]
        parts = polytope.cut(Form(rows, np.zeros((1, 1))), np.zeros(1, int))
        side = int(parts.sizes[1] > 0)
        polytope = parts.take(np.array([side]))
        planes.append((1 if side else -1) * np.concatenate(([c], g)))
        A, b = -np.stack(planes)[:, 1:], np.stack(planes)[:, 0]
        assert (polytope.x @ A.T <= b + 1e-9).all()
        for goal in generator.normal(0, 1, (8, variables)):
            best = -linprog(-goal, A_ub=A, b_ub=b, bounds=(-1, 1)).fun
            low, high = polytope.ends(Form(np.concatenate(([0.0], goal))[None, :, None], np.zeros((1, 1))))
            assert high[0, 0] == pytest.approx(best, abs=1e-9)
            assert high[0, 0] >= best - 1e-12


def test_onnx_and_safetensors_give_the_layers_that_the_engine_reads(tmp_path):
    module = mlp(4, 6, 5, 3).float()
    save_network(module, tmp_path / "n.onnx", (4,))
    expected = digest(layers_of(module, (4,)))
    assert digest(network(tmp_path / "n.onnx")) == expected
    assert digest(network(kept(module, tmp_path / "n.safetensors"))) == expected
    half = mlp(4, 6, 3).bfloat16()
    assert digest(network(kept(half, tmp_path / "h.safetensors"))) == digest(layers_of(half, (4,)))


def test_networks_that_the_checker_cannot_read_are_refused_by_name(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    save_network(module, tmp_path / "n.onnx", (1, 4, 4))
    with pytest.raises(Refused, match="Conv"):
        network(tmp_path / "n.onnx")
    with pytest.raises(Refused, match="0.weight"):
        network(kept(module, tmp_path / "n.safetensors"))
    (tmp_path / "n.pt2").write_bytes(b"")
    with pytest.raises(Refused, match="safetensors and .onnx"):
        network(tmp_path / "n.pt2")
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(Refused, match="damaged"):
        network(tmp_path / "m.onnx")


@pytest.mark.parametrize("seed", range(6))
def test_bounds_with_any_signs_and_multipliers_hold_at_samples(seed):
    """Random pairs, boxes, signs asked and multipliers: no sample with these signs lies above a bound."""
    generator = np.random.default_rng(seed)
    first = mlp(4, 9, 7, 2, seed=seed)
    second = mlp(4, 9, 7, 2, seed=seed + (0 if seed % 2 else 50))
    if seed % 2:
        second = tr.prune_weights(second, 0.3)
    nets = Networks.of(layers_of(first, (4,)), layers_of(second, (4,)))
    low = generator.uniform(-1, 0.5, 4)
    given = Set(np.concatenate((np.zeros((1, 4)), np.eye(4))), np.zeros((0, 4)), np.zeros(0), low, low + 0.6)
    x = torch.from_numpy(generator.uniform(given.low, given.high, (4000, 4)))
    signs, y = [], []
    for net in (first, second):
        hidden = [net[:1](x), net[:3](x)]
        signs.append([torch.sign(z) for z in hidden])
        y.append(net(x))
    pattern = torch.cat([part for pair in zip(*signs, strict=True) for part in pair], 1).detach().numpy()
    difference = torch.cat((y[0] - y[1], y[1] - y[0]), 1).detach().numpy()
    hidden, count = pattern.shape[1], 12
    asked = np.where(generator.random((count, hidden)) < 0.2, pattern[generator.integers(4000, size=count)], 0)
    parts = Parts(
        np.arange(count), *(np.tile(end, (count, 1)) for end in (given.low, given.high)), asked.astype(np.int8)
    )
    bounded = Bounded.of(nets, given, parts)
    row, objective = generator.integers(count, size=300), generator.integers(4, size=300)
    form = generator.integers(bounded.known.error.shape[1], size=300)
    for scale in (0.0, 0.01, 0.3):
        found = bounded.bounds(row, objective, form, scale * generator.random(300))
        for b in range(count):
            inside = ((asked[b] == 0) | (asked[b] == pattern)).all(1)
            assert inside.any()
            assert (difference[inside] <= found[b]).all()


# -- ACAS Xu --------------------------------------------------------------------------------------------

NETWORKS = ("1_2", "1_3", "2_1", "2_5", "3_3", "4_2", "5_7")
# Twenty pairs: the recorded ones, and networks beside copies with 8-bit weights on a quarter of a property.
ACAS_XU = [*(("recorded", i) for i in range(13)), *(("onnx", name) for name in NETWORKS)]


@pytest.mark.parametrize(("kind", "which"), ACAS_XU)
def test_acas_xu_certificates_are_verified(kind, which, tmp_path):
    if kind == "recorded":
        cases = json.loads(require_data("equivalence", "acasxu.json").read_text())["cases"]
        case = sorted(cases, key=lambda c: c["regions"] or c["regions_one_tool_only"])[which]
        pair, box = [net.double() for net in acasxu_pair(case["npz"])], torch.tensor(case["box"]).double()
    else:
        one = tr.load(require_data("acasxu", f"ACASXU_run2a_{which}_batch_2000.onnx")).double()
        pair = [one, tr.quantize_weights(one, bits=8)]
        low, high = (
            end[0].double()
            for end in tr.StarBatch.from_vnnlib(require_data("acasxu", "prop_3.vnnlib")).bounding_box()[:2]
        )
        middle, half = (low + high) / 2, (high - low) / 8
        box = torch.stack((middle - half, middle + half), 1)
    found = tr.discrepancy(*pair, tr.StarBatch.from_box(box[:, 0], box[:, 1]), method="exact")
    made = found.save_certificate(tmp_path / "c")
    files = [kept(net, tmp_path / f"{i}.safetensors") for i, net in enumerate(pair)]
    said(made.path, *files)
    assert made.leaves == tuple(found.regions.tolist())
    assert (made.upper <= found.upper + 1e-9).all()
