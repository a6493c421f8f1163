"""Deployment: packed weights, their file, inference from them, and ONNX."""
