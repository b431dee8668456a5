"""Sampling on a MODEL: one model call, the velocity field over such calls, the SideNet, and the sampler."""
