"""What to try: search spaces, Ray Tune sweeps, Pareto frontiers and reports."""
