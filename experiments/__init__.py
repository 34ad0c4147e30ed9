"""What makes the numbers in results/: data, one training loop, grids of runs, statistics, tables and pictures.

A package of this repository, not of the wheel. The scripts in scripts/ parse their command line and call it.
"""
