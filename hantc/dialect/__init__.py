"""The closed set of leaf operations: ONNX to torch.fx and back; everything else is an opaque leaf."""
