"""The reference solvers against hand-solved programs, enumeration of activation patterns, and sampling."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from torchreach.core.errors import InvalidNetworkError, InvalidSetError, ShapeError, UnsupportedLayerError
from torchreach.core.results import Discrepancy, ReachStats, Status
from torchreach.reference import mixed_integer
from torchreach.reference.certify import certify
from torchreach.reference.linear_programs import run, solve_reference
from torchreach.reference.mixed_integer import affine_layers, mixed_integer_discrepancy

INF = float("inf")
DTYPE = torch.float64


def network(sizes: list[int], seed: int) -> nn.Sequential:
    """Random fully connected ReLU network in float64."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out, dtype=DTYPE)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(fan_out, fan_in, generator=generator, dtype=DTYPE) / fan_in**0.5)
            layer.bias.copy_(0.3 * torch.randn(fan_out, generator=generator, dtype=DTYPE))
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def quantised(module: nn.Module, levels: int) -> nn.Module:
    result = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in result.parameters():
            step = parameter.abs().max() / levels
            parameter.copy_((parameter / step).round() * step)
    return result


def box(lower: Tensor, upper: Tensor) -> SimpleNamespace:
    """Stars {c + diag(r) a : |a| <= 1} for boxes [S, N]."""
    S, N = lower.shape
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    basis = torch.cat((centre[:, None], torch.diag_embed(radius)), dim=1)
    ones = torch.ones(S, N, dtype=DTYPE)
    A, b = torch.zeros(S, 0, N, dtype=DTYPE), torch.zeros(S, 0, dtype=DTYPE)
    return SimpleNamespace(basis=basis, A=A, b=b, lower=-ones, upper=ones)


def random_star(inputs: int, M: int, seed: int, radius: float = 1.0) -> SimpleNamespace:
    """One star with two half-spaces that cut its box without emptying it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(1, 1 + M, inputs, generator=generator, dtype=DTYPE)
    A = torch.randn(1, 2, M, generator=generator, dtype=DTYPE)
    b = torch.tensor([[0.2, 0.5]], dtype=DTYPE) * radius
    ones = torch.ones(1, M, dtype=DTYPE) * radius
    return SimpleNamespace(basis=basis, A=A, b=b, lower=-ones, upper=ones)


def sample(stars: SimpleNamespace, count: int, seed: int) -> Tensor:
    """Points of the only star."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = stars.lower[0], stars.upper[0]
    a = lower + (upper - lower) * torch.rand(count, lower.numel(), generator=generator, dtype=DTYPE)
    a = a[(a @ stars.A[0].T <= stars.b[0]).all(dim=1)]
    return stars.basis[0, 0] + a @ stars.basis[0, 1:]


