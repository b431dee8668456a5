"""A SideNet made from the MODEL in the graph: its prompts, its velocities for the trainer, and the work itself."""
