"""From a trained model to files that run without torch: the ONNX graph, then the bundle around it."""