def enumerated_range(first: nn.Module, second: nn.Module, stars: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """[N] minimum and maximum of first - second over one star: every activation pattern, one program each."""
    nets = [affine_layers(first), affine_layers(second)]
    hidden = [len(b) for layers in nets for _, b, _ in layers[:-1]]
    M = stars.lower.shape[1]
    start = torch.cat((stars.basis[0, 1:].T, stars.basis[0, :1].T), dim=1)  # [inputs, M + 1], constant last
    rows, goals = [], []
    for bits in itertools.product((0.0, 1.0), repeat=sum(hidden)):
        pattern = iter(torch.tensor(bits, dtype=DTYPE).split(hidden))
        signs, outputs = [], []
        for layers in nets:
            value = start
            for k, (W, b, _) in enumerate(layers):
                value = torch.from_numpy(W) @ value
                value[:, -1] += torch.from_numpy(b)
                if k < len(layers) - 1:
                    on = next(pattern)[:, None]
                    signs.append((1 - 2 * on) * value)  # <= 0 where the pattern holds
                    value = on * value
            outputs.append(value)
        rows.append(torch.cat(signs))
        goals.append(outputs[0] - outputs[1])
    table, goal = torch.stack(rows), torch.stack(goals)  # [2^n, n, M + 1], [2^n, N, M + 1]
    A = torch.cat((stars.A.expand(len(table), -1, -1), table[..., :M]), dim=1)[:, None]
    b = torch.cat((stars.b.expand(len(table), -1), -table[..., M]), dim=1)[:, None]
    high, _ = solve_reference(goal[..., :M], A, b, stars.lower[0], stars.upper[0])
    low, _ = solve_reference(-goal[..., :M], A, b, stars.lower[0], stars.upper[0])
    return -(low - goal[..., M]).amax(dim=0), (high + goal[..., M]).amax(dim=0)


def discrepancy_of(reference, status: Status, widen: float = 0.0, **changed: Tensor) -> Discrepancy:
    """The discrepancy that a perfect analysis would have returned, with some claims changed."""
    upper_wins = (reference.range_upper >= -reference.range_lower)[..., None]
    claims = {
        "lower": reference.max_abs,
        "upper": reference.max_abs + widen,
        "range_lower": reference.range_lower - widen,
        "range_upper": reference.range_upper + widen,
        "witness": torch.where(upper_wins, reference.argmax, reference.argmin),
        **changed,
    }
    stats = ReachStats(layers=(), method="vertices", root_bounds="none", seconds=0.0)
    regions = torch.ones(len(reference.max_abs), dtype=torch.long)
    return Discrepancy(**claims, regions=regions, status=(status,) * len(reference.max_abs), stats=stats)


class TestLinearProgram:
    def test_hand_solved(self):
        # max 3x + 2y with x + y <= 4, x + 3y <= 6 in [0, 3]^2: the vertex (3, 1).
        value, point = solve_reference([3.0, 2.0], [[1.0, 1.0], [1.0, 3.0]], [4.0, 6.0], [0, 0], [3, 3])
        assert value.dtype == point.dtype == DTYPE
        assert value.item() == pytest.approx(11.0, abs=1e-9)
        torch.testing.assert_close(point, torch.tensor([3.0, 1.0], dtype=DTYPE), atol=1e-9, rtol=0)

    def test_box_alone_has_the_closed_form(self):
        g = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 0.5, 3.0]], dtype=DTYPE)
        lower, upper = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([4.0, 5.0, 6.0])
        value, _ = solve_reference(g, torch.zeros(0, 3), torch.zeros(0), lower, upper)
        expected = (g.clamp(min=0) * upper + g.clamp(max=0) * lower).sum(dim=1)
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=0)

    def test_batch_axes_broadcast_and_states_stay_apart(self):
        A = torch.tensor([[[1.0]], [[-1.0]], [[0.0]]], dtype=DTYPE)  # a <= 0.5, a >= 2 (empty), no constraint
        b = torch.tensor([[0.5], [-2.0], [1.0]], dtype=DTYPE)
        g = torch.tensor([[1.0], [-1.0]], dtype=DTYPE)[:, None]
        value, point = solve_reference(g, A, b, torch.tensor([-1.0]), torch.tensor([1.0]))
        assert value.shape == (2, 3)
        assert point.shape == (2, 3, 1)
        torch.testing.assert_close(
            value, torch.tensor([[0.5, -INF, 1.0], [1.0, -INF, 1.0]], dtype=DTYPE), atol=1e-9, rtol=0
        )
        assert point[:, 1].isnan().all()
        assert not point[:, [0, 2]].isnan().any()

    def test_infeasible_and_unbounded(self):
        assert solve_reference([1.0], [[1.0]], [0.0], [1.0], [2.0])[0].item() == -INF
        assert solve_reference([1.0], [[1.0]], [5.0], [2.0], [1.0])[0].item() == -INF
        value, point = solve_reference([1.0, 0.0], [[-1.0, 0.0]], [0.0], [-INF, 0.0], [INF, 1.0])
        assert value.item() == INF
        assert point.isnan().all()
        assert solve_reference([1.0], [[1.0]], [INF], [-INF], [3.0])[0].item() == pytest.approx(3.0)

    def test_bad_input_is_named(self):
        with pytest.raises(ShapeError, match=r"needs objective, .* got shapes \(3,\), \(2,\)"):
            solve_reference([1.0, 1.0, 1.0], [[1.0, 1.0]], [1.0], [0.0, 0.0], [1.0, 1.0])
        with pytest.raises(InvalidSetError, match="got NaN"):
            solve_reference([1.0], [[float("nan")]], [1.0], [0.0], [1.0])


class TestAffineLayers:
    def test_equal_the_module_for_every_placing_of_relus(self):
        torch.manual_seed(0)
        lin = [nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)]
        x = torch.randn(50, 3, dtype=DTYPE)
        for module in (
            nn.Sequential(nn.Flatten(), *lin),
            nn.Sequential(nn.ReLU(), lin[0], nn.Sequential(lin[1], nn.ReLU()), nn.ReLU(), lin[2], nn.ReLU()),
        ):
            module = module.double()
            layers = affine_layers(module)
            y = x
            for k, (W, b, _) in enumerate(layers):
                y = y @ torch.from_numpy(W).T + torch.from_numpy(b)
                y = y.relu() if k < len(layers) - 1 else y
            torch.testing.assert_close(y, module(x), atol=1e-12, rtol=0)
        assert len(affine_layers(nn.Sequential(*lin))) == 1

    def test_unsupported_layer_is_named_with_its_place(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sigmoid()))
        with pytest.raises(UnsupportedLayerError, match=r"needs nn.Linear.*got Sigmoid at '1.1'"):
            affine_layers(module)
        with pytest.raises(UnsupportedLayerError, match=r"got Tanh at 'the top'"):
            affine_layers(nn.Tanh())
        with pytest.raises(UnsupportedLayerError, match=r"at least one nn\.Linear"):
            affine_layers(nn.Sequential(nn.ReLU()))

    def test_bad_weights_are_refused(self):
        module = network([2, 3, 1], 0)
        with torch.no_grad():
            module[1].weight[0, 0] = float("nan")
        with pytest.raises(InvalidNetworkError, match=r"must be finite.*layer '1'"):
            affine_layers(module)
        with pytest.raises(InvalidNetworkError, match=r"'1' needs 4 inputs, got 3"):
            affine_layers(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1)))


