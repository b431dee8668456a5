"""Sampling on a MODEL: a backbone call, the velocity field made of such calls, the SideNet beside it, the sampler."""
