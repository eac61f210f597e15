"""Benchmarks. Each file is a command of its own (`python -m bench.startup --help`); `python -m bench` runs them all.

Everything stays on loopback and on two cores, is bounded in time, and writes bench/results/NAME.json with the machine
and the command that made it. kit.py: load generator, CPU clocks, `neaptide up`. gateway/: the C programs.
"""