class TestMixedInteger:
    @pytest.mark.parametrize("seed", range(6))
    def test_equals_enumeration_of_activation_patterns(self, seed):
        first = network([2, 3, 2] if seed % 2 else [3, 2, 1, 1], seed)
        second = network([2, 2, 2] if seed % 2 else [3, 3, 1], 100 + seed)
        inputs = 2 if seed % 2 else 3
        stars = random_star(inputs, M=2 + seed % 2, seed=seed)
        result = mixed_integer_discrepancy(first, second, stars)
        low, high = enumerated_range(first, second, stars)
        torch.testing.assert_close(result.range_lower[0], low, atol=1e-8, rtol=0)
        torch.testing.assert_close(result.range_upper[0], high, atol=1e-8, rtol=0)

    @pytest.mark.parametrize("seed", range(8))
    def test_points_attain_the_range_and_no_sample_leaves_it(self, seed):
        first = network([3, 6, 5, 2], seed)
        second = quantised(first, 7) if seed % 2 else network([3, 4, 2], 50 + seed)
        stars = random_star(3, M=3, seed=seed, radius=0.4)
        result = mixed_integer_discrepancy(first, second, stars)
        torch.testing.assert_close(result.attained_lower, result.range_lower, atol=1e-8, rtol=0)
        torch.testing.assert_close(result.attained_upper, result.range_upper, atol=1e-8, rtol=0)
        replayed = first(result.argmax[0]) - second(result.argmax[0])
        torch.testing.assert_close(replayed.diagonal(), result.range_upper[0], atol=1e-8, rtol=0)
        x = sample(stars, 10_000, seed)
        assert len(x) > 100
        y = first(x) - second(x)
        assert (y <= result.range_upper + 1e-9).all()
        assert (y >= result.range_lower - 1e-9).all()

    def test_identical_networks_have_no_discrepancy(self):
        first = network([2, 5, 5, 1], 3)
        stars = box(torch.full((1, 2), -0.5, dtype=DTYPE), torch.full((1, 2), 0.5, dtype=DTYPE))
        result = mixed_integer_discrepancy(first, copy.deepcopy(first), stars)
        assert result.undecided.item() > 0
        assert result.max_abs.abs().max() < 1e-8

    def test_an_optimum_lost_by_the_solver_is_noticed_and_found_again(self, monkeypatch):
        first, second = network([2, 5, 1], 6), network([2, 4, 1], 7)
        stars = random_star(2, M=2, seed=6)
        expected = mixed_integer_discrepancy(first, second, stars)
        calls = []

        def losing(problem, options):
            """On the first call, the optimum of the opposite objective, with a bound that agrees with it."""
            calls.append(options)
            if len(calls) > 1:
                return run(problem, options)
            (g,) = problem.parameters()
            g.value = -g.value
            status = run(problem, options)
            g.value = -g.value
            problem._value = -problem.value
            return status

        monkeypatch.setattr(mixed_integer, "run", losing)
        result = mixed_integer_discrepancy(first, second, stars)
        assert len(calls) == 3
        torch.testing.assert_close(result.range_lower, expected.range_lower, atol=1e-9, rtol=0)
        torch.testing.assert_close(result.range_upper, expected.range_upper, atol=1e-9, rtol=0)

    def test_stars_are_solved_apart_and_a_point_is_a_star(self):
        first, second = network([2, 4, 3], 1), network([2, 3, 3], 2)
        lower = torch.tensor([[-1.0, -1.0], [0.3, 0.4]], dtype=DTYPE)
        upper = torch.tensor([[0.0, 1.0], [0.3, 0.4]], dtype=DTYPE)
        result = mixed_integer_discrepancy(first, second, box(lower, upper))
        alone = mixed_integer_discrepancy(first, second, box(lower[:1], upper[:1]))
        torch.testing.assert_close(result.range_upper[0], alone.range_upper[0], atol=1e-9, rtol=0)
        at_point = (first(lower[1:]) - second(lower[1:]))[0]
        torch.testing.assert_close(result.range_lower[1], at_point, atol=1e-9, rtol=0)
        torch.testing.assert_close(result.range_upper[1], at_point, atol=1e-9, rtol=0)

    def test_image_stars_keep_their_shape(self):
        first, second = network([4, 3, 2], 1), network([4, 3, 2], 2)
        stars = box(torch.full((1, 4), -0.2, dtype=DTYPE), torch.full((1, 4), 0.2, dtype=DTYPE))
        flat = mixed_integer_discrepancy(first, second, stars)
        stars.basis = stars.basis.reshape(1, 5, 1, 2, 2)
        result = mixed_integer_discrepancy(first, second, stars)
        assert result.argmax.shape == (1, 2, 1, 2, 2)
        torch.testing.assert_close(result.range_upper, flat.range_upper, atol=1e-9, rtol=0)

    def test_bad_input_is_named(self):
        stars = random_star(3, M=2, seed=0)
        with pytest.raises(ShapeError, match="got 3 -> 2 and 3 -> 1"):
            mixed_integer_discrepancy(network([3, 2, 2], 0), network([3, 2, 1], 0), stars)
        with pytest.raises(ShapeError, match="stars of 4 features needed by the networks, got 3"):
            mixed_integer_discrepancy(network([4, 2, 2], 0), network([4, 2, 2], 0), stars)
        stars.b = torch.full_like(stars.b, -100.0)
        with pytest.raises(InvalidSetError, match="empty star at index 0"):
            mixed_integer_discrepancy(network([3, 2, 1], 0), network([3, 2, 1], 1), stars)
        stars.upper = torch.full_like(stars.upper, INF)
        with pytest.raises(InvalidSetError, match="got NaN or infinity"):
            mixed_integer_discrepancy(network([3, 2, 1], 0), network([3, 2, 1], 1), stars)


