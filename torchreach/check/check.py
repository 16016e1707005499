"""Checks a certificate against two networks: digests, witnesses, and the bounds of every leaf of every tree.

A certificate is a zip of `certificate.json` and `evidence.safetensors`:

    set.S.basis [1 + M, N_in], .A [P, M], .b [P], .low, .high [M]    input set S
    claim.S.low, .high [N]       range of y1 - y2 over it (of y1 where there is no second network)
    claim.S.attained [N], .at [N, M]    |y1 - y2| attained, and the predicate where
    tree.S [T]                   the splits, see `proof.Tree`
    multipliers.S.many [leaves], .objective, .form, .value [Q]    where leaves are boxes, see `proof.by_boxes`

Verified: that the networks are those of the certificate; that each witness lies in its set and attains what is claimed;
that the leaves cover each set and the range holds on each; all for the real-valued functions of the numbers that are
stored. What is not verified is printed.
"""

from __future__ import annotations

import json
import sys
import zipfile
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from torchreach.check.forms import Networks, Refused, gamma
from torchreach.check.polytopes import MOST
from torchreach.check.proof import Bounded, Bounds, Parts, Set, Tree, by_boxes, by_vertices
from torchreach.check.weights import digest, network, safetensors

FORMAT, VERSION, LARGEST = "torchreach certificate", 1, 1 << 32
NOT_CHECKED = (
    "not checked: that these sets are the ones you mean; what floating-point execution rounds beyond the real-valued "
    "functions of the stored weights; method, region count and time that the analysis states of itself"
)


class Certificate:
    """One that is whole and of the right kind; nothing of it is believed. Raises Refused, OSError."""

    def __init__(self, path: Path) -> None:
        content = BytesIO(path.read_bytes())
        try:
            with zipfile.ZipFile(content) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                    raise Refused(f"more than {LARGEST} bytes")
                about = json.loads(archive.read("certificate.json"))
                self.tensors = safetensors(archive.read("evidence.safetensors"))
            self.sets, self.digests = int(about["sets"]), [entry["digest"] for entry in about["networks"]]
            fits = about["format"] == FORMAT and about["version"] == VERSION and len(self.digests) in (1, 2)
        except Exception as error:  # what a damaged file makes zipfile, zlib and json raise
            raise Refused(f"{path} is no certificate, or damaged: {error!r}") from None
        if not fits or self.sets < 1:
            raise Refused(f"{path} is no certificate of version {VERSION}")

    def get(self, name: str, kind: str, *shape: int | None) -> np.ndarray:
        """A tensor of a kind of numbers, "f" or "i", and of a shape, None for any size."""
        value = self.tensors.get(name, np.zeros(0, bool))
        fits = len(shape) == value.ndim and all(a in (None, b) for a, b in zip(shape, value.shape, strict=True))
        if value.dtype.kind != kind or not fits or not np.isfinite(value).all():
            raise Refused(f"{name} is missing, of the wrong kind or shape, or not finite")
        return value.astype(np.float64 if kind == "f" else np.int64)

    def set(self, s: int, inputs: int) -> Set:
        low = self.get(f"set.{s}.low", "f", None)
        A = self.get(f"set.{s}.A", "f", None, len(low))
        more = self.get(f"set.{s}.b", "f", len(A)), low, self.get(f"set.{s}.high", "f", len(low))
        return Set(self.get(f"set.{s}.basis", "f", 1 + len(low), inputs), A, *more)

    def bounds(self, s: int, nets: Networks, given: Set) -> tuple[int, Bounds]:
        """How many leaves set s has, and what bounds them."""
        hidden = len(nets.layer_of)
        tree = Tree(self.get(f"tree.{s}", "i", None), len(given.low), hidden)
        count = int((tree.split < 0).sum())
        if f"multipliers.{s}.many" not in self.tensors and 1 <= len(given.low) <= MOST:
            return count, by_vertices(nets, given, tree)
        many, value = self.get(f"multipliers.{s}.many", "i", count), self.get(f"multipliers.{s}.value", "f", None)
        objective, form = (self.get(f"multipliers.{s}.{name}", "i", len(value)) for name in ("objective", "form"))
        most = 2 * len(nets.first[-1].bias), len(given.b) + 3 * hidden
        inside = all(((at >= 0) & (at < end)).all() for at, end in zip((objective, form), most, strict=True))
        if not inside or (value < 0).any() or (many < 0).any() or (many > len(value)).any() or many.sum() != len(value):
            raise Refused(f"set {s}: multipliers that are negative, or of nothing")
        return count, by_boxes(nets, given, tree, many, objective, form, value)


