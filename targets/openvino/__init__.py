"""OpenVINO: the ONNX target's graph as an IR of two files, in OpenVINO's own runtime.

May import the contract of a target and the ONNX target; openvino where it is used.
"""
