"""An artifact against eager: distances, the rules of decisions 0004 and 0010, the arithmetic of lower precisions, records.

May import captured programs and components, never a target or an artifact.
"""
