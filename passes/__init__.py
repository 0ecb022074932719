"""The compiler's passes; `hantc.pipeline` lists them in order."""