class TestCertify:
    @pytest.fixture(scope="class")
    def case(self):
        first, second = network([2, 5, 2], 4), network([2, 4, 2], 5)
        stars = random_star(2, M=2, seed=4)
        return first, second, stars, mixed_integer_discrepancy(first, second, stars)

    def test_true_claims_agree(self, case):
        first, second, stars, reference = case
        report = certify(discrepancy_of(reference, Status.EXACT), first, second, stars)
        assert report.agrees
        assert report.deviation < 1e-8

    def test_wide_interval_agrees_only_if_it_does_not_claim_to_be_exact(self, case):
        first, second, stars, reference = case
        assert certify(discrepancy_of(reference, Status.BOUNDED, widen=0.1), first, second, stars).agrees
        report = certify(discrepancy_of(reference, Status.EXACT, widen=0.1), first, second, stars)
        assert not report.agrees
        assert report.deviation == pytest.approx(0.1, abs=1e-7)

    @pytest.mark.parametrize("claim", ["range_lower", "range_upper", "lower", "upper"])
    def test_unsound_claim_is_found_and_named(self, case, claim):
        first, second, stars, reference = case
        amount = 0.01 if claim in ("range_lower", "lower") else -0.01
        true = getattr(discrepancy_of(reference, Status.BOUNDED), claim)
        wrong = true.clone()
        wrong[0, 1] += amount
        report = certify(discrepancy_of(reference, Status.BOUNDED, **{claim: wrong}), first, second, stars)
        assert not report.agrees
        assert report.deviation == pytest.approx(0.01, abs=1e-7)
        assert report.where in (f"{claim} of star 0, output 1", "value at witness of star 0, output 1")

    def test_witness_outside_its_star_is_found(self, case):
        first, second, stars, reference = case
        witness = discrepancy_of(reference, Status.BOUNDED).witness.clone()
        witness[0, 0] += 50.0
        claims = {"witness": witness, "lower": torch.zeros_like(reference.max_abs)}
        report = certify(discrepancy_of(reference, Status.BOUNDED, **claims), first, second, stars)
        assert not report.agrees
        assert report.where == "distance of witness of star 0, output 0"

    def test_nan_is_never_agreed_to(self, case):
        first, second, stars, reference = case
        nan = torch.full_like(reference.max_abs, float("nan"))
        assert not certify(discrepancy_of(reference, Status.BOUNDED, upper=nan), first, second, stars).agrees

    def test_another_number_of_outputs_is_refused(self, case):
        first, second, stars, reference = case
        with pytest.raises(ShapeError, match=r"1 stars and 2 outputs needed, got shape \(1, 3\)"):
            certify(discrepancy_of(reference, Status.EXACT, upper=torch.zeros(1, 3)), first, second, stars)
