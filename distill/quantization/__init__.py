"""Smaller versions of an exported fp32 graph, each one ONNX file; ``distill.bundles`` names them.

A maker takes (fp32 file, file to write, feeds of *training* rows, config) and returns what it did as JSON values.
"""
