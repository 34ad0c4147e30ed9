"""What makes the numbers in results/. A package of this repository, not of the wheel."""
