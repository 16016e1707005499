"""Checks a certificate against two networks: hashes, witnesses, and the bounds of every leaf of every tree.

A certificate is a zip of `certificate.json` and `evidence.safetensors`:

    set.S.basis [1 + M, N_in], .A [P, M], .b [P], .low, .high [M]    input set S
    claim.S.low, .high [N]       range of y1 - y2 over it (of y1 where there is no second network)
    claim.S.attained [N], .at [N, M]    |y1 - y2| attained, and the predicate where
    tree.S [T]                   the splits, see `proof.Tree`
    multipliers.S.many [leaves], .objective, .form, .value [Q]    where leaves are bounded as boxes, `proof.Multipliers`

Verified: that the networks are those of the certificate; that each witness lies in its set and attains what is claimed;
that the leaves cover each set and the range holds on each; all for the real-valued functions of the numbers that are stored.
Not verified: that the sets are those you mean (they are printed), what an execution in floating point rounds, and
what the analysis says of itself (its method, its number of regions, its time).
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchreach.check.forms import Layer, Refused, gamma
from torchreach.check.polytopes import MOST
from torchreach.check.proof import Bounded, Multipliers, Networks, Parts, Set, Tree, beside, by_boxes, by_vertices
from torchreach.check.weights import digest, network, safetensors

FORMAT, VERSION, LARGEST = "torchreach certificate", 1, 1 << 32
NOT_CHECKED = (
    "not checked: that these sets are the ones you mean; what floating-point execution rounds beyond the real-valued "
    "functions of the stored weights; method, region count and time that the analysis states of itself"
)


@dataclass(frozen=True, eq=False)
class Claims:
    """Of one set: range [N] of the difference, and what is attained [N] at predicates [N, M]."""

    low: np.ndarray
    high: np.ndarray
    attained: np.ndarray
    at: np.ndarray


@dataclass(frozen=True, eq=False)
class Certificate:
    """One that is whole and well formed; nothing of it is believed."""

    about: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def sets(self) -> int:
        return int(self.about["sets"])

    def get(self, name: str, kind: str, *shape: int | None) -> np.ndarray:
        """A tensor of a kind of numbers and of a shape, None for any size."""
        value = self.tensors.get(name)
        if value is None or value.dtype.kind != kind or value.ndim != len(shape):
            raise Refused(f"{name} is missing or of the wrong kind")
        if any(want is not None and want != size for want, size in zip(shape, value.shape, strict=True)):
            raise Refused(f"{name} is of shape {value.shape}")
        if kind == "f" and not np.isfinite(value).all():
            raise Refused(f"{name} has numbers that are not finite")
        return value.astype(np.float64) if kind == "f" else value

    def set(self, s: int, inputs: int) -> Set:
        low = self.get(f"set.{s}.low", "f", None)
        basis = self.get(f"set.{s}.basis", "f", 1 + len(low), inputs)
        A = self.get(f"set.{s}.A", "f", None, len(low))
        found = Set(basis, A, self.get(f"set.{s}.b", "f", len(A)), low, self.get(f"set.{s}.high", "f", len(low)))
        if (found.low > found.high).any():
            raise Refused(f"set {s}: a lower end above the upper one")
        return found

    def claims(self, s: int, outputs: int, variables: int) -> Claims:
        parts = (self.get(f"claim.{s}.{name}", "f", outputs) for name in ("low", "high", "attained"))
        return Claims(*parts, self.get(f"claim.{s}.at", "f", outputs, variables))


def read(path: Path) -> Certificate:
    """Raises Refused, OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise Refused(f"more than {LARGEST} bytes")
            about = json.loads(archive.read("certificate.json"))
            tensors, _ = safetensors(archive.read("evidence.safetensors"))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"{path} is no certificate, or damaged: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise Refused(f"{path} is no certificate of version {VERSION}")
    if not isinstance(about.get("sets"), int) or not isinstance(about.get("networks"), list) or about["sets"] < 1:
        raise Refused(f"{path} names no sets or networks")
    return Certificate(about, tensors)


def leaf_bounds(nets: Networks, given: Set, tree: Tree, multipliers: Multipliers | None) -> Any:
    """Leaves and their bounds, by vertices where there are no multipliers."""
    return by_vertices(nets, given, tree) if multipliers is None else by_boxes(nets, given, tree, multipliers)


