"""The fusion encoder as one function of named tensors: configuration, layers and their branches, each kind traced once.

May import the request and the errors alone.
"""
