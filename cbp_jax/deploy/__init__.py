"""Deployment: packed weights, their file, inference from them, ONNX and GGUF."""
