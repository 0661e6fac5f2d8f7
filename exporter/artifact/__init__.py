"""A folder on disk: manifest, hashes, publishing with a journal and a lock, and the artifact that runs it.

May import targets (whose runners it opens) and what lies below; imports no torch.
"""
