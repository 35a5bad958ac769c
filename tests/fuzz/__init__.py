"""A fuzzer of everything that gradless reads: `python -m tests.fuzz.run --files 100000 --loads 5000 --seed 0`."""
