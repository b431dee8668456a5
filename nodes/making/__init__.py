"""A SideNet made from the MODEL in the graph: its prompts, the MODEL as a backbone, and the work."""
