"""Linear layers and the permutations around them.

May import the graph toolkit.
"""
