"""Solvers beside each other on a MODEL: calls counted, ends compared with a converged one, shown."""
