"""TensorRT engines in FP16, built ahead of time for GPUs that need not be here."""
