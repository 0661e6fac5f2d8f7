"""``torch.cond``: narrowed to what differs, or turned into data flow.

May import the graph toolkit.
"""
