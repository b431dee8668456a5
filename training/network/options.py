"""How a SideNet is trained: the settings of `ba-solver train` and `make`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...bas_core.quadrature import RULES
from ..settings import UsageError, check_positive, parse_nfe
from .loop import LoopSettings

OBJECTIVES = ("all_pairs", "published")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a SideNet is trained.

    Attributes:
        objective: all_pairs (from trajectories alone) or published (from data, with the backbone; for comparison).
        latents: data for the published objective: a folder of images, or safetensors with `latents` and `labels`.
        start_from: a SideNet to go on from instead of fresh weights.
        steps: optimizer steps of the first stage.
        batch: examples a step.
        learning_rate: peak, after a linear warm-up, of a cosine down to 1 %; the later stages take a tenth of it.
        warmup: steps.
        weight_decay: of Muon and AdamW.
        muon: orthogonalise the updates of the blocks' matrices (Muon; needs torch 2.9), which transformer blocks learn
            faster with; the conv architecture has none, and is trained by AdamW alone.
        ema: decay of the averaged weights.
        accumulate: backward passes a step, when memory is short; 0 = by what is free, where that is known.
        precision: fp32 or bf16.
        save_every: steps between reports and saves.
        validation: runs to validate on; 0 = an eighth, at most 64.
        nfe_range: fewest and most backbone calls it will be used with.
        rule: quadrature that the network is trained for; fitted runs have one of their own.
        anchors: 2, or 1 (the paper).
        architecture: of the SideNet: transformer, or conv (the paper).
        data_mean_size: it keeps the mean of the model's data on a grid of this side, which saves each run's first
            backbone
            call, if the trajectories show that the model says no more there; 0 = it does not.
        base_channels: the SideNet's width.
        embedding_dim: width of its time, step and class embeddings.
        num_layers: its blocks.
        num_heads: of its attention block.
        patch_size: it works on a grid this much coarser; 0 = as the model does, or 2 where that is not known.
        kernel_size: of its first and last convolution.
        nfe: learn time grids for these numbers of calls, such as 5,7,10 (needs --backbone).
        tune: steps that tune each number of calls' times and weights by gradients through whole runs (needs --nfe,
            and the memory of a call with gradients). Where it does not help runs that were held out, it is undone.
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
    save_every: int = 250
    validation: int = 0
    nfe_range: tuple[int, int] = (4, 15)
    rule: str = "lobatto4"
    anchors: int = 2
    architecture: str = "transformer"
    data_mean_size: int = 32
    base_channels: int = 96
    embedding_dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 0
    kernel_size: int = 1
    nfe: str = ""
    tune: int = 0
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
            accumulate=max(1, self.accumulate),
            precision=self.precision,
        )

    def check(self) -> None:
        """Refuse what cannot be trained, before any work.

        Raises:
            UsageError: saying which setting and why.
        """
        check_positive(self, "batch", "save_every")
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
        if self.objective == "published" and self.nfe:
            raise UsageError("The published objective trains a network alone: leave --nfe out.")
        if self.tune and not self.nfe:
            raise UsageError("--tune tunes learned grids: give --nfe too, such as --nfe 5,7,10.")
        for name in ("steps", "tune", "validation", "accumulate"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative; got {getattr(self, name)}.")
        if self.nfe:
            parse_nfe(self.nfe, "--nfe")

    def validation_count(self, runs: int) -> int:
        """How many of so many runs are held out."""
        return self.validation or min(64, max(1, runs // 8))

    @property
    def trains(self) -> bool:
        """Whether the network is trained; one that is not adds nothing, and is as small as can be."""
        return self.steps > 0

    @property
    def needs_backbone(self) -> bool:
        """Whether a stage calls the backbone."""
        return self.objective == "published" or bool(self.nfe)
