"""ComfyUI's MODEL: its parameterization, the SideNet on it, class labels, fingerprints, and SiT as a MODEL."""
