"""The kernels. Each file opens with the formulas it computes; symbols as in docs/accuracy.md."""
