"""Schedules for a model: times and weights that end nearest to the exact ends, and never farther than a known method's.

1. A few trajectories make a surrogate of the model (`surrogate.py`).
2. On the model, known methods on usual grids, with slightly scattered weights, are rolled out from the trajectories'
   noises. They show how the model behaves beside the trajectories; what one number of calls shows serves all. Many
   trajectories with few rollouts each tell more than few with many.
3. For each number of calls, the best known method on the best grid of a family is found on the surrogate, and its times
   and weights are moved to where the surrogate ends nearest (`end_fit.py`). Rollouts of the result correct the
   surrogate, and it is fitted again.
4. The result is sampled from noises that nothing was fitted on. Where a known method ends nearer there, that is taken.
5. With a network, how much is added of what it predicts beyond the known velocities is fitted too, in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ...bas_core.files import read_pickled_tensors, write_atomically
from ...bas_core.grids import grid_between, has_short_first_step, time_grid
from ...bas_core.prediction import SideNetProtocol, StraightLine
from ...bas_core.schedule import Schedule
from ...bas_core.sidenet import spread_mean
from ..interrupted import rebuilt
from ..network.new_sidenet import pooled
from ..progress import progress, say
from ..recording.replay import Replay
from ..recording.trajectories import Trajectories
from .end_fit import fit_on_surrogate
from .fitting import CFGRows, enough_for_conditional_only, fit_count, takes_conditional_only
from .judging import Found, clearly_nearer, judge, log_ratios, watched
from .linear_form import LinearForm, linear_form, schedule_of
from .rollouts import Rollout, roll_out, scattered
from .surrogate import Coordinates, Subsampled, Surrogate, mean_error, subsampled

# The known methods, and the grids (shift, cosine) on which each is tried.
KNOWN = (
    "adams_bashforth2", "adams_bashforth3", "predictor_corrector", "dpmpp_2m", "unipc", "ipndm", "deis",
    "res_multistep",
)  # fmt: skip
GRIDS = tuple(itertools.product((0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6), (-0.2, 0.0, 0.15, 0.3, 0.5)))
# What is rolled out first, in turn: methods on grids that suit most models, their weights scattered by a share of the
# path's length.
FIRST = (
    ("unipc", (2.8, 0.3)), ("adams_bashforth2", (2.0, 0.15)), ("predictor_corrector", (2.0, 0.3)),
    ("ipndm", (2.8, 0.15)),
)  # fmt: skip
SCATTER = 0.02
# Each of these on every so many-th trajectory, from another one on for each.
FIRST_EVERY = 8
# On so many validation trajectories at most schedules are judged: each of two for every number of calls.
VALIDATION_TRAJECTORIES, VALIDATED = 8, 2
# Known methods that are tried at once on the surrogate, and how many of the best are fitted from.
CHUNK, STARTS = 40, 2


@dataclass(frozen=True)
class Candidate:
    """A method, and how its calls are made.

    Attributes:
        label: for people.
        form: times and weights.
        analytic: whether the first velocity is noise minus the data mean, without a call.
        conditional_only: whether the calls `CONDITIONAL_ONLY` leave out the unconditional branch.
    """

    label: str
    form: LinearForm
    analytic: bool = False
    conditional_only: bool = False


def search_nfe(trajectories: int, validation: int, numbers: Sequence[int], guided: bool, rounds: Sequence[int]) -> int:
    """How many model calls a search takes. With guidance it is the most: there, some conditional-only calls of rollouts
    evaluate both branches."""

    count = fit_count(trajectories)
    calls = _most_calls(numbers, guided)
    first = sum(calls[nfe] * len(rows) for nfe, _, rows in first_rollouts(count, numbers))
    judged = VALIDATED * min(VALIDATION_TRAJECTORIES, validation) * sum(numbers)
    return first + _nfe_of_rounds(count, calls, rounds) + judged


def network_nfe(trajectories: int, validation: int, numbers: Sequence[int], guided: bool, rounds: Sequence[int]) -> int:
    """How many model calls `search_with_network` takes; see `search_nfe`."""
    judged = min(VALIDATION_TRAJECTORIES, validation) * sum(numbers)
    return _nfe_of_rounds(fit_count(trajectories), _most_calls(numbers, guided), rounds) + (judged if rounds else 0)


def _most_calls(numbers: Sequence[int], guided: bool) -> dict[int, int]:
    """What a rollout for each NFE takes."""
    return {n: n + (guided and enough_for_conditional_only(n)) for n in sorted(numbers)}


def _nfe_of_rounds(count: int, calls: Mapping[int, int], rounds: Sequence[int]) -> int:
    planned = [each for index, every in enumerate(rounds) for each in round_rollouts(count, list(calls), index, every)]
    return sum(calls[nfe] * len(rows) for nfe, rows in planned)


def with_rows(known: Tensor | None, count: int, rows: Tensor, values: Tensor) -> Tensor:
    """[N, count, D] what is known of `count` trajectories, with new values [N, M, D] for some; 0 where there are none.

    Values of another N are forgotten.
    """
    if known is None or len(known) != len(values):
        known = torch.zeros(len(values), count, values.shape[-1], dtype=torch.float64)
    return known.index_copy(1, rows, values.double())


def part_of(count: int, index: int, every: int) -> Tensor:
    """Of `count` trajectories every so many-th, from another one on for each index; one at least."""
    rows = torch.arange(count)
    return rows[(rows + index) % min(every, count) == 0]


def round_rollouts(count: int, numbers: Sequence[int], index: int, every: int) -> list[tuple[int, Tensor]]:
    """A later round for `count` trajectories: NFE, and which trajectories, every so many-th.

    What one number shows serves the others; where there are fewer of them, each rolls out more.
    """
    every = min(every, len(numbers))
    return [(nfe, part_of(count, i + index, every)) for i, nfe in enumerate(sorted(numbers))]


def first_numbers(numbers: Sequence[int]) -> list[int]:
    """For which NFE known methods are rolled out: what these show of the model serves the others too."""
    ordered = sorted(numbers)
    return ordered[len(ordered) // 3 :: 3]


def first_rollouts(count: int, numbers: Sequence[int]) -> list[tuple[int, int, Tensor]]:
    """The first round for `count` trajectories: NFE, which of `FIRST`, and which trajectories."""
    pairs = itertools.product(first_numbers(numbers), range(len(FIRST)))
    return [(nfe, method, part_of(count, i, FIRST_EVERY)) for i, (nfe, method) in enumerate(pairs)]


@cache
def known_methods(steps: int, start: float, end: float, short_first_step: bool) -> tuple[list[str], list[LinearForm]]:
    """The known methods on all grids from `start` to `end`, or on those whose first step is short: labels and forms."""
    labels, forms = [], []
    for solver, (shift, cosine) in itertools.product(KNOWN, GRIDS):
        grid = time_grid(steps, shift, cosine, dtype=torch.float64)
        if not short_first_step or has_short_first_step(grid):
            labels.append(f"{solver}, shift {shift:g}, cosine {cosine:g}")
            forms.append(linear_form(solver, grid_between(grid, start, end)))
    return labels, forms


class MeanLine(StraightLine):
    """A straight line through two anchors, and a first velocity from the data mean: of all samples, or one each."""

    has_data_mean = True

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """See `SideNet.analytic_velocity`."""
        return (x - self.mean) / t


def means_of_others(means: Tensor, labels: Tensor) -> Tensor:
    """For each trajectory the mean [C, H, W] over those of other conditions, or over all others where there are none.

    A trajectory's own condition tells nothing about prompts that were not recorded.
    """
    found = []
    for row, label in enumerate(labels):
        chosen = labels != label
        if not chosen.any():
            chosen = torch.arange(len(labels)) != row
        found.append(means[chosen].mean(0) if chosen.any() else means[row])
    return torch.stack(found)


def means_for(trajectories: Trajectories, rows: Tensor, size: int) -> Tensor:
    """[M, C, *spatial] for each of the rows the data mean that the others show, averaged on a grid of side `size`."""
    firsts = torch.stack(
        [pooled(trajectories.states[row][0] - trajectories.velocities[row][0], size) for row in rows.tolist()]
    )
    others = means_of_others(firsts, trajectories.labels[rows])
    return torch.stack([spread_mean(mean, tuple(trajectories.states.shape[2:])) for mean in others])


class SearchData:
    """Trajectories of one CFG scale, beside the model and its surrogate.

    Args:
        replay: trajectories beside the model.
        count: at most so many are taken.
        mean_size: side of the grid that the data mean is averaged on, for an analytic first step; 0 = none.
        like: others, whose coordinates are used.
    """

    def __init__(self, replay: Replay, count: int, mean_size: int = 0, like: Subsampled | None = None) -> None:
        self.replay, self.rows = replay, replay.cfg_rows(count)
        known = replay.trajectories
        self.data = subsampled(known, self.rows) if like is None else like.like(known, self.rows)
        self.surrogate = Surrogate(self.data)
        self.means = means_for(known, self.rows, mean_size) if mean_size else None
        self.size = known.states[int(self.rows[0])][0].numel()
        self.part = replay.backbone.first_time, replay.backbone.last_time
        # What an analytic first velocity is off by.
        noise, first = self.data.states[:, 0], self.data.velocities[:, 0]
        self.first_missed = None if self.means is None else noise - self.coordinates.of(self.means) - first

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def coordinates(self) -> Coordinates:
        """Which numbers of a state the surrogate uses."""
        return self.data.coordinates

    def roll_out(
        self,
        candidate: Candidate,
        chosen: Tensor,
        scatter: Tensor | None = None,
        sidenet: SideNetProtocol | None = None,
    ) -> Rollout:
        """Sample on the model from the noises of some of the rows; the calls are added to `replay.nfe`."""
        rows = self.rows[chosen]
        field = self.replay.field_of(rows)
        mean = self.means[chosen] if candidate.analytic and self.means is not None else None
        found = roll_out(
            field,
            self.replay.noise(rows),
            candidate.form,
            self.coordinates,
            mean=mean,
            conditional_only=candidate.conditional_only,
            scatter=scatter,
            sidenet=sidenet,
        )
        self.replay.nfe["rollouts"] += field.calls * len(rows)
        return found

    def learn(self, times: Tensor, states: Tensor, velocities: Tensor, chosen: Tensor) -> None:
        """Add what a sampling of some of the rows showed; `Surrogate.learn` takes it in.

        Args:
            times: [N] of the calls; the first one is at the noise and tells nothing.
            states, velocities: [N, M, D] there.
            chosen: [M] which rows.
        """
        known_states, known_velocities = (part[:, chosen] for part in self.data.at(times))
        deviations, changes = states - known_states, velocities - known_velocities
        for i, m in enumerate(chosen.tolist()):
            self.surrogate.pairs[m] += [(float(t), deviations[k, i], changes[k, i]) for k, t in enumerate(times) if k]

    def extra(self, candidate: Candidate, measured: Tensor | None) -> Tensor:
        """[N, M, D] see `Surrogate.end_errors`: the analytic first step's, and what was measured of conditional-only
        calls, which are counted from the end."""
        steps = candidate.form.steps
        found = torch.zeros(steps, *self.data.states[:, 0].shape, dtype=torch.float64)
        if measured is not None and candidate.conditional_only:
            common = min(steps, len(measured))
            found[-common:] = measured[-common:]
        if candidate.analytic and self.first_missed is not None:
            found[0] = self.first_missed
        return found

    def error(self, candidate: Candidate) -> float:
        """A candidate's mean error on the surrogate, were all its calls whole."""
        form = candidate.form
        return float(mean_error(self.surrogate.end_errors(form.times[None], form.weights[None]), self.size))

    def known(
        self, steps: int, analytic: bool, conditional_only: bool, measured: Tensor | None
    ) -> list[tuple[float, Candidate]]:
        """The known methods on all grids by their error on the surrogate, the best first."""
        labels, forms = known_methods(steps, *self.part, analytic)
        found = [Candidate(label, form, analytic, conditional_only) for label, form in zip(labels, forms, strict=True)]
        errors: list[float] = []
        extra = self.extra(found[0], measured) if found else None
        for i in range(0, len(forms), CHUNK):
            times, weights = (
                torch.stack([getattr(form, name) for form in forms[i : i + CHUNK]]) for name in ("times", "weights")
            )
            ends = self.surrogate.end_errors(times, weights, extra)
            errors += mean_error(ends, self.size).tolist()
        return sorted(zip(errors, found, strict=True), key=lambda pair: pair[0])


