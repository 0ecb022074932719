"""Selection as pure numbers: integer program, diversity, Pareto fronts, baselines. Knows no torch."""
