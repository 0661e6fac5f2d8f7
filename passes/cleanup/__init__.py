"""What changes no value: no-ops, constants, sizes, spellings of one operator.

May import the graph toolkit.
"""
