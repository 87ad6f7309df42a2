"""What a benchmark run found: the report in HTML, and the summary in a dozen lines."""
