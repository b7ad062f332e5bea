"""What benchmarks share, and the two sides of a benchmark that run in processes of their own."""
