"""Components around the code of transformers' ``Sam3Model`` and ``Sam3LiteTextModel``."""
