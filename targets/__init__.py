"""Back ends (import name ``sam3x.targets``)."""

if __name__ != "sam3x.targets":
    raise ImportError("import this package as 'sam3x.targets', not as a top-level folder of the repository")
