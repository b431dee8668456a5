"""What a ComfyUI MODEL is to this pack: its path and states, the SideNet on it, its class labels, and SiT as one."""
