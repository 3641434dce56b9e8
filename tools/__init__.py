"""Measurements, experiments and the training of the bundled models:
run from the root of a checkout, never installed.

    python -m tools.NAME --help
"""
