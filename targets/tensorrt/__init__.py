"""TensorRT engines through Torch-TensorRT, built ahead of time for a named GPU.

May import the ONNX target, whose files its parser reads; torch_tensorrt where it is used.
"""
