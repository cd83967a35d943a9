"""The benchmarks that TinyGPT-V reports: their files as distributed, prompts and scores. One module per benchmark."""
