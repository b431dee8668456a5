"""`ba-solver sample`: images of a model, drawn with a SideNet or with any other solver.

Every image has a noise of its own, by its number: images do not depend on the batch, on the number of processes, or on
interruptions, but for rounding.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bas_core.checkpoint import SideNetCard, load_official_sidenet, load_sidenet
from ..bas_core.files import CheckpointError, fingerprint, write_text
from ..bas_core.sidenet import SideNet
from .backbones import Backbone, BackboneChoice, open_backbone
from .drawing.folder import Folder, write_npz
from .drawing.named_solvers import PRESETS, parse_rival, solver_named
from .drawing.scores import MISSING, scores, weights_file
from .processes import MAIN_PROCESS, processes
from .progress import progress, say
from .schedules.solvers import UNIFORM, GridShape, Solver
from .settings import UsageError, check_positive, plain

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class SampleSettings(BackboneChoice):
    """Draw images of a model, with a SideNet or without; the same command continues where it was interrupted.

    Attributes:
        backbone: the model as kind:where, such as diffusers:FOLDER or python:MODULE:FUNCTION; or give --sit.
        sit: a SiT or REPA file; the same as --backbone sit:FILE.
        sidenet: its file, or the authors' .pt.
        preset: the paper's settings for so many calls: paper-5, paper-7, paper-8, paper-10, paper-15.
        nfe: model calls an image.
        grid: shift and cosine of the time grid, such as 2.8 0.3; left out, the SideNet's schedule, or the model's own
            shift.
        method: bi_anchor, single_anchor, multistep (no SideNet), euler, heun, …
        guidance: CFG scale; left out, the SideNet's own.
        count: how many images.
        classes: which classes, or prompts by number, separated by commas, in turn; left out, all of them.
        seed: of the noises.
        batch: images drawn together.
        vae: folder of a diffusers AutoencoderKL, for SiTs that draw latents.
        latents: keep the latents as safetensors instead of images.
        compare: another solver and its calls, such as euler:50, drawn from the same noises; writes pairs too.
        npz: write the array file that ImageNet's usual evaluator reads, too.
        fid: an evaluator's reference file: compute FID, IS, precision and recall against it.
        out: folder for the images.
    """

    backbone: str = ""
    sit: Path | None = None
    sidenet: Path | None = None
    preset: str = ""
    nfe: int = 7
    grid: tuple[float, ...] = ()
    method: str = "bi_anchor"
    guidance: tuple[float, ...] = ()
    count: int = 16
    classes: str = ""
    seed: int = 0
    batch: int = 16
    vae: Path | None = None
    latents: bool = False
    compare: str = ""
    npz: bool = False
    fid: Path | None = None
    out: Path = Path("ba_solver_images")


@dataclass(frozen=True)
class Drawing:
    """Everything needed to draw an image by its number.

    Attributes:
        backbone: the model.
        solver, nfe: of the images.
        rival: another solver and its NFE, or None.
        scale, interval, mode: of guidance.
        classes: conditions, in turn.
        seed: of the noises.
        decode: states to images [B, 3, H, W] in [0, 1]; None keeps states.
        shape: of the time grid, where the solver has no schedule.
    """

    backbone: Backbone
    solver: Solver
    nfe: int
    rival: tuple[Solver, int] | None
    scale: float
    interval: tuple[float, float]
    mode: Any
    classes: tuple[int, ...]
    seed: int
    decode: Callable[[Tensor], Tensor] | None
    shape: GridShape

    def noise(self, index: int) -> Tensor:
        """[C, *spatial] of an image's own, the same on every machine."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        return torch.from_numpy(generator.standard_normal(self.backbone.shape, dtype=np.float32))

    def draw(self, indices: list[int], solver: Solver, nfe: int) -> tuple[Tensor, float]:
        """The end states [B, C, *spatial] of some images, and the NFE of each."""
        noise = self.backbone.noise(torch.stack([self.noise(index) for index in indices])).to(self.backbone.device)
        labels = torch.tensor([self.classes[index % len(self.classes)] for index in indices])
        field = self.backbone.field(labels, self.scale, self.interval, self.mode)
        return solver.sample(field, noise, nfe, self.shape), field.nfe

    def images(self, states: Tensor) -> Tensor:
        """States to images, or states as they are."""
        return states.cpu() if self.decode is None else self.decode(states).float().cpu()


def run_sample(settings: SampleSettings) -> dict[str, Any]:
    """Do the work of `ba-solver sample`; returns the report.

    Raises:
        UsageError: a setting cannot be used.
        CheckpointError: a file is damaged, or belongs to another model.
        NonFiniteError: the model returned NaN or infinity.
    """
    settings = with_preset(settings)
    check_positive(settings, "count", "batch", "nfe")
    weights = weights_file() if settings.fid else None
    backbone = open_backbone(settings)
    sidenet, card, mark = open_sidenet(settings, backbone)
    drawing = prepare(settings, backbone, sidenet, card)
    folder = Folder(settings.out, settings.latents)
    folder.open(settings_of_images(settings, backbone, drawing, mark))
    report = draw_missing(drawing, folder, settings)
    images = [folder.path(index) for index in range(settings.count)]
    if settings.npz and MAIN_PROCESS:
        write_npz(settings.out / "images.npz", images)
        say(f"Written: {settings.out / 'images.npz'}")
    if settings.fid and weights and MAIN_PROCESS:
        report["scores"] = scores(images, settings.fid, backbone.device, weights)
        say(", ".join(f"{name} {value:.4g}" for name, value in report["scores"].items()))
        say(MISSING)
    if MAIN_PROCESS:
        write_text(settings.out / REPORT, json.dumps({"settings": plain(settings), **report}, indent=1))
        say(f"{settings.count} images are in {settings.out}.")
    return report


