"""The BA-solver and its SideNet in plain torch. Start reading at `flow.py`, or at `solver.py` for the method."""

from .checkpoint import SideNetCard, load_official_sidenet, load_sidenet, load_sit, save_sidenet, save_sit
from .editing import (
    Control,
    DivergedError,
    SourceTrajectory,
    edit,
    editing_grid,
    invert,
    reconstruct,
    straight_trajectory,
)
from .files import CheckpointError
from .flow import interpolate, velocity_to_noise, velocity_to_x0
from .grids import resample_grid, time_grid, time_shift
from .guidance import Field, Guidance, NonFiniteError, model_field
from .prediction import SideNetProtocol
from .quadrature import RULES, Rule, get_rule, symmetric_four_point
from .schedule import Schedule, StepHook, StepState, plain_schedule
from .selection import select_part, select_schedule
from .sidenet import SideNet, SideNetConfig
from .sit import SiT, SiTConfig
from .solver import Step, solve
from .strength import WeightedSideNet, with_strength

__all__ = [
    "RULES",
    "CheckpointError",
    "Control",
    "DivergedError",
    "Field",
    "Guidance",
    "NonFiniteError",
    "Rule",
    "Schedule",
    "SiT",
    "SiTConfig",
    "SideNet",
    "SideNetCard",
    "SideNetConfig",
    "SideNetProtocol",
    "SourceTrajectory",
    "Step",
    "StepHook",
    "StepState",
    "WeightedSideNet",
    "edit",
    "editing_grid",
    "get_rule",
    "interpolate",
    "invert",
    "load_official_sidenet",
    "load_sidenet",
    "load_sit",
    "model_field",
    "plain_schedule",
    "reconstruct",
    "resample_grid",
    "save_sidenet",
    "save_sit",
    "select_part",
    "select_schedule",
    "solve",
    "straight_trajectory",
    "symmetric_four_point",
    "time_grid",
    "time_shift",
    "velocity_to_noise",
    "velocity_to_x0",
    "with_strength",
]
