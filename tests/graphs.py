"""Saved workflows as prompts: what ComfyUI's frontend sends when one is run."""

from __future__ import annotations

from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"MarkdownNote", "Note"}
BYPASSED = 4


def widget_names(info: dict[str, Any]) -> list[str]:
    """A node's widgets in the order in which a workflow keeps their values; None = one that is not sent."""
    names: list[str] = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *settings = info["input"][group][name]
            options = settings[0] if settings else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            names.append(name)
            # The frontend adds a control to inputs of these names unless the node forbids it.
            if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                names.append("")
    return names


def as_prompt(content: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A workflow as saved (not inside subgraphs), as {id: {class_type, inputs}}; `known` is `/object_info`."""
    nodes = {node["id"]: node for node in content["nodes"]}
    links = {link[0]: link for link in content["links"]}

    def source(link: int) -> list[Any]:
        """Where a link comes from; a bypassed node passes on what enters it of the same type."""
        _, origin, slot, *_, kind = links[link]
        if nodes[origin]["mode"] != BYPASSED:
            return [str(origin), slot]
        entries = [entry for entry in nodes[origin]["inputs"] if entry["type"] == kind and entry["link"] is not None]
        return source(entries[0]["link"])

    prompt = {}
    for node in nodes.values():
        if node["type"] in NOTES or node["mode"] == BYPASSED:
            continue
        values = dict(zip(widget_names(known[node["type"]]), node.get("widgets_values") or [], strict=False))
        values.pop("", None)
        entries = [entry for entry in node.get("inputs", []) if entry.get("link") is not None]
        linked = {entry["name"]: source(entry["link"]) for entry in entries}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return prompt


def subgraph_prompt(definition: dict[str, Any], known: dict[str, Any], entries: list[list[Any]]) -> dict[str, Any]:
    """The nodes inside a subgraph, whose inputs come from `entries` ([node id, slot] each)."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[key] for key in keys] for link in definition["links"]]
    outside = {"id": definition["inputNode"]["id"], "type": "Note", "mode": 0}
    prompt = as_prompt({"nodes": [*definition["nodes"], outside], "links": links}, known)

    def placed(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return entries[value[1]] if value[0] == str(outside["id"]) else [f"inside:{value[0]}", value[1]]

    return {
        f"inside:{key}": {**part, "inputs": {name: placed(value) for name, value in part["inputs"].items()}}
        for key, part in prompt.items()
    }
