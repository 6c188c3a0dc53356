"""Matrices in files: read without reading them into memory where the format allows, and written block by block."""

from .filematrix import FileMatrix
from .read import SUFFIXES, open_matrix, read_matrix
from .write import write_matrix

__all__ = ["SUFFIXES", "FileMatrix", "open_matrix", "read_matrix", "write_matrix"]
