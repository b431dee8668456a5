"""The BA-solver and its SideNet in plain torch. Start reading at `flow.py`."""

from .baselines import BASELINES, Baseline, get_baseline, run_baseline
from .checkpoint import SideNetCard, load_official_sidenet, load_sidenet, load_sit, save_sidenet, save_sit
from .editing import Control, DivergedError, SourcePath, edit, editing_grid, invert, reconstruct, straight_path
from .files import CheckpointError
from .flow import interpolate, velocity_to_noise, velocity_to_x0
from .grids import resample_grid, time_grid, time_shift
from .guidance import Field, Guidance, NonFiniteError, model_field
from .quadrature import RULES, Rule, get_rule, symmetric_four_point
from .runs import FittedRun, Inversion, run_over
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig
from .solver import Step, solve
from .steps import Proposal
from .weighting import WeightedSideNet, with_strength

__all__ = [
    "BASELINES",
    "RULES",
    "Baseline",
    "CheckpointError",
    "Control",
    "DivergedError",
    "Field",
    "FittedRun",
    "Guidance",
    "Inversion",
    "NonFiniteError",
    "Proposal",
    "Rule",
    "SiT",
    "SiTConfig",
    "SideNet",
    "SideNetCard",
    "SideNetConfig",
    "SourcePath",
    "Step",
    "WeightedSideNet",
    "edit",
    "editing_grid",
    "get_baseline",
    "get_rule",
    "interpolate",
    "invert",
    "load_official_sidenet",
    "load_sidenet",
    "load_sit",
    "model_field",
    "reconstruct",
    "resample_grid",
    "run_baseline",
    "run_over",
    "save_sidenet",
    "save_sit",
    "solve",
    "straight_path",
    "symmetric_four_point",
    "time_grid",
    "time_shift",
    "velocity_to_noise",
    "velocity_to_x0",
    "with_strength",
]
