"""Operations and their operands in a lower precision.

May import the graph toolkit.
"""
