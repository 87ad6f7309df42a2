"""The models that tests and benchmarks use: what there is, how each is exported, and the probes on top of them."""
