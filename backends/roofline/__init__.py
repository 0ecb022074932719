"""A roofline model: predicts latencies without running anything."""
