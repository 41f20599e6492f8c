"""The cost of rlmod: ``python -m tools.bench`` measures and writes the tables of docs/benchmarks.md."""
