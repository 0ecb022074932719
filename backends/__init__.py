"""Inference engines behind one interface (`hantc.core.backend_api`), the registry and the targets."""
