"""A module in, a ``CapturedProgram`` out: ``torch.export``, dynamic sizes, samples of every branch.

May import sources and the fusion encoder.
"""
