"""How a SideNet is trained: the settings of `ba-solver train` and `make`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...bas_core.quadrature import RULES
from ...bas_core.sidenet import ARCHITECTURES
from ..settings import UsageError, check_positive, parse_nfe
from .loop import LoopSettings

OBJECTIVES = ("all_pairs", "published")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a SideNet is trained.

    Attributes:
        objective: all_pairs (from recorded trajectories alone) or published (the paper's: from data, with the backbone;
            it fits no schedules).
        latents: data for the published objective: a folder of images, or safetensors with `latents` and `labels`.
        start_from: a SideNet to start from instead of fresh weights.
        steps: optimizer steps of the network; 0 = no network, but schedules alone.
        batch: examples a step.
        learning_rate: peak, after a linear warm-up, of a cosine down to 1 %.
        warmup: steps.
        weight_decay: of Muon and AdamW.
        muon: use Muon (needs torch 2.9) for the matrices of transformer blocks, which learn faster with it.
        ema: decay of the averaged weights.
        accumulate: backward passes a step, when memory is short; 0 = by the free memory, where that is known.
        precision: fp32 or bf16.
        save_every: steps between reports and saves.
        validation: trajectories to validate on; 0 = an eighth, at most 64.
        nfe_range: fewest and most model calls that the network is trained for.
        rule: quadrature that the network is trained for; schedules have one of their own.
        anchors: 2, or 1 (the paper).
        architecture: of the SideNet: local (convolutions), conv (the paper: attention too) or transformer.
        data_mean_size: the SideNet keeps the data mean on a grid of this side, for an analytic first step where the
            trajectories show that the model's first velocity is noise minus that mean; 0 = never.
        base_channels: the SideNet's width; 0 = by the backbone's size (`new_sidenet.SIZES`), as the next three.
        embedding_dim: width of its time, step and class embeddings.
        num_layers: its blocks.
        num_heads: of its attention.
        patch_size: side of its patches; 0 = 1 if it is local, else as the model has it, or 2 where that is not known.
        kernel_size: of its first and last convolution.
        nfe: fit schedules for these numbers of model calls, such as 5,7,10 (needs --backbone).
        rounds: of rollouts, between which schedules are fitted anew: in each, on every so many-th trajectory, and on
            all for one number of model calls alone.
        network_rounds: further rounds, in which the schedules ask the network; none = they do without.
        seed: of weights and batches.
        resume: continue an unfinished training.
    """

    objective: str = "all_pairs"
    latents: Path | None = None
    start_from: Path | None = None
    steps: int = 2500
    batch: int = 32
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
    architecture: str = "local"
    data_mean_size: int = 32
    base_channels: int = 0
    embedding_dim: int = 0
    num_layers: int = 0
    num_heads: int = 0
    patch_size: int = 0
    kernel_size: int = 3
    nfe: str = ""
    rounds: tuple[int, ...] = (2,)
    network_rounds: tuple[int, ...] = (2, 4)
    seed: int = 1
    resume: bool = False

    def loop(self) -> LoopSettings:
        """The network's training loop."""
        return LoopSettings(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            warmup=min(self.warmup, self.steps),
            weight_decay=self.weight_decay,
            muon=self.muon and hasattr(torch.optim, "Muon"),
            ema=self.ema,
            seed=self.seed,
            save_every=self.save_every,
            accumulate=max(1, self.accumulate),
            precision=self.precision,
        )

    def check(self) -> None:
        """Refuse settings that cannot be used, before any work.

        Raises:
            UsageError: saying which setting and why.
        """
        check_positive(self, "batch", "save_every")
        for name, valid in (("objective", OBJECTIVES), ("architecture", ARCHITECTURES)):
            if getattr(self, name) not in valid:
                raise UsageError(f"--{name} must be one of {', '.join(valid)}; got {getattr(self, name)!r}.")
        if (self.objective == "published") != (self.latents is not None):
            raise UsageError(
                "--latents and --objective published go together: it trains from data, all_pairs does not."
            )
        if self.rule not in RULES or not RULES[self.rule].has_both_ends:
            valid_rules = ", ".join(name for name, rule in RULES.items() if rule.has_both_ends)
            raise UsageError(f"--rule must be one of {valid_rules}; got {self.rule!r}.")
        low, high = self.nfe_range
        if not 2 <= low <= high <= 100:
            raise UsageError(f"--nfe-range must be two numbers from 2 to 100, the lower first; got {self.nfe_range}.")
        for name in ("steps", "validation", "accumulate"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must not be negative; got {getattr(self, name)}.")
        for name, rounds in (("rounds", self.rounds), ("network-rounds", self.network_rounds)):
            if any(every < 1 for every in rounds):
                raise UsageError(f"--{name} must be numbers from 1; got {rounds}.")
        self._check_schedules()

    def _check_schedules(self) -> None:
        if self.nfe:
            parse_nfe(self.nfe)
        if self.objective == "published" and self.nfe:
            raise UsageError("The published objective fits no schedules: leave --nfe out.")

    def validation_count(self, trajectories: int) -> int:
        """How many of so many trajectories to validate on."""
        return self.validation or min(64, max(1, trajectories // 8))

    @property
    def rounds_with_network(self) -> tuple[int, ...]:
        """Of rollouts; none where there is no network."""
        return self.network_rounds if self.nfe and (self.steps or self.start_from is not None) else ()

    @property
    def needs_backbone(self) -> bool:
        """Whether a stage calls the backbone."""
        return self.objective == "published" or bool(self.nfe)