@dataclass
class Search:
    """A search under way.

    Attributes:
        fit: to fit on.
        numbers: the NFE.
        rounds: of rollouts after those of known methods: in each, on every so many-th trajectory (`round_rollouts`).
        folder: that keeps the rollouts, a file each, for a search that is interrupted; None = none.
    """

    fit: SearchData
    numbers: Sequence[int]
    rounds: Sequence[int]
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.numbers = sorted(self.numbers)
        # What each fit came to, in order.
        self.stages: dict[int, list[Candidate]] = {nfe: [] for nfe in self.numbers}
        self.last: dict[int, Rollout] = {}
        # What conditional-only calls missed when they were last rolled out; 0 on trajectories that were not.
        self.measured: dict[int, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def options(self, nfe: int) -> list[tuple[int, bool, bool]]:
        """Steps, analytic first step, conditional-only calls: how so many NFE can be spent."""
        guided = takes_conditional_only(self.fit.replay.field_of(self.fit.rows[:1]), nfe)
        return [
            (nfe + conditional_only + analytic, analytic, conditional_only)
            for conditional_only in ((True, False) if guided else (False,))
            for analytic in ((False, True) if self.fit.means is not None else (False,))
        ]

    def rolled(
        self,
        name: str,
        candidate: Candidate,
        chosen: Tensor,
        scatter: Tensor | None = None,
        sidenet: SideNetProtocol | None = None,
    ) -> Rollout:
        """A rollout, made or read from before an interruption; the surrogate learns of it."""
        path = None if self.folder is None else self.folder / f"rollout {name}.pt"
        if path is not None and path.exists():
            rollout = rebuilt(Rollout, read_pickled_tensors(path), path)
        else:
            rollout = self.fit.roll_out(candidate, chosen, scatter, sidenet)
            if path is not None:
                write_atomically(path, lambda temporary: torch.save(vars(rollout), temporary))
        self.fit.learn(rollout.times, rollout.states, rollout.velocities, chosen)
        return rollout

    def roll_out_known(self) -> None:
        """The first round."""
        planned = first_rollouts(len(self.fit), self.numbers)
        for nfe, method, rows in progress(planned, "rollouts of known methods"):
            solver, shape = FIRST[method]
            grid = time_grid(self.options(nfe)[0][0], *shape, dtype=torch.float64)
            form = linear_form(solver, grid_between(grid, *self.fit.part))
            scatter = scattered(form, len(rows), SCATTER, self.generator)
            self.rolled(f"first {nfe} {method}", Candidate(solver, form), rows, scatter)
        self.fit.surrogate.learn()

    def roll_out_best(self, index: int, every: int) -> None:
        """A later round, on every so many-th trajectory."""
        for nfe, rows in progress(round_rollouts(len(self.fit), self.numbers, index, every), "rollouts"):
            self.roll_out_last(f"{index} {nfe}", nfe, rows)
        self.fit.surrogate.learn()

    def roll_out_last(self, name: str, nfe: int, rows: Tensor, sidenet: SideNetProtocol | None = None) -> None:
        """Roll out the last fit for so many NFE."""
        found = self.last[nfe] = self.rolled(name, self.stages[nfe][-1], rows, sidenet=sidenet)
        self.measured[nfe] = with_rows(self.measured.get(nfe), len(self.fit), rows, found.extra)

    def fit_network(self, sidenet: SideNetProtocol, rounds: Sequence[int]) -> None:
        """How much of what a network predicts is taken in each step, fitted together with the weights.

        Each round rolls out every so many-th trajectory: first by the schedules without the network, which is asked
        all the same, and then by those that ask it. It is fitted on all for which the network has been asked.
        """
        predictions: dict[int, Tensor] = {}
        asked = {nfe: torch.zeros(len(self.fit), dtype=torch.bool) for nfe in self.numbers}
        for index, every in enumerate(rounds):
            planned = round_rollouts(len(self.fit), self.numbers, index, every)
            for nfe, rows in progress(planned, "rollouts with the network"):
                self.roll_out_last(f"network {index} {nfe}", nfe, rows, sidenet)
                predictions[nfe] = with_rows(predictions.get(nfe), len(self.fit), rows, self.last[nfe].predictions)
                asked[nfe][rows] = True
            self.fit.surrogate.learn()
            for nfe in progress(self.numbers, "fit with the network"):
                last, rows = self.stages[nfe][-1], asked[nfe]
                surrogate, extra = self.fit.surrogate.part(rows), self.fit.extra(last, self.measured[nfe])[:, rows]
                predicted = predictions[nfe][:, rows]
                _, form = fit_on_surrogate(surrogate, last.form, self.fit.size, extra, predicted)
                self.stages[nfe].append(replace(last, form=form))

    def fit_all(self) -> None:
        """Fit every number of calls on the surrogate as it is."""
        for nfe in progress(self.numbers, "fit schedules"):
            measured = self.measured.get(nfe)
            options = self.options(nfe)
            if nfe in self.last:  # coefficients of conditional-only calls are those of the last rollouts
                options = [option for option in options if option[2] == self.stages[nfe][-1].conditional_only]
            known = [pair for option in options for pair in self.fit.known(*option, measured)[:1]]
            starts = [candidate for _, candidate in sorted(known, key=lambda pair: pair[0])[:STARTS]]
            starts = [*self.stages[nfe][-1:], *starts][:STARTS]
            fitted = []
            for start in starts:
                extra = self.fit.extra(start, measured)
                error, form = fit_on_surrogate(self.fit.surrogate, start.form, self.fit.size, extra)
                fitted.append((error, Candidate(start.label, form, start.analytic, start.conditional_only)))
            self.stages[nfe].append(min(fitted, key=lambda pair: pair[0])[1])

    def run(self) -> None:
        """All rounds."""
        self.roll_out_known()
        self.fit_all()
        for index, every in enumerate(self.rounds):
            self.roll_out_best(index, every)
            self.fit_all()

    def known_on(self, held: SearchData, nfe: int) -> tuple[float, Candidate]:
        """The known method of so many whole calls that ends nearest on the surrogate that was fitted on, and its error
        on that of other trajectories."""
        known = self.fit.known(nfe, False, False, None)[0][1]
        return held.error(known), known

    def schedule(self, candidate: Candidate, nfe: int) -> Schedule:
        """A candidate as a schedule; coefficients of conditional-only calls as last fitted."""
        rows: CFGRows = self.last[nfe].cfg_coefficients if candidate.conditional_only else []
        return schedule_of(candidate.form, candidate.analytic, rows)


def validated(search: Search, held: SearchData, line: SideNetProtocol) -> dict[int, Found]:
    """The schedules, judged on trajectories that nothing was fitted on.

    Beside each, another one is sampled: the fit before or the best known method, whichever the surrogate says is nearer
    there. The surrogate may flatter a method: the model decides. As few noises say little, the last fit is taken unless
    the other one is clearly nearer.
    """
    judged: dict[int, tuple[list[float], float]] = {}
    for nfe in progress(search.numbers, "validate"):
        seen: list[tuple[float, Tensor, Tensor]] = []
        watch = partial(watched, coordinates=held.coordinates, seen=seen)
        judged[nfe] = judge(line, search.schedule(search.stages[nfe][-1], nfe), held.replay, held.rows, watch)
        times, states, velocities = zip(*seen, strict=True)
        at = torch.tensor(times, dtype=torch.float64)
        held.learn(at, torch.stack(states), torch.stack(velocities), torch.arange(len(held)))
    held.surrogate.learn()
    return {nfe: nearer(search, held, line, nfe, *judged[nfe]) for nfe in progress(search.numbers, "compare")}


def nearer(
    search: Search, held: SearchData, line: SideNetProtocol, nfe: int, errors: list[float], seconds: float
) -> Found:
    """The last fit, which was judged, or another schedule that ends nearer; see `validated`."""
    known_error, known = search.known_on(held, nfe)
    before = search.stages[nfe][-2]
    known_is_likelier = known_error < held.error(before)
    label, other = ("the known method", known) if known_is_likelier else ("the fit before", before)
    tried, tried_seconds = judge(line, search.schedule(other, nfe), held.replay, held.rows)
    known_error = mean(tried) if known_is_likelier else known_error
    found = Found(search.schedule(search.stages[nfe][-1], nfe), errors, known.label, known_error, seconds)
    say(
        f"{nfe} calls: {found.error:.3g} ± {found.standard_error:.2g}; the best known method ({known.label}) "
        f"{known_error:.3g}."
    )
    if not clearly_nearer(tried, errors):
        return found
    say(f"{nfe} calls: {label} is nearer on the model, {mean(tried):.3g}, and taken.")
    return replace(found, schedule=search.schedule(other, nfe), errors=tried, seconds=tried_seconds)


def search_for(
    replay: Replay, numbers: Sequence[int], mean_of_data: Tensor | None, rounds: Sequence[int], folder: Path | None
) -> Search:
    """A search for schedules without a network, run.

    Args:
        replay: trajectories of combined CFG, to fit on.
        numbers: the NFE.
        mean_of_data: [C, S, S], if the first step may be analytic.
        rounds: of rollouts; see `Search`.
        folder: that keeps rollouts, so that an interrupted search goes on.
    """
    with torch.inference_mode():
        count = fit_count(len(replay.cfg_rows(len(replay.trajectories))))
        data = SearchData(replay, count, 0 if mean_of_data is None else mean_of_data.shape[-1])
        search = Search(data, numbers, rounds, folder)
        search.run()
    return search


def validated_schedules(search: Search, validation: Replay, mean_of_data: Tensor | None) -> dict[int, Found]:
    """A search's schedules, without a network, judged on other trajectories; see `validated`."""
    line = StraightLine()
    if mean_of_data is not None:
        line = MeanLine(spread_mean(mean_of_data, validation.backbone.shape))
    with torch.inference_mode():
        return validated(search, SearchData(validation, VALIDATION_TRAJECTORIES, like=search.fit.data), line)


def search_schedules(
    replay: Replay,
    validation: Replay,
    numbers: Sequence[int],
    mean_of_data: Tensor | None,
    rounds: Sequence[int],
    folder: Path | None = None,
) -> dict[int, Found]:
    """Schedules without a network: see `search_for` and `validated_schedules`."""
    return validated_schedules(search_for(replay, numbers, mean_of_data, rounds, folder), validation, mean_of_data)


def search_with_network(
    search: Search, found: Mapping[int, Found], validation: Replay, sidenet: SideNetProtocol, rounds: Sequence[int]
) -> dict[int, Found]:
    """The same schedules, which ask a network where that ends nearer on validation trajectories.

    Args:
        search: that they come from.
        found: the schedules.
        validation: the trajectories that they were judged on.
        sidenet: the network, with the data mean of an analytic first step.
        rounds: see `Search.fit_network`.
    """
    with torch.inference_mode():
        search.fit_network(sidenet, rounds)
        rows = validation.cfg_rows(VALIDATION_TRAJECTORIES)
        asking: dict[int, Found] = {}
        for nfe in progress(search.numbers, "validate with the network"):
            asking[nfe] = found[nfe]
            schedule = search.schedule(search.stages[nfe][-1], nfe)
            if schedule.analytic_first_step and not sidenet.has_data_mean:
                continue  # it would make one call more
            errors, seconds = judge(sidenet, schedule, validation, rows)
            share = math.exp(mean(log_ratios(errors, found[nfe].errors)))
            say(f"{nfe} calls: the network leaves {100 * share:.0f} % of the error.")
            if share < 1 and mean(errors) < found[nfe].error:
                asking[nfe] = replace(found[nfe], schedule=schedule, errors=errors, seconds=seconds)
    return asking
