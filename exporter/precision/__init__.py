"""Rounded weights, emulated arithmetic below float32, and the doctor that ranks operations by their error in it.

May import artifacts, targets, verification and what lies below.
"""