def attained(nets: Networks, given: Set, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Certified range [B, N] of the output at predicates [B, M]; the point itself must lie in the set: Refused."""
    outside = ((at < given.low) | (at > given.high)).any()
    if len(given.b):
        size = np.abs(at) @ np.abs(given.A).T + np.abs(given.b)
        outside |= (at @ given.A.T - given.b > gamma(at.shape[1] + 4) * size).any()
    if outside:
        raise Refused("a witness that lies outside of its set")
    parts = Parts(np.zeros(len(at), int), at, at, np.zeros((len(at), nets.hidden), np.int8))
    none = np.zeros(0, np.int64)
    found = Bounded.of(nets, given, parts).bounds(none, none, none, np.zeros(0))
    outputs = found.shape[1] // 2
    return -found[:, outputs:], found[:, :outputs]


def check_set(certificate: Certificate, nets: Networks, s: int) -> tuple[int, Claims, Set]:
    """Leaves and claims of set s, all of them verified. Raises Refused."""
    inputs, outputs = nets.first[0].weight.shape[1], len(nets.first[-1].bias)
    given = certificate.set(s, inputs)
    variables = len(given.low)
    claims = certificate.claims(s, outputs, variables)
    low, high = attained(nets, given, claims.at)
    own = np.arange(outputs)
    sure = np.maximum(low[own, own], -high[own, own])
    short = np.flatnonzero(claims.attained > np.maximum(sure, 0))
    if len(short):
        raise Refused(f"set {s}, output {short[0]}: the witness attains {sure[short[0]]:.6g}, not {claims.attained[short[0]]:.6g}")
    tree, multipliers = Tree(certificate.get(f"tree.{s}", "i", None), variables, nets.hidden), None
    leaves = len(tree.split) - int((tree.split >= 0).sum())
    if f"multipliers.{s}.many" in certificate.tensors or not 1 <= variables <= MOST:
        value = certificate.get(f"multipliers.{s}.value", "f", None)
        objective, form = (certificate.get(f"multipliers.{s}.{n}", "i", len(value)) for n in ("objective", "form"))
        many = certificate.get(f"multipliers.{s}.many", "i", leaves)
        if (many < 0).any() or many.sum() != len(value) or (len(value) and objective.max() >= 2 * outputs):
            raise Refused(f"set {s}: multipliers of nothing")
        multipliers = Multipliers(np.stack((np.repeat(np.arange(leaves), many), objective, form), 1), value)
    limit = np.concatenate((claims.high, -claims.low))
    for nodes, found in leaf_bounds(nets, given, tree, multipliers):
        wrong = np.argwhere(~(found <= limit))
        if len(wrong):
            b, n = wrong[0]
            sign = "y1 - y2" if n < outputs else "y2 - y1"
            raise Refused(
                f"set {s}, node {nodes[b]} of the tree, output {n % outputs}: {sign} may be {found[b, n]:.6g} there, "
                f"more than the {limit[n]:.6g} that is claimed"
            )
    return leaves, claims, given


def check(path: Path, files: list[Path], say: Callable[[str], object] = print) -> None:
    """Verifies the certificate at `path` for the networks in `files`. Raises Refused, OSError."""
    certificate, layers = read(path), list[list[Layer]]()
    for name, file, entry in zip("AB", files, certificate.about["networks"], strict=False):
        layers.append(network(file))
        own = digest(layers[-1])
        if not isinstance(entry, dict) or own != entry.get("digest"):
            raise Refused(f"{file} is not network {name} of the certificate: its layers have the digest {own}")
        sizes = "-".join(str(n) for n in [layers[-1][0].weight.shape[1], *(len(layer.bias) for layer in layers[-1])])
        say(f"{name}  {file}: {sizes}, SHA-256 of the file {hashlib.sha256(file.read_bytes()).hexdigest()}")
    if len(layers) != len(certificate.about["networks"]) or len(files) != len(layers):
        raise Refused(f"the certificate is about {len(certificate.about['networks'])} networks, not {len(files)}")
    for one, two in zip(layers, layers[1:], strict=False):
        if one[0].weight.shape[1] != two[0].weight.shape[1] or len(one[-1].bias) != len(two[-1].bias):
            raise Refused("networks of different input or output sizes")
    nets, largest, what = beside(layers[0], layers[1] if len(layers) > 1 else None), 0.0, "y" if len(layers) == 1 else "y1 - y2"
    for s in range(certificate.sets):
        leaves, claims, given = check_set(certificate, nets, s)
        most = max(float(claims.high.max()), -float(claims.low.min()))
        largest = max(largest, most)
        plain = "" if not len(given.b) else f", {len(given.b)} half-spaces"
        say(
            f"set {s}: {text(given)}{plain}: {leaves:,} leaves cover it; "
            f"|{what}| <= {most:.8g} holds, {float(claims.attained.max()):.8g} is attained"
        )
    say(f"verified: |{what}| <= {largest:.8g} for every input of {certificate.sets} set{'s' * (certificate.sets > 1)}")
    say(NOT_CHECKED)


def text(given: Set) -> str:
    """The box of a set's inputs, shortened."""
    low = given.basis[0] + np.minimum(given.low[:, None] * given.basis[1:], given.high[:, None] * given.basis[1:]).sum(0)
    high = given.basis[0] + np.maximum(given.low[:, None] * given.basis[1:], given.high[:, None] * given.basis[1:]).sum(0)
    ends = [f"[{a:.6g}, {b:.6g}]" for a, b in zip(low[:6], high[:6], strict=True)]
    return f"{' x '.join(ends)}{' x ...' if len(low) > 6 else ''} ({len(low)} inputs, {len(given.low)} vary)"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: verified; 1: not; 2: files that cannot be read."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) not in (2, 3):
        print("usage: python -m torchreach.check CERTIFICATE A [B]", file=sys.stderr)
        return 2
    path, *files = map(Path, arguments)
    try:
        check(path, files)
    except Refused as error:
        print(f"not verified: {error}")
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
