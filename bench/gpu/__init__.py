"""The GPU run, ``make gpu``: what the card can do, whether every kernel is right on it, and how fast each is.

It needs torch, triton and nothing from the network, takes less than nine minutes, keeps going after a failure and
reports it, and writes ``bench/results/gpu-ARCHITECTURE.json``, the same as a table, and what ``auto`` may use to
``byol_fast/backends/verified.json``. Committed together, they are the verification.
"""
