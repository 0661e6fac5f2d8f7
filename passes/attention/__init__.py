"""Custom attention to ``scaled_dot_product_attention``, and from there to the form a target runs best.

May import the linear passes and the graph toolkit.
"""
