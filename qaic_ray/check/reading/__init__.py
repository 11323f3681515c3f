"""Files as facts: ONNX models, the compiler's config files, programs. Only headers of weights."""
