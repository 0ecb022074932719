"""TensorRT engines in FP16 and INT8, built ahead of time for GPUs that need not be here."""
