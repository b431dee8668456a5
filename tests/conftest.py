"""How the tests share a machine, and which of them need more than ComfyUI brings along."""

import os
from importlib.util import find_spec

# Workers side by side: each takes its share of the processors, here and in the processes that it starts. Set before
# anything imports torch.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

NEEDS_EXTRAS = ("accelerate", "diffusers", "torchdiffeq", "tyro")
TRAINER_TESTS = [
    f"test_{name}.py"
    for name in (
        "backbones_diffusers",
        "demo",
        "demo_editing",
        "extra_cfg",
        "fit",
        "power",
        "record",
        "sample",
        "score",
        "surrogate",
        "training",
    )
]

missing = [name for name in NEEDS_EXTRAS if find_spec(name) is None]
collect_ignore = TRAINER_TESTS if missing else []


def pytest_report_header() -> str | None:
    """Say aloud what is left out; a Python made for ComfyUI need not have the trainer's extras."""
    if not missing:
        return None
    left_out = ", ".join(TRAINER_TESTS)
    return f"NOT TESTED: {left_out}, for want of {', '.join(missing)}; pip install -e '.[test]'"
