"""Core ML: the graph as an ML program in an ``.mlpackage``, converted by coremltools on any system, run on Apple's.

May import the contract of a target; torch and coremltools where they are used.
"""
