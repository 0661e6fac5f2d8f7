"""Rounded weights, and the doctor that ranks operations by their error below float32.

May import artifacts, targets, verification and what lies below.
"""
