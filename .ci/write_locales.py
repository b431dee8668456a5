"""Write locales/en/nodeDefs.json from the nodes' own texts; run with COMFYUI_PATH set after changing a text."""

import asyncio
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import comfyui  # noqa: E402


def entry(schema):
    """One node's entry, as ComfyUI's frontend reads it."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {
            str(n): {"name": o.display_name or o.id or o.io_type, "tooltip": o.tooltip}
            for n, o in enumerate(schema.outputs)
        },
    }


def main():
    comfyui.require()
    import ba_solver

    extension = asyncio.run(ba_solver.comfy_entrypoint())
    schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({s.node_id: entry(s) for s in schemas}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
