"""Time and memory of artifacts and baselines, measured in turn in processes of their own, and the pages that show them.

May import every room but the command line.
"""
