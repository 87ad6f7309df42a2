"""The Python tools: models, data and reports. Each of their programs can be run as a file."""
