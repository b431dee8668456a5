"""`ba-solver convert` and `ba-solver info`: SideNet files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..bas_core.checkpoint import SideNetCard, load_official_sidenet, load_sidenet, save_sidenet
from ..bas_core.schedule import describe_schedules
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
    """Print what a SideNet is for, how it was trained and how good it is.

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
    card = SideNetCard(cfg_mode="per_branch", backbone={"name": "SiT-XL/2 + REPA", "kind": "sit"},
                       training={"objective": "published", "converted_from": settings.source.name})  # fmt: skip
    save_sidenet(settings.target, sidenet, card)
    print(f"Written: {settings.target}")


def run_info(settings: InfoSettings) -> None:
    """Do the work of `ba-solver info`."""
    print(describe_sidenet(*load_sidenet(settings.file)))


def describe_sidenet(sidenet: SideNet, card: SideNetCard) -> str:
    """A SideNet's metadata in words."""
    config, training, recorded = sidenet.config, card.training, card.training.get("recorded", {})
    earlier = training.get("started_from", {})
    parameters = sum(p.numel() for p in sidenet.parameters())
    facts = {
        "for": f"{card.backbone.get('name', 'a model it does not name')} ({card.backbone.get('kind', '?')}, "
        f"fingerprint {card.backbone.get('fingerprint', 'unknown')})",
        "network": f"{config.anchors} anchor(s), {parameters:,} parameters, {config.in_channels} latent channels"
        + (f", {config.num_classes} classes" if config.num_classes else ""),
        "velocity": f"{card.cfg_mode}, guidance {card.describe_cfg()}",
        "schedules": describe_schedules(card.own_schedules),
        "part of path": "" if card.whole_path else card.describe_part(),
        "trained": str(training.get("objective", "unknown")),
        "recorded": _formatted(
            "{trajectories} trajectories of {points} points of ({size}); the reference solver's error "
            "{reference_error:.2g}",
            {
                "reference_error": float("nan"),
                **recorded,
                "trajectories": training.get("trajectories"),
                "size": str(recorded.get("shape")).strip("[]"),
            },
        )
        if recorded
        else "",
        "cost": f"model calls {training.get('backbone_calls', 'unknown')}, "
        f"{training.get('seconds', '?')} s of training",
        "began as": f"one trained: {earlier.get('objective', 'unknown')}; model calls "
        f"{earlier.get('backbone_calls', 'unknown')}"
        if earlier
        else "",
        "license": card.license,
    }
    lines = [f"{name + ':':<12}{value}" for name, value in facts.items() if value]
    return "\n".join([*lines, *_evaluation_lines(card.evaluation)])


def _formatted(text: str, values: Any) -> str:
    """A text with values put in; in files of other makers these may be anything."""
    try:
        return text.format(**values)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return "in an unknown form"


def _evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    unexplained = evaluation.get("variance_unexplained")
    for by, values in unexplained.items() if isinstance(unexplained, dict) else ():
        if isinstance(values, dict):
            parts = [_formatted("{name} {value:.2f}", {"name": name, "value": value}) for name, value in values.items()]
            lines.append(f"fraction of variance unexplained by {by}: {', '.join(parts)}")
    rows = evaluation.get("endpoint_error")
    if isinstance(rows, list) and rows:
        lines.append("endpoint error at guidance " + _formatted("{guidance:g}, {noises} noises:", evaluation))
        lines += ["  " + _formatted("{nfe:>3} calls  {label:<18} {grid:<8} {error:.4f}", row) for row in rows]
    return lines or ["not evaluated yet: ba-solver evaluate"]