def attained(nets: Networks, given: Set, at: np.ndarray) -> np.ndarray:
    """[N] certified |y| of output n at the predicate at[n] [M] of the set. Raises Refused where one lies outside."""
    beyond = at @ given.A.T - given.b + gamma(at.shape[1] + 4) * (np.abs(at) @ np.abs(given.A).T + np.abs(given.b))
    if ((at < given.low) | (at > given.high)).any() or (beyond > 0).any():
        raise Refused("a witness that lies outside of its set")
    parts, none = Parts(np.arange(len(at)), at, at, np.zeros((len(at), len(nets.layer_of)), np.int8)), np.zeros(0, int)
    found = Bounded.of(nets, given, parts).bounds(none, none, none, np.zeros(0))
    n = np.arange(len(at))
    return np.maximum(np.maximum(-found[n, len(at) + n], -found[n, n]), 0)


def check_set(certificate: Certificate, nets: Networks, s: int) -> str:
    """What is verified of set s, in words. Raises Refused."""
    outputs, given = len(nets.first[-1].bias), certificate.set(s, nets.first[0].weight.shape[1])
    low, high, met = (certificate.get(f"claim.{s}.{name}", "f", outputs) for name in ("low", "high", "attained"))
    sure = attained(nets, given, certificate.get(f"claim.{s}.at", "f", outputs, len(given.low)))
    for n in np.flatnonzero(met > sure)[:1]:
        raise Refused(f"set {s}, output {n}: the witness attains {sure[n]:.8g}, not the {met[n]:.8g} that is claimed")
    limit = np.concatenate((high, -low))
    count, bounds = certificate.bounds(s, nets, given)
    for parts, found in bounds:
        for b, n in np.argwhere(~(found <= limit))[:1]:
            what, sign = ("upper", 1) if n < outputs else ("lower", -1)
            where = f"set {s}, part {parts[b]} of the tree, output {n % outputs}: the {what} end is"
            raise Refused(f"{where} {sign * found[b, n]:.8g} there, not the {sign * limit[n]:.8g} that is claimed")
    ends = given.basis[0] + np.sort(np.stack((given.low, given.high))[:, :, None] * given.basis[1:], 0).sum(1)
    box = " x ".join(f"[{a:.6g}, {b:.6g}]" for a, b in ends.T[:6]) + (" x ..." if ends.shape[1] > 6 else "")
    kind = f"{ends.shape[1]} inputs, {len(given.low)} vary" + (f", {len(given.b)} half-spaces" if len(given.b) else "")
    return f"set {s}: {box} ({kind}): {count:,} parts cover it; <= {limit.max():.8g} holds, {met.max():.8g} is attained"


def check(path: Path, files: list[Path], say: Any = print) -> None:
    """Verifies the certificate at `path` for the networks in `files`, and says so. Raises Refused, OSError."""
    certificate = Certificate(path)
    layers = [network(file) for file in files]
    if [digest(net) for net in layers] != certificate.digests:
        raise Refused(f"{' and '.join(map(str, files))} are not the networks of the certificate")
    for name, file, net in zip("AB", files, layers, strict=False):
        sizes = "-".join(str(n) for n in [net[0].weight.shape[1], *(len(layer.bias) for layer in net)])
        say(f"{name}  {file}: {sizes}, SHA-256 of the file {sha256(file.read_bytes()).hexdigest()}")
    if len({(net[0].weight.shape[1], len(net[-1].bias)) for net in layers}) > 1:
        raise Refused("networks of different input or output sizes")
    nets = Networks.of(layers[0], layers[1] if len(layers) > 1 else None)
    for s in range(certificate.sets):
        say(check_set(certificate, nets, s))
    names = [f"claim.{s}.{end}" for s in range(certificate.sets) for end in ("low", "high")]
    most = max(float(np.abs(certificate.get(name, "f", None)).max()) for name in names)
    what = "|y1 - y2|" if len(layers) > 1 else "|y|"
    say(f"verified: {what} <= {most:.8g} for every input of {certificate.sets} set{'s' * (certificate.sets > 1)}")
    say(NOT_CHECKED)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: verified; 1: not; 2: files that cannot be read."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) not in (2, 3):
            raise OSError("required are CERTIFICATE A [B]: the certificate and the networks' files")
        check(Path(arguments[0]), [Path(argument) for argument in arguments[1:]])
    except (Refused, OSError) as error:
        refused = isinstance(error, Refused)
        print(f"{'not verified' if refused else 'error'}: {error}", file=sys.stdout if refused else sys.stderr)
        return 1 if refused else 2
    return 0
