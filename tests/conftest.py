"""Which test files need more than ComfyUI brings along."""

from importlib.util import find_spec

NEEDS_EXTRAS = ("accelerate", "diffusers", "torchdiffeq", "tyro")
TRAINER_TESTS = [
    f"test_{name}.py" for name in ("backbones_diffusers", "demo", "demo_editing", "fit", "record", "score", "training")
]

missing = [name for name in NEEDS_EXTRAS if find_spec(name) is None]
collect_ignore = TRAINER_TESTS if missing else []


def pytest_report_header() -> str | None:
    """Say aloud what is left out; a Python made for ComfyUI need not have the trainer's extras."""
    if not missing:
        return None
    left_out = ", ".join(TRAINER_TESTS)
    return f"NOT TESTED: {left_out}, for want of {', '.join(missing)}; pip install -e '.[test]'"
