"""A stand-in for the API that draws placeholder pictures: for tests, demos and benchmarks."""
