"""What is deployed: packed weights, their file, inference with them, and ONNX."""
