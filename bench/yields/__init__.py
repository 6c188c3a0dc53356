"""How fast, how good and how small the closed solution is, against what is used today; ``python -m bench.yields``."""
