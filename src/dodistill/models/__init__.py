"""Networks: our zoo, other libraries' by name, weights in and out, and normalisation."""

from .load import load_model
from .normalized import NORMALISATION, Normalized
from .weights import read_metadata, save_model
from .zoo import zoo_names

__all__ = ["NORMALISATION", "Normalized", "load_model", "read_metadata", "save_model", "zoo_names"]
