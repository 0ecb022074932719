"""hantc inside other toolchains."""
