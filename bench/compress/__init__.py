"""``python -m bench.compress``: whole real models, compressed."""
