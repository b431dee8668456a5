"""`ba-solver train`: a SideNet from recorded chains, in up to four stages, each of which can be interrupted.

1. all pairs of the chains (or the published objective, which needs the backbone and data instead);
2. the time grids for the numbers of calls that it will be used with (needs the backbone); when all is done, the steps'
   weights on them;
3. closed loop: the real sampler, interval by interval (needs the backbone);
4. end point: the real sampler, with gradients through the backbone (needs it, and its memory).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bas_core.checkpoint import (
    CheckpointError,
    SideNetCard,
    load_sidenet,
    read_pickled_tensors,
    save_sidenet,
    write_atomically,
    write_text,
)
from ..bas_core.grids import time_grid
from ..bas_core.quadrature import RULES, get_rule
from ..bas_core.sidenet import SideNet, SideNetConfig
from .backbones import Backbone, BackboneChoice, open_backbone
from .chains import Chains, check_alike, open_chains
from .closed_loop import SCORED_RUNS, Rollout, end_point_loss, interval_loss
from .loop import LoopSettings, Numbers, Share, train
from .losses import predicted, relative_loss, squared_errors
from .pairs import KINDS, Examples, QueryRange, draw_examples
from .progress import MAIN_PROCESS, say
from .published import CHAIN_STEPS, load_latents, published_loss
from .record import STARTS
from .settings import UsageError, check_device, check_positive, parse_calls, plain, prepare_folder, shareable
from .time_grids import ROUNDS, Learned, fit_weights, joined, learn_grids
from .tuning import tune, tuning_loop

OBJECTIVES = ("all_pairs", "published")
TIME_BINS, STEP_BINS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.05, 0.1, 0.2, 1.0)
# The later stages' learning rate, over the first's; and on how many draws of SCORED_RUNS they are scored.
LATER_RATE = 0.1
SCORED_DRAWS = 4
VALIDATION_BATCH, VALIDATION_BATCHES = 128, 16
# Of the runs that could save the call at t = 1, how many do in training: the others are for noise of inversions.
SKIP_FIRST = 0.85
# The call at t = 1 is saved where the mean of the data leaves no more of the velocity there than this share of its mean
# square (the demo at CFG 2: 0.017); the mean is taken over so many chains.
MEAN_TOLERANCE, MEAN_CHAINS = 0.05, 1024
# Settings that may change when a run is resumed: they do not change what it computes.
MAY_CHANGE = ("resume", "device", "compile")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a SideNet is trained.

    Attributes:
        objective: all_pairs (from chains alone) or published (from data, with the backbone; for comparison).
        latents: data for the published objective: a folder of images, or safetensors with `latents` and `labels`.
        start_from: a SideNet to go on from instead of fresh weights.
        steps: optimizer steps of the first stage.
        batch: examples a step.
        learning_rate: peak, after a linear warm-up, of a cosine down to 1 %; the later stages take a tenth of it.
        warmup: steps.
        weight_decay: of Muon and AdamW.
        muon: orthogonalise the updates of the blocks' matrices (Muon; needs torch 2.9), which transformer blocks learn
            faster with; the convolution body has none, and is trained by AdamW alone.
        ema: decay of the averaged weights.
        accumulate: backward passes a step, when memory is short.
        precision: fp32, bf16 or fp16.
        compile: use torch.compile.
        patience: reports without a better held-out score after which to stop; 0 = never.
        save_every: steps between reports and saves.
        held_out: runs to validate on; 0 = an eighth, at most 64.
        nfe_range: fewest and most backbone calls it will be used with.
        rule: quadrature.
        anchors: 2, or 1 (the paper).
        body: of the SideNet: tokens (transformer blocks) or convolution (the paper).
        mean_size: it keeps the mean of the model's data on a grid of this side, which saves each run's first backbone
            call, if the chains show that the model says no more there; 0 = it does not.
        base_channels: the SideNet's width.
        embedding_dim: width of its time, step and class embeddings.
        num_layers: its blocks.
        num_heads: of its attention block.
        patch_size: it works on a grid this much coarser.
        kernel_size: of its first and last convolution.
        grid_nfe: learn time grids for these numbers of calls, such as 5,7,10 (needs --backbone).
        grid_runs: recorded runs that they are learned on; each number of calls takes 30 to 60 times so many samplings.
            A few runs find the grid that suits those few.
        tune: steps that tune each number of calls' times and weights by gradients through whole runs (needs --grid-nfe,
            and the memory of --end-point); the grids are then searched in the family alone. A few hundred; where it
            does not help runs that were held out, it is undone.
        closed_loop: steps of the closed-loop stage (needs --backbone).
        end_point: steps with gradients through the backbone (needs --backbone, and its memory).
        loop_batch: runs a step in these two stages.
        seed: of weights and batches.
        resume: go on with an unfinished run.
    """

    objective: str = "all_pairs"
    latents: Path | None = None
    start_from: Path | None = None
    steps: int = 2500
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    muon: bool = True
    ema: float = 0.995
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    patience: int = 0
    save_every: int = 250
    held_out: int = 0
    nfe_range: tuple[int, int] = (4, 15)
    rule: str = "lobatto4"
    anchors: int = 2
    body: str = "tokens"
    mean_size: int = 32
    base_channels: int = 96
    embedding_dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 2
    kernel_size: int = 1
    grid_nfe: str = ""
    grid_runs: int = 24
    tune: int = 0
    closed_loop: int = 0
    end_point: int = 0
    loop_batch: int = 16
    seed: int = 1
    resume: bool = False

    def loop(self, steps: int, batch: int, rate: float = 1.0) -> LoopSettings:
        """The loop of one stage; `rate` multiplies the learning rate."""
        return LoopSettings(
            steps=steps,
            batch=batch,
            learning_rate=self.learning_rate * rate,
            warmup=min(self.warmup, steps),
            weight_decay=self.weight_decay,
            muon=self.muon and hasattr(torch.optim, "Muon"),
            ema=self.ema,
            seed=self.seed,
            save_every=self.save_every,
            accumulate=self.accumulate,
            precision=self.precision,
            patience=self.patience,
            compile=self.compile,
        )

    def check(self) -> None:
        """Refuse what cannot be trained, before any work.

        Raises:
            UsageError: saying which setting and why.
        """
        check_positive(self, "batch", "save_every", "loop_batch", "grid_runs")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}.")
        if (self.objective == "published") != (self.latents is not None):
            raise UsageError(
                "--latents and --objective published go together: it trains from data, all_pairs does not."
            )
        if self.rule not in RULES or not RULES[self.rule].has_both_ends:
            valid = ", ".join(name for name, rule in RULES.items() if rule.has_both_ends)
            raise UsageError(f"--rule must be one of {valid}; got {self.rule!r}.")
        low, high = self.nfe_range
        if not 2 <= low <= high <= 100:
            raise UsageError(f"--nfe-range must be two numbers from 2 to 100, the lower first; got {self.nfe_range}.")
        if self.tune and not self.grid_nfe:
            raise UsageError("--tune tunes learned grids: give --grid-nfe too, such as --grid-nfe 5,7,10.")
        for name in ("steps", "tune", "closed_loop", "end_point", "held_out", "patience"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative; got {getattr(self, name)}.")
        if self.grid_nfe:
            parse_calls(self.grid_nfe, "--grid-nfe")

    @property
    def needs_backbone(self) -> bool:
        """Whether a stage calls the backbone."""
        return bool(self.objective == "published" or self.grid_nfe or self.closed_loop or self.end_point)


@dataclass(frozen=True, kw_only=True)
class FitSettings(BackboneChoice, Training):
    """Train a SideNet from recorded chains; the backbone is not needed, but for the stages that say so.

    Attributes:
        chains: folders that `ba-solver record` wrote.
        out: the SideNet's file; beside it a folder NAME.run keeps the unfinished run, its log and its plots.
        backbone: for the stages that need it: kind:where, as for `record`.
        guidance: CFG scale; leave it out to take the chains'.
    """

    chains: tuple[Path, ...]
    out: Path
    backbone: str = ""
    guidance: tuple[float, ...] = ()


@dataclass
class Job:
    """One training: what it works with, and what it has come to.

    Attributes:
        training: settings.
        chains, held_out: to train on, and to validate on.
        starts: first stretches of more runs to train on, if they were recorded.
        mean: of the data, as states, if the SideNet keeps it.
        about: what the chains say of themselves.
        device: where the SideNet is trained.
        folder: of the unfinished run.
        backbone: for the stages that need it.
        spent: backbone calls by stage.
        learned: for numbers of calls.
    """

    training: Training
    chains: Chains
    held_out: Chains
    about: dict[str, Any]
    device: torch.device
    folder: Path
    backbone: Backbone | None = None
    starts: Chains | None = None
    mean: Tensor | None = None
    spent: Counter[str] = field(default_factory=Counter)
    learned: Learned = field(default_factory=Learned)

    @property
    def ranges(self) -> QueryRange:
        """Which queries to draw: for grids from uniform to well beyond the model's own shift."""
        usual = QueryRange()
        highest = max(usual.shift[1], 1.5 * self.about["shift"])
        return dataclasses.replace(usual, calls=self.training.nfe_range, shift=(usual.shift[0], highest))

    def examples(self, chains: Chains, sidenet: SideNet, count: int, generator: torch.Generator) -> Examples:
        """A batch drawn from chains; for training, from the starts too."""
        starts = self.starts if chains is self.chains else None
        ranges = self.ranges if self.mean is None else dataclasses.replace(self.ranges, skip_first=SKIP_FIRST)
        rule = get_rule(self.training.rule)
        return draw_examples(chains, rule, sidenet.anchors, count, ranges, generator, starts, self.mean)

    def rollout(self, chains: Chains) -> Rollout:
        """What the closed-loop stages roll: the learned grids, or else some of the family.

        Raises:
            UsageError: there is no backbone.
        """
        if self.backbone is None:
            raise UsageError("This stage needs the backbone; give --backbone.")
        grids = [torch.tensor(grid) for grid in self.learned.time_grids.values()]
        low, high = self.training.nfe_range
        usual = [time_grid(n, self.about["shift"] * shift) for n in range(low, high + 1) for shift in (1.0, 1.5)]
        rule = get_rule(self.training.rule)
        batch = self.training.loop_batch
        return Rollout(self.backbone, chains, self.about, rule, grids or usual, batch, self.spent)


def mean_in(sidenet: SideNet, shape: Sequence[int]) -> Tensor | None:
    """The mean of the data that a SideNet keeps, as states of `shape`; None if it keeps none."""
    known = sidenet.first_velocity(torch.zeros(1, *shape), torch.tensor(1.0))
    return None if known is None else -known[0]


def data_mean(job: Job) -> Tensor | None:
    """The mean of the model's data, read off the chains' first velocities: at t = 1, velocity = noise - mean.

    Returns:
        [C, mean_size, mean_size], a video's over its frames. None where it is not asked for, where sampling does not
        start from pure noise, and where the first velocity says more than that: its call is then not to be saved.
    """
    size, chains = job.training.mean_size, job.chains
    if not size or job.about["start"] != 1:
        return None
    rows = torch.arange(len(chains))[:MEAN_CHAINS]
    first = torch.zeros_like(rows)
    velocities = chains.velocities[rows, first]
    seen = chains.states[rows, first] - velocities
    unexplained = ((seen - seen.mean(0)).square().mean() / velocities.square().mean()).item()
    if unexplained > MEAN_TOLERANCE:
        say(
            f"The first velocity is not noise minus a mean ({100 * unexplained:.0f} % of it is something else), so its "
            "call is not saved."
        )
        return None
    mean = seen.mean(0)
    return F.adaptive_avg_pool2d(mean.mean(1) if mean.ndim == 4 else mean, size)


@torch.inference_mode()
def residual_table(sidenet: SideNet, job: Job) -> dict[str, dict[str, float]]:
    """Held-out residual variance left: the SideNet's squared error over the straight line's, by kind of query, by
    time of the anchor and by size of the step. 1 = no better than the multistep method."""
    generator = torch.Generator().manual_seed(10_007)
    rows = []
    for _ in range(VALIDATION_BATCHES):
        e = job.examples(job.held_out, sidenet, VALIDATION_BATCH, generator).share(lambda c: c.to(job.device))
        errors = squared_errors(predicted(sidenet, e, sidenet.anchors), e), squared_errors(e.straight_line(), e)
        rows.append(torch.stack([*errors, e.kinds.float(), e.t, e.h.abs()]).float().cpu())
    ours, line, kinds, t, h = torch.cat(rows, 1)

    def left(chosen: Tensor) -> float:
        return round((ours[chosen].sum() / line[chosen].sum().clamp_min(1e-12)).item(), 4)

    def binned(values: Tensor, edges: tuple[float, ...]) -> dict[str, float]:
        pairs = itertools.pairwise(edges)
        chosen = {f"{lo:g}-{hi:g}": (values > lo) & (values <= hi) for lo, hi in pairs}
        return {name: left(rows) for name, rows in chosen.items() if rows.any()}

    by_kind = {kind: left(kinds == i) for i, kind in enumerate(KINDS) if (kinds == i).any()}
    return {"kind": by_kind, "time": binned(t, TIME_BINS), "step": binned(h, STEP_BINS)}


def make_sidenet(training: Training, about: dict[str, Any], mean: Tensor | None = None) -> SideNet:
    """A fresh SideNet that fits the chains, and keeps the mean of the data if it is given; or the one to start from.

    Raises:
        UsageError, CheckpointError: the sizes do not fit each other, or the chains.
    """
    low, high = about["guidance"]
    try:
        config = SideNetConfig(
            in_channels=about["shape"][0],
            num_classes=about["num_classes"],
            guidance_input=low != high,
            mean_size=0 if mean is None else training.mean_size,
            **{
                f.name: getattr(training, f.name)
                for f in dataclasses.fields(SideNetConfig)
                if hasattr(training, f.name) and f.name != "mean_size"
            },
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if training.start_from is None:
        torch.manual_seed(training.seed)
        sidenet = SideNet(config).zero_output()
        if mean is not None:
            sidenet.data_mean.copy_(mean)
        return sidenet
    sidenet, card = load_sidenet(training.start_from, dtype=torch.float32)
    if card.backbone.get("fingerprint") != about["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"{training.start_from} belongs to {card.backbone.get('name')!r}, the chains to "
            f"{about['backbone']['name']!r}. Start from a SideNet of the same model."
        )
    if (sidenet.config.in_channels, sidenet.config.guidance_input) != (config.in_channels, config.guidance_input):
        raise CheckpointError(f"{training.start_from} takes other channels or guidance than the chains have.")
    return sidenet.train().requires_grad_(True)


def check_choice(choice: BackboneChoice, about: dict[str, Any], backbone: Backbone | None) -> None:
    """Refuse chains of another guidance, backbone or resolution than asked for.

    Raises:
        CheckpointError: saying which.
    """
    if choice.guidance and list(choice.scales) != about["guidance"]:
        raise CheckpointError(
            f"The chains were recorded with guidance {about['guidance']}; {list(choice.scales)} is asked for. Record "
            "chains with that, or leave --guidance out."
        )
    if backbone is None:
        return
    if backbone.fingerprint != about["backbone"]["fingerprint"]:
        raise CheckpointError(
            f"The chains were recorded from {about['backbone']['name']!r} (fingerprint "
            f"{about['backbone']['fingerprint']}); {backbone.name!r} ({backbone.fingerprint}) is asked for. Record "
            "chains of it."
        )
    if list(backbone.shape) != about["shape"]:
        raise CheckpointError(
            f"The chains hold states of {about['shape']}; {backbone.name} is asked for at {list(backbone.shape)}. Give "
            "the resolution they were recorded at."
        )


def open_starts(folders: tuple[Path, ...], about: dict[str, Any]) -> Chains | None:
    """The starts that were recorded beside chains; None if there are none.

    Raises:
        CheckpointError: they do not belong to the chains, or a shard is damaged.
    """
    there = [folder / STARTS for folder in folders if (folder / STARTS).is_dir()]
    if not any(path for folder in there for path in folder.glob("*.safetensors")):
        return None
    starts, said = open_chains(there)
    alike = {key: said.get(key) for key in ("points", "until")}
    check_alike(about | alike, said, str(there[0]), f"in {folders[0]} it is")
    return starts


def hold_out(chains: Chains, wanted: int) -> tuple[Chains, Chains]:
    """Training runs, and runs to validate on.

    Raises:
        UsageError: there are too few.
    """
    runs = len(chains) // chains.branches
    held_out = wanted or min(64, max(1, runs // 8))
    if runs - held_out < 1:
        raise UsageError(f"--held-out {held_out} leaves none of the {runs} recorded runs to train on. Record more.")
    return chains.split(held_out)


LossOf = Callable[[SideNet, torch.Generator, Share], Tensor]
RolledLoss = Callable[[SideNet, Rollout, torch.Generator, Share], Tensor]
ScoreOf = Callable[[SideNet], float]


def run_stage(
    job: Job, sidenet: SideNet, name: str, loop: LoopSettings, loss_of: LossOf, score_of: ScoreOf | None
) -> SideNet:
    """Train one stage, or go on with it. The weights with the best held-out score are kept: by default the mean over
    the kinds of query of the residual variance left."""

    def loss_at(step: int, share: Share) -> Tensor:
        return loss_of(sidenet, loop.generator(step), share)

    def report(average: SideNet, step: int) -> Numbers:
        table = residual_table(average, job)["kind"]
        return {**table, "score": score_of(average) if score_of else sum(table.values()) / len(table)}

    trained = train(sidenet, loss_at, loop, name, job.folder / f"{name}.pt", report, job.folder)
    return trained.train().requires_grad_(True)


def all_pairs_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Stage 1: from chains alone."""
    loop = job.training.loop(job.training.steps, job.training.batch)

    def loss(network: SideNet, generator: torch.Generator, share: Share) -> Tensor:
        examples = job.examples(job.chains, network, loop.batch, generator)
        return relative_loss(network, examples.share(lambda c: share.of(c).to(job.device)), network.anchors)

    return run_stage(job, sidenet, "all_pairs", loop, loss, None)


def published_stage(job: Job, sidenet: SideNet) -> SideNet:
    """Stage 1, as published: from data, with the backbone."""
    backbone, path = job.backbone, job.training.latents
    if backbone is None or path is None:
        raise UsageError("The published objective needs --backbone and --latents.")
    latents = load_latents(path, backbone)
    loop = job.training.loop(job.training.steps, job.training.batch)

    def loss(network: SideNet, generator: torch.Generator, share: Share) -> Tensor:
        job.spent["published"] += (CHAIN_STEPS + 1) * loop.batch if share.index == 0 else 0
        return published_loss(network, backbone, latents, loop.batch, generator, share)

    return run_stage(job, sidenet, "published", loop, loss, None)


def rolled_stage(job: Job, sidenet: SideNet, name: str, steps: int, loss: RolledLoss) -> SideNet:
    """Stages 3 and 4: the real sampler, scored on held-out runs."""
    rollout = job.rollout(job.chains)
    held_out = dataclasses.replace(job.rollout(job.held_out), batch=SCORED_RUNS)
    loop = job.training.loop(steps, job.training.loop_batch, LATER_RATE)

    def score(average: SideNet) -> float:
        draws = [torch.Generator().manual_seed(seed) for seed in range(SCORED_DRAWS)]
        with torch.no_grad():
            return sum(loss(average, held_out, draw, Share()).item() for draw in draws) / SCORED_DRAWS

    return run_stage(job, sidenet, name, loop, lambda network, *drawn: loss(network, rollout, *drawn), score)


def grids_stage(job: Job, sidenet: SideNet, calls: Sequence[int]) -> dict[int, list[float]]:
    """Stage 2: time grids for numbers of calls; in the family alone if they are tuned later."""
    path = job.folder / "time_grids.pt"
    if path.exists():
        return {int(n): grid for n, grid in read_pickled_tensors(path).items()}
    rounds = 0 if job.training.tune else ROUNDS
    found = learn_grids(sidenet, job.rollout(job.chains), calls, job.training.grid_runs, rounds)
    if MAIN_PROCESS:
        write_atomically(path, lambda temporary: torch.save(found, temporary))
    return found


def fit(job: Job) -> SideNet:
    """All stages that are asked for."""
    training = job.training
    sidenet = make_sidenet(training, job.about, data_mean(job))
    job.mean = mean_in(sidenet, job.about["shape"])
    sidenet = sidenet.to(job.device)
    if training.steps:
        sidenet = (published_stage if training.objective == "published" else all_pairs_stage)(job, sidenet)
    if training.grid_nfe:
        calls = parse_calls(training.grid_nfe, "--grid-nfe")
        job.learned = Learned(grids_stage(job, sidenet, calls))
    if training.closed_loop:
        sidenet = rolled_stage(job, sidenet, "closed_loop", training.closed_loop, interval_loss)
    if training.end_point:
        sidenet = rolled_stage(job, sidenet, "end_point", training.end_point, end_point_loss)
    sidenet = sidenet.eval().requires_grad_(False)
    if job.learned.time_grids:
        job.learned = fit_weights(sidenet, job.rollout(job.chains), job.learned.time_grids)
    if training.tune:
        loop = tuning_loop(training.loop(training.tune, training.loop_batch))
        parts = job.rollout(job.chains), job.rollout(job.held_out)
        tuned = [tune(sidenet, *parts, job.learned, calls, loop, job.folder) for calls in job.learned.time_grids]
        job.learned = joined(tuned)
    return sidenet


def card_of(job: Job, sidenet: SideNet, settings: Any, seconds: float) -> SideNetCard:
    """What the SideNet's file says of itself."""
    runs = (len(job.chains) + len(job.held_out)) // job.chains.branches
    recorded = {"chains": runs * job.about["points"]}
    if job.starts is not None:
        recorded["starts"] = len(job.starts) // job.chains.branches * job.starts.times.shape[1]
    spent = dict(job.spent) if job.training.objective == "published" else {**recorded, **job.spent}
    low, high = job.about["guidance"]
    begun = job.training.start_from
    earlier = SideNetCard() if begun is None else load_sidenet(begun)[1]
    return SideNetCard(
        velocity=job.about["velocity"],
        guidance_range=(low, high),
        backbone=job.about["backbone"],
        **vars(job.learned),
        training={
            "objective": job.training.objective,
            "recorded_runs": runs,
            "held_out_runs": len(job.held_out) // job.chains.branches,
            "recorded": job.about,
            "backbone_calls": spent,
            "settings": shareable(settings),
            "seconds": round(seconds),
            "torch": torch.__version__,
            **({} if begun is None else {"started_from": earlier.training}),
        },
        licence=earlier.licence,
        evaluation={"residual_variance": residual_table(sidenet, job)},
    )


def check_run_folder(folder: Path, settings: Any, resume: bool) -> None:
    """Keep the settings beside the unfinished run, and refuse to mix runs.

    Raises:
        UsageError: there is an unfinished run and no --resume, or its settings differ.
    """
    prepare_folder(folder)
    path = folder / "settings.json"
    asked = {k: v for k, v in plain(settings).items() if k not in MAY_CHANGE}
    if any(folder.glob("*.pt")):
        if not resume:
            raise UsageError(f"{folder} holds an unfinished run. Go on with --resume, or delete the folder.")
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in asked if known.get(key) != asked[key]]
        if differing:
            said = "; ".join(f"{key} was {known.get(key)!r}, now {asked[key]!r}" for key in differing)
            raise UsageError(f"--resume goes on with the same settings only: {said}.")
    write_text(path, json.dumps(asked, indent=1))


@contextmanager
def account(path: Path, spent: Counter[str]) -> Iterator[Callable[[], float]]:
    """Counts seconds, and keeps them and the calls spent in the file when the work is done or interrupted; where the
    unfinished run beside it is gone on with, from those in the file on."""
    earlier = 0.0
    if path.exists() and any(path.parent.glob("*.pt")):
        known = json.loads(path.read_text(encoding="utf-8"))
        earlier = known["seconds"]
        spent.update(known["backbone_calls"])
    start = time.perf_counter()

    def seconds() -> float:
        return earlier + time.perf_counter() - start

    try:
        yield seconds
    finally:
        if MAIN_PROCESS:
            write_text(path, json.dumps({"seconds": round(seconds(), 1), "backbone_calls": dict(spent)}))


def train_from(
    training: Training,
    choice: BackboneChoice,
    chains: tuple[Path, ...],
    out: Path,
    settings: Any,
    backbone: Backbone | None = None,
) -> SideNetCard:
    """Train a SideNet on recorded chains and write it; returns what its file says.

    Args:
        training: how.
        choice: the backbone, for the stages that need it.
        chains: folders.
        out: the SideNet's file.
        settings: to be stored with it.
        backbone: what `choice` names, if it is open already.
    """
    training.check()
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors; got {out}.")
    if out.exists():
        raise UsageError(f"--out {out} exists already; nothing is overwritten. Choose another name, or delete it.")
    if training.objective == "published" and training.anchors != 1:
        say("Note: the published SideNet has one anchor; with --anchors 2 its second is never shown in training.")
    if training.needs_backbone and not choice.backbone:
        raise UsageError("The published objective, --grid-nfe, --closed-loop and --end-point need --backbone.")
    folder = out.with_suffix(".run")
    check_run_folder(folder, settings, training.resume)
    recorded, about = open_chains(chains)
    starts = open_starts(chains, about)
    if training.needs_backbone:
        backbone = backbone or open_backbone(choice)
    check_choice(choice, about, backbone)
    if training.objective == "published" and about["velocity"] == "guided" and about["guidance"] != [1.0, 1.0]:
        raise CheckpointError(
            "The published objective trains on each branch of guidance, and is validated on chains of them: record "
            "with --mode branch."
        )
    parts = hold_out(recorded, training.held_out)
    job = Job(training, *parts, about, check_device(choice.device), folder, backbone, starts)
    with account(folder / "spent.json", job.spent) as seconds:
        sidenet = fit(job)
    card = card_of(job, sidenet, settings, seconds())
    if MAIN_PROCESS:
        save_sidenet(out, sidenet, card)
        for state in folder.glob("*.pt"):
            state.unlink()
    left = card.evaluation["residual_variance"]["kind"]
    say(f"Held-out residual variance left (1 = a straight line): {', '.join(f'{k} {v:.2f}' for k, v in left.items())}")
    say(f"Written: {out}; log and plots in {folder}.")
    return card


def run_fit(settings: FitSettings) -> SideNetCard:
    """Do the work of `ba-solver train`."""
    return train_from(settings, settings, settings.chains, settings.out, settings)