# --- what is asked for ----------------------------------------------------------------------------------------------


def with_preset(settings: SampleSettings) -> SampleSettings:
    """Settings with those of the preset filled in, and --sit as a backbone.

    Raises:
        UsageError: they contradict each other.
    """
    if bool(settings.sit) == bool(settings.backbone):
        raise UsageError("Give the model, once: --sit FILE, or --backbone KIND:WHERE.")
    if settings.sit:
        settings = dataclasses.replace(settings, backbone=f"sit:{settings.sit}")
    if settings.latents and (settings.npz or settings.fid or settings.compare or settings.vae):
        raise UsageError("--latents keeps no images; leave out --vae, --npz, --fid and --compare.")
    if settings.grid and (len(settings.grid) != 2 or settings.grid[0] <= 0 or not -1 <= settings.grid[1] <= 1):
        raise UsageError(f"--grid must be a shift above 0 and a cosine from -1 to 1; got {settings.grid}.")
    if not settings.preset:
        return settings
    if settings.preset not in PRESETS:
        raise UsageError(f"There is no preset {settings.preset!r}. Valid ones: {', '.join(PRESETS)}.")
    if settings.grid:
        raise UsageError("--preset samples on the paper's uniform grid; leave --grid out.")
    preset = PRESETS[settings.preset]
    return dataclasses.replace(
        settings, nfe=preset.calls, guidance=(preset.guidance,), guidance_interval=preset.interval
    )


def open_sidenet(settings: SampleSettings, backbone: Backbone) -> tuple[SideNet | None, SideNetCard, str]:
    """The SideNet, its metadata, and its fingerprint.

    Raises:
        CheckpointError: the file is damaged, or the SideNet belongs to another model.
    """
    if settings.sidenet is None:
        return None, SideNetCard(), ""
    if settings.sidenet.suffix in (".pt", ".pth"):
        network, card = load_official_sidenet(settings.sidenet).to(backbone.device), SideNetCard(cfg_mode="per_branch")
    else:
        network, card = load_sidenet(settings.sidenet, backbone.device, torch.float32)
        card.check_whole_path(settings.sidenet.name)
    if card.backbone.get("fingerprint") not in (None, "", backbone.fingerprint):
        raise CheckpointError(
            f"{settings.sidenet} belongs to {card.backbone.get('name')!r}, and {backbone.name!r} is to draw. Give the "
            "model's own SideNet."
        )
    if network.config.in_channels != backbone.shape[0] or network.config.num_classes not in (0, backbone.num_classes):
        raise CheckpointError(
            f"{settings.sidenet} is for {network.config.in_channels} channels and {network.config.num_classes} "
            f"classes; {backbone.name!r} has {backbone.shape[0]} and {backbone.num_classes}. Give the model's own "
            "SideNet."
        )
    return network.eval(), card, fingerprint(network.state_dict())


def prepare(settings: SampleSettings, backbone: Backbone, sidenet: SideNet | None, card: SideNetCard) -> Drawing:
    """Everything that draws.

    Raises:
        UsageError: a setting cannot be used.
    """
    scale = settings.guidance[0] if settings.guidance else card.cfg
    asked = dataclasses.replace(settings, guidance=(scale,))
    asked.check_guidance(backbone)
    if len(settings.guidance) > 1:
        raise UsageError(f"--guidance takes one scale here; got {settings.guidance}.")
    if sidenet is not None and not card.supports_cfg(scale) and not settings.preset:
        say(f"Note: the SideNet was made for guidance {card.describe_cfg()}; at {scale:g} it is less accurate.")
    schedules = card.schedules_for(scale)
    schedules = {} if settings.preset or settings.grid or settings.nfe not in schedules else schedules
    rival = None
    if settings.compare:
        name, calls = parse_rival(settings.compare)
        rival = solver_named(name, sidenet, {}, backbone.start), calls
    return Drawing(
        backbone,
        solver_named(settings.method, sidenet, schedules, backbone.start),
        settings.nfe,
        rival,
        scale,
        settings.guidance_interval,
        card.cfg_mode if settings.sidenet else "combined",
        classes_of(settings.classes, backbone),
        settings.seed,
        None if settings.latents else decoder(settings, backbone),
        grid_shape(settings, backbone),
    )


def grid_shape(settings: SampleSettings, backbone: Backbone) -> GridShape:
    """The time grid's, where there is no schedule."""
    if settings.grid:
        shift, cosine = settings.grid
        return shift, cosine
    return UNIFORM if settings.preset else (backbone.shift, 0.0)


