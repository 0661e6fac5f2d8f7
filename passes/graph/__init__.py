"""What passes share: operator sets, nodes with values, conditionals, weights, layouts.

May import the contract of a pass.
"""
