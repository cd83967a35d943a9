"""The benchmarks that TinyGPT-V reports, from their files as distributed to scores. One module a benchmark."""
