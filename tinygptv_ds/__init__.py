"""A distributed trainer for TinyGPT-V, a small vision-language model, on DeepSpeed."""

__version__ = "0.1.0"
