"""The BA-solver and its SideNet in plain torch. Start reading at `flow.py`."""

from .baselines import BASELINES, Baseline, get_baseline, run_baseline
from .checkpoint import (
    CheckpointError,
    SideNetCard,
    load_official_sidenet,
    load_sidenet,
    load_sit,
    save_sidenet,
    save_sit,
)
from .editing import (
    Control,
    DivergedError,
    SourcePath,
    edit,
    editing_grid,
    invert,
    reconstruct,
    straight_path,
)
from .flow import interpolate, velocity_to_noise, velocity_to_x0
from .grids import resample_grid, time_grid, time_shift
from .guidance import Field, Guidance, NonFiniteError, model_field
from .half_calls import HalfCalls
from .quadrature import RULES, Rule, get_rule, symmetric_four_point
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig
from .solver import Proposal, Step, solve
from .step_weights import StepWeights
from .weighting import WeightedSideNet, with_strength

__all__ = [
    "BASELINES",
    "RULES",
    "Baseline",
    "CheckpointError",
    "Control",
    "DivergedError",
    "Field",
    "Guidance",
    "HalfCalls",
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
    "StepWeights",
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
