"""Inversion and editing on a MODEL: what is given, the path of an image, the work in ComfyUI's sampling."""
