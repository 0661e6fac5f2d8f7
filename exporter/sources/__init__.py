"""Where a model comes from: a live module, a checkpoint, a factory, a folder; split into components with named ports.

May import the fusion encoder; never a pass, a target or an artifact.
"""
