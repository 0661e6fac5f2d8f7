"""An artifact against eager: distances, the rule of decision 0004, records.

May import captured programs and components, never a target or an artifact.
"""
