"""ONNX, opset 18: lowering, attention and loops, weights, joining of files, ONNX Runtime.

May import the contract of a target; onnx and onnxruntime where they are used.
"""
