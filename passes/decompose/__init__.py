"""Operators that a target lacks, in terms of those it has.

May import the graph toolkit.
"""
