"""`ba-solver convert` and `ba-solver info`: SideNet files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..bas_core.checkpoint import SideNetCard, load_official_sidenet, load_sidenet, save_sidenet
from ..bas_core.sidenet import SideNet
from .settings import UsageError


@dataclass(frozen=True)
class ConvertSettings:
    """Turn an official SideNet (.pt) into our format; nothing in the file is executed.

    Attributes:
        source: the official file.
        target: the safetensors file to write.
    """

    source: Annotated[Path, tyro.conf.Positional]
    target: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class InfoSettings:
    """Say what a SideNet is for, how it was trained and how good it is.

    Attributes:
        file: the SideNet.
    """

    file: Annotated[Path, tyro.conf.Positional]


def run_convert(settings: ConvertSettings) -> None:
    """Do the work of `ba-solver convert`."""
    if settings.target.suffix != ".safetensors":
        raise UsageError(f"The target must end in .safetensors; got {settings.target}.")
    if settings.target.exists():
        raise UsageError(f"{settings.target} exists already; nothing is overwritten.")
    sidenet = load_official_sidenet(settings.source)
    card = SideNetCard(velocity="branch", backbone={"name": "SiT-XL/2 + REPA", "kind": "sit"},
                       training={"objective": "published", "converted_from": settings.source.name})  # fmt: skip
    save_sidenet(settings.target, sidenet, card)
    print(f"Written: {settings.target}")


def run_info(settings: InfoSettings) -> None:
    """Do the work of `ba-solver info`."""
    print(describe_sidenet(*load_sidenet(settings.file)))


def describe_sidenet(sidenet: SideNet, card: SideNetCard) -> str:
    """A SideNet's card in words."""
    config, training, recorded = sidenet.config, card.training, card.training.get("recorded", {})
    earlier = training.get("started_from", {})
    low, high = card.guidance_range
    parameters = sum(p.numel() for p in sidenet.parameters())
    facts = {
        "for": f"{card.backbone.get('name', 'a model it does not name')} ({card.backbone.get('kind', '?')}, "
        f"fingerprint {card.backbone.get('fingerprint', 'unknown')})",
        "network": f"{config.anchors} anchor(s), {parameters:,} parameters, {config.in_channels} latent channels"
        + (f", {config.num_classes} classes" if config.num_classes else ""),
        "velocity": f"{card.velocity}, guidance {low:g}" + (f" to {high:g}" if high != low else ""),
        "time grids": ", ".join(f"{n} calls" for n in sorted(card.time_grids)) or "none: use any",
        "weights": ", ".join(f"{n} calls" for n in sorted(card.step_weights)),
        "half calls": ", ".join(f"{sum(map(bool, rows))} of {n}" for n, rows in sorted(card.half_calls.items())),
        "trained": str(training.get("objective", "not said")),
        "recorded": f"{training['recorded_runs']} runs of {recorded['points']} points of {tuple(recorded['shape'])}; "
        f"the teacher's error {recorded.get('teacher_error', float('nan')):.2g}"
        if "recorded_runs" in training
        else "",
        "cost": f"backbone calls {training.get('backbone_calls', 'not said')}, "
        f"{training.get('seconds', '?')} s of training",
        "began as": f"one trained: {earlier.get('objective', 'not said')}; backbone calls "
        f"{earlier.get('backbone_calls', 'not said')}"
        if earlier
        else "",
        "licence": card.licence,
    }
    lines = [f"{name + ':':<12}{value}" for name, value in facts.items() if value]
    return "\n".join([*lines, *_how_good(card.evaluation)])


def _how_good(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    left = evaluation.get("residual_variance", {})
    for by, values in left.items():
        if isinstance(values, dict):
            lines.append(f"residual variance left by {by}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    rows = evaluation.get("endpoint_error", [])
    if rows:
        lines.append(f"endpoint error at guidance {evaluation['guidance']:g}, {evaluation['noises']} noises:")
        lines += [f"  {r['calls']:>3} calls  {r['label']:<18} {r['grid']:<8} {r['error']:.4f}" for r in rows]
    return lines or ["not evaluated yet: ba-solver evaluate"]
