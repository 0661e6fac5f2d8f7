"""ExecuTorch ``.pte``: partitions, delegates, quantization, the runtime.

May import the contract of a target; executorch where it is used.
"""