def classes_of(text: str, backbone: Backbone) -> tuple[int, ...]:
    """Which conditions to draw.

    Raises:
        UsageError: not whole numbers, or one that the model does not have.
    """
    if not text:
        return tuple(range(backbone.conditions))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < backbone.conditions for part in parts):
        raise UsageError(
            f"--classes must be numbers from 0 to {backbone.conditions - 1}, separated by commas; got {text!r}."
        )
    return tuple(map(int, parts))


def decoder(settings: SampleSettings, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """From states to images.

    Raises:
        UsageError: the model draws latents, and there is nothing to decode them with.
    """
    if settings.vae is None:
        if backbone.decode is None:
            raise UsageError(
                f"{backbone.name} draws latents. Give the folder of its autoencoder with --vae (for SiT: "
                "sd-vae-ft-ema), or keep them with --latents."
            )
        return backbone.decode
    from diffusers import AutoencoderKL

    from .backbones.autoencoder import autoencoder

    if not settings.vae.is_dir():
        raise UsageError(f"--vae {settings.vae} is no folder. Give that of a diffusers AutoencoderKL.")
    vae = AutoencoderKL.from_pretrained(settings.vae, local_files_only=True).to(backbone.device).eval()
    decode = autoencoder(SimpleNamespace(vae=vae), len(backbone.shape) + 1)[0]
    if decode is None or vae.config.latent_channels != backbone.shape[0]:
        raise UsageError(
            f"--vae {settings.vae} decodes {vae.config.latent_channels} channels, or does not say its scaling factor; "
            f"{backbone.name} draws {backbone.shape[0]}."
        )
    return decode


def settings_of_images(settings: SampleSettings, backbone: Backbone, drawing: Drawing, sidenet: str) -> dict[str, Any]:
    """All that an image depends on beside its number; a folder is continued only with the same."""
    vae = None if settings.vae is None else settings.vae.name
    return {
        "backbone": backbone.identity,
        "sidenet": sidenet,
        "method": settings.method,
        "nfe": settings.nfe,
        "grid": list(settings.grid),
        "preset": settings.preset,
        "guidance": drawing.scale,
        "guidance_interval": list(drawing.interval),
        "classes": list(drawing.classes),
        "seed": settings.seed,
        "dtype": settings.dtype,
        "vae": vae,
        "latents": settings.latents,
        "compare": settings.compare,
        "shape": list(backbone.shape),
    }


# --- the work -------------------------------------------------------------------------------------------------------


def my_batches(
    folder: Folder, settings: SampleSettings, device: torch.device
) -> tuple[list[list[int]], Callable[[], None]]:
    """This process's share of the batches with missing images, and a function that waits for the other processes."""
    rank, count, wait_for_all = processes(device.type == "cpu")
    missing = folder.missing(settings.count)
    wait_for_all()  # nobody draws before all have looked, or their shares would not fit together
    if 0 < len(missing) < settings.count:
        say(f"{settings.count - len(missing)} of {settings.count} images are already drawn; the others follow.")
    starts = sorted({index // settings.batch * settings.batch for index in missing})
    mine = starts[rank::count]
    return [list(range(start, min(start + settings.batch, settings.count))) for start in mine], wait_for_all


def drawn_batches(
    drawing: Drawing, batches: list[list[int]]
) -> Iterator[tuple[list[int], Tensor, Tensor | None, float]]:
    """Numbers, images, the rival's images and the NFE of an image, batch by batch."""
    for indices in progress(batches, "batches"):
        states, cost = drawing.draw(indices, drawing.solver, drawing.nfe)
        beside = None
        if drawing.rival is not None:
            beside = drawing.images(drawing.draw(indices, *drawing.rival)[0])
        yield indices, drawing.images(states), beside, cost


def draw_missing(drawing: Drawing, folder: Folder, settings: SampleSettings) -> dict[str, Any]:
    """Draw and write the missing images; returns the report."""
    device = drawing.backbone.device
    batches, wait_for_all = my_batches(folder, settings, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began, drawn, calls = time.perf_counter(), 0, 0.0
    with torch.inference_mode():
        for indices, images, beside, cost in drawn_batches(drawing, batches):
            for row, index in enumerate(indices):
                folder.write(index, images[row], None if beside is None else beside[row])
            drawn, calls = drawn + len(indices), calls + cost * len(indices)
    seconds = time.perf_counter() - began
    wait_for_all()
    if not drawn:
        return {"drawn": 0}
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    found = {
        "drawn": drawn,
        "calls_per_image": calls / drawn,
        "calls": calls,
        "calls_per_second": calls / seconds,
        "seconds_per_image": seconds / drawn,
        "peak_memory_bytes": memory,
    }
    say(
        f"{drawn} images, {calls / drawn:g} calls each: {calls / seconds:.3g} calls/s, {seconds / drawn:.3g} s an "
        f"image, {memory / 2**30:.2f} GiB at the peak."
    )
    return found


def peak_memory() -> int:
    """The most main memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
