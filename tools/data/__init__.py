"""The traffic that benchmarks send: raw data sets, the workloads that are made of them, and their token files."""
